"""Which font draws which characters: the bundled ones first, then those of the system.

The bundled Liberation Sans has the advance widths of Arial, and Noto Emoji has emoji in outline. They come before any
font of the system, so that Latin, Greek, Cyrillic, Hebrew and emoji look the same on every machine.
"""

import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont, features

from e5v_search.errors import UnreadableFile, UnrenderableText

_BUNDLED = Path(__file__).parent.parent / "fonts"
PRIMARY = _BUNDLED / "LiberationSans-Regular.ttf"
_EMOJI = _BUNDLED / "NotoEmoji-Regular.ttf"

# names of faces that are no plain text face, or that show a box for whatever they are asked
_PASSED_OVER = (
    "bold",
    "italic",
    "oblique",
    "mono",
    "condensed",
    "light",
    "thin",
    "black",
    "medium",
    "heavy",
    "lastresort",
    "blank",
)
_FAMILIES = {"CJK": "CJK", "HIRAGANA": "CJK", "KATAKANA": "CJK", "HANGUL": "CJK", "BOPOMOFO": "CJK"}


def face_for(cluster: str, primary: Path) -> Path:
    """The font file that draws `cluster`, a character with its marks. Raises UnrenderableText, which names the character."""
    return _bundled(cluster, primary) or _of_system(cluster, _folders())


@lru_cache(1 << 16)
def _bundled(cluster: str, primary: Path) -> Path | None:
    needed = _needed(cluster)
    return next((path for path in (primary, PRIMARY, _EMOJI) if needed <= _covered(path)), None)


@lru_cache(1 << 16)
def _of_system(cluster: str, folders: tuple[Path, ...]) -> Path:
    needed = _needed(cluster)
    for char in cluster:
        if unicodedata.category(char) in ("Cn", "Co", "Cs"):
            raise UnrenderableText(
                f"U+{ord(char):04X} is no character that a font could show (unassigned, private or half of one)"
            )
    for path in _system(folders):
        if needed <= _covered(path):
            return path
    raise UnrenderableText(_nothing_has(cluster, needed))


def _needed(cluster: str) -> set[int]:
    return {ord(char) for char in cluster if unicodedata.category(char) != "Cf"}


def _nothing_has(cluster: str, needed: set[int]) -> str:
    missing = next((char for char in cluster if ord(char) in needed - _covered(PRIMARY)), cluster[0])
    name = unicodedata.name(missing, "without a name")
    family = "Symbols"
    if unicodedata.category(missing)[0] in "LMN":
        script = name.split()[0].split("-")[0]
        family = _FAMILIES.get(script, script.title())
    return f"no font here has {missing} (U+{ord(missing):04X}, {name}): install one, for instance Noto Sans {family}"


@lru_cache(1024)
def load(path: Path, size: int, shaped: bool) -> ImageFont.FreeTypeFont:
    """The face at `size` pixels per em. `shaped`: with joined letters and placed marks, which takes libraqm.

    All else is laid out by FreeType alone, which every Pillow has: a text gives the same pixels with and without libraqm.
    """
    try:
        font = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.RAQM if shaped else ImageFont.Layout.BASIC)
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror or 'not a font'}") from error
    with suppress(OSError):  # of a font that is not variable; the first instance of one that is may be hairline
        axes = font.get_variation_axes()
        font.set_variation_by_axes([400.0 if axis["name"] == b"Weight" else axis["default"] or 0 for axis in axes])
    return font


def can_shape() -> bool:
    return bool(features.check_feature("raqm"))


@lru_cache(1024)
def _covered(path: Path) -> frozenset[int]:
    """Code points that the outlines of a font cover; none of one that cannot be read or has only bitmaps."""
    from fontTools.ttLib import TTFont

    try:
        with TTFont(path, fontNumber=0, lazy=True) as font:
            if not {"glyf", "CFF ", "CFF2"} & set(font.keys()):
                return frozenset()
            return frozenset(font.getBestCmap() or ())
    except Exception:  # whatever a damaged font makes the reader raise
        return frozenset()


@lru_cache(8)
def _system(folders: tuple[Path, ...]) -> tuple[Path, ...]:
    """The regular faces below `folders`: Noto's first, then others without serifs, then the rest, each by name."""
    found = {
        path
        for folder in folders
        for path in _walk(folder)
        if path.suffix.lower() in (".ttf", ".otf", ".ttc", ".otc")
        and not any(word in path.stem.lower() for word in _PASSED_OVER)
    }

    def rank(path: Path) -> tuple[int, str, str]:
        name = path.stem.lower()
        return (0 if name.startswith("notosans") else 1 if "sans" in name else 2), name, str(path)

    return tuple(sorted(found, key=rank))


def _walk(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place, name) for name in names)


def _folders() -> tuple[Path, ...]:
    """Where this system keeps fonts."""
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library/Fonts", Path("/Library/Fonts"), Path("/System/Library/Fonts")
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA", home / "AppData/Local")
        return Path(os.environ.get("WINDIR", "C:/Windows"), "Fonts"), Path(local, "Microsoft/Windows/Fonts")
    own = os.environ.get("XDG_DATA_HOME") or home / ".local/share"
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    return Path(own, "fonts"), home / ".fonts", *(Path(folder, "fonts") for folder in shared.split(":") if folder)
