"""What the rest of the program asks of a model. Knows no torch."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image

from e5v_search.errors import OutOfMemory, TextTooLong

T = TypeVar("T")
R = TypeVar("R")

Picture = str | bytes | Path | Image.Image

NO_PROMPTS = "none"  # in the fingerprint of a model that takes its inputs bare


@dataclass(frozen=True)
class Fingerprint:
    """What made an embedding: vectors with different fingerprints do not share a space.

    float32, float16 and bfloat16 are one class (`weights="float"`), so that a collection made on a GPU can be asked
    on a laptop; quantised weights are another.
    """

    model: str
    revision: str
    prompts: str = "retrieval"
    backend: str = "pil"
    tiles: str = "auto"
    weights: str = "float"
    adapter: str | None = None  # name@revision of what was merged into the model
    dim: int | None = None  # of vectors that were cut

    def __str__(self) -> str:
        model = f"{self.model}@{self.revision[:12]}{f'+{self.adapter}' if self.adapter else ''}"
        cut = "" if self.dim is None else f"/{self.dim}"
        return f"{model}/{self.prompts}/{self.backend}/{self.tiles}/{self.weights}{cut}"

    def with_prompts(self, prompts: str) -> "Fingerprint":
        return self if self.prompts == NO_PROMPTS else replace(self, prompts=prompts)


@dataclass(frozen=True)
class Word:
    """A word of a model's vocabulary, and the cosine of its row with an embedding."""

    text: str
    score: float


class Embedder(Protocol):
    """One model. Embeddings are float32 arrays (n, dim) whose rows have length 1.

    `name` is what was asked for, `quantize` how the weights are held, `tiles` how much is read of a picture, `adapter` what
    was asked to be merged into the model. So many threads as `abreast` keep its device busy: while one waits for what comes
    of its inputs, others hand in theirs.
    """

    name: str
    dim: int
    quantize: str | None
    tiles: str
    adapter: str | None
    made_by: Fingerprint
    abreast: int = 1

    @property
    def recalled_by(self) -> dict[str, Any]:
        """What a collection keeps, to load the model again: fields of `ModelChoice`."""
        made_by = {"name": self.name, "quantize": self.quantize, "tiles": self.tiles}
        return made_by | {"adapter": self.adapter, "dim": self.made_by.dim}

    @property
    def fingerprint(self) -> str:
        """What a collection of this model's vectors is bound to."""
        return str(self.made_by)

    @abstractmethod
    def embed_texts(self, texts: Sequence[str], prompts: str = "retrieval") -> np.ndarray: ...

    @abstractmethod
    def embed_images(self, images: Sequence[Picture], prompts: str = "retrieval") -> np.ndarray: ...

    @abstractmethod
    def embed_composed(
        self, pairs: Sequence[tuple[Picture, str]], prompts: str = "cirr", *, normalise: bool = True
    ) -> np.ndarray:
        """`normalise=False`: rows as the model gives them, for sums that are normalised afterwards (FashionIQ's protocol)."""

    @abstractmethod
    def open(self, picture: Picture) -> Any:
        """A picture in any form, prepared; it need not be decoded whole. Raises MediaError."""

    @abstractmethod
    def enough(self, size: tuple[int, int]) -> tuple[int, int]:
        """The least (height, width) at which an upright picture of `size` serves `prepare` as well as at its own."""

    @abstractmethod
    def prepare(self, image: Image.Image, size: tuple[int, int] | None = None) -> Any:
        """The part of an upright RGB picture's work that needs no device: called from many threads, ahead of the model.

        `size` is the (height, width) of the picture that `image` is a reduction of.
        """

    @abstractmethod
    def embed_prepared(self, prepared: Sequence[Any], prompts: str = "retrieval") -> np.ndarray: ...

    @abstractmethod
    def embed_views(self, prepared: Sequence[Any], views: Sequence[str]) -> np.ndarray:
        """Prepared pictures under the image prompts of several sets -> (len(views), n, dim)."""

    @abstractmethod
    def nearest_words(self, x: np.ndarray, k: int = 10) -> list[list[Word]]:
        """What embeddings (n, dim) say in the model's own words: for each the k nearest, best first."""

    @abstractmethod
    def shared_words(self, a: np.ndarray, x: np.ndarray, k: int = 10) -> list[list[Word]]:
        """For each embedding of x (n, dim) the words that it shares with a (dim,), by the smaller of the two cosines."""


def embed_each(inputs: Sequence[T], embed: Callable[[list[T]], Iterable[R]]) -> list[R | TextTooLong | OutOfMemory]:
    """What `embed` gives for each input, or why it gives none: one that is too much for the model takes no other with it."""
    if not inputs:
        return []
    try:
        return list(embed(list(inputs)))
    except (TextTooLong, OutOfMemory) as error:
        if len(inputs) == 1:
            return [error]
        return [one for each in inputs for one in embed_each([each], embed)]
