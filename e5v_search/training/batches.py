"""What one optimiser step sees. A batch depends on the recipe's seed and the step alone, so that a resumed run goes on
exactly as an uninterrupted one."""

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from e5v_search.backbones.tiles import Tiles, TileSpec, cut
from e5v_search.render import render
from e5v_search.scenes import draw, random_change, random_scene
from e5v_search.training.data import Photos, Triplet, caption_corpus, shuffled
from e5v_search.training.recipe import Recipe, Stage
from e5v_search.training.told import Teller, Told

Box = tuple[float, float, float, float]
Pictures = Tensor | list[Tiles]  # base tiles (n, 3, tile, tile) uint8, or the full layout

# width / height of photos; most cameras
_ASPECTS = (1.0, 1.0, 4 / 3, 3 / 2, 3 / 4, 2 / 3)


@dataclass(frozen=True)
class Batch:
    """n photos with a caption each, another caption each and the words of all their captions (n, vocabulary); m scenes
    before and after a change, with captions of both; k triplets; bare sentences. Scenes and triplets are empty in most steps
    when they join only some, sentences where no language is modelled."""

    photos: Pictures
    boxes: Tensor  # (n, 4): which part of each photo is seen; see `Maps.at`
    captions: list[str]
    others: list[str]
    words: Tensor
    scenes: Pictures
    changed: Pictures
    scene_captions: list[str]
    changed_captions: list[str]
    changes: list[str]
    triplets: list[Triplet]
    bare: list[str]
    rows: list[int]  # of the photos, in the corpus
    sentences: list[int]  # of the teacher's corpus
    pages: Pictures  # rendered captions of the first scenes
    told: Told | None


class Batches:
    """`make(step)` for any step, in any order."""

    def __init__(
        self, recipe: Recipe, photos: Photos, triplets: Sequence[Triplet], tokenizer: Tokenizer, sentences: int = 0
    ) -> None:
        self.recipe, self.photos, self.triplets, self.sentences = recipe, photos, triplets, sentences
        self.bare = caption_corpus(photos.captions, triplets)
        self.spec: TileSpec = recipe.model.tiles()
        self.teller = Teller(self.spec, tokenizer)
        self.words = caption_words(photos.captions, tokenizer)
        self._vocabulary = recipe.model.decoder.vocabulary  # rows of the table; a small corpus may fill fewer
        self.log_prior = _log_prior(self.words, self._vocabulary)
        self._starts = {what: self._seen(what) for what in ("photos", "triplets", "bare", "sentences")}

    def make(self, step: int) -> Batch:
        stage = self.recipe.stage_at(step)
        rng = random.Random(f"{self.recipe.seed}/{step}")
        rows = self._rows("photos", step, stage.photos, len(self.photos)) if stage.weights.of_photos else []
        captions = [rng.choice(self.photos.captions[i]) for i in rows]
        views = [self._view(i, caption, stage, rng) for i, caption in zip(rows, captions, strict=True)]
        words = torch.zeros(len(rows), self._vocabulary)
        for row, i in enumerate(rows):
            ids, share = self.words[i]
            words[row, ids] = share
        aside = step % stage.aside_every == 0
        drawn = aside and stage.weights.scenes + stage.weights.changes + stage.weights.pages > 0
        before = [random_scene(rng) for _ in range(stage.scenes if drawn else 0)]
        changes = [random_change(scene, rng) for scene in before]
        pictures = []
        for scene in (*before, *(after for _, after in changes)):
            size = _size(224, rng) if stage.layout == "full" else (224, 224)
            pictures.append(self._prepare(draw(scene, rng, size), stage))
        triplets = self._rows("triplets", step, stage.triplets, len(self.triplets)) if aside and stage.weights.nli else []
        others = [
            rng.choice([c for c in self.photos.captions[i] if c != own] or [own]) for i, own in zip(rows, captions, strict=True)
        ]
        bare = self._rows("bare", step, stage.bare, len(self.bare)) if stage.weights.language else []
        before_captions = [scene.caption(rng) for scene in before]
        changed_captions = [scene.caption(rng) for _, scene in changes]
        pages = [self._page(text, stage) for text in before_captions[: stage.pages]] if stage.weights.pages else []
        sentences = self._rows("sentences", step, stage.sentences, self.sentences) if stage.weights.taught else []
        told = self.teller.make(stage.told, random.Random(f"{self.recipe.seed}/told/{step}")) if stage.weights.told else None
        return Batch(
            photos=_together([picture for picture, _ in views]),
            boxes=torch.tensor([box for _, box in views]).view(-1, 4),
            captions=captions,
            others=others,
            words=words,
            scenes=_together(pictures[: len(before)]),
            changed=_together(pictures[len(before) :]),
            scene_captions=before_captions,
            changed_captions=changed_captions,
            changes=[text for text, _ in changes],
            triplets=[self.triplets[i] for i in triplets],
            bare=[self.bare[i] for i in bare],
            rows=rows,
            sentences=sentences,
            pages=_together(pages),
            told=told,
        )

    def whole(self, rows: Sequence[int]) -> Tensor:
        """Photos as they are, on the base tile: (n, 3, tile, tile) uint8"""
        images = [Image.fromarray(self.photos.pixels[i].transpose(1, 2, 0)) for i in rows]
        return torch.from_numpy(np.stack([self._on_tile(image) for image in images]))

    def _seen(self, what: str) -> list[int]:
        """Items of a kind consumed before each step."""
        counts = [0]
        for stage in self.recipe.stages:
            counts += [getattr(stage, what)] * stage.steps
        return list(itertools.accumulate(counts))

    def _rows(self, what: str, step: int, n: int, total: int) -> list[int]:
        first = self._starts[what][step]
        return shuffled(f"{self.recipe.seed}/{what}", total, first, first + n)

    def _view(self, i: int, caption: str, stage: Stage, rng: random.Random) -> tuple[Tiles | np.ndarray, Box]:
        """One photo: a random crop, mirrored unless its caption tells left from right."""
        image = Image.fromarray(self.photos.pixels[i].transpose(1, 2, 0))
        mirrored = rng.random() < 0.5 and "left" not in caption and "right" not in caption
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        side = image.width
        share, stretch = rng.uniform(stage.crop, 1.0), rng.uniform(0.8, 1.25) if stage.crop < 1 else 1.0
        width = min(side, round(side * (share * stretch) ** 0.5))
        height = min(side, round(side * (share / stretch) ** 0.5))
        left, top = rng.randint(0, side - width), rng.randint(0, side - height)
        image = image.crop((left, top, left + width, top + height))
        edges = (side - left, side - left - width) if mirrored else (left, left + width)
        box = (edges[0] / side, top / side, edges[1] / side, (top + height) / side)
        if stage.layout == "full":
            height, width = _size(max(width, height), rng)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return self._prepare(image, stage), box

    def _page(self, text: str, stage: Stage) -> Tiles | np.ndarray:
        """A rendered text. A stage on the base tile sees its two tiles alone, side by side: (3, tile, 2 tiles)."""
        tiles = cut(render(text), self.spec)
        return tiles if stage.layout == "full" else np.concatenate(list(tiles.pixels[1:]), axis=2)

    def _prepare(self, image: Image.Image, stage: Stage) -> Tiles | np.ndarray:
        if stage.layout == "full":
            return cut(image, self.spec)
        return self._on_tile(image)

    def _on_tile(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((self.spec.tile, self.spec.tile), self.spec.resample)).transpose(2, 0, 1)


