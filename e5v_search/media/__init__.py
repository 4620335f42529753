"""Photos on disk: find, open, orient, bound and hash them; their facts, thumbnails and contact sheets."""

from e5v_search.media.photo import (
    MAX_BYTES,
    MAX_PIXELS,
    Facts,
    Photo,
    content_hash,
    decode,
    open_photo,
    open_picture,
    read_photo,
)
from e5v_search.media.pixels import upright
from e5v_search.media.scan import SUFFIXES, Found, Problem, Scan, shown
from e5v_search.media.sheet import contact_sheet
from e5v_search.media.thumbs import thumbnail

__all__ = [
    "MAX_BYTES",
    "MAX_PIXELS",
    "SUFFIXES",
    "Facts",
    "Found",
    "Photo",
    "Problem",
    "Scan",
    "contact_sheet",
    "content_hash",
    "decode",
    "open_photo",
    "open_picture",
    "read_photo",
    "shown",
    "thumbnail",
    "upright",
]
