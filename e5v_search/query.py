"""A query as a value: what is put in, what is added and taken away, and which items may answer.

A score is a weighted sum of cosines (arXiv 2407.12580 has one space for everything, so vectors of any input add up):

    score(x) = cos(q, x) + Σ w·cos(plus, x) - Σ w·cos(minus, x)

where q is the main input; a query without plus and minus scores by the plain cosine.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from e5v_search.errors import QueryError

if TYPE_CHECKING:  # numpy comes with it
    from e5v_search.embedder import Picture

_DIGITS = 19  # of a number that SQLite cannot hold
_WEIGHT = re.compile(r"(?P<what>.*):(?P<weight>[-+]?(?:[\d.,][\d.,eE+-]*|nan|inf))", re.DOTALL)


@dataclass(frozen=True)
class Input:
    """One thing that the model reads: a text, a picture, or a picture and a change to it.

    `image` is a picture (path, encoded bytes or PIL image) or the id of an item of the collection, of any kind.
    """

    text: str | None = None
    image: "Picture | int | None" = None
    modify: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("query", self.text), ("modify", self.modify)):
            if value is not None and not value.strip():
                raise QueryError(f"the {name} text is empty; say what to look for")
        if self.modify is not None and self.image is None:
            raise QueryError("--modify changes a picture: give one with --image")
        if self.text is not None and self.image is not None:
            raise ValueError("an input is a text or a picture, not both")

    def to_json(self) -> dict[str, Any]:
        image: str | int | None = "<picture>"  # bytes and PIL images have no name
        if self.image is None or isinstance(self.image, str | int):
            image = self.image
        elif isinstance(self.image, Path):
            image = str(self.image)
        parts = {"text": self.text, "image": image, "modify": self.modify}
        return {name: value for name, value in parts.items() if value is not None}


@dataclass(frozen=True)
class Term:
    """An input that counts `weight` times (above 0) for or against an item."""

    input: Input
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.weight < math.inf):
            raise QueryError(f"the weight {self.weight:g} is not a number above 0; to push results away use minus")

    @classmethod
    def of(cls, given: "TermLike") -> "Term":
        """A text, a picture (a path as a Path), the id of an item, or one of these and its weight as a pair."""
        if isinstance(given, Term):
            return given
        what, weight = given if isinstance(given, tuple) else (given, 1.0)
        return cls(Input(text=what) if isinstance(what, str) else Input(image=what), weight)

    def to_json(self) -> dict[str, Any]:
        return self.input.to_json() | {"weight": self.weight}


TermLike: TypeAlias = "Term | str | Picture | int | tuple[str | Picture | int, float]"


@dataclass(frozen=True)
class Query:
    """What is asked. `prompts` None: the prompt set that fits the kind of query.

    - text alone, or image alone;
    - image and modify: a composed query, embedded as one by the `cirr` prompt (or `prompts`);
    - image and text: both at once, their embeddings added and normalised;
    - any of these with terms to add and to take away; or terms alone, at least one of them added.
    """

    text: str | None = None
    image: "Picture | int | None" = None
    modify: str | None = None
    plus: tuple[Term, ...] = ()
    minus: tuple[Term, ...] = ()
    where: tuple[str, ...] = ()
    prompts: str | None = None

    def __post_init__(self) -> None:
        if self.modify is not None and self.text is not None:
            raise QueryError("give either a text or --modify with a picture, not both")
        if not (self.inputs or self.plus):
            start = "only what to avoid" if self.minus else "nothing to search for"
            raise QueryError(f"{start}: give a text, --image FILE, --image FILE with --modify TEXT, or --plus TEXT")

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The main inputs, whose embeddings are added and normalised."""
        picture = Input(image=self.image, modify=self.modify) if (self.image, self.modify) != (None, None) else None
        return tuple(each for each in (picture, Input(self.text) if self.text is not None else None) if each is not None)

    @property
    def composed(self) -> bool:
        return self.modify is not None

    @property
    def signed(self) -> list[tuple[Input, float]]:
        """The inputs of the terms with their weights, those to take away negative."""
        return [(t.input, t.weight) for t in self.plus] + [(t.input, -t.weight) for t in self.minus]

    def to_json(self) -> dict[str, Any]:
        shown: dict[str, Any] = {}
        for each in self.inputs:
            shown |= each.to_json()
        for name, terms in (("plus", self.plus), ("minus", self.minus)):
            if terms:
                shown[name] = [term.to_json() for term in terms]
        return shown | ({"where": list(self.where)} if self.where else {})


def parse_input(argument: str) -> Input:
    """An input as written on a command line where files are usual: FILE, ITEM_ID, `text:…`.

    A whole number is an item's id, unless there is a file of that name.
    """
    if argument.startswith("text:"):
        return Input(text=argument.removeprefix("text:"))
    image = parse_image(argument)
    if isinstance(image, str) and not os.path.lexists(image):
        raise QueryError(f"there is no file {argument!r}; a text is written {'text:' + argument!r}")
    return Input(image=image)


def parse_image(argument: str) -> str | int:
    if not argument:
        raise QueryError("the name of the picture is empty; give a file or an item's id")
    return int(argument) if argument.isdecimal() and not os.path.exists(argument) else argument


def parse_item(argument: str) -> int:
    """The id of an item, where files are not to be had."""
    if not (argument.isascii() and argument.isdecimal() and len(argument) < _DIGITS):
        raise QueryError(f"{argument[:80]!r} is no item's id; ids are whole numbers, as results have them")
    return int(argument)


def parse_term(argument: str, image: Callable[[str], str | int] = parse_image) -> Term:
    """A term as written on a command line where texts are usual: `TEXT`, `image:FILE|ITEM_ID`, each with `:WEIGHT` or without.

    `snow`, `snow:0.5`, `image:beach.jpg:2`, `image:17`. What follows the last colon is a weight if it is made of digits and
    the signs that numbers have; `image` reads what stands behind `image:`. Raises QueryError that names the place.
    """
    what, weight = argument, 1.0
    if match := _WEIGHT.fullmatch(argument):
        try:
            weight = float(match["weight"])
        except ValueError:
            weight = math.nan
        what = match["what"]
        if what in ("image", "text"):  # `image:17` is an item, not a text with a weight
            what, weight = argument, 1.0
        elif not 0 < weight < math.inf:
            raise QueryError(
                f"{argument!r}: the weight {match['weight']!r} after the last colon (column {match.start('weight') + 1}) is no "
                f"number above 0; a text that ends like this needs a weight of its own: {argument + ':1'!r}"
            )
    if what.startswith("image:"):
        return Term(Input(image=image(what.removeprefix("image:"))), weight)
    return Term(Input(text=what.removeprefix("text:")), weight)


def terms(given: Sequence[TermLike]) -> tuple[Term, ...]:
    return tuple(map(Term.of, given))
