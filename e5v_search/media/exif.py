"""What a camera wrote into a photo. Wrong or garbled EXIF is common and never fails a photo: a fact is then None."""

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from PIL import ExifTags, Image

METADATA = ("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp")  # where Pillow keeps it in Image.info
_DATE = re.compile(r"\s*(\d{4})[:/.-](\d\d)[:/.-](\d\d)[ T](\d\d):(\d\d):(\d\d)")
_OFFSET = re.compile(r"\s*([+-](?:0\d|1[0-4]):[0-5]\d)")
_FIRST_PHOTOGRAPH = 1826  # an earlier year is a clock that was never set
_MAX_NAME = 80
# in the order of how well they tell when the shutter opened, each with the tag of its offset from UTC
_DATES = (
    (ExifTags.Base.DateTimeOriginal, ExifTags.Base.OffsetTimeOriginal),
    (ExifTags.Base.DateTimeDigitized, ExifTags.Base.OffsetTimeDigitized),
    (ExifTags.Base.DateTime, ExifTags.Base.OffsetTime),
)


@dataclass(frozen=True, slots=True)
class Exif:
    taken_at: str | None = None
    lat: float | None = None
    lon: float | None = None
    camera: str | None = None


def read_orientation(image: Image.Image) -> int:
    """How the pixels of a decoded picture lie: 1 to 8, 1 when nothing sensible is said."""
    if not _has_exif(image):
        return 1
    value = None
    with suppress(Exception):
        value = image.getexif().get(ExifTags.Base.Orientation)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _has_exif(image: Image.Image) -> bool:
    return image.format == "TIFF" or any(key in image.info for key in METADATA)


def read_exif(image: Image.Image) -> Exif:
    """The facts that an opened picture's EXIF tells."""
    if not _has_exif(image):
        return Exif()
    # Pillow's parser raises whatever the bytes make it raise (struct.error, SyntaxError, KeyError, ...)
    base: Mapping[int, Any] = {}
    detail: Mapping[int, Any] = {}
    gps: Mapping[int, Any] = {}
    with suppress(Exception):
        base = exif = image.getexif()
        with suppress(Exception):
            detail = exif.get_ifd(ExifTags.IFD.Exif)
        with suppress(Exception):
            gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
    lat, lon = _place(gps)
    return Exif(_taken_at({**base, **detail}), lat, lon, _camera(base))


def _text(value: Any) -> str:
    """A tag's value as printable text; cameras pad with NULs and blanks, and some write bytes."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str):
        return ""
    return " ".join("".join(c if c.isprintable() else " " for c in value.partition("\0")[0]).split())


def _taken_at(tags: Mapping[int, Any]) -> str | None:
    for date_tag, offset_tag in _DATES:
        match = _DATE.match(_text(tags.get(date_tag)))
        if match is None:
            continue
        with suppress(ValueError):  # the 31st of June
            date = datetime(*map(int, match.groups()))  # type: ignore[arg-type]
            if date.year >= _FIRST_PHOTOGRAPH:
                offset = _OFFSET.match(_text(tags.get(offset_tag)))
                return date.isoformat() + (offset[1] if offset else "")
    return None


def _place(gps: Mapping[int, Any]) -> tuple[float, float] | tuple[None, None]:
    """Latitude and longitude in degrees, south and west negative."""
    lat = _degrees(gps.get(ExifTags.GPS.GPSLatitude), gps.get(ExifTags.GPS.GPSLatitudeRef), "NS", 90)
    lon = _degrees(gps.get(ExifTags.GPS.GPSLongitude), gps.get(ExifTags.GPS.GPSLongitudeRef), "EW", 180)
    # both exactly zero is what receivers write that had no fix
    return (None, None) if lat is None or lon is None or lat == lon == 0 else (lat, lon)


def _degrees(value: Any, ref: Any, refs: str, limit: int) -> float | None:
    side = _text(ref).upper()[:1]
    if not side or side not in refs:
        return None
    try:
        degrees, minutes, seconds = (float(part) for part in value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    total = degrees + minutes / 60 + seconds / 3600
    # the comparisons are false for the nan that a zero denominator gives
    if not (degrees >= 0 and 0 <= minutes < 60 and 0 <= seconds < 60 and total <= limit) or not math.isfinite(total):
        return None
    return round(-total if side == refs[1] else total, 7)


def _camera(tags: Mapping[int, Any]) -> str | None:
    make = _text(tags.get(ExifTags.Base.Make))
    model = _text(tags.get(ExifTags.Base.Model))
    # "Canon" + "Canon EOS 5D", "NIKON CORPORATION" + "NIKON D90"
    named = bool(make) and model.lower().startswith(make.split()[0].lower())
    return (model if named else f"{make} {model}".strip())[:_MAX_NAME] or None
