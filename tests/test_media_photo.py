"""Reading photos: every format, mode and orientation to upright RGB; every bad file refused in words; facts true."""

import hashlib
import io
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pictures
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import BLACK, BLUE, GREEN, RED, encoded, photo, quarters
from PIL import ExifTags, Image

from e5v_search import media
from e5v_search.errors import NotAPicture, PictureTooLarge, UnreadableFile

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

# where the four quarters lie, row by row, when a picture stored with this orientation is not turned:
# EXIF says how the stored rows and columns lie in the scene, so these are the inverses of what must be done
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """Colours of the four quarters, each channel rounded to 0 or 255."""
    w, h = image.size
    places = [(w // 4, h // 4), (3 * w // 4, h // 4), (w // 4, 3 * h // 4), (3 * w // 4, 3 * h // 4)]
    return [tuple(255 if v > 127 else 0 for v in image.getpixel(place)) for place in places]  # type: ignore[union-attr]


def read(data: bytes, tmp_path: Path, name: str = "x.jpg") -> media.Photo:
    path = tmp_path / name
    path.write_bytes(data)
    return media.read_photo(path)


@pytest.mark.parametrize("name", pictures.ODD)
def test_odd_pictures_are_read(name: str, tmp_path: Path) -> None:
    make, size = pictures.ODD[name]
    data = make()
    got = read(data, tmp_path, name)
    assert (got.image.mode, got.image.size) == ("RGB", size)
    assert (got.facts.width, got.facts.height) == size
    assert got.content_hash == hashlib.sha256(data).hexdigest() == media.content_hash(tmp_path / name)


@pytest.mark.parametrize("name", pictures.BAD)
def test_bad_pictures_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    make, word = pictures.BAD[name]
    with pytest.raises((NotAPicture, PictureTooLarge)) as caught:
        read(make(), tmp_path, name)
    line = str(caught.value)
    assert word in line
    assert "\n" not in line
    assert str(tmp_path) not in line  # the caller prints the path


def test_the_limit_is_named_with_the_size(tmp_path: Path) -> None:
    with pytest.raises(PictureTooLarge, match=r"30,000 x 30,000 pixels are 900 megapixels; the limit is 128 megapixels"):
        read(pictures.png_header(30_000, 30_000), tmp_path)
    (tmp_path / "big.jpg").write_bytes(bytes(3 * 2**20))
    with pytest.raises(PictureTooLarge, match="the file has 3 MB; the limit is 2 MB"):
        media.read_photo(tmp_path / "big.jpg", max_bytes=2 * 2**20)


def test_a_huge_picture_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(pictures.png_header(30_000, 30_000))
    code = (
        "import resource, sys; from e5v_search import media; from e5v_search.errors import PictureTooLarge\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "try: media.read_photo(sys.argv[1])\n"
        "except PictureTooLarge: print('refused')"
    )
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert out.stdout == "refused\n"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "HEIF", "AVIF", "MPO"])
def test_orientation(format: str, orientation: int, tmp_path: Path) -> None:
    upright = np.asarray(quarters())
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    if format == "TIFF":
        data = encoded(stored, format, tiffinfo={pictures.ORIENTATION: orientation})
    else:
        data = encoded(stored, format, exif=pictures.exif_bytes(orientation))
    got = read(data, tmp_path)
    assert got.image.size == (got.facts.width, got.facts.height) == (96, 64)
    assert corners(got.image) == [RED, GREEN, BLUE, BLACK]
    # what has been turned does not ask for it a second time
    assert corners(media.open_picture(got.image)) == [RED, GREEN, BLUE, BLACK]


def test_orientation_behind_the_pixels_of_a_png() -> None:
    plain = encoded(Image.fromarray(np.ascontiguousarray(STORED[6](np.asarray(quarters())))), "PNG")
    body = pictures.exif_bytes(6).removeprefix(b"Exif\0\0")
    chunk = pictures.png_chunk(b"eXIf", body)
    assert corners(media.open_picture(plain[:-12] + chunk + plain[-12:])) == [RED, GREEN, BLUE, BLACK]


