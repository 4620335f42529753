"""First weights. A from-scratch run of minutes gains from every prior that can be written down.

Patches: random Gaussian weights. Positions: two-dimensional sinusoids, so that neighbours begin alike. Residual
branches: scaled down with depth, as in GPT-2, so that the sum over layers keeps its size.
"""

import math

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
            one = name.endswith("norm.weight") or "norm" in name and name.endswith("weight")
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
