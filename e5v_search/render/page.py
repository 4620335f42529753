"""A text on a page of 800×400 pixels, as the paper draws captions for its image-to-image retrieval."""

import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from e5v_search.errors import UnrenderableText
from e5v_search.render.clusters import Cluster, Piece, clean, is_rtl, split, visual
from e5v_search.render.fonts import PRIMARY, face_for, load

WIDTH, HEIGHT, MARGIN = 800, 400, 20
_LARGEST, _SMALLEST = 40, 8  # pixels per em
_LINE = WIDTH - 2 * MARGIN
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
_LONGEST = 20_000  # characters: more than a page holds of the narrowest letters at the smallest size


def render(text: str, font: str | os.PathLike[str] | None = None) -> Image.Image:
    """-> an RGB picture, 800×400: `text` in black on white, from 20 pixels on, in lines of at most 760, centred vertically.

    The font is always the bundled Liberation Sans, whose letters are as wide as Arial's, so that a text gives the same
    picture on every machine; `font` is the path of another, such as one's own Arial. What it lacks is drawn with the
    bundled Noto Emoji, or with a font of the system.

    The size is 40 pixels. A text that would pass the margins gets the largest size that fits, down to 8; what even then
    does not fit (beyond some 1,500 words) is cut, and `…` stands in its place. Lines end at blanks, and between any two
    characters of a script without blanks; a word wider than a line is broken. Line breaks count as blanks. A text whose
    first letter is of a script written from right to left is aligned to the right.

    Raises UnrenderableText when there is nothing to draw, or when no font here has a character; UnreadableFile for `font`.
    """
    page = _page(text, PRIMARY if font is None else Path(font))
    picture = page.draw(*page.largest())
    if picture.getextrema()[0] == (255, 255):
        raise UnrenderableText("nothing to draw: the text has only characters that leave no ink")
    return picture


def words(text: str) -> list[tuple[str, Box]]:
    """The words of a text written from left to right, and where `render` draws each. Raises UnrenderableText."""
    page = _page(text, PRIMARY)
    return list(page.words(*page.largest()))


def _page(text: str, primary: Path) -> "_Page":
    load(primary, _LARGEST, False)
    page = _Page(*split(clean(text, _LONGEST), primary), primary)
    if not page.pieces:
        raise UnrenderableText("nothing to draw: the text is empty, or has only blanks and characters that are not seen")
    return page


@dataclass(frozen=True)
class _Run:
    """Clusters of one style, side by side."""

    font: ImageFont.FreeTypeFont
    text: str
    direction: str | None  # only where libraqm lays out

    @property
    def width(self) -> float:
        return self.font.getlength(self.text, direction=self.direction)


def _runs(clusters: Sequence[Cluster], size: int, in_visual_order: bool = False) -> list[_Run]:
    runs = []
    for (face, shaped, rtl), group in groupby(clusters, key=lambda cluster: cluster.style):
        texts = [cluster.text for cluster in group]
        if shaped and rtl and in_visual_order:
            texts.reverse()  # libraqm orders the letters itself when it joins them
        runs.append(_Run(load(face, size, shaped), "".join(texts), ("rtl" if rtl else "ltr") if shaped else None))
    return runs


@dataclass(frozen=True)
class _Line:
    clusters: Sequence[Cluster]
    width: float
    top: float  # of the ink, seen from the base line; downwards is positive
    bottom: float


def _line(clusters: Sequence[Cluster], size: int) -> _Line:
    runs = _runs(clusters, size)
    boxes = [run.font.getbbox(run.text, direction=run.direction, anchor="ls") for run in runs]
    return _Line(clusters, sum(run.width for run in runs), min(box[1] for box in boxes), max(box[3] for box in boxes))