def test_first_frame_of_what_moves(tmp_path: Path) -> None:
    for name in ("animated.gif", "animated.webp", "animated.png", "several-pages.tif", "several-pictures.jpg"):
        assert corners(read(pictures.ODD[name][0](), tmp_path).image) == [RED] * 4, name


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    for name in ("palette.png", "palette.gif"):
        assert corners(read(pictures.ODD[name][0](), tmp_path).image) == [RED, GREEN, BLUE, (255, 255, 255)], name
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    for image in (clear, clear.convert("LA"), clear.convert("RGBa"), clear.convert("LA").convert("La")):
        assert media.upright(image).getcolors() == [(64, (255, 255, 255))], image.mode
    keyed = encoded(Image.new("RGB", (8, 8), RED), "PNG", transparency=RED)
    assert media.open_picture(keyed).getcolors() == [(64, (255, 255, 255))]
    half = media.upright(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).getpixel((0, 0))
    assert half == (127, 127, 127)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(format: str) -> None:
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # 0, 257, ... are exactly 0, 1, ...
    image = media.open_picture(encoded(Image.fromarray(values), format))
    assert np.array_equal(np.asarray(image)[..., 0].ravel(), np.arange(256))
    big_endian = Image.frombytes("I;16B", (16, 16), values.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(media.upright(big_endian)), np.asarray(image))


def test_greys_without_a_known_white() -> None:
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    want = np.arange(256)
    for values in (
        ramp,
        ramp * 255,
        ramp * 65535,
        ramp * 1e6 - 5e5,
        (ramp * 255).round().astype(np.int32),
        (ramp * 65535).astype(np.int32),
    ):
        got = np.asarray(media.upright(Image.fromarray(values)))[..., 0].ravel().astype(int)
        assert abs(got - want).max() <= 1, values.dtype
    broken = ramp.copy()
    broken[0, :3] = np.nan, np.inf, -np.inf
    assert np.asarray(media.upright(Image.fromarray(broken)))[0, :3].max() == 0


def test_cmyk_keeps_its_colours(tmp_path: Path) -> None:
    assert corners(read(pictures.ODD["cmyk.jpg"][0](), tmp_path).image)[:3] == [RED, GREEN, BLUE]


def test_pixels_of_a_jpeg_are_exact(tmp_path: Path) -> None:
    data = encoded(photo(3000, 2000, seed=5), "JPEG", quality=90)
    (tmp_path / "x.jpg").write_bytes(data)
    with Image.open(tmp_path / "x.jpg") as plain:
        assert np.array_equal(np.asarray(plain), np.asarray(media.read_photo(tmp_path / "x.jpg").image))


# files that are none

READERS: list[Callable[[Path], object]] = [media.decode, media.read_photo, media.content_hash, media.open_picture]


def test_what_is_not_a_file_is_never_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    for path, word in (
        (pipe, "pipe"),
        (tmp_path, "folder"),
        (Path("/dev/zero"), "device"),
        (tmp_path / "gone.jpg", "no such file"),
    ):
        for reader in (media.read_photo, media.content_hash, media.open_picture):
            with pytest.raises(UnreadableFile, match=word):
                reader(path)  # type: ignore[operator]
    with pytest.raises(UnreadableFile, match="null"):
        media.read_photo("a\0b.jpg")


@pytest.mark.usefixtures("permissions_apply")
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "secret.jpg"
    photo().save(path)
    path.chmod(0)
    for reader in READERS:
        with pytest.raises(UnreadableFile, match="permission denied"):
            reader(path)


def test_odd_names(tmp_path: Path) -> None:
    for path in pictures.write_odd_names(tmp_path):
        assert media.read_photo(path).facts.format == "JPEG"
        path.write_bytes(b"")
        with pytest.raises(NotAPicture) as caught:
            media.open_picture(path)
        str(caught.value).encode("utf-8")  # can be printed
        assert "\n" not in str(caught.value)


# what a query gives


