"""How results look: a table for people, JSON, CSV and bare paths for programs."""

import csv
import io
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from PIL.Image import Image

    from e5v_search.collection import Collection, Failure, Hit
    from e5v_search.collection.duplicates import Photo

# what could move the cursor, end the line, or turn the reading direction of what follows
_ESCAPED = {"Cc", "Cs", "Zl", "Zp"}
_SHOWN_TEXT = 100  # characters of a text in a table
_TURNING = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """`text` on one line of a terminal: control characters and bytes that are no text are shown as escapes."""
    if text.isprintable():
        return text
    return "".join(map(_escape, text))


def _escape(char: str) -> str:
    if char not in _TURNING and unicodedata.category(char) not in _ESCAPED:
        return char
    if "\udc80" <= char <= "\udcff":  # how Python shows a byte of a file name that is no UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")


def shown_path(path: str) -> str:
    """A path as a person reads it: relative when it lies below the working folder, on one line."""
    try:
        relative = os.path.relpath(path)
    except (OSError, ValueError):  # the working folder is gone, or on another drive
        return printable(path)
    return printable(path if relative.startswith(os.pardir) else relative)


def print_json(value: Any) -> None:
    """One line. In ASCII, where a name that is no UTF-8 survives as an escape and becomes the same bytes again."""
    click.echo(json.dumps(value))


def print_failures(failed: Iterable["Failure"]) -> None:
    for failure in failed:
        click.echo(f"{printable(failure.path)}: {printable(failure.reason)}", err=True)


def warn(line: str) -> None:
    click.echo(f"{click.style('warning:', fg='yellow')} {printable(line)}", err=True)


def count(n: int, noun: str) -> str:
    """`1 photo`, `1,200 photos`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def size(n: float) -> str:
    """A number of bytes as a person reads it."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while n >= 1000 and len(units) > 1:
        n /= 1000
        del units[0]
    return f"{n:.0f} {units[0]}" if units[0] == "bytes" or n >= 10 else f"{n:.1f} {units[0]}"


def print_hits(hits: Sequence["Hit"], drawn: Sequence[bytes] = ()) -> None:
    """A table. The path comes last and is never cut, so that it can be copied whole; behind it stands a text's beginning.

    `drawn`: for each hit what draws its thumbnail, which follows its line.
    """
    rows = [
        (
            str(hit.rank),
            f"{hit.score:.4f}",
            f"{hit.width}×{hit.height}" if hit.width and hit.height else "",
            (hit.taken_at or "")[:10],
            _named(hit),
        )
        for hit in hits
    ]
    header = ("#", "score", "size", "taken", "path")
    shown = [i for i in range(len(header)) if any(row[i] for row in rows)]  # a column without any value says nothing
    widths = [max(len(row[i]) for row in (header, *rows)) for i in shown[:-1]]
    for row, hit, picture in zip((header, *rows), (None, *hits), (b"", *(drawn or [b""] * len(rows))), strict=True):
        cells = [row[i].rjust(width) for i, width in zip(shown, widths, strict=False)]
        click.echo(click.style("  ".join([*cells, row[shown[-1]]]), dim=row is header))
        if hit is not None and hit.words is not None:
            indent = " " * (sum(widths) + 2 * len(widths))
            click.echo(click.style(indent + printable(", ".join(hit.words) or "(no word in common)"), dim=True))
        if picture:
            _write(picture)


def _named(hit: "Hit") -> str:
    text = " ".join((hit.text or "").split())
    shown = printable(text if len(text) <= _SHOWN_TEXT else text[: _SHOWN_TEXT - 1] + "…")
    if hit.path is None:
        return shown
    place = shown_path(hit.path) + (f":{printable(hit.part)}" if hit.part is not None else "")
    return f"{place}  {shown}" if shown else place


def print_csv(hits: Sequence["Hit"]) -> None:
    """All fields of the hits, UTF-8, with a header; file names keep their bytes."""
    from e5v_search.collection import Hit  # its fields are the columns

    explained = any(hit.words is not None for hit in hits)
    fields = [name for name in Hit.__dataclass_fields__ if name != "words" or explained]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(hit.to_json() | ({"words": " ".join(hit.words)} if hit.words is not None else {}) for hit in hits)
    _write(text.getvalue().encode("utf-8", "surrogateescape"))


def print_paths(hits: "Sequence[Hit | Photo]", end: bytes) -> None:
    """The files' names in the very bytes that the file system has, each followed by `end`."""
    _write(b"".join(os.fsencode(hit.path) + end for hit in hits if hit.path is not None))


def _write(data: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def draw_hits(source: "Collection", hits: Sequence["Hit"], draw: Callable[[Path], bytes]) -> list[bytes]:
    """For each hit what draws its thumbnail; nothing for what is no photo."""
    return [draw(picture) if (picture := _picture(source, hit)) else b"" for hit in hits]


def save_sheet(source: "Collection", hits: Sequence["Hit"], out: Path, title: str) -> None:
    """Draw the hits with their scores into the picture file `out`; one that cannot be read is a grey cell with its name."""
    from e5v_search.errors import MediaError
    from e5v_search.media import contact_sheet
    from e5v_search.render import render

    def seen(hit: "Hit") -> "Path | Image":
        if hit.kind != "image" and hit.text is not None:
            with suppress(MediaError):  # a script for which there is no font
                return render(hit.text)
        return _picture(source, hit) or Path(hit.path or "")

    def caption(hit: "Hit") -> str:
        name = printable(os.path.basename(hit.path or "")) + (f":{printable(hit.part)}" if hit.part is not None else "")
        return f"{hit.score:.3f}\n{name}"

    contact_sheet([(seen(hit), caption(hit)) for hit in hits], out, title)


def _picture(source: "Collection", hit: "Hit") -> Path | None:
    """The thumbnail of a hit, or None of what is no photo of the collection and of one that cannot be read."""
    from e5v_search.errors import MediaError, QueryError

    if hit.id is None:
        return None
    with suppress(MediaError, QueryError):
        return source.thumbnail(hit.id)
    return None


def open_best(hits: Sequence["Hit"]) -> None:
    """Open the file of the best hit that has one, as a double click on it would. Raises E5VError when nothing can."""
    from e5v_search.errors import E5VError

    path = next((hit.path for hit in hits if hit.path is not None), None)
    if path is None:
        return
    if not os.path.exists(path):
        raise E5VError(f"{shown_path(path)} cannot be opened: it is not there, or its disk is away")
    if click.launch(path) != 0:
        raise E5VError(f"{shown_path(path)} cannot be opened: no program here does it (on Linux, xdg-utils finds one)")
