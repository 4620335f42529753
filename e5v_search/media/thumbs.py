"""Small pictures of photos, made on first use: a cache that may be deleted at any time."""

import os
import threading
from contextlib import suppress
from pathlib import Path

from PIL import Image

from e5v_search.errors import CollectionReadOnly, DiskFull, from_os_error
from e5v_search.media.photo import open_picture, read_photo


def thumbnail(path: str | os.PathLike[str], content_hash: str, cache_dir: str | os.PathLike[str], size: int = 256) -> Path:
    """The JPEG thumbnail of the photo at `path`, at most `size` pixels wide and high.

    `content_hash` is what the photo is known by; a photo that has changed since gets a thumbnail under its new hash.
    Raises what `read_photo` raises, and DiskFull or CollectionReadOnly when `cache_dir` cannot take the file.
    """
    cached = _place(Path(cache_dir), content_hash, size)
    if _is_whole(cached):
        return cached
    photo = read_photo(path)
    photo.image.thumbnail((size, size), Image.Resampling.LANCZOS)
    cached = _place(Path(cache_dir), photo.content_hash, size)
    try:
        _save(photo.image, cached)
    except OSError as error:
        raise from_os_error(error, cached) from error
    return cached


def small(path: str | os.PathLike[str], content_hash: str, cache_dir: str | os.PathLike[str], size: int = 256) -> Image.Image:
    """As `thumbnail`, but the picture itself, in RGB; where `cache_dir` takes no file it is made from the photo each time."""
    try:
        return open_picture(thumbnail(path, content_hash, cache_dir, size))
    except (CollectionReadOnly, DiskFull):
        image = open_picture(Path(path))
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
        return image


def _place(cache_dir: Path, content_hash: str, size: int) -> Path:
    return cache_dir / content_hash[:2] / f"{content_hash}-{size}.jpg"


def _is_whole(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except Exception:  # missing, or anything that damaged bytes make a decoder raise
        return False
    return True


def _save(image: Image.Image, path: Path) -> None:
    """Several may make the same thumbnail at once: each writes a file of its own, and any may win."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        image.save(temporary, "JPEG", quality=85)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
