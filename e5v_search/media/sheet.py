"""A contact sheet: what was found, as one picture."""

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from e5v_search.errors import MediaError, UsageError
from e5v_search.media.photo import open_picture
from e5v_search.media.scan import shown

_SCALE = 2  # pixels per unit of the lengths below, so that the sheet is sharp on today's screens
_CELL = (216, 162)
_TRIM = 0.15  # a photo of nearly the cell's shape fills it and loses at most this part; any other is shown whole
_GAP = 18
_MARGIN = 30
_RADIUS = 8
_TITLE_SIZE, _CAPTION_SIZE, _LEADING = 22, 13, 1.35
_PAPER, _MAT, _INK, _FAINT = "#ffffff", "#eef0f3", "#1c1f24", "#6b7280"

_Picture = str | os.PathLike[str] | Image.Image
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(hits: Sequence[tuple[_Picture, str]], out: str | os.PathLike[str], title: str = "", columns: int = 5) -> None:
    """Write a picture of `hits` (photo and caption, in order) to `out`, in the format that its suffix names.

    Of a caption with several lines the first is printed darker; what does not fit is cut with an ellipsis. A photo that
    is missing or broken becomes a grey cell with its name. Raises UsageError when `out` cannot be written.
    """
    sheet = draw_sheet(hits, title, columns)
    try:
        sheet.save(Path(out), quality=92)  # formats that know no quality pass over it
    except ValueError as error:
        raise UsageError(f"{shown(out)}: no picture format has this suffix; take .png or .jpg") from error
    except OSError as error:
        raise UsageError(f"{shown(out)} cannot be written: {error.strerror or error}") from error


def draw_sheet(hits: Sequence[tuple[_Picture, str]], title: str = "", columns: int = 5) -> Image.Image:
    columns = max(1, min(columns, len(hits)))
    rows = -(-len(hits) // columns)
    lines = max((caption.count("\n") + 1 for _, caption in hits if caption), default=0)
    title_font, font = _font(_TITLE_SIZE), _font(_CAPTION_SIZE)
    (wide, high), gap, margin = _cell_size(), _GAP * _SCALE, _MARGIN * _SCALE
    line_height = round(_CAPTION_SIZE * _LEADING * _SCALE)
    caption_height = lines * line_height + 7 * _SCALE if lines else 0
    head = round(_TITLE_SIZE * 2 * _SCALE) if title else 0

    width = 2 * margin + columns * wide + (columns - 1) * gap
    height = 2 * margin + head + rows * (high + caption_height) + max(rows - 1, 0) * gap
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    corners = Image.new("L", (wide, high), 0)
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, wide - 1, high - 1), _RADIUS * _SCALE, 255)
    if title:
        draw.text((margin, margin), _cut(title, title_font, width - 2 * margin), _INK, title_font, anchor="lt")
    for i, (picture, caption) in enumerate(hits):
        x = margin + (i % columns) * (wide + gap)
        y = margin + head + (i // columns) * (high + caption_height + gap)
        sheet.paste(_cell(picture), (x, y), corners)
        for n, line in enumerate(caption.split("\n")):
            place = (x + _SCALE, y + high + 7 * _SCALE + n * line_height)
            draw.text(place, _cut(line, font, wide - 2 * _SCALE), _FAINT if n else _INK, font, anchor="la")
    return sheet


def _cell_size() -> tuple[int, int]:
    return _CELL[0] * _SCALE, _CELL[1] * _SCALE


def _cell(picture: _Picture) -> Image.Image:
    """The photo in the middle of a mat that has the size of a cell."""
    wide, high = _cell_size()
    mat = Image.new("RGB", (wide, high), _MAT)
    try:
        image = open_picture(picture if isinstance(picture, Image.Image) else Path(picture))
    except MediaError:
        name = "not a picture" if isinstance(picture, Image.Image) else shown(os.path.basename(os.fspath(picture)))
        font = _font(_CAPTION_SIZE)
        ImageDraw.Draw(mat).text((wide // 2, high // 2), _cut(name, font, round(wide * 0.9)), _FAINT, font, anchor="mm")
        return mat
    inside, outside = sorted((wide / image.width, high / image.height))
    scale = outside if inside / outside >= 1 - _TRIM else inside
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3)
    mat.paste(image, ((wide - size[0]) // 2, (high - size[1]) // 2))
    return mat


def _font(size: float) -> _Font:
    return ImageFont.load_default(size * _SCALE)


def _cut(text: str, font: _Font, width: int) -> str:
    """`text` on one line, with an ellipsis in place of what is wider than `width` pixels."""
    text = "".join(c if c.isprintable() else " " for c in text)
    if font.getlength(text) <= width:
        return text
    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if font.getlength(text[:middle].rstrip() + "…") <= width:
            fits = middle
        else:
            too_long = middle
    return text[:fits].rstrip() + "…"
