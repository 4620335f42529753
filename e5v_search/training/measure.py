"""Held-out measurements cheap enough for the middle of a run, and by command for a finished model:

python -m e5v_search.training.measure e5v-tiny --data DIR --split test
"""

import argparse
import csv
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from e5v_search.backbones.llava_next import LlavaNextEmbedder
from e5v_search.backbones.tiles import TileSpec, cut
from e5v_search.embedder import Picture
from e5v_search.errors import E5VError
from e5v_search.evaluation.metrics import Ranked, spearman
from e5v_search.evaluation.ranks import Items, score_ranks
from e5v_search.render import render
from e5v_search.scenes import draw, random_change, random_scene
from e5v_search.training.data import Photos, load_photos
from e5v_search.training.encode import BatchEncoder

_BATCH = 64

T = TypeVar("T")


class Embeds(Protocol):
    """The part of `Embedder` that a measurement needs."""

    def embed_texts(self, texts: Sequence[str], prompts: str = "retrieval") -> np.ndarray: ...
    def embed_images(self, images: Sequence[Picture], prompts: str = "retrieval") -> np.ndarray: ...
    def embed_composed(self, pairs: Sequence[tuple[Picture, str]], prompts: str = "cirr") -> np.ndarray: ...


class RunEmbedder:
    """The model of a running training, in the layout ("base" or "full") that its stage trains."""

    def __init__(self, encoder: BatchEncoder, layout: str, spec: TileSpec) -> None:
        self.encoder, self.layout, self.spec = encoder, layout, spec

    def embed_texts(self, texts: Sequence[str], prompts: str = "retrieval") -> np.ndarray:
        return self._all(texts, lambda some: self.encoder.texts(some, prompts))

    def embed_images(self, images: Sequence[Picture], prompts: str = "retrieval") -> np.ndarray:
        return self._all(images, lambda some: self.encoder.pictures(self._features(some), prompts))

    def embed_composed(self, pairs: Sequence[tuple[Picture, str]], prompts: str = "cirr") -> np.ndarray:
        def embed(some: Sequence[tuple[Picture, str]]) -> Tensor:
            return self.encoder.composed(self._features([p for p, _ in some]), [text for _, text in some], prompts)

        return self._all(pairs, embed)

    @torch.inference_mode()
    def _all(self, items: Sequence[T], embed: Callable[[Sequence[T]], Tensor]) -> np.ndarray:
        rows = torch.cat([embed(items[i : i + _BATCH]) for i in range(0, len(items), _BATCH)])
        out: np.ndarray = torch.nn.functional.normalize(rows, dim=-1).cpu().numpy()
        return out

    def _features(self, pictures: Sequence[Picture]) -> Tensor | list[Tensor]:
        images = [p for p in pictures if isinstance(p, Image.Image)]
        if self.layout == "full":
            return self.encoder.full_features([cut(image, self.spec) for image in images])
        side = (self.spec.tile, self.spec.tile)
        small = [np.asarray(image.resize(side, self.spec.resample)).transpose(2, 0, 1) for image in images]
        return self.encoder.base_features(torch.from_numpy(np.stack(small)))


def recalls(
    scores: np.ndarray, right: Sequence[set[int]], ks: Sequence[int] = (1, 5, 10), masked: Items | None = None
) -> dict[int, float]:
    """Share of queries with one of their right items among the k best, without those masked; scores (queries, items)."""
    part = Ranked(score_ranks(scores, [tuple(some) for some in right], masked), tuple(ks), recalls_only=True)
    return {k: value / 100 for k, value in zip(ks, part.values(np.ones(part.n)).values(), strict=True)}


def photo_recalls(embedder: Embeds, photos: Photos, captions: int = 5) -> dict[str, float]:
    """Recall@1/5/10 between photos and their first `captions` captions, both ways (any-hit)."""
    images = embedder.embed_images([Image.fromarray(p.transpose(1, 2, 0)) for p in photos.pixels])
    owner = [i for i, own in enumerate(photos.captions) for _ in own[:captions]]
    texts = embedder.embed_texts([caption for own in photos.captions for caption in own[:captions]])
    own_texts: list[set[int]] = [set() for _ in range(len(photos))]
    for text, photo in enumerate(owner):
        own_texts[photo].add(text)
    scores = texts @ images.T
    to_image = recalls(scores, [{photo} for photo in owner])
    to_text = recalls(scores.T, own_texts)
    return {f"t2i_r{k}": v for k, v in to_image.items()} | {f"i2t_r{k}": v for k, v in to_text.items()}


def scene_recalls(embedder: Embeds, n: int, seed: str = "held out") -> dict[str, float]:
    """Recall@1 over n scenes, for their captions and for pages that these are written on, and, for changes, over those
    scenes and their n changed ones.

    The scene that is to be changed is left out, as a composed search leaves out its reference; "with_reference" keeps it.
    """
    rng = random.Random(seed)
    scenes = {scene.facts: scene for scene in (random_scene(rng) for _ in range(3 * n))}
    before = list(scenes.values())[:n]
    changes = [random_change(scene, rng) for scene in before]
    everything = [*before, *(after for _, after in changes)]
    drawn = [draw(scene, rng) for scene in everything]
    showing: dict[object, set[int]] = {}
    for i, scene in enumerate(everything):
        showing.setdefault(scene.facts, set()).add(i)
    pictures = embedder.embed_images(drawn, "cirr")
    captions = [scene.caption(rng) for scene in before]
    texts = embedder.embed_texts(captions)
    pages = embedder.embed_images([render(caption) for caption in captions], "cirr")
    composed = embedder.embed_composed([(picture, text) for picture, (text, _) in zip(drawn[:n], changes, strict=True)])
    right = [showing[after.facts] for _, after in changes]
    scores = composed @ pictures.T
    references = [(i,) for i in range(len(before))]
    described = [{i} for i in range(len(before))]
    return {
        "scene_t2i_r1": recalls(texts @ pictures[: len(before)].T, described, (1,))[1],
        "scene_page_r1": recalls(pages @ pictures[: len(before)].T, described, (1,))[1],
        "scene_composed_r1": recalls(scores, right, (1,), references)[1],
        "scene_composed_r1_with_reference": recalls(scores, right, (1,))[1],
    }


def sts_spearman(embedder: Embeds, path: Path) -> float:
    """Spearman correlation over a file of STS-B (score in column 5, sentences in columns 6 and 7)."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if len(row) >= 7]
    a, b = (embedder.embed_texts([row[i] for row in rows], "sts") for i in (5, 6))
    gold = np.array([float(row[4]) for row in rows])
    return spearman((a * b).sum(axis=1), gold)


def sts_file(data: Path, split: str) -> Path:
    return data / "sts_raw" / "STS" / "STSBenchmark" / f"sts-{split}.csv"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m e5v_search.training.measure", description="Measure a finished model.")
    parser.add_argument("model", help="e5v-tiny, or a checkpoint folder")
    parser.add_argument("--data", type=Path, required=True, help="folder with flickr8k/ and sts_raw/")
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--scenes", type=int, default=500)
    arguments = parser.parse_args()
    try:
        embedder = LlavaNextEmbedder.load(arguments.model, device="cpu")
        photos = load_photos(arguments.data / "flickr8k", arguments.split, 224)
        found = photo_recalls(embedder, photos) | scene_recalls(embedder, arguments.scenes)
        found["sts"] = sts_spearman(embedder, sts_file(arguments.data, arguments.split))
    except E5VError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps({"model": arguments.model, "split": arguments.split, **found}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