def test_open_picture_takes_path_bytes_and_image(tmp_path: Path) -> None:
    image = photo()
    path = tmp_path / "x.png"
    image.save(path)
    for source in (path, str(path), path.read_bytes(), image, Image.open(path)):
        assert np.array_equal(np.asarray(media.open_picture(source)), np.asarray(image))


def test_open_picture_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(NotAPicture, match=r"x\.png: the file is empty"):
        media.open_picture(tmp_path / "x.png")


def test_a_lazy_image_that_is_broken_or_too_large() -> None:
    with pytest.raises(NotAPicture, match="truncated"):
        media.open_picture(Image.open(io.BytesIO(encoded(photo(640, 480), "JPEG")[:4000])))
    with pytest.raises(PictureTooLarge, match="limit"):
        media.open_picture(Image.new("1", (200, 200)), max_pixels=39_999)
    with pytest.raises(NotAPicture, match="0 x 5"):
        media.open_picture(Image.new("RGB", (0, 5)))


def test_turned_image_of_the_python_api() -> None:
    image = Image.open(io.BytesIO(pictures.ODD["turned.jpg"][0]()))
    assert media.open_picture(image).size == (64, 96)
    assert image.size == (96, 64)  # the caller's picture is left alone


# robustness


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "HEIF", "AVIF"]), st.data())
def test_damaged_bytes_never_raise_anything_else(format: str, data: st.DataObject) -> None:
    image = bytearray(_valid(format))
    for _ in range(data.draw(st.integers(1, 8))):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(1, len(image)))
    with suppress(NotAPicture, PictureTooLarge):
        assert media.open_picture(bytes(image[:cut]), max_pixels=10**6).mode == "RGB"


_VALID: dict[str, bytes] = {}


def _valid(format: str) -> bytes:
    if format not in _VALID:
        exif = Image.Exif()
        exif[pictures.ORIENTATION] = 6
        exif[0x010F] = "Maker"
        exif.get_ifd(0x8769)[0x9003] = "2020:01:02 03:04:05"
        options = {} if format in ("GIF", "BMP") else {"exif": exif}
        _VALID[format] = encoded(photo(), format, **options)
    return _VALID[format]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_refused_in_words(data: bytes) -> None:
    with pytest.raises((NotAPicture, PictureTooLarge)):
        media.open_picture(data)


def test_many_threads_give_what_one_gives(tmp_path: Path) -> None:
    paths = list(pictures.write_odd(tmp_path))
    alone = [np.asarray(media.read_photo(path).image) for path in paths]
    barrier = threading.Barrier(8)

    def work(n: int) -> bool:
        barrier.wait()
        order = paths[n:] + paths[:n]
        together = {path: np.asarray(media.read_photo(path).image) for path in order}
        return all(np.array_equal(together[path], one) for path, one in zip(paths, alone, strict=True))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_large_pictures_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("e5v_search.media.photo._LARGE_PIXELS", 1000)
    path = tmp_path / "x.jpg"
    photo(64, 48).save(path)
    now, most, lock = 0, 0, threading.Lock()
    true_load = Image.Image.transpose

    def watched(image: Image.Image, method: Image.Transpose) -> Image.Image:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        try:
            threading.Event().wait(0.005)
            return true_load(image, method)
        finally:
            with lock:
                now -= 1

    turned = tmp_path / "turned.jpg"
    turned.write_bytes(encoded(quarters(), "JPEG", exif=pictures.exif_bytes(6)))
    monkeypatch.setattr(Image.Image, "transpose", watched)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(media.read_photo, [turned] * 8))
    assert most == 1
    monkeypatch.setattr("e5v_search.media.photo._LARGE_PIXELS", 10**6)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(media.read_photo, [turned] * 8))
    assert most > 1


def test_plain_photos_do_not_pay_for_other_formats(tmp_path: Path) -> None:
    photo().save(tmp_path / "x.jpg")
    code = (
        "import sys; from e5v_search import media; media.read_photo(sys.argv[1])\n"
        "print(sorted({'pillow_heif', 'numpy', 'PIL.AvifImagePlugin', 'PIL.PdfParser'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.jpg")], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


