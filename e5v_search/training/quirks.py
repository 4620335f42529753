"""What the published training code does otherwise than its paper says. To measure what it matters, not to train with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from e5v_search.backbones.layout import Layout, attention
from e5v_search.backbones.modules import TextDecoder
from e5v_search.backbones.prompt_encoder import PromptEncoder


def plain_ids(prompts: PromptEncoder, prompt: str, sentences: Sequence[str]) -> list[list[int]]:
    """`prompts.encode`, but underscores become blanks after wrapping, which turns special tokens into plain text, and the
    blank end of the wrapper is cut off."""
    return prompts.fill(prompts.wording.chat.replace("{}", prompt).replace("_", " ").strip(), sentences)


class _PaddedLeft(Layout):
    """(b, t, ...), all rows at an end. mask (b, 1, t, t) is what each token sees."""

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask
        self.positions = torch.arange(mask.shape[-1], device=mask.device)[None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, self._mask)

    def last(self, x: Tensor) -> Tensor:
        return x[:, -1]

    def attend_last(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q[:, None], k, v, self._mask[:, :, -1:])[:, 0]


def attended(decoder: TextDecoder, ids: Sequence[list[int]], pad: int) -> Tensor:
    """Last states (n, d) of rows padded on the left to the longest of them, under the mask `ids > 0`: pads are read like
    any word, and the token 0 (LLaMA-3's "!") is not. So a row's result depends on the rows beside it.
    """
    longest = max(map(len, ids))
    device = decoder.embed_tokens.weight.device
    padded = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=device)
    causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    mask = causal & (padded > 0)[:, None, None]
    # a query that may look nowhere would be no number; what such a place gives is never read
    mask = mask | (causal & ~mask.any(dim=-1, keepdim=True))
    last: Tensor = decoder(decoder.embed_tokens(padded), _PaddedLeft(mask))
    return last
