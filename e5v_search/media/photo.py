"""Reading one photo: bounded, decoded once, turned upright; a foreign exception becomes one line that says what is wrong."""

import hashlib
import io
import logging
import os
import stat
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image

from e5v_search.errors import MediaError, NotAPicture, PictureTooLarge, UnreadableFile
from e5v_search.media.exif import read_exif
from e5v_search.media.pixels import on_its_side, upright
from e5v_search.media.scan import shown

MAX_PIXELS = 128_000_000  # a 108-megapixel phone camera fits; decoded, that is 512 MB
MAX_BYTES = 512 * 2**20
# what a picture's reader says: its (height, width) -> the least height and width that will do
Enough = Callable[[tuple[int, int]], tuple[int, int]]
_LARGE_PIXELS = 24_000_000
_LARGE_BYTES = 64 * 2**20
_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}

# Threads decode ordinary photos side by side, but large ones one after the other, so that memory does not grow with the
# number of threads.
_one_large_picture = threading.RLock()

# Pillow warns and logs about garbled metadata and large sizes. The first is no news to the user of a photo that is read
# all the same; the second is judged here.
for _category in (UserWarning, RuntimeWarning):
    warnings.filterwarnings("ignore", category=_category, module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a photo apart from its pixels. Width and height are those of the upright picture."""

    width: int
    height: int
    format: str
    taken_at: str | None = None  # ISO 8601, local time, with an offset when the camera wrote one
    lat: float | None = None  # degrees, south negative
    lon: float | None = None  # degrees, west negative
    camera: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Photo:
    image: Image.Image  # upright, RGB, decoded; smaller than the facts say if less was enough
    facts: Facts
    content_hash: str  # SHA-256 of the file, hexadecimal


def content_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of the file's bytes, 64 hexadecimal digits. Raises UnreadableFile."""
    _file_size(path)
    with _system_errors(), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def decode(
    path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES, enough: Enough | None = None
) -> tuple[Image.Image, Facts]:
    """The photo at `path`, upright and in RGB, and its facts. Safe in many threads.

    A JPEG that is at least twice as large as `enough` says is decoded at a half, a quarter or an eighth of its size, which
    takes a fraction of the time; the facts are those of the whole.

    Raises UnreadableFile, NotAPicture, PictureTooLarge; the reason does not repeat the path.
    """
    with _read(path, max_bytes) as data:
        return _decode(data, max_pixels, enough)


def read_photo(
    path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES, enough: Enough | None = None
) -> Photo:
    """As `decode`, with the hash of the very bytes that were decoded, even when the file changes meanwhile."""
    with _read(path, max_bytes) as data:
        return Photo(*_decode(data, max_pixels, enough), hashlib.sha256(data).hexdigest())


def open_picture(source: str | bytes | Path | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An upright RGB picture from a path, from the bytes of a picture file, or from a PIL image.

    Raises as `decode` does; for a path the message begins with it.
    """
    if isinstance(source, Image.Image):
        _check_size(source.size, max_pixels)
        with _decoder_errors(source.format or "picture"):
            return upright(source)
    return open_photo(source, max_pixels).image


def open_photo(source: str | bytes | Path, max_pixels: int = MAX_PIXELS, enough: Enough | None = None) -> Photo:
    """As `read_photo`, from a path or from the bytes of a picture file; for a path, errors begin with it."""
    if isinstance(source, bytes):
        return Photo(*_decode(source, max_pixels, enough), hashlib.sha256(source).hexdigest())
    try:
        return read_photo(source, max_pixels, enough=enough)
    except MediaError as error:
        raise type(error)(f"{shown(source)}: {error}") from error


def _file_size(path: str | os.PathLike[str]) -> int:
    """Size of a regular file. Nothing else is ever opened: a pipe would block, and a device may do anything."""
    with _system_errors():
        status = os.stat(path)
    if stat.S_ISREG(status.st_mode):
        return status.st_size
    raise UnreadableFile("a folder, not a file" if stat.S_ISDIR(status.st_mode) else "a pipe or device, not a file")


@contextmanager
def _read(path: str | os.PathLike[str], max_bytes: int) -> Iterator[bytes]:
    size = _file_size(path)
    if size > max_bytes:
        raise PictureTooLarge(f"the file has {size / 2**20:,.0f} MB; the limit is {max_bytes / 2**20:,.0f} MB")
    with _in_turn(size > _LARGE_BYTES):
        with _system_errors(), open(path, "rb") as file:
            data = file.read()
        yield data


@contextmanager
def _system_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnreadableFile((error.strerror or str(error)).lower()) from error
    except ValueError as error:  # a NUL in the name
        raise UnreadableFile(str(error)) from error


def _in_turn(large: bool) -> AbstractContextManager[Any]:
    return _one_large_picture if large else nullcontext()


def _decode(data: bytes, max_pixels: int, enough: Enough | None = None) -> tuple[Image.Image, Facts]:
    name = _format(data)
    image = _opened(name, data)
    _check_size(image.size, max_pixels)
    whole = image.size
    if enough is not None and name == "JPEG":
        with _decoder_errors(name):
            _reduce(image, enough)
    with _in_turn(image.width * image.height > _LARGE_PIXELS), _decoder_errors(name):
        picture = upright(image)
        exif = read_exif(image)  # after decoding: a PNG may have it behind its pixels
    width, height = picture.size if image.size == whole else whole[::-1] if on_its_side(image) else whole
    return picture, Facts(width, height, name, exif.taken_at, exif.lat, exif.lon, exif.camera)


def _reduce(image: Image.Image, enough: Enough) -> None:
    """Have a JPEG that is not decoded yet come out smaller, if that is enough."""
    width, height = image.size
    if on_its_side(image):
        image.draft(None, enough((width, height)))
    else:
        image.draft(None, enough((height, width))[::-1])


def _format(data: bytes) -> str:
    """The format by what the bytes begin with: only its decoder is imported, and only decoders of photos ever run."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if data.startswith(b"BM"):
        return "BMP"
    if data[4:8] == b"ftyp":
        length = min(int.from_bytes(data[:4], "big"), 256)
        brands = {data[i : i + 4] for i in (8, *range(16, length, 4))}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        if brands & _HEIF_BRANDS:
            return "HEIF"
    if not data.strip(b"\0"):
        raise NotAPicture("the file holds nothing but zeros" if data else "the file is empty")
    raise NotAPicture("not a picture (neither JPEG, PNG, WebP, GIF, BMP, TIFF, HEIC nor AVIF)")


def _opened(name: str, data: bytes) -> Image.Image:
    """The picture with its header read and its pixels not decoded yet."""
    if name == "HEIF":
        _register_heif()
    else:
        import_module(_PLUGINS[name])
    factory = Image.OPEN[name][0]
    with _decoder_errors(name):
        # not Image.open: it has a limit of its own, global to the process, and warns below it
        return factory(io.BytesIO(data), "")


_PLUGINS = {
    "JPEG": "PIL.JpegImagePlugin",
    "PNG": "PIL.PngImagePlugin",
    "WEBP": "PIL.WebPImagePlugin",
    "GIF": "PIL.GifImagePlugin",
    "TIFF": "PIL.TiffImagePlugin",
    "BMP": "PIL.BmpImagePlugin",
    "AVIF": "PIL.AvifImagePlugin",
}


def _register_heif() -> None:
    if "HEIF" in Image.OPEN:
        return
    try:
        import pillow_heif  # loads libheif: only for those who have such photos
    except ImportError as error:
        # no MissingPackage: photos of other formats go on
        raise UnreadableFile("HEIC photos need one more package: pip install pillow-heif") from error
    pillow_heif.register_heif_opener()


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if not width * height:
        raise NotAPicture(f"{width} x {height} pixels are no picture")
    if width * height > max_pixels:
        mega, limit = width * height / 1e6, max_pixels / 1e6
        raise PictureTooLarge(f"{width:,} x {height:,} pixels are {mega:,.0f} megapixels; the limit is {limit:,.0f} megapixels")


@contextmanager
def _decoder_errors(name: str) -> Iterator[None]:
    """Decoders meet arbitrary bytes and raise nearly anything: OSError, SyntaxError, struct.error, KeyError, ..."""
    try:
        yield
    except MemoryError as error:
        raise PictureTooLarge("not enough memory to decode it") from error
    except Image.DecompressionBombError as error:
        raise PictureTooLarge(str(error)) from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, EOFError | struct.error) or "truncat" in reason.lower() or "nexpected end" in reason:
            raise NotAPicture(f"truncated {name}: the file ends before the picture does") from error
        raise NotAPicture(f"damaged {name}: {reason}") from error
