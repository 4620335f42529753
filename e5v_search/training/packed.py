"""Texts through the decoder with no token computed twice and none for padding.

Attention is causal, so what a layer makes of a token depends on the tokens before it alone. Rows that begin alike, as all
do under one prompt, share their beginnings: the distinct beginnings are the nodes of a tree, and linear layers, where the
time goes, see each node once. Only attention lays the rows out one by one.

What is shared is shared in chance too: with dropout inside the layers, one draw serves all rows of a beginning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e5v_search.backbones.modules import TextDecoder, TextLayer, rotate


@dataclass(frozen=True)
class Packed:
    """n distinct beginnings of b rows of at most t tokens."""

    tokens: Tensor  # (n,) the last token of each beginning
    rows: Tensor  # (b, t) the beginning that ends at each place of each row; behind the row's end any
    first: Tensor  # (n,) a place in the flattened rows where each beginning ends
    last: Tensor  # (b,) the last place of each row


def pack(ids: Sequence[Sequence[int]], device: torch.device) -> Packed:
    """Rows of token ids, none empty, as a tree."""
    longest = max(map(len, ids))
    nodes: dict[tuple[int, int], int] = {}  # beginning without its last token, last token -> beginning
    first, rows = [], []
    for r, row in enumerate(ids):
        node, path = -1, []
        for place, token in enumerate(row):
            key = node, token
            if key not in nodes:
                nodes[key] = len(nodes)
                first.append(r * longest + place)
            path.append(node := nodes[key])
        rows.append(path + [0] * (longest - len(path)))
    last = [len(row) - 1 for row in ids]
    tokens = [token for _, token in nodes]
    return Packed(*(torch.tensor(values, device=device) for values in (tokens, rows, first, last)))


def last_states(decoder: TextDecoder, packed: Packed) -> Tensor:
    """(b, d): the state at each row's last token after the final norm, as `decoder` gives it for padded rows."""
    b, t = packed.rows.shape
    x = decoder.embed_tokens(packed.tokens)
    rotation = decoder.rotation(torch.arange(t, device=x.device)[None], x)
    ends = packed.rows[torch.arange(b, device=x.device), packed.last]

    def through(i: int, x: Tensor) -> Tensor:
        layer = cast(TextLayer, decoder.layers[i])
        attention = layer.self_attn
        h = layer.input_layernorm(x)

        def heads(projection: nn.Module) -> Tensor:
            flat: Tensor = projection(h)
            return flat[packed.rows].reshape(b, t, -1, attention.head_dim).transpose(1, 2)

        k, v = rotate(heads(attention.k_proj), rotation), heads(attention.v_proj)
        if i == len(decoder.layers) - 1:
            seen = torch.arange(t, device=x.device) <= packed.last[:, None, None, None]
            of_ends: Tensor = layer(x[ends, None], h[ends, None], k, v, decoder.rotation(packed.last[:, None], x), seen)
            return of_ends[:, 0]
        q = rotate(heads(attention.q_proj), rotation)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=attention.grouped)
        x = x + attention.o_proj(mixed.transpose(1, 2).reshape(b * t, -1)[packed.first])
        out: Tensor = x + layer.mlp(layer.post_attention_layernorm(x))
        return out

    states: Tensor = decoder.norm(decoder.in_turn(through, x))
    return states
