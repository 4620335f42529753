"""Thumbnails: small, upright, made once, mended when damaged, written whole or not at all."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pictures
import pytest
from pictures import encoded, photo, quarters
from PIL import Image

from e5v_search.errors import CollectionReadOnly, DiskFull, NotAPicture, UnreadableFile
from e5v_search.media import content_hash, thumbnail

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "x.jpg"
    photo(640, 480).save(path)
    return path


def test_made_once_and_small(picture: Path, tmp_path: Path) -> None:
    made = thumbnail(picture, content_hash(picture), tmp_path / "cache", size=128)
    with Image.open(made) as image:
        assert (image.format, image.size) == ("JPEG", (128, 96))
    before = made.stat().st_mtime_ns
    assert thumbnail(picture, content_hash(picture), tmp_path / "cache", size=128) == made
    assert made.stat().st_mtime_ns == before
    assert thumbnail(picture, content_hash(picture), tmp_path / "cache", size=64) != made
    digest = content_hash(picture)
    picture.unlink()
    assert thumbnail(picture, digest, tmp_path / "cache", size=128) == made  # the photo is not needed any more
    with pytest.raises(UnreadableFile):
        thumbnail(picture, digest, tmp_path / "cache", size=32)


def test_upright_and_never_enlarged(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded(quarters(), "JPEG", exif=pictures.exif_bytes(6)))
    with Image.open(thumbnail(path, content_hash(path), tmp_path / "cache")) as image:
        assert image.size == (64, 96)
        assert image.getexif().get(pictures.ORIENTATION, 1) == 1
    for name, (_, size) in pictures.ODD.items():
        file = tmp_path / name
        file.write_bytes(pictures.ODD[name][0]())
        with Image.open(thumbnail(file, content_hash(file), tmp_path / "cache")) as image:
            assert max(image.size) <= 256
            assert image.size == size or max(size) > 256


@pytest.mark.parametrize("damage", [b"", b"not a picture", None])
def test_a_damaged_one_is_made_anew(picture: Path, tmp_path: Path, damage: bytes | None) -> None:
    made = thumbnail(picture, content_hash(picture), tmp_path / "cache")
    whole = made.read_bytes()
    made.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert thumbnail(picture, content_hash(picture), tmp_path / "cache") == made
    assert made.read_bytes() == whole


def test_a_photo_that_changed_gets_one_of_its_own(picture: Path, tmp_path: Path) -> None:
    old = content_hash(picture)
    photo(100, 100, seed=1).save(picture)
    made = thumbnail(picture, old, tmp_path / "cache")
    assert content_hash(picture) in made.name
    assert not list((tmp_path / "cache").rglob(f"{old}*"))


def test_bad_pictures_leave_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"")
    with pytest.raises(NotAPicture):
        thumbnail(tmp_path / "x.jpg", "0" * 64, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, DiskFull), (errno.EROFS, CollectionReadOnly)])
def test_a_disk_that_refuses(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(error):
        thumbnail(picture, content_hash(picture), tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_many_at_once(picture: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: thumbnail(picture, content_hash(picture), tmp_path / "cache"), range(16)))
    assert len(set(made)) == 1
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == made[:1]
