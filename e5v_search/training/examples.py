"""What a model is tuned on: queries with what is right for them and what is not. A bad row is named by file and line."""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e5v_search.errors import DataError
from e5v_search.evaluation.files import json_file, json_object, text_lines
from e5v_search.evaluation.read_captioned import own_rows
from e5v_search.training.data import read_split, tidy, triplet_rows
from e5v_search.training.tuning import Examples

_NUMBER = re.compile(r"#\d+$")  # of a caption, behind the file's name in Flickr's files


@dataclass(frozen=True, slots=True)
class Input:
    """A text, a picture, or a picture with a text."""

    text: str | None = None
    image: Path | None = None

    @property
    def kind(self) -> str:
        """The prompt that it needs."""
        return "text" if self.image is None else "image" if self.text is None else "composed"


@dataclass(frozen=True, slots=True)
class Example:
    """A query, right answers (none for a distillation) and wrong ones."""

    row: int  # line of its file, or number of its record
    query: Input
    positives: tuple[Input, ...] = ()
    negatives: tuple[Input, ...] = ()

    def draw(self, negatives: int, rng: random.Random) -> tuple[Input, Input | None, list[Input]]:
        """Its query, one of the right answers, and so many of the wrong ones."""
        return self.query, rng.choice(self.positives) if self.positives else None, rng.sample(self.negatives, negatives)


def read_examples(examples: Examples, data: Path) -> list[Example]:
    """The examples of a recipe in the folder `data`. DataError names file and line of what is not as it should be."""
    path = data / examples.file
    if not path.is_file():
        raise DataError(f"{path} is not there; --data names the folder below which a recipe's files lie")
    found = _READERS[examples.kind](examples, data)[: examples.limit]
    if not found:
        raise DataError(f"{path} holds no examples")
    return found


def sentences(examples: Sequence[Example]) -> list[Example]:
    """Every different text by itself, under the row where it was met first."""
    first: dict[str, int] = {}
    for example in examples:
        for one in (example.query, *example.positives, *example.negatives):
            if one.text is not None:
                first.setdefault(one.text, example.row)
    return [Example(row, Input(text)) for text, row in first.items()]


def _triplets(examples: Examples, data: Path) -> list[Example]:
    rows = triplet_rows(data / examples.file)
    return [Example(n, Input(anchor), (Input(right),), (Input(wrong),)) for n, (anchor, right, wrong) in rows]


def _captions(examples: Examples, data: Path) -> list[Example]:
    """A picture with all its captions is one example: two captions of one picture never meet in a batch as strangers."""
    path, pictures = data / examples.file, data / examples.pictures
    captions: dict[str, list[str]] = {}
    line: dict[str, int] = {}
    for number, file, caption in _karpathy(path, examples.split) if path.suffix == ".json" else own_rows(path):
        file = _NUMBER.sub("", file)
        captions.setdefault(file, []).append(tidy(caption))
        line.setdefault(file, number)
    names: Iterable[str] = captions
    if examples.split is not None and path.suffix != ".json":
        names = read_split(data / examples.split)
        if unknown := [name for name in names if name not in captions]:
            raise DataError(f"{path} has no captions of {unknown[0]} ({len(unknown)} such pictures of {examples.split})")
    return [Example(line[n], Input(image=pictures / n), tuple(Input(text) for text in captions[n])) for n in names]


def _karpathy(path: Path, split: str | None) -> Iterator[tuple[int, str, str]]:
    """(record, file, caption) of a split of Karpathy's files; of the training split when none is named."""
    found = json_file(path)
    wanted = ("train", "restval") if split is None else (split,)
    number = 0
    try:
        for number, entry in enumerate(found["images"], 1):
            if entry["split"] in wanted:
                file = f"{entry.get('filepath', '.')}/{entry['filename']}"
                yield from ((number, file, sentence["raw"]) for sentence in entry["sentences"])
    except (KeyError, TypeError) as error:
        problem = f"{type(error).__name__} {error}"
        raise DataError(f"{path}: record {number} is not in the layout of Karpathy's files: {problem}") from error


def _instructions(examples: Examples, data: Path) -> list[Example]:
    path, pictures = data / examples.file, data / examples.pictures
    found = []
    for number, line in enumerate(text_lines(path), 1):
        if line.strip():
            row = json_object(path, number, line)
            try:
                found.append(_instruction(number, row, pictures, examples.negatives))
            except ValueError as error:
                raise DataError(f"{path}:{number}: {error}, not {line[:80]}") from error
    return found


def _instruction(number: int, row: dict[str, Any], pictures: Path, wanted: int) -> Example:
    """ValueError says what is needed."""
    query = _input(row.get("query"), "query", pictures)
    instruction = row.get("instruction")
    if isinstance(instruction, str) and instruction.strip():
        query = Input("\n".join(filter(None, (instruction.strip(), query.text))), query.image)
    elif instruction is not None:
        raise ValueError("an instruction must be a text")
    negatives = row.get("negatives", [])
    if not isinstance(negatives, list) or len(negatives) < wanted:
        raise ValueError(f"negatives must be a list of {wanted} or more (`examples.negatives` of the recipe)")
    wrong = tuple(_input(one, "each of the negatives", pictures) for one in negatives)
    return Example(number, query, (_input(row.get("positive"), "positive", pictures),), wrong)


def _input(value: object, what: str, pictures: Path) -> Input:
    if isinstance(value, str):
        value = {"text": value}
    if isinstance(value, dict) and value and value.keys() <= {"text", "image"}:
        parts = [part.strip() if isinstance(part, str) else "" for part in value.values()]
        if all(parts):
            image = value.get("image")
            return Input(value.get("text"), None if image is None else pictures / image)
    raise ValueError(f'{what} must be a text, or an object with "image", "text" or both')


_READERS: dict[str, Callable[[Examples, Path], list[Example]]] = {
    "triplets": _triplets,
    "captions": _captions,
    "instructions": _instructions,
}
