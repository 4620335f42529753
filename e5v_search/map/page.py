"""A map as one page: everything it shows is inside it, and it asks no host for anything."""

import base64
import hashlib
import html
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from e5v_search import media
from e5v_search.catalog import Item
from e5v_search.errors import MediaError
from e5v_search.parallel import ahead

THUMBNAILS = 5_000
_ALL_BYTES = 24 * 2**20  # of thumbnails in a page, as the base64 that they are there
_TEXT = 240  # characters of a text
NOUNS = {"image": ("photo", "photos"), "text": ("text", "texts"), "rendered": ("rendered text", "rendered texts")}

Progress = Callable[[int, int], None]


def thumbnails(items: Sequence[Item], cache: Path, most: int, seed: int = 0, on_progress: Progress | None = None) -> list[str]:
    """A small JPEG in base64 for each item, empty for what is no photo, cannot be read, or is too much for a page.

    At most `most` photos, drawn by `seed`, and as many of them as fit into 24 MB.
    """
    found = [""] * len(items)
    photos = [n for n, item in enumerate(items) if item.kind == "image"]
    drawn = sorted(np.random.default_rng(seed).permutation(photos)[:most].tolist())
    size, quality = _size(len(drawn))

    def small(n: int) -> tuple[int, str]:
        try:
            image = media.small(items[n].path or "", items[n].content_hash, cache)
        except MediaError:
            return n, ""
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
        data = io.BytesIO()
        image.save(data, "JPEG", quality=quality, optimize=True)
        return n, base64.b64encode(data.getvalue()).decode("ascii")

    room = _ALL_BYTES
    for done, (n, text) in enumerate(ahead(small, drawn), start=1):
        if len(text) <= room:
            found[n] = text
            room -= len(text)
        if on_progress is not None:
            on_progress(done, len(drawn))
    return found


def _size(photos: int) -> tuple[int, int]:
    """Pixels and JPEG quality: with more photos each gets less of the page."""
    if photos <= 1_000:
        return 224, 75
    return (144, 70) if photos <= 3_000 else (112, 60)


def page(items: Sequence[Item], xy: np.ndarray, pictures: Sequence[str], facts: dict[str, Any]) -> str:
    """The HTML of a map of `items` at places xy (n, 2), with their thumbnails.

    `facts` are what the page says of the whole: title, about, facts, gaps. Whatever names and texts hold, they are only
    ever shown: they travel as JSON without a `<`, and the page's policy lets no script run but its own.
    """
    kinds = [kind for kind in NOUNS if any(item.kind == kind for item in items)]
    places, place = _places(items)
    data = facts | {
        "kinds": [
            {"name": kind, "noun": NOUNS[kind][0], "label": NOUNS[kind][1], "count": sum(item.kind == kind for item in items)}
            for kind in kinds
        ],
        "xy": _packed(xy.astype("<f4")),
        "kind": _packed(np.array([kinds.index(item.kind) for item in items], np.uint8)),
        "names": [_name(item) for item in items],
        "places": places,
        "place": place,
        "notes": [_note(item) for item in items],
        "thumbnails": list(pictures),
    }
    css, js = _part("page.css"), _part("canvas.js") + _part("page.js")
    policy = f"default-src 'none'; img-src data:; style-src {_hash(css)}; script-src {_hash(js)}"
    text = json.dumps(data, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    parts = {
        "csp": f"{policy}; base-uri 'none'; form-action 'none'",
        "title": html.escape(f"Map of {data['title']}"),
        "css": css,
        "js": js,
        "data": text,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda slot: parts[slot[1]], _part("page.html"))


def _part(name: str) -> str:
    return resources.files("e5v_search.map").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


def _packed(x: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(x).tobytes()).decode("ascii")


def _name(item: Item) -> str:
    if item.kind == "image":
        return media.shown(os.path.basename(item.path or ""))
    text = media.shown(" ".join((item.text or "").split()))
    return text if len(text) <= _TEXT else f"{text[: _TEXT - 1]}…"


def _note(item: Item) -> str:
    size = f"{item.width}×{item.height}" if item.width and item.height else ""
    return " · ".join(filter(None, (size, (item.taken_at or "")[:10])))


def _places(items: Sequence[Item]) -> tuple[list[str], list[int]]:
    """Where items come from, below the folder that holds them all: each place once, and the number of each item's."""
    folders = [os.path.dirname(item.path) if item.kind == "image" else item.path for item in items if item.path]
    try:
        root = os.path.commonpath([folder for folder in folders if folder])
    except ValueError:  # no folder at all, or several drives
        root = ""
    numbers: dict[str, int] = {}
    place = []
    for item in items:
        path = item.path or ""
        name = os.path.relpath(os.path.dirname(path) if item.kind == "image" else path, root) if path and root else path
        place.append(numbers.setdefault("" if name == os.curdir else media.shown(name), len(numbers)))
    return list(numbers), place
