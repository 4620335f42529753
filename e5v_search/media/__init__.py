"""Photos on disk: find, open, orient, bound and hash them, notice changes; their facts, thumbnails and contact sheets."""

from e5v_search.media.changes import TICK, Changes, Signature, signature
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
from e5v_search.media.scan import SUFFIXES, Found, Problem, Scan, roots_above, shown
from e5v_search.media.sheet import contact_sheet
from e5v_search.media.thumbs import small, thumbnail

__all__ = [
    "MAX_BYTES",
    "MAX_PIXELS",
    "SUFFIXES",
    "TICK",
    "Changes",
    "Facts",
    "Found",
    "Photo",
    "Problem",
    "Scan",
    "Signature",
    "contact_sheet",
    "content_hash",
    "decode",
    "open_photo",
    "open_picture",
    "read_photo",
    "roots_above",
    "shown",
    "signature",
    "small",
    "thumbnail",
    "upright",
]
