"""What a text is made of when it is drawn: clusters (a character with its marks), pieces between which a line may end,
and the order in which a line's clusters stand from left to right."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bidi import algorithm
from bidi.mirror import MIRRORED

from e5v_search.errors import UnrenderableText
from e5v_search.render.fonts import can_shape, face_for

# more marks than this on one character are noise (the limit of Unicode's stream-safe format)
_MARKS = 30

# Scripts whose letters join, reorder or stack: Arabic and its kin, those of India and South-East Asia, Tibetan, Mongolian
_SHAPED = re.compile(
    "[\u0600-\u109f\u1700-\u18af\u1900-\u1cff\ua800-\ua82f\ua840-\ua95f\ua980-\uaadf\uaae0-\uaaff\uabc0-\uabff"
    "\ufb50-\ufdff\ufe70-\ufefe\U00010a00-\U00010a5f\U00010ac0-\U00010aff\U00010d00-\U00010d3f\U00010f30-\U00010fdf"
    "\U00011000-\U00011fff\U00016b00-\U00016b8f\U0001e900-\U0001e95f]"
)

# Characters that only tell a renderer what to do with others (Unicode's Default_Ignorable_Code_Point), controls, and
# what turns one emoji into a coloured or framed variant of itself. An emoji made of several is drawn as these several.
_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\u20e3\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U0001f3fb-\U0001f3ff\U000e0000-\U000e0fff]"
)
_ZERO_WIDTH_SPACE = "\u200b"
_JOINERS = "\u200c\u200d"

# no line starts with one of these, none ends with one of those
_CLOSING = set("、。，．・：；？！」』）］｝〉》】〕〗ー々ぁぃぅぇぉっゃゅょァィゥェォッャュョ,.:;?!)]}%”’…")
_OPENING = set("「『（［｛〈《【〔〖([{“‘")


@dataclass(frozen=True, slots=True)
class Cluster:
    text: str
    face: Path
    shaped: bool = False
    rtl: bool = False

    @property
    def style(self) -> tuple[Path, bool, bool]:
        """Neighbours of one style are laid out together."""
        return self.face, self.shaped, self.rtl


@dataclass(frozen=True, slots=True)
class Piece:
    """Clusters `start` to `end` (excluded), which stay together on a line if it can hold them."""

    start: int
    end: int


def clean(text: str, limit: int) -> str:
    """`text` with single blanks and without what is not seen; of a text longer than `limit` the beginning and `…`."""
    seen = " ".join(_UNSEEN.sub("", unicodedata.normalize("NFC", text)).split())
    return seen if len(seen) <= limit else seen[:limit] + "…"


def split(text: str, primary: Path) -> tuple[list[Cluster], list[Piece]]:
    """The clusters of a cleaned text, and its pieces: words, or single characters where a script has no blanks.

    Between two pieces stands one blank, a cluster of its own, or nothing. Raises UnrenderableText.
    """
    clusters: list[Cluster] = []
    pieces: list[Piece] = []
    for word in text.split():
        parts = [part for part in map(_clusters, word.split(_ZERO_WIDTH_SPACE)) if part]
        if parts and clusters:
            clusters.append(Cluster(" ", primary))
        for part in parts:
            start = len(clusters)
            for each in part:
                if len(clusters) > start and _may_break(clusters[-1].text, each):
                    pieces.append(Piece(start, len(clusters)))
                    start = len(clusters)
                clusters.append(_styled(each, primary))
            pieces.append(Piece(start, len(clusters)))
    return clusters, pieces


def _clusters(word: str) -> list[str]:
    clusters: list[str] = []
    for char in word:
        if char in _JOINERS:  # they join letters; the emoji that they join are drawn one by one
            if clusters and _SHAPED.match(clusters[-1]):
                clusters[-1] += char
        elif clusters and unicodedata.category(char)[0] == "M":
            if len(clusters[-1]) <= _MARKS:
                clusters[-1] += char
        else:
            clusters.append(char)
    return clusters


def _styled(text: str, primary: Path) -> Cluster:
    face = face_for(text, primary)
    shaped = _SHAPED.match(text) is not None
    if not shaped:
        shaped = len(text) > 1 and can_shape()  # without, FreeType alone puts the marks roughly where they belong
    elif not can_shape():
        name = unicodedata.name(text[0], "without a name")
        raise UnrenderableText(
            f"{text[0]} (U+{ord(text[0]):04X}, {name}) is of a script that only libraqm can draw, which this Pillow lacks: "
            "install the library fribidi (libfribidi0 on Debian, fribidi in Homebrew)"
        )
    return Cluster(text, face, shaped, unicodedata.bidirectional(text[0]) in ("R", "AL"))


def _may_break(before: str, after: str) -> bool:
    wide = unicodedata.east_asian_width(before[0]) in "WF" or unicodedata.east_asian_width(after[0]) in "WF"
    return wide and before[0] not in _OPENING and after[0] not in _CLOSING


def is_rtl(clusters: Sequence[Cluster]) -> bool:
    """Whether a text runs from right to left: its first letter says it."""
    return next((cluster.rtl for cluster in clusters if unicodedata.bidirectional(cluster.text[0]) in ("L", "R", "AL")), False)


def visual(line: Sequence[Cluster], rtl: bool) -> list[Cluster]:
    """The clusters of a line from left to right (UAX 9), with mirrored brackets. `rtl`: the direction of the whole text."""
    if not rtl and not any(unicodedata.bidirectional(cluster.text[0]) in ("R", "AL", "AN") for cluster in line):
        return list(line)
    storage = algorithm.get_empty_storage()
    storage["base_level"], storage["base_dir"] = int(rtl), "LR"[rtl]
    algorithm.get_embedding_levels("".join(cluster.text[0] for cluster in line), storage)
    for cluster, char in zip(line, storage["chars"], strict=True):
        char["cluster"] = cluster
    algorithm.explicit_embed_and_overrides(storage)
    algorithm.resolve_weak_types(storage)
    algorithm.resolve_neutral_types(storage, False)
    algorithm.resolve_implicit_levels(storage, False)
    algorithm.reorder_resolved_levels(storage, False)
    return [_mirrored(char["cluster"]) if char["level"] % 2 else char["cluster"] for char in storage["chars"]]


def _mirrored(cluster: Cluster) -> Cluster:
    return replace(cluster, text=MIRRORED.get(cluster.text[0], cluster.text[0]) + cluster.text[1:])
