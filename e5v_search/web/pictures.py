"""What is shown of an item: small pictures from the cache, and the photo itself."""

import io
import os
import stat
from dataclasses import dataclass

from PIL import Image

from e5v_search import media
from e5v_search.catalog import Catalog, Item
from e5v_search.errors import CollectionReadOnly, DiskFull, QueryError, UnreadableFile
from e5v_search.render import render

SIZES = (256, 512, 1024, 2048)  # pixels of thumbnails: few, as each is a file in the cache
_TYPES = {  # what photos begin with, and their media type
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
    b"BM": "image/bmp",
    b"II*\0": "image/tiff",
    b"MM\0*": "image/tiff",
    b"II+\0": "image/tiff",
    b"MM\0+": "image/tiff",
}


@dataclass(frozen=True)
class Picture:
    """`body` in bytes, or the file `path` of `size` bytes; `tag` changes with what is shown."""

    media_type: str
    tag: str
    body: bytes = b""
    path: str | None = None
    size: int = 0


def thumbnail(catalog: Catalog, item: Item, size: int) -> Picture:
    """A JPEG, at most `size` pixels wide and high; a text is drawn. Raises MediaError."""
    tag = f"{item.content_hash[:32]}-{size}"
    if item.text is not None:
        return Picture("image/jpeg", tag, _encoded(render(item.text), size))
    assert item.path is not None
    cache = catalog.path.parent / "thumbnails"
    try:
        found = media.thumbnail(item.path, item.content_hash, cache, size)
        return Picture("image/jpeg", tag, found.read_bytes())
    except (CollectionReadOnly, DiskFull):
        return Picture("image/jpeg", tag, _encoded(media.open_picture(item.path), size))
    except OSError as error:  # gone from the cache in this moment
        raise UnreadableFile(f"{cache}: {error.strerror or error}") from error


def _encoded(image: Image.Image, size: int) -> bytes:
    image.thumbnail((size, size))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    return data.getvalue()


def original(item: Item) -> Picture:
    """The photo's file as it is. Raises QueryError for what is none, UnreadableFile for a file that is no photo any more."""
    if item.kind != "image" or item.path is None:
        raise QueryError(f"item {item.id} is no photo")
    try:
        status = os.stat(item.path)
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableFile("it is no file any more")
        with open(item.path, "rb") as file:
            start = file.read(32)
    except OSError as error:
        raise UnreadableFile((error.strerror or str(error)).lower()) from error
    return Picture(_media_type(start), f"{status.st_mtime_ns:x}-{status.st_size:x}", path=item.path, size=status.st_size)


def _media_type(start: bytes) -> str:
    """Whatever has taken the place of a photo is not given out."""
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return "image/webp"
    if start[4:8] == b"ftyp":
        return "image/avif" if start[8:12] in (b"avif", b"avis") else "image/heic"
    for magic, name in _TYPES.items():
        if start.startswith(magic):
            return name
    raise UnreadableFile("what lies there now is no photo")
