"""Text to picture: against the paper's protocol computed anew, Unicode's order of mixed directions, and with any string."""

import unicodedata
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from bidi import get_display
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTFont
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont, features

from e5v_search.errors import MediaError, UnreadableFile, UnrenderableText
from e5v_search.render import HEIGHT, MARGIN, WIDTH, clusters, fonts, render
from e5v_search.render import words as words_on

FONT = Path(fonts.__file__).parent.parent / "fonts/LiberationSans-Regular.ttf"
needs_raqm = pytest.mark.skipif(not features.check("raqm"), reason="this Pillow lacks libraqm or the system libfribidi")
CAPTION = "A dog runs through the snow with a stick in its mouth, and a second dog, by far the younger, follows it."


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"))


def same(a: Image.Image, b: Image.Image) -> bool:
    return bool((pixels(a) == pixels(b)).all())


def ink(image: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is not white."""
    ys, xs = np.nonzero(pixels(image) < 255)
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def plain_font(size: int = 40) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONT, size, layout_engine=ImageFont.Layout.BASIC)


def wrapped(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """Words by words, and letter by letter where a word is wider than a line."""
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") > 760:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
        while font.getlength(lines[-1]) > 760:
            n = next(n for n in range(1, len(lines[-1])) if font.getlength(lines[-1][: n + 1]) > 760)
            lines[-1:] = [lines[-1][:n], lines[-1][n:]]
    return lines


def published(text: str) -> Image.Image:
    """The paper's protocol: 40 pixels, each line as high as its ink."""
    font, image = plain_font(), Image.new("RGB", (800, 400), "white")
    draw = ImageDraw.Draw(image)
    lines = wrapped(text, font)
    heights = [bottom - top for _, top, _, bottom in (draw.textbbox((0, 0), line, font) for line in lines)]
    y = (400 - sum(heights)) // 2
    for line, height in zip(lines, heights, strict=True):
        draw.text((20, y), line, "black", font)
        y += height
    return image


def page(lines: list[str], size: int) -> Image.Image | None:
    """Like `published`, with lines at least one ascent apart; None if they pass the margins."""
    font, image = plain_font(size), Image.new("RGB", (800, 400), "white")
    draw, ascent = ImageDraw.Draw(image), font.getmetrics()[0]
    if len(lines) * ascent > 400:
        return None
    boxes = [draw.textbbox((0, 0), line, font) for line in lines]
    steps = [max(a[3] - a[1], a[3] - b[1], ascent) for a, b in pairwise(boxes)]
    y = (400 - sum(steps) - (boxes[-1][3] - boxes[-1][1])) // 2
    if y + boxes[0][1] < 20 or y + sum(steps) + boxes[-1][3] > 380:
        return None
    for line, step in zip(lines, [*steps, 0], strict=True):
        draw.text((20, y), line, "black", font)
        y += step
    return image


@pytest.mark.parametrize("text", ["Two dogs play.", CAPTION, "A boy, a girl and\n their dog\tjump"])
def test_captions_are_drawn_as_published(text: str) -> None:
    image = render(text)
    assert (image.mode, image.size) == ("RGB", (800, 400))
    assert same(image, published(text))


WORDS = st.lists(st.text("abcdefghijklmnopqrstuvwxyzWIMÄß.,'-0123", min_size=1, max_size=20), min_size=1, max_size=60)


@settings(deadline=None, max_examples=25)
@given(WORDS)
@example(["x" * 500])
@example(["word"] * 300)
@example(["ace", "i" * 300, "nose", "W" * 60])
def test_long_latin_texts_wrap_and_shrink(words: list[str]) -> None:
    text = " ".join(words)
    pages = (page(wrapped(text, plain_font(size)), size) for size in range(40, 7, -1))
    assert same(render(text), next(image for image in pages if image))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from(["a", "picture", "of", "Grey,", "jumpy", "x" * 90, "naïve"]), min_size=1, max_size=60))