@dataclass(frozen=True)
class _Page:
    clusters: list[Cluster]
    pieces: list[Piece]
    primary: Path

    def largest(self) -> tuple[int, list[_Line]]:
        """The largest size at which all lines fit, and these; at the smallest, those that do."""
        tried = {_LARGEST: self.lines(_LARGEST)}
        if (all_lines := tried[_LARGEST]) is not None:
            return _LARGEST, all_lines

        def fits(size: int) -> bool:
            tried[size] = self.lines(size)
            return tried[size] is not None

        if fits(_SMALLEST):  # asked first: of a text that is far too long no other size need be tried
            sizes = range(_LARGEST - 1, _SMALLEST, -1)
            at = bisect_left(sizes, True, key=fits)
            size = sizes[at] if at < len(sizes) else _SMALLEST
            return size, tried[size] or []
        return _SMALLEST, self.beginning()

    def lines(self, size: int) -> list[_Line] | None:
        """All lines at `size`, or None as soon as they pass the margins: the work never exceeds what a page holds."""
        lines: list[_Line] = []
        for line in self._filled(size):
            lines.append(line)
            if line.width > _LINE or not self._fit(lines, size):
                return None
        return lines

    def beginning(self) -> list[_Line]:
        """As many lines of the smallest size as fit, the last of them ending in an ellipsis."""
        lines: list[_Line] = []
        for line in self._filled(_SMALLEST):
            if not self._fit([*lines, line], _SMALLEST):
                break
            lines.append(line)
        dots = Cluster("…", face_for("…", self.primary))
        kept = list(lines.pop().clusters) if lines else []
        while kept and (kept[-1].text == " " or _line([*kept, dots], _SMALLEST).width > _LINE):
            kept.pop()
        return [*lines, _line([*kept, dots], _SMALLEST)]

    def draw(self, size: int, lines: Sequence[_Line]) -> Image.Image:
        canvas = Image.new("RGB", (WIDTH, HEIGHT), "white")
        pen = ImageDraw.Draw(canvas)
        rtl = is_rtl(self.clusters)
        for line, y in zip(lines, self._base_lines(lines, size), strict=True):
            runs = _runs(visual(line.clusters, rtl), size, in_visual_order=True)
            x = WIDTH - MARGIN - sum(run.width for run in runs) if rtl else MARGIN
            for run in runs:
                pen.text((x, y), run.text, "black", run.font, anchor="ls", direction=run.direction)
                x += run.width
        # a letter may lean out of its own width, but stacked marks and ornaments must not fill the margins
        lean = size // 5
        inside = (MARGIN - lean, MARGIN - lean, WIDTH - MARGIN + lean, HEIGHT - MARGIN + lean)
        page = Image.new("RGB", (WIDTH, HEIGHT), "white")
        page.paste(canvas.crop(inside), inside)
        return page

    def words(self, size: int, lines: Sequence[_Line]) -> Iterator[tuple[str, Box]]:
        for line, y in zip(lines, self._base_lines(lines, size), strict=True):
            x = float(MARGIN)
            for blank, group in groupby(line.clusters, key=lambda cluster: cluster.text == " "):
                clusters = list(group)
                right = x + sum(run.width for run in _runs(clusters, size))
                if not blank:
                    yield "".join(cluster.text for cluster in clusters), (x, y + line.top, right, y + line.bottom)
                x = right

    def _base_lines(self, lines: Sequence[_Line], size: int) -> list[float]:
        """Where each line stands. As in the published code, the next line is as far down as the ink of this one is high,
        and what is centred are these heights below the font's ascent. A line without tall or hanging letters counts as
        high as one with both: the next would be drawn over it."""
        ascent = load(self.primary, size, False).getmetrics()[0]
        steps = [max(line.bottom - line.top, line.bottom - below.top, ascent) for line, below in pairwise(lines)]
        height = sum(steps) + lines[-1].bottom - lines[-1].top
        at = [(HEIGHT - height) // 2 + ascent]
        for step in steps:
            at.append(at[-1] + step)
        return at

    def _fit(self, lines: Sequence[_Line], size: int) -> bool:
        at = self._base_lines(lines, size)
        return at[0] + lines[0].top >= MARGIN and at[-1] + lines[-1].bottom <= HEIGHT - MARGIN

    def _filled(self, size: int) -> Iterator[_Line]:
        """Lines, each with as many pieces as it holds; a piece wider than a line is broken between clusters."""
        clusters, ends = self.clusters, [piece.end for piece in self.pieces]
        at, start = 0, 0
        while at < len(ends):
            room = start + self._room(start, size)
            after = bisect_right(ends, room, lo=at)
            end = ends[after - 1] if after > at else max(room, start + 1)
            yield _line(clusters[start:end], size)
            at = bisect_right(ends, end, lo=at)
            start = max(end, self.pieces[at].start) if at < len(ends) else end

    def _room(self, start: int, size: int) -> int:
        """How many clusters from `start` on a line holds: first by their single widths, then by the width of the whole, which
        kerning and joined letters change. The work grows with the line, not with the text."""

        def fits(count: int) -> bool:
            return sum(run.width for run in _runs(self.clusters[start : start + count], size)) <= _LINE

        rest = len(self.clusters) - start
        widths = accumulate(_advance(self.clusters[at], size) for at in range(start, len(self.clusters)))
        guess = next((count for count, width in enumerate(widths) if width > _LINE), rest)
        low, high, step = guess, guess, 1
        while low and not fits(low):
            low, high, step = max(0, low - step), low, 2 * step
        while low == high < rest and fits(min(rest, high + step)):
            low = high = min(rest, high + step)
            step *= 2
        if low == high:
            high = min(rest, high + step)
        return low + bisect_left(range(low + 1, high), True, key=lambda count: not fits(count))


@lru_cache(1 << 16)
def _advance(cluster: Cluster, size: int) -> float:
    return _runs([cluster], size)[0].width
