"""What the published training code does otherwise than its paper says. To measure what it matters, not to train with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from e5v_search.backbones.modules import TextDecoder, TextLayer
from e5v_search.backbones.prompt_encoder import PromptEncoder


def plain_ids(prompts: PromptEncoder, prompt: str, sentences: Sequence[str]) -> list[list[int]]:
    """`prompts.encode`, but underscores become blanks after wrapping, which turns special tokens into plain text, and the
    blank end of the wrapper is cut off."""
    return prompts.fill(prompts.wording.chat.replace("{}", prompt).replace("_", " ").strip(), sentences)


def attended(decoder: TextDecoder, ids: Sequence[list[int]], pad: int) -> Tensor:
    """Last states (n, d) of rows padded on the left to the longest of them, under the mask `ids > 0`: pads are read like
    any word, and the token 0 (LLaMA-3's "!") is not. So a row's result depends on the rows beside it.
    """
    longest = max(map(len, ids))
    device = decoder.embed_tokens.weight.device
    padded = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=device)
    x = decoder.embed_tokens(padded)
    rotation = decoder.rotation(torch.arange(longest, device=device)[None], x)
    causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    mask = causal & (padded > 0)[:, None, None]
    # a query that may look nowhere would be no number; what such a place gives is never read
    mask = mask | (causal & ~mask.any(dim=-1, keepdim=True))

    def through(i: int, x: Tensor) -> Tensor:
        layer = decoder.layers[i]
        assert isinstance(layer, TextLayer)
        h = layer.input_layernorm(x)
        k, v = layer.self_attn.keys_values(h, rotation)
        y: Tensor = layer(x, h, k, v, rotation, mask)
        return y

    last: Tensor = decoder.norm(decoder.in_turn(through, x)[:, -1])
    return last
