"""Texts through the decoder with no token computed twice and none for padding.

Attention is causal, so what a layer makes of a token depends on the tokens before it alone. Rows that begin alike, as all
do under one prompt, share their beginnings: the distinct beginnings are the nodes of a tree, and linear layers, where the
time goes, see each node once. Only attention lays the rows out one by one.

What is shared is shared in chance too: with dropout inside the layers, one draw serves all rows of a beginning.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from e5v_search.backbones.layout import Layout, attention
from e5v_search.backbones.modules import TextDecoder


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


class _Tree(Layout):
    """(n, ...): the beginnings. Attention alone lays them out as the rows (b, t, ...) that they make up."""

    def __init__(self, packed: Packed) -> None:
        b, t = packed.rows.shape
        self._rows, self._first = packed.rows, packed.first
        self.positions = packed.first % t
        self._ends = packed.rows[torch.arange(b, device=packed.last.device), packed.last]
        self._seen = torch.arange(t, device=packed.last.device) <= packed.last[:, None, None, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q[self._rows], k[self._rows], v[self._rows]).flatten(0, 1)[self._first]

    def last(self, x: Tensor) -> Tensor:
        return x[self._ends]

    def attend_last(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q[:, None], k[self._rows], v[self._rows], self._seen)[:, 0]


def last_states(decoder: TextDecoder, packed: Packed) -> Tensor:
    """(b, d): the state at each row's last token after the final norm, as `decoder` gives it for padded rows."""
    states: Tensor = decoder(decoder.embed_tokens(packed.tokens), _Tree(packed))
    return states
