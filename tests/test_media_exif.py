"""EXIF facts: dates, places and cameras as cameras write them, well and badly; no garbage ever fails a photo."""

import io
from datetime import datetime
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, photo
from PIL import Image, TiffImagePlugin

from e5v_search.media import Facts
from e5v_search.media.exif import Exif, read_exif, read_orientation
from e5v_search.media.photo import _decode

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

MAKE, MODEL, DATE = 0x010F, 0x0110, 0x0132
ORIGINAL, DIGITIZED, OFFSET, OFFSET_ORIGINAL, OFFSET_DIGITIZED = 0x9003, 0x9004, 0x9010, 0x9011, 0x9012


def facts(base: dict[int, Any] | None = None, detail: dict[int, Any] | None = None, gps: dict[int, Any] | None = None) -> Facts:
    exif = Image.Exif()
    exif.update(base or {})
    exif.get_ifd(0x8769).update(detail or {})
    exif.get_ifd(0x8825).update(gps or {})
    return _decode(encoded(photo(8, 8), "JPEG", exif=exif.tobytes()), 10**6)[1]


def place(lat: Any, lat_ref: Any, lon: Any, lon_ref: Any) -> tuple[float | None, float | None]:
    got = facts(gps={1: lat_ref, 2: lat, 3: lon_ref, 4: lon})
    return got.lat, got.lon


# dates


@pytest.mark.parametrize(
    ("base", "detail", "want"),
    [
        ({}, {ORIGINAL: "2019:07:14 18:05:09"}, "2019-07-14T18:05:09"),
        ({}, {ORIGINAL: "2019:07:14 18:05:09", OFFSET_ORIGINAL: "+02:00"}, "2019-07-14T18:05:09+02:00"),
        ({}, {ORIGINAL: "2019:07:14 18:05:09", OFFSET_ORIGINAL: "-09:30"}, "2019-07-14T18:05:09-09:30"),
        ({}, {ORIGINAL: "2019:07:14 18:05:09", OFFSET_ORIGINAL: "   :  "}, "2019-07-14T18:05:09"),
        ({}, {ORIGINAL: "2019:07:14 18:05:09", OFFSET: "+02:00"}, "2019-07-14T18:05:09"),  # another date's offset
        ({DATE: "2022:01:01 00:00:00"}, {ORIGINAL: "2019:07:14 18:05:09"}, "2019-07-14T18:05:09"),
        (
            {DATE: "2022:01:01 00:00:00"},
            {DIGITIZED: "2020:02:29 23:59:59", OFFSET_DIGITIZED: "+01:00"},
            "2020-02-29T23:59:59+01:00",
        ),
        ({DATE: "2022:01:01 00:00:00"}, {OFFSET: "+05:45"}, "2022-01-01T00:00:00+05:45"),
        ({DATE: "2022:01:01 00:00:00"}, {ORIGINAL: "0000:00:00 00:00:00"}, "2022-01-01T00:00:00"),
        ({}, {ORIGINAL: "2019-07-14T18:05:09"}, "2019-07-14T18:05:09"),
        ({}, {ORIGINAL: "2019:07:14 18:05:09\0\0garbage"}, "2019-07-14T18:05:09"),
        ({}, {ORIGINAL: "0000:00:00 00:00:00"}, None),
        ({}, {ORIGINAL: "    :  :     :  :  "}, None),
        ({}, {ORIGINAL: "2019:02:30 10:00:00"}, None),
        ({}, {ORIGINAL: "2019:13:01 10:00:00"}, None),
        ({}, {ORIGINAL: "2019:01:01 24:00:00"}, None),
        ({}, {ORIGINAL: "0001:01:01 00:00:00"}, None),
        ({}, {ORIGINAL: "yesterday"}, None),
        ({}, {ORIGINAL: 20190714}, None),
        ({}, {}, None),
    ],
)
def test_date_taken(base: dict[int, Any], detail: dict[int, Any], want: str | None) -> None:
    assert facts(base, detail).taken_at == want


@given(st.datetimes(min_value=datetime(1826, 1, 1)))
@settings(max_examples=50, deadline=None)
def test_every_date_survives(date: Any) -> None:
    date = date.replace(microsecond=0)
    assert facts(detail={ORIGINAL: date.strftime("%Y:%m:%d %H:%M:%S").rjust(19, "0")}).taken_at == date.isoformat()


# places