def caption_words(captions: Sequence[Sequence[str]], tokenizer: Tokenizer) -> list[tuple[Tensor, Tensor]]:
    """For each photo the tokens of all its captions and their shares (sum 1), rare ones weighted up."""
    bags = [Counter(t for e in tokenizer.encode_batch(list(c), add_special_tokens=False) for t in set(e.ids)) for c in captions]
    photos_with = Counter(token for bag in bags for token in bag)
    words = []
    for bag in bags:
        ids = torch.tensor(sorted(bag), dtype=torch.long)
        weight = torch.tensor([bag[int(t)] * np.log((1 + len(bags)) / photos_with[int(t)]) for t in ids], dtype=torch.float32)
        words.append((ids, weight / weight.sum()))
    return words


def _log_prior(words: Sequence[tuple[Tensor, Tensor]], vocabulary: int) -> Tensor:
    """(vocabulary,): logarithm of the mean of all photos' distributions, smoothed."""
    total = torch.full((vocabulary,), 1e-2)
    for ids, share in words:
        total[ids] += share
    return (total / total.sum()).log()


def _size(long_side: int, rng: random.Random) -> tuple[int, int]:
    """(height, width) of a photo with one of the usual shapes."""
    aspect = rng.choice(_ASPECTS)
    return (round(long_side / aspect), long_side) if aspect >= 1 else (long_side, round(long_side * aspect))


def _together(pictures: list[Tiles | np.ndarray]) -> Pictures:
    if not pictures or isinstance(pictures[0], Tiles):
        return [p for p in pictures if isinstance(p, Tiles)]
    return torch.from_numpy(np.stack([p for p in pictures if isinstance(p, np.ndarray)]))
