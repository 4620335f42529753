"""Held-out measurements in the middle of a tuning run, by the functions that measure a pretraining (see `measure`)."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from e5v_search import media
from e5v_search.backbones.llava_next import Row
from e5v_search.backbones.tiles import Tiles
from e5v_search.embedder import Picture
from e5v_search.errors import DataError
from e5v_search.training.data import load_photos
from e5v_search.training.measure import photo_recalls, sts_file, sts_spearman
from e5v_search.training.tuned import Tuned

_WINDOW = 256  # inputs prepared at a time

T = TypeVar("T")

Measurement = Callable[[], dict[str, float]]


class Midway:
    """A model in training as an embedder, without dropout and gradients. `prompts` in place of each measurement's own."""

    def __init__(self, tuned: Tuned, prompts: str | None = None) -> None:
        self.tuned, self.prompts = tuned, prompts

    def embed_texts(self, texts: Sequence[str], prompts: str = "retrieval") -> np.ndarray:
        return self._all(texts, lambda some: self.tuned.text_rows(some, self.prompts or prompts, max_tokens=512))

    def embed_images(self, images: Sequence[Picture], prompts: str = "retrieval") -> np.ndarray:
        return self._all(images, lambda some: self.tuned.picture_rows(self._tiles(some), self.prompts or prompts))

    def embed_composed(self, pairs: Sequence[tuple[Picture, str]], prompts: str = "cirr") -> np.ndarray:
        def rows(some: Sequence[tuple[Picture, str]]) -> list[Row]:
            tiles = self._tiles([picture for picture, _ in some])
            return self.tuned.composed_rows(tiles, [text for _, text in some], self.prompts or prompts, max_tokens=512)

        return self._all(pairs, rows)

    def _tiles(self, pictures: Sequence[Picture]) -> list[Tiles]:
        return [self.tuned.prepare(media.open_picture(picture)) for picture in pictures]

    def _all(self, items: Sequence[T], rows: Callable[[Sequence[T]], list[Row]]) -> np.ndarray:
        self.tuned.train(False)
        with torch.inference_mode():
            found = [self.tuned.embed(rows(items[i : i + _WINDOW])) for i in range(0, len(items), _WINDOW)]
        self.tuned.train(True)
        out: np.ndarray = torch.nn.functional.normalize(torch.cat(found), dim=-1).cpu().numpy()
        return out


def measurement(names: Sequence[str], data: Path, limit: int | None, embedder: Midway) -> Measurement:
    """What measures the sets of `names`, whose files are read now: a missing one is named before the run.

    `limit`: the first photos of Flickr8k's dev split alone. Test splits cannot be asked for.
    """
    of: list[Measurement] = []
    for name in names:
        if name == "flickr8k-dev":
            of.append(partial(photo_recalls, embedder, load_photos(data / "flickr8k", "dev", 224, limit)))
        else:
            of.append(partial(_sts, embedder, sts_file(data, "dev")))
            if not sts_file(data, "dev").exists():
                raise DataError(f"{sts_file(data, 'dev')} is not there: get it, or leave {name} out of `evaluate`")
    return lambda: {key: value for measure in of for key, value in measure().items()}


def _sts(embedder: Midway, path: Path) -> dict[str, float]:
    return {"sts_dev": sts_spearman(embedder, path)}