@given(
    st.integers(0, 89), st.integers(0, 59), st.integers(0, 5999), st.sampled_from("NS"),
    st.integers(0, 179), st.integers(0, 59), st.integers(0, 5999), st.sampled_from("EW"),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_every_place_survives(d: int, m: int, s: int, ns: str, d2: int, m2: int, s2: int, ew: str) -> None:
    if (d, m, s, d2, m2, s2) == (0,) * 6:
        return
    lat, lon = place((d, m, Fraction(s, 100)), ns, (d2, m2, Fraction(s2, 100)), ew)
    assert lat == pytest.approx((d + m / 60 + s / 360000) * (-1 if ns == "S" else 1), abs=1e-6)
    assert lon == pytest.approx((d2 + m2 / 60 + s2 / 360000) * (-1 if ew == "W" else 1), abs=1e-6)


def test_places_as_cameras_write_them() -> None:
    assert place((48.0, 51.5, 0.0), "N", (2.0, 17.6692, 0.0), "E") == (48.8583333, 2.2944867)
    assert place((33, 51, 31.5), "S\0", (151, 12, 51), "E") == (-33.85875, 151.2141667)
    assert place((90, 0, 0), "N", (180, 0, 0), "W") == (90, -180)


ZERO = TiffImagePlugin.IFDRational(0, 0)
NONSENSE = TiffImagePlugin.IFDRational(5, 0)


@pytest.mark.parametrize(
    ("lat", "lat_ref", "lon", "lon_ref"),
    [
        ((0, 0, 0), "N", (0, 0, 0), "E"),
        ((ZERO, ZERO, ZERO), "N", (ZERO, ZERO, ZERO), "E"),
        ((10, NONSENSE, 0), "N", (10, 0, 0), "E"),
        ((10, 0, 0), "N", (10, 0, ZERO), "E"),
        ((91, 0, 0), "N", (10, 0, 0), "E"),
        ((90, 0, 1), "N", (10, 0, 0), "E"),
        ((10, 0, 0), "N", (181, 0, 0), "E"),
        ((10, 60, 0), "N", (10, 0, 0), "E"),
        ((10, 0, 61), "N", (10, 0, 0), "E"),
        ((10, 0), "N", (10, 0, 0), "E"),
        ((10, 0, 0), "", (10, 0, 0), "E"),
        ((10, 0, 0), "N", (10, 0, 0), "N"),
        ((10, 0, 0), "?", (10, 0, 0), "E"),
        ((4294967295, 0, 0), "N", (10, 0, 0), "E"),
    ],
)
def test_wrong_places_are_none(lat: Any, lat_ref: Any, lon: Any, lon_ref: Any) -> None:
    assert place(lat, lat_ref, lon, lon_ref) == (None, None)


def test_half_a_place_is_none() -> None:
    got = facts(gps={1: "N", 2: (10, 0, 0)})
    assert (got.lat, got.lon) == (None, None)


# cameras


@pytest.mark.parametrize(
    ("make", "model", "want"),
    [
        ("Canon", "Canon EOS 5D", "Canon EOS 5D"),
        ("NIKON CORPORATION", "NIKON D90", "NIKON D90"),
        ("Apple", "iPhone 15 Pro", "Apple iPhone 15 Pro"),
        ("SONY   \0", " DSC-RX100 \0\0", "SONY DSC-RX100"),
        ("Google", None, "Google"),
        (None, "Pixel 8", "Pixel 8"),
        ("two\nlines", "x", "two lines x"),
        ("   ", "\0", None),
        (None, None, None),
    ],
)
def test_camera(make: str | None, model: str | None, want: str | None) -> None:
    assert facts({tag: value for tag, value in ((MAKE, make), (MODEL, model)) if value is not None}).camera == want


def test_a_name_of_any_length_is_cut() -> None:
    assert len(facts({MODEL: "x" * 5000}).camera or "") == 80


# where it lies, and garbage


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "HEIF", "AVIF", "MPO"])
def test_every_format_that_has_exif(format: str) -> None:
    exif = Image.Exif()
    exif[MAKE] = "Maker"
    exif.get_ifd(0x8769)[ORIGINAL] = "2020:01:02 03:04:05"
    exif.get_ifd(0x8825).update({1: "N", 2: (10.0, 30.0, 0.0), 3: "W", 4: (20.0, 15.0, 0.0)})
    loaded = Image.Exif()
    loaded.load(exif.tobytes())  # Pillow writes the inner tables of an EXIF into a TIFF only when it was read from bytes
    got = _decode(encoded(photo(32, 32), format, exif=loaded), 10**6)[1]
    assert (got.taken_at, got.lat, got.lon, got.camera) == ("2020-01-02T03:04:05", 10.5, -20.25, "Maker")
    assert got.format == ("JPEG" if format == "MPO" else format)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "HEIF", "AVIF"])
def test_no_exif(format: str) -> None:
    got = _decode(encoded(photo(32, 32), format), 10**6)[1]
    assert (got.taken_at, got.lat, got.lon, got.camera) == (None, None, None, None)


@pytest.mark.parametrize("orientation", [0, 9, 65535, "6", (6, 6), 6.5])
def test_a_wrong_orientation_turns_nothing(orientation: Any) -> None:
    image = photo(8, 4)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.info["exif"] = b"Exif\0\0"
    assert read_orientation(image) == 1


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(lambda b: b"Exif\0\0II*\0\x08\0\0\0" + b)))
def test_garbage_never_fails_a_photo(garbage: bytes) -> None:
    image, got = _decode(encoded(photo(8, 8), "JPEG", exif=garbage), 10**6)
    assert (image.mode, sorted(image.size)) == ("RGB", [8, 8])
    assert got.lat is None or -90 <= got.lat <= 90


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_exif_never_fails_a_photo(data: st.DataObject) -> None:
    exif = Image.Exif()
    exif.update({MAKE: "Maker", MODEL: "Model", 0x0112: 6, DATE: "2020:01:02 03:04:05"})
    exif.get_ifd(0x8769)[ORIGINAL] = "2020:01:02 03:04:05"
    exif.get_ifd(0x8825).update({1: "N", 2: (10.0, 30.0, 0.0), 3: "W", 4: (20.0, 15.0, 0.0)})
    raw = bytearray(exif.tobytes())
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(6, len(raw) - 1))] = data.draw(st.integers(0, 255))
    image, _ = _decode(encoded(photo(8, 8), "JPEG", exif=bytes(raw)), 10**6)
    assert image.mode == "RGB"


def test_reading_leaves_a_picture_without_exif_alone() -> None:
    with Image.open(io.BytesIO(encoded(photo(8, 8), "PNG"))) as image:
        assert read_exif(image) == Exif()
