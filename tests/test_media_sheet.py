"""Contact sheets: every photo in its place, captions inside their cells, and no photo that can stop one."""

from pathlib import Path

import pytest
from pictures import photo
from PIL import Image, ImageChops

from e5v_search.errors import UsageError
from e5v_search.media import contact_sheet
from e5v_search.media.sheet import _MARGIN, _MAT, _SCALE, _cell_size, _cut, _font, draw_sheet

WIDE, HIGH = _cell_size()


def cell_centre(sheet: Image.Image, n: int, columns: int = 5) -> tuple[int, ...]:
    """Colour in the middle of cell `n` of a sheet without title and captions."""
    step_x = (sheet.width - 2 * _MARGIN * _SCALE - WIDE) // max(columns - 1, 1)
    gap = step_x - WIDE
    x = _MARGIN * _SCALE + n % columns * step_x + WIDE // 2
    y = _MARGIN * _SCALE + n // columns * (HIGH + gap) + HIGH // 2
    return sheet.getpixel((x, y))  # type: ignore[return-value]


def test_photos_lie_in_order() -> None:
    colours = [(20 * i, 255 - 20 * i, 7 * i) for i in range(12)]
    for shape in ((400, 300), (300, 400), (500, 50), (3, 2)):
        sheet = draw_sheet([(Image.new("RGB", shape, colour), "") for colour in colours])
        assert [cell_centre(sheet, n) for n in range(12)] == colours


def test_a_photo_of_another_shape_is_shown_whole() -> None:
    image = Image.new("RGB", (100, 400), "red")
    image.paste("lime", (0, 0, 100, 8))
    image.paste("blue", (0, 392, 100, 400))
    sheet = draw_sheet([(image, "")])
    x, top = sheet.width // 2, _MARGIN * _SCALE
    assert sheet.getpixel((x, top + 1)) == (0, 255, 0)
    assert sheet.getpixel((x, top + HIGH - 2)) == (0, 0, 255)
    assert sheet.getpixel((_MARGIN * _SCALE + 20, top + HIGH // 2)) == Image.new("RGB", (1, 1), _MAT).getpixel((0, 0))


def test_missing_and_broken_photos_become_grey_cells(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_bytes(b"text")
    hits = [(photo(), "a"), (tmp_path / "gone.jpg", "b"), (str(tmp_path / "text.jpg"), "c"), (tmp_path, "d"), (photo(), "e")]
    sheet = draw_sheet(hits)
    with_names = draw_sheet([hits[0], (tmp_path / "other name.jpg", "b"), *hits[2:]])
    assert sheet.size == with_names.size
    left, _, right, _ = ImageChops.difference(sheet, with_names).getbbox() or (0, 0, 0, 0)
    first = _MARGIN * _SCALE + WIDE
    assert first < left < right < 2 * first + WIDE  # only the second cell differs: it shows the name


def test_long_texts_stay_in_their_cell() -> None:
    short = [(photo(seed=i), "x") for i in range(3)]
    long = [short[0], (short[1][0], "W" * 3000 + "\nsecond line 写真\n" + "\x00\udcff" * 50), short[2]]
    sheet = draw_sheet(long, title="T" * 3000)
    assert sheet.size[0] == draw_sheet(short).size[0]
    plain = draw_sheet([short[0], (short[1][0], "\n\n"), short[2]], title="T" * 3000)
    left, _, right, _ = ImageChops.difference(sheet, plain).getbbox() or (0, 0, 0, 0)
    first = _MARGIN * _SCALE + WIDE
    assert first < left < right < sheet.width - first


@pytest.mark.parametrize("text", ["", "short", "a name that is far too long for its cell.jpg", "W" * 1000])
def test_cut_text_fits_and_is_as_long_as_it_can_be(text: str) -> None:
    font = _font(13)
    got = _cut(text, font, 300)
    assert font.getlength(got) <= 300
    if got != text:
        assert got.endswith("…")
        longer = text[: len(got)]
        assert font.getlength(longer + "…") > 300


@pytest.mark.parametrize("name", ["sheet.png", "sheet.jpg", "sheet.webp", "sheet.pdf"])
def test_written_in_the_format_of_the_suffix(name: str, tmp_path: Path) -> None:
    contact_sheet([(photo(), "0.912  a.jpg")] * 7, tmp_path / name, title="a dog on grass", columns=3)
    assert (tmp_path / name).stat().st_size > 1000


def test_no_hits_give_a_sheet_that_says_so_by_its_title(tmp_path: Path) -> None:
    contact_sheet([], tmp_path / "sheet.png", title="nothing like it")
    with Image.open(tmp_path / "sheet.png") as image:
        assert len(image.convert("L").getcolors() or []) > 2


@pytest.mark.parametrize(
    ("name", "word"), [("sheet.xyz", "suffix"), ("sheet", "suffix"), ("no/such/folder/sheet.png", "no such file")]
)
def test_what_cannot_be_written_is_said_in_one_line(name: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"(?i){word}") as caught:
        contact_sheet([(photo(), "")], tmp_path / name)
    assert "\n" not in str(caught.value)
