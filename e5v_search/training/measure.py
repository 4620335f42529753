"""Held-out measurements cheap enough for the middle of a run: recall on photos and scenes, Spearman on STS pairs."""

import csv
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from e5v_search.backbones.tiles import TileSpec, cut
from e5v_search.training.data import Photos
from e5v_search.training.encode import BatchEncoder
from e5v_search.training.scenes import draw, random_change, random_scene

_BATCH = 64


def recalls(
    queries: Tensor, gallery: Tensor, right: Callable[[int], set[int]], ks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """Share of queries with a right item among the k best, for each k. Rows of both have length 1."""
    best = (queries @ gallery.T).topk(min(max(ks), len(gallery)), dim=1).indices.tolist()
    return {k: float(np.mean([bool(right(q).intersection(row[:k])) for q, row in enumerate(best)])) for k in ks}


@torch.inference_mode()
def photo_recalls(encoder: BatchEncoder, photos: Photos, layout: str, spec: TileSpec, captions: int = 5) -> dict[str, float]:
    """Recall@1/5/10 between photos and their first `captions` captions, both ways (any-hit)."""
    images = embed_pictures(encoder, [Image.fromarray(p.transpose(1, 2, 0)) for p in photos.pixels], layout, spec)
    owner = [i for i, own in enumerate(photos.captions) for _ in own[:captions]]
    texts = embed_texts(encoder, [caption for own in photos.captions for caption in own[:captions]])
    to_image = recalls(texts, images, lambda q: {owner[q]})
    to_text = recalls(images, texts, lambda q: {j for j, i in enumerate(owner) if i == q})
    return {f"t2i_r{k}": v for k, v in to_image.items()} | {f"i2t_r{k}": v for k, v in to_text.items()}


@torch.inference_mode()
def scene_recalls(encoder: BatchEncoder, n: int, layout: str, spec: TileSpec, seed: str = "held out") -> dict[str, float]:
    """Recall@1 over n scenes and, for changes, over those scenes and their n changed ones."""
    rng = random.Random(seed)
    scenes = {scene.facts: scene for scene in (random_scene(rng) for _ in range(3 * n))}
    before = list(scenes.values())[:n]
    changes = [random_change(scene, rng) for scene in before]
    after = [scene for _, scene in changes]
    drawn = [draw(scene, rng) for scene in (*before, *after)]
    pictures = embed_pictures(encoder, drawn, layout, spec, "cirr")
    texts = embed_texts(encoder, [scene.caption(rng) for scene in before])
    composed = embed_composed(encoder, drawn[:n], [text for text, _ in changes], layout, spec)
    where: dict[object, set[int]] = {}
    for i, scene in enumerate((*before, *after)):
        where.setdefault(scene.facts, set()).add(i)
    return {
        "scene_t2i_r1": recalls(texts, pictures[:n], lambda q: {q}, (1,))[1],
        "scene_composed_r1": recalls(composed, pictures, lambda q: where[after[q].facts], (1,))[1],
    }


@torch.inference_mode()
def sts_spearman(encoder: BatchEncoder, path: Path) -> float:
    """Spearman correlation over a file of STS-B (score in column 5, sentences in 6 and 7)."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if len(row) >= 7]
    a, b = (embed_texts(encoder, [row[i] for row in rows], "sts") for i in (5, 6))
    return float(np.corrcoef(_ranks((a * b).sum(dim=1).numpy()), _ranks(np.array([float(row[4]) for row in rows])))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks with ties at their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    means: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return means


def embed_texts(encoder: BatchEncoder, texts: Sequence[str], prompts: str = "retrieval") -> Tensor:
    rows = [encoder.texts(texts[i : i + 256], prompts) for i in range(0, len(texts), 256)]
    return torch.nn.functional.normalize(torch.cat(rows), dim=-1)


def embed_pictures(
    encoder: BatchEncoder, pictures: Sequence[Image.Image], layout: str, spec: TileSpec, prompts: str = "retrieval"
) -> Tensor:
    rows = [
        encoder.pictures(_features(encoder, pictures[i : i + _BATCH], layout, spec), prompts)
        for i in range(0, len(pictures), _BATCH)
    ]
    return torch.nn.functional.normalize(torch.cat(rows), dim=-1)


def embed_composed(
    encoder: BatchEncoder, pictures: Sequence[Image.Image], changes: Sequence[str], layout: str, spec: TileSpec
) -> Tensor:
    rows = [
        encoder.composed(_features(encoder, pictures[i : i + _BATCH], layout, spec), changes[i : i + _BATCH])
        for i in range(0, len(pictures), _BATCH)
    ]
    return torch.nn.functional.normalize(torch.cat(rows), dim=-1)


def _features(encoder: BatchEncoder, pictures: Sequence[Image.Image], layout: str, spec: TileSpec) -> Tensor | list[Tensor]:
    if layout == "full":
        return encoder.full_features([cut(picture, spec) for picture in pictures])
    small = [np.asarray(p.resize((spec.tile, spec.tile), spec.resample)).transpose(2, 0, 1) for p in pictures]
    return encoder.base_features(torch.from_numpy(np.stack(small)))