def test_without_pillow_heif_only_heic_fails(tmp_path: Path) -> None:
    paths = [tmp_path / "x.heic", tmp_path / "x.jpg"]
    for path in paths:
        photo().save(path)
    code = (
        "import sys; sys.modules['pillow_heif'] = None\n"
        "from e5v_search import media\n"
        "try: media.read_photo(sys.argv[1])\n"
        "except Exception as e: print(type(e).__name__, e)\n"
        "print(media.read_photo(sys.argv[2]).facts.format)"
    )
    out = subprocess.run([sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, check=True)
    assert out.stdout == "UnreadableFile HEIC photos need one more package: pip install pillow-heif\nJPEG\n"


def test_a_real_photo_of_the_shared_data_folder() -> None:
    folder = Path(__file__).parent.parent.parent / "shared" / "data" / "photos"
    if not folder.is_dir():
        pytest.skip("no shared data folder beside the project")
    for path in sorted(folder.glob("*.jpg"))[:20]:
        got = media.read_photo(path)
        assert max(got.image.size) <= 512
        assert got.facts.format == "JPEG"


def test_the_sample_photos_are_small_and_each_has_its_licence() -> None:
    folder = Path(media.__file__).parent.parent / "samples"
    listed = set(
        re.findall(r"^\| `(.+?\.jpg)` \|.*(?:public domain|CC0) \|$", (folder / "LICENSES.md").read_text("utf-8"), re.MULTILINE)
    )
    samples = {path.name: path for path in folder.glob("*.*") if path.suffix != ".md"}
    assert listed == {name for name in samples if not name.startswith("drawn-")}  # the project's own
    assert sum(path.stat().st_size for path in samples.values()) < 1_500_000
    for path in samples.values():
        assert max(media.read_photo(path).image.size) <= 640


# less than the whole, where that is enough


@given(
    height=st.integers(1, 900),
    width=st.integers(1, 900),
    least=st.tuples(st.integers(1, 500), st.integers(1, 500)),
    orientation=st.integers(1, 8),
)
@settings(max_examples=40, deadline=None)
def test_a_jpeg_is_decoded_no_smaller_than_is_enough(height: int, width: int, least: tuple[int, int], orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(Image.new("RGB", (width, height), (90, 120, 30)), "JPEG", exif=exif)
    whole = media.open_photo(data)
    asked: list[tuple[int, int]] = []

    def enough(size: tuple[int, int]) -> tuple[int, int]:
        asked.append(size)
        return least

    got = media.open_photo(data, enough=enough)
    assert got.facts == whole.facts
    assert asked == [whole.facts.size] == [(whole.image.height, whole.image.width)]
    for side, all_of_it, needed in zip((got.image.height, got.image.width), whole.facts.size, least, strict=True):
        assert side >= min(needed, all_of_it)
        assert side in {math.ceil(all_of_it / scale) for scale in (1, 2, 4, 8)}
    if all(of >= 8 * needed for of, needed in zip(whole.facts.size, least, strict=True)):
        assert got.image.height == math.ceil(height / 8) or got.image.height == math.ceil(width / 8)


def test_a_reduced_jpeg_shows_the_same_and_other_formats_stay_whole(tmp_path: Path) -> None:
    with Image.open(Path(media.__file__).parent.parent / "samples/coffee.jpg") as sample:
        large = sample.convert("RGB").resize((2400, 1600), Image.Resampling.BICUBIC)
    for name, size in (("x.jpg", (600, 400)), ("x.png", (2400, 1600))):
        large.save(tmp_path / name)
        got, facts = media.decode(tmp_path / name, enough=lambda _: (400, 600))
        assert (got.size, facts.size) == (size, (1600, 2400))
    got, _ = media.decode(tmp_path / "x.jpg", enough=lambda _: (400, 600))
    expected = np.asarray(large.resize((600, 400), Image.Resampling.BOX), dtype=float)
    assert np.abs(np.asarray(got, dtype=float) - expected).mean() < 1.5
