"""First weights. A from-scratch run of minutes gains from every prior that can be written down.

Words: by the company they keep in captions. Patches: principal
components of photos. Positions: two-dimensional sinusoids, so that neighbours begin alike. Residual
branches: scaled down with depth, as in GPT-2, so that the sum over layers keeps its size.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from e5v_search.backbones.modules import LlavaNext


def initialise(model: LlavaNext, generator: torch.Generator) -> None:
    """Fill every parameter of `model` from `generator`."""
    depth = {
        "vision_tower": len(model.vision_tower.encoder.layers),
        "language_model": len(model.language_model.layers),
    }
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        if parameter.dim() < 2:
            one = "norm" in name and name.endswith("weight")
            nn.init.constant_(parameter, 1.0 if one else 0.0)
        elif name.endswith(("out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight")):
            _normal(parameter, 1 / math.sqrt(2 * depth[part] * parameter.shape[1]), generator)
        elif name.endswith(("embed_tokens.weight", "class_embedding", "image_newline")):
            _normal(parameter, 0.02, generator)
        elif name.endswith("patch_embedding.weight"):
            _normal(parameter, 1 / math.sqrt(parameter[0].numel()), generator)
        elif not name.endswith("position_embedding.weight"):
            _normal(parameter, 1 / math.sqrt(parameter.shape[1]), generator)
    with torch.no_grad():
        positions = model.vision_tower.embeddings.position_embedding.weight
        positions[0] = 0
        positions[1:] = 0.5 * _sinusoids(math.isqrt(len(positions) - 1), positions.shape[1])
    for vector in (model.vision_tower.embeddings.class_embedding, model.image_newline):
        _normal(vector, 0.02, generator)


def initialise_words(model: LlavaNext, bags: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Give words that occur in the same photos' captions similar embeddings: a truncated SVD of words by photos.

    `bags` holds the tokens of each photo's captions with their weights. Tokens of no caption keep what they have.
    """
    table = model.language_model.embed_tokens.weight
    counts = torch.zeros(len(table), len(bags))
    for photo, (ids, share) in enumerate(bags):
        counts[ids, photo] = share
    seen = counts.sum(dim=1) > 0
    rank = min(table.shape[1], *counts.shape)
    u, s, _ = torch.svd_lowrank(nn.functional.normalize(counts[seen], dim=1), q=rank, niter=2)
    vectors = nn.functional.normalize(u * s.sqrt(), dim=1)
    with torch.no_grad():
        size = table.norm(dim=1).mean()
        table[seen, :rank] = vectors * size
        table[seen, rank:] = 0.0


def initialise_taught_words(model: LlavaNext, words: Tensor, keep: Sequence[int]) -> None:
    """Give every token the direction (vocabulary, d) that a teacher has for it, in its old size; the rows `keep` stay."""
    table = model.language_model.embed_tokens.weight
    with torch.no_grad():
        kept = table[list(keep)].clone()
        n = min(len(table), len(words))
        table[:n] = words[:n] * table[:n].norm(dim=1).mean()
        table[list(keep)] = kept


def initialise_taught_projector(model: LlavaNext, patches: Iterable[Tensor], targets: Tensor) -> None:
    """Let a photo's visual tokens be, on average, what the teacher says of it: its words, as far as a linear map knows them.

    patches: what the vision tower makes of all photos (n_i, p, d_vision), in pieces; targets (n, d). A ridge regression
    gives the projector's second layer; gradients alone would take hundreds of steps to turn one space into the other.
    """
    projector, size = model.multi_modal_projector, model.language_model.embed_tokens.weight.norm(dim=1).mean()
    with torch.no_grad():
        tokens = [projector.act(projector.linear_1(some)) for some in patches]
        _regress(projector.linear_2, torch.cat([some.mean(dim=1) for some in tokens]), targets)
        # tokens as long as words
        scale = size / projector.linear_2(tokens[0]).norm(dim=-1).mean()
        projector.linear_2.weight.mul_(scale)
        projector.linear_2.bias.mul_(scale)


def initialise_head(head: nn.Linear, patches: Tensor, cells: Tensor) -> None:
    """Let the head be what tells a teacher's cells (n, d) best from the tower's patches (n, d_vision) as they are."""
    with torch.no_grad():
        _regress(head, patches, cells)


def initialise_patches(model: LlavaNext, pixels: Tensor) -> None:
    """Let the patch embedding read the principal components of photos' patches, the strong ones damped.

    pixels (n, 3, height, width), normalised. Random weights would see little but the mean brightness: natural
    patches have nearly all their energy in a few components.
    """
    weight = model.vision_tower.embeddings.patch_embedding.weight
    size = weight.shape[-1]
    patches = nn.functional.unfold(pixels, size, stride=size).transpose(1, 2).flatten(0, 1)
    energy, components = torch.linalg.eigh(patches.T @ patches / len(patches))
    rank = min(weight.shape[0], len(energy))
    strongest = components[:, -rank:].flip(1) * energy[-rank:].flip(0).clamp(min=1e-6) ** -0.375
    with torch.no_grad():
        weight[:rank] = strongest.T.reshape(rank, *weight.shape[1:])


def _regress(layer: nn.Linear, x: Tensor, y: Tensor) -> None:
    """Ridge regression: rows of `x` (n, d) to rows of `y` (n, d')."""
    middle, centre = x.mean(dim=0), y.mean(dim=0)
    covariance = (x - middle).T @ (x - middle)
    covariance += 1e-2 * covariance.diagonal().mean() * torch.eye(len(covariance))
    weight = torch.linalg.solve(covariance, (x - middle).T @ (y - centre)).T
    layer.weight.copy_(weight)
    layer.bias.copy_(centre - weight @ middle)


def _normal(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    with torch.no_grad():
        parameter.normal_(0.0, std, generator=generator)


def _sinusoids(side: int, width: int) -> Tensor:
    """(side², width): a quarter of the columns each for sine and cosine of row and column, at falling frequencies."""
    quarter = width // 4
    omega = 1.0 / 100 ** (torch.arange(quarter) / quarter)
    rows, cols = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [torch.outer(axis.flatten().float(), omega) for axis in (rows, cols)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)