def test_words_are_where_they_are_drawn(some: list[str]) -> None:
    text = " ".join(some)
    placed, ink = words_on(text), np.asarray(render(text).convert("L")) < 128
    assert "".join(word for word, _ in placed) == "".join(some)  # one wider than a line is broken
    outside = ink.copy()
    for _, (left, top, right, bottom) in placed:
        # a j begins before its place
        box = np.s_[int(top) : int(bottom) + 1, int(left) - 4 : int(right) + 5]
        assert ink[box].any()
        outside[box] = False
    assert not outside.any()


def test_the_bundled_font_is_as_wide_as_arial() -> None:
    # advance widths of Arial Regular in units of 1/2048 em
    arial = {
        " ": 569,
        ".": 569,
        "0": 1139,
        "A": 1366,
        "C": 1479,
        "M": 1706,
        "W": 1933,
        "a": 1139,
        "i": 455,
        "m": 1706,
        "@": 2079,
    }
    with TTFont(FONT) as font:
        widths, names = font["hmtx"], font.getBestCmap()
        assert font["head"].unitsPerEm == 2048
        assert {char: widths[names[ord(char)]][0] for char in arial} == arial


@settings(deadline=None, max_examples=150)
@given(st.one_of(st.text(max_size=60), st.text("aäß z\u0301\u20e3\ufe0f\u200d👩🚀❤é犬שלםמر.,(١2\u202e\u2066", max_size=60)))
@example("z" + "\u0301" * 40)
@example("\u0301" * 5000)
@example("\u1ab0" * 5000 + "a")
@example("j" * 300)
@example("﷽𒐫" * 20)
@example("\u2800a\u2800")
def test_any_string_is_drawn_within_the_margins_or_refused(text: str) -> None:
    try:
        image = render(text)
    except UnrenderableText:
        return
    left, top, right, bottom = ink(image)
    lean = 8  # of a letter out of its own width
    assert min(left, top) >= MARGIN - lean
    assert right <= WIDTH - MARGIN + lean
    assert bottom <= HEIGHT - MARGIN + lean
    assert same(image, render(text))


