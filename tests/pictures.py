"""Makers of pictures for tests: ordinary ones, odd ones that must work, and bad ones that must each be refused in words.

photo(width, height, seed)     a smooth picture that no other seed gives
quarters(width, height)        red, green, blue and black quarters: shows how a picture lies
write_odd(folder)              odd but good files -> {path: (width, height) of the upright picture}
write_bad(folder)              bad files -> {path: word that the refusal has to contain}
write_odd_names(folder)        good files under awkward names -> paths
"""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import Image

pillow_heif.register_heif_opener()  # to write HEIC

RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)
ORIENTATION = 0x0112


def photo(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def noise(height: int, width: int) -> Image.Image:
    """Random pixels, the same for the same size: what a mistake in resizing or cutting cannot hide in."""
    return Image.fromarray(np.random.default_rng(height * 31 + width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def quarters(width: int = 96, height: int = 64) -> Image.Image:
    image = Image.new("RGB", (width, height), BLACK)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def exif_bytes(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif.tobytes()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, with hardly any data behind the claim."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(3 * width + 1))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def _frames() -> list[Image.Image]:
    return [Image.new("RGB", (40, 30), colour) for colour in (RED, GREEN, BLUE)]


def _animated(format: str) -> bytes:
    first, *rest = _frames()
    return encoded(
        first, format, save_all=True, append_images=rest, duration=100, **({"lossless": True} if format == "WEBP" else {})
    )


def _grey_16() -> Image.Image:
    return Image.fromarray(np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16))


def _palette_with_transparency(format: str) -> bytes:
    image = quarters().convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    return encoded(image, format, transparency=image.getpixel((90, 60)))  # the black quarter


def _rgba() -> Image.Image:
    image = quarters().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


ODD: dict[str, tuple[Callable[[], bytes], tuple[int, int]]] = {
    "one-pixel.png": (lambda: encoded(photo(1, 1), "PNG"), (1, 1)),
    "one-by-5000.png": (lambda: encoded(photo(1, 5000), "PNG"), (1, 5000)),
    "5000-by-one.jpg": (lambda: encoded(photo(5000, 1), "JPEG"), (5000, 1)),
    "cmyk.jpg": (lambda: encoded(quarters().convert("CMYK"), "JPEG"), (96, 64)),
    "grey-16.png": (lambda: encoded(_grey_16(), "PNG"), (64, 48)),
    "grey-16.tif": (lambda: encoded(_grey_16(), "TIFF"), (64, 48)),
    "float.tif": (lambda: encoded(Image.fromarray(np.random.default_rng(1).random((48, 64), np.float32)), "TIFF"), (64, 48)),
    "bilevel.tif": (lambda: encoded(photo().convert("1"), "TIFF"), (64, 48)),
    "palette.png": (lambda: _palette_with_transparency("PNG"), (96, 64)),
    "palette.gif": (lambda: _palette_with_transparency("GIF"), (96, 64)),
    "alpha.png": (lambda: encoded(_rgba(), "PNG"), (96, 64)),
    "grey-alpha.png": (lambda: encoded(_rgba().convert("LA"), "PNG"), (96, 64)),
    "alpha.webp": (lambda: encoded(_rgba(), "WEBP", lossless=True), (96, 64)),
    "animated.gif": (lambda: _animated("GIF"), (40, 30)),
    "animated.webp": (lambda: _animated("WEBP"), (40, 30)),
    "animated.png": (lambda: _animated("PNG"), (40, 30)),
    "several-pages.tif": (lambda: _animated("TIFF"), (40, 30)),
    "several-pictures.jpg": (lambda: _animated("MPO"), (40, 30)),
    "photo.heic": (lambda: encoded(photo(), "HEIF"), (64, 48)),
    "photo.avif": (lambda: encoded(photo(), "AVIF"), (64, 48)),
    "PHOTO.BMP": (lambda: encoded(photo(), "BMP"), (64, 48)),
    "turned.jpg": (lambda: encoded(quarters(), "JPEG", exif=exif_bytes(6)), (64, 96)),
    "wrong-exif.jpg": (lambda: encoded(photo(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage"), (64, 48)),
    "png-named.jpg": (lambda: encoded(photo(), "PNG"), (64, 48)),
}

BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.jpg": (lambda: b"", "empty"),
    "zeros.jpg": (lambda: bytes(5000), "zeros"),
    "text.jpg": (lambda: b"this is a shopping list, not a photo\n" * 9, "not a picture"),
    "page.jpg": (lambda: b"<!DOCTYPE html><title>404</title>", "not a picture"),
    "document.png": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a picture"),
    "truncated.jpg": (lambda: encoded(photo(640, 480), "JPEG")[:4000], "truncated"),
    "header-only.jpg": (lambda: b"\xff\xd8\xff\xe0", "JPEG"),
    "truncated.png": (lambda: encoded(photo(640, 480), "PNG")[:4000], "truncated"),
    "truncated.webp": (lambda: encoded(photo(640, 480), "WEBP")[:800], "WEBP"),
    "truncated.gif": (lambda: encoded(photo(640, 480), "GIF")[:4000], "truncated"),
    "truncated.bmp": (lambda: encoded(photo(640, 480), "BMP")[:4000], "truncated"),
    "truncated.tif": (lambda: encoded(photo(640, 480), "TIFF")[:4000], "TIFF"),
    "truncated.heic": (lambda: encoded(photo(640, 480), "HEIF")[:1000], "HEIF"),
    "truncated.avif": (lambda: encoded(photo(640, 480), "AVIF")[:1000], "AVIF"),
    "huge.png": (lambda: png_header(30_000, 30_000), "limit"),
}


def write_odd(folder: Path) -> dict[Path, tuple[int, int]]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (make, _) in ODD.items():
        (folder / name).write_bytes(make())
    return {folder / name: size for name, (_, size) in ODD.items()}


def write_bad(folder: Path) -> dict[Path, str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (make, _) in BAD.items():
        (folder / name).write_bytes(make())
    return {folder / name: word for name, (_, word) in BAD.items()}


def write_odd_names(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [
        b"no utf-8 \xff\xfe.jpg",
        b"two\nlines.jpg",
        b"x" * 246 + b".jpg",
        "größe 写真 🐕.jpg".encode(),
        b"-k 5.jpg",
        b" .jpg",
    ]
    paths = [folder / os.fsdecode(name) for name in names]
    for seed, path in enumerate(paths, start=100):
        path.write_bytes(encoded(photo(seed=seed), "JPEG"))
    return paths
