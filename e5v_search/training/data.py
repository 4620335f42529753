"""What training reads: photos with captions, splits, NLI triplets. A bad row is named by file and line."""

import csv
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from e5v_search.errors import UsageError

Triplet = tuple[str, str, str]  # anchor, entailed, contradicting


def read_split(path: Path) -> list[str]:
    """File names of a split, one per line, in the file's order."""
    names = [line.strip() for line in _lines(path)]
    for number, name in enumerate(names, 1):
        if not name or "/" in name:
            raise UsageError(f"{path}:{number}: a bare file name is needed, not {name!r}")
    if twice := len(names) - len(set(names)):
        raise UsageError(f"{path}: {twice} names occur twice")
    return names


def read_captions(path: Path) -> dict[str, list[str]]:
    """Captions of each photo, from lines `<file>#<n>` TAB caption (the layout of Flickr8k.token.txt)."""
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(path), 1):
        key, tab, caption = line.partition("\t")
        name, mark, index = key.partition("#")
        if not (tab and mark and index.isdigit() and caption.strip()):
            raise UsageError(f"{path}:{number}: `file#n<TAB>caption` is needed, not {line[:80]!r}")
        captions.setdefault(name, []).append(tidy(caption))
    return captions


def triplet_rows(path: Path) -> Iterator[tuple[int, Triplet]]:
    """NLI triplets, each with its line, from a CSV file with the columns sent0, sent1, hard_neg (SimCSE's layout)."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            if header != ["sent0", "sent1", "hard_neg"]:
                raise UsageError(f"{path}:1: the header must be sent0,sent1,hard_neg, not {','.join(header)!r}")
            for row in rows:
                if len(row) != 3 or not all(cell.strip() for cell in row):
                    raise UsageError(f"{path}:{rows.line_num}: three sentences are needed, not {row!r}")
                yield rows.line_num, (row[0].strip(), row[1].strip(), row[2].strip())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: {error}") from error


def read_triplets(path: Path) -> list[Triplet]:
    return [triplet for _, triplet in triplet_rows(path)]


def sts_sentences(folder: Path) -> list[str]:
    """What the training pairs of STS-B say, without their scores; each sentence once, in the file's order.

    Left out are sentences that dev or test hold too, and captions of photos (the file "images"): Flickr8k's test photos may
    be among these.
    """
    held_out = {s for split in ("dev", "test") for row in _sts_rows(folder / f"sts-{split}.csv") for s in row[5:7]}
    own = (s for row in _sts_rows(folder / "sts-train.csv") if row[1] != "images" for s in row[5:7])
    return [s for s in dict.fromkeys(own) if s not in held_out]


def _sts_rows(path: Path) -> list[list[str]]:
    rows = [line.split("\t") for line in _lines(path)]
    for number, row in enumerate(rows, 1):
        if len(row) < 7:
            raise UsageError(f"{path}:{number}: seven columns are needed, not {len(row)}")
    return rows


def tidy(caption: str) -> str:
    """A caption as a person would write it: the corpus puts a blank before each mark."""
    return re.sub(r"\s+([.,;:!?])", r"\1", caption.strip()).strip('"').strip()


@dataclass(frozen=True)
class Photos:
    """Photos of one split in memory: `pixels` (n, 3, side, side) uint8, squashed to squares; captions per photo."""

    names: list[str]
    captions: list[list[str]]
    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def first(self, n: int) -> "Photos":
        return Photos(self.names[:n], self.captions[:n], self.pixels[:n])


def load_photos(folder: Path, split: str, side: int, limit: int | None = None) -> Photos:
    """Flickr8k's photos of a split ("train", "dev" or "test") from its folder, decoded once."""
    names = read_split(folder / f"Flickr_8k.{split}Images.txt")[:limit]
    captions = read_captions(folder / "Flickr8k.token.txt")
    if missing := [name for name in names if name not in captions]:
        raise UsageError(f"{folder}: no caption for {missing[0]} ({len(missing)} such photos in split {split!r})")
    pixels = np.empty((len(names), 3, side, side), dtype=np.uint8)

    def decode(i: int) -> None:
        pixels[i] = _decode(folder / "images" / names[i], side)

    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(decode, range(len(names))):
            pass
    return Photos(names, [captions[name] for name in names], pixels)


def caption_corpus(photos: Iterable[Sequence[str]], triplets: Iterable[Triplet]) -> list[str]:
    """Every sentence that the tokenizer learns from."""
    return [caption for captions in photos for caption in captions] + [s for triplet in triplets for s in triplet]


def shuffled(seed: str, total: int, first: int, stop: int) -> list[int]:
    """Places `first` to `stop` of an endless sequence of epochs, each `total` items in an order of its own."""
    return [_order(seed, epoch, total)[at] for epoch, at in (divmod(place, total) for place in range(first, stop))]


@lru_cache(maxsize=8)
def _order(seed: str, epoch: int, total: int) -> list[int]:
    return random.Random(f"{seed}/{epoch}").sample(range(total), total)


def _decode(path: Path, side: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UsageError(f"{path}: {error}") from error
    if rgb.size != (side, side):
        rgb = rgb.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(rgb).transpose(2, 0, 1)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from error