@pytest.fixture
def laid_out(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many characters each call of the layout engine was given."""
    calls: list[int] = []
    measure = ImageFont.FreeTypeFont.getlength

    def counted(self: ImageFont.FreeTypeFont, text: str, *args: object, **options: object) -> float:
        calls.append(len(text))
        return measure(self, text, *args, **options)

    monkeypatch.setattr(ImageFont.FreeTypeFont, "getlength", counted)
    return calls


@pytest.mark.parametrize("word", ["word ", "i", "ace dog ", "\u05e9"])
def test_work_is_bounded_by_the_page(word: str, laid_out: list[int]) -> None:
    image = render(word * 30_000)
    first = sum(laid_out)
    assert first < 400_000
    laid_out.clear()
    assert same(image, render(word * 100_000))
    assert sum(laid_out) <= first
    left, top, right, bottom = ink(image)
    assert bottom - top > 340
    assert right - left > 740


def test_what_does_not_fit_is_replaced_by_an_ellipsis() -> None:
    text = " ".join(f"word{n}" for n in range(10_000))
    font = plain_font(8)
    lines = wrapped(text[:12_000], font)
    fitting = next(n for n in range(len(lines), 0, -1) if page(lines[:n], 8))
    last = lines[fitting - 1]
    while font.getlength(last + "…") > 760 or last.endswith(" "):
        last = last[:-1]
    expected = page([*lines[: fitting - 1], last + "…"], 8)
    assert expected
    assert same(render(text), expected)


REFUSED = {
    "": "empty",
    " \n\t\u3000": "blanks",
    "\x00\x1b\u200d\ufe0f\u202e": "not seen",
    "\u2800": "no ink",
    "caf\udce9": r"U\+DCE9 is no character",
    "a\ue000": r"U\+E000 is no character",
    "a\U000e0001\u0378": r"U\+0378 is no character",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused_in_words(text: str) -> None:
    with pytest.raises(MediaError, match=REFUSED[text]) as refusal:
        render(text)
    assert isinstance(refusal.value, UnrenderableText)


@pytest.fixture
def own_fonts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only folder of system fonts."""
    monkeypatch.setattr(fonts, "_folders", lambda: (tmp_path,))
    yield tmp_path
    fonts._system.cache_clear()
    fonts._of_system.cache_clear()


def write_font(path: Path, chars: str) -> None:
    """A font in which every one of `chars` is a full square."""
    names = [".notdef", *(f"u{ord(char):04X}" for char in chars)]
    pen = TTGlyphPen(None)
    for move, point in ((pen.moveTo, (0, 0)), (pen.lineTo, (0, 700)), (pen.lineTo, (700, 700)), (pen.lineTo, (700, 0))):
        move(point)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(char): f"u{ord(char):04X}" for char in chars})
    builder.setupGlyf(dict.fromkeys(names, square))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (800, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupPost()
    builder.save(path)


def test_a_script_without_a_font_is_refused_by_name(own_fonts: Path) -> None:
    (own_fonts / "Broken.ttf").write_bytes(b"\0\1\0\0 no font")
    for text, words in {
        "犬 runs": r"no font here has 犬 \(U\+72AC, CJK UNIFIED IDEOGRAPH-72AC\): install one, for instance Noto Sans CJK",
        "สุนัข": r"ส \(U\+0E2A, THAI CHARACTER SO SUA\): install one, for instance Noto Sans Thai",
        "🀀🀁": "Noto Sans Symbols",
    }.items():
        with pytest.raises(UnrenderableText, match=words):
            render(text)


def test_a_font_of_the_system_draws_what_the_bundled_ones_lack(own_fonts: Path) -> None:
    write_font(own_fonts / "Other-Bold.ttf", "犬雪")
    with pytest.raises(UnrenderableText):
        render("犬")
    (own_fonts / "deep").mkdir()
    write_font(own_fonts / "deep/Other-Regular.ttf", "犬")
    fonts._system.cache_clear()
    fonts._of_system.cache_clear()
    assert ink(render("犬")) == (20, 200 - 14 + 9, 48, 200 + 14 + 9)  # 28 pixels, below the bundled font's ascent of 37
    with pytest.raises(UnrenderableText, match="雪"):
        render("犬雪")


def test_scripts_without_blanks_wrap_between_characters(own_fonts: Path) -> None:
    write_font(own_fonts / "Square.ttf", "犬。「")
    assert ink(render("犬" * 23))[2] == 20 + 22 * 32 + 28  # 23 squares of 32 make 736
    full = pixels(render("犬" * 24))
    [rows] = np.nonzero((full < 255).any(axis=1))
    assert rows.max() - rows.min() + 1 == 28 + 37  # two lines
    heads = [pixels(render("犬" * n + end)) for n, end in ((23, "。"), (22, "「犬"))]
    for page in heads:  # neither a closing mark at the head of a line nor an opening one at the end of one
        lower = page[rows.max() - 20 : rows.max()]
        assert (lower < 255).any(axis=0).nonzero()[0].max() > 20 + 32


def test_another_font_can_be_given(tmp_path: Path) -> None:
    write_font(tmp_path / "mine.ttf", "ab ")
    assert ink(render("ab", tmp_path / "mine.ttf"))[0] == 20
    assert not same(render("ab", tmp_path / "mine.ttf"), render("ab"))
    assert same(render("xyz", tmp_path / "mine.ttf"), render("xyz", str(tmp_path / "mine.ttf")))
    for bad in (tmp_path / "none.ttf", Path(__file__)):
        with pytest.raises(UnreadableFile, match=bad.name):
            render("a", bad)


def test_emoji_leave_no_boxes() -> None:
    box = render("a\ufffd")
    assert same(render("I ❤️ it"), render("I ❤ it"))
    assert same(render("👩\u200d🚀"), render("👩🚀"))
    assert same(render("👍🏽"), render("👍"))
    assert same(render("1\ufe0f\u20e3"), render("1"))
    pages = [render(emoji) for emoji in ("🐕", "🐈", "🍕", "🎉", "👩", "☺", "🇫🇷")]
    assert len({page.tobytes() for page in (*pages, box)}) == 8


def test_hebrew_runs_from_right_to_left() -> None:
    drawn = render("שלום")
    expected = Image.new("RGB", (800, 400), "white")
    font = plain_font()
    reverse = "שלום"[::-1]
    top, bottom = font.getbbox(reverse)[1::2]
    y = (400 - (bottom - top)) // 2
    ImageDraw.Draw(expected).text((780 - font.getlength(reverse), y), reverse, "black", font)
    assert same(drawn, expected)


def test_brackets_turn_with_the_direction() -> None:
    assert same(render("אב(גד"), render("אב(גד"))
    line, _ = clusters.split("אב(גד", FONT)
    assert "".join(cluster.text for cluster in clusters.visual(line, True)) == "דג)בא"


@settings(deadline=None, max_examples=300)
@given(st.text("abc אבג 123 .,-+$%:/!", min_size=1, max_size=30))
@example("he said אבג 12-13, and 5% דהו!")
def test_mixed_directions_stand_in_unicodes_order(text: str) -> None:
    seen = " ".join(text.split())
    if not seen:
        return
    line, _ = clusters.split(seen, FONT)
    rtl = clusters.is_rtl(line)
    assert "".join(cluster.text for cluster in clusters.visual(line, rtl)) == get_display(seen, base_dir="R" if rtl else "L")


def arabic_font() -> Path:
    try:
        return fonts.face_for("م", FONT)
    except UnrenderableText:
        pytest.skip("no font here has Arabic letters")


@needs_raqm
def test_arabic_letters_are_joined() -> None:
    path = arabic_font()
    word = "مرحبا"
    joined = ImageFont.truetype(path, 40, layout_engine=ImageFont.Layout.RAQM)
    drawn = render(word)
    left, _, right, _ = ink(drawn)
    assert abs(right - left - joined.getlength(word, direction="rtl")) < 6
    single = sum(joined.getlength(char) for char in word)
    assert abs(right - left - single) > 20
    assert right > 770
    assert same(render("\u202e" + word), drawn)  # what would turn the order of letters is not obeyed


@needs_raqm
def test_marks_stand_on_their_letters() -> None:
    assert same(render("e\u0301"), render("é"))
    left, top, right, _ = ink(render("x\u0302"))
    bare_left, bare_top, bare_right, _ = ink(render("x"))
    assert (left, right) == (bare_left, bare_right)
    assert top < bare_top - 8


def test_without_libraqm(monkeypatch: pytest.MonkeyPatch) -> None:
    arabic_font()
    with_it = [pixels(render(text)) for text in (CAPTION, "שלום 🐕 é")]
    monkeypatch.setattr(features, "check_feature", lambda name: False)
    assert all((a == pixels(render(text))).all() for a, text in zip(with_it, (CAPTION, "שלום 🐕 é"), strict=True))
    assert ink(render("x\u0302"))[1] < ink(render("x"))[1]
    with pytest.raises(UnrenderableText, match=r"م \(U\+0645, ARABIC LETTER MEEM\).*install the library fribidi"):
        render("hello مرحبا")


def test_every_bundled_emoji_has_ink() -> None:
    blank = []
    with TTFont(FONT.with_name("NotoEmoji-Regular.ttf")) as font:
        chars = [chr(code) for code in font.getBestCmap()]
    for char in chars:
        if unicodedata.category(char) in ("So", "Sk") and not fonts.load(fonts._EMOJI, 8, False).getmask(char).getbbox():
            blank.append(char)
    assert len(chars) > 1300
    assert blank == []
