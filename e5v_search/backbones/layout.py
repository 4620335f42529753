"""How the rows of a batch lie in the decoder: side by side, padded to the longest, or packed, one behind the other.

The decoder works on tokens, whatever places they have: (b, t, ...) padded, (n, ...) packed. What a token sees of the others is
its layout's to know. b rows, t tokens of the longest, n of all; k and v may have fewer heads than q.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e5v_search.backbones.upload import indices

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
"""Attention of packed rows, (q, k, v, starts of q, starts of k, longest of q, longest of k) -> as q.

q (n, heads, d_head), k and v (m, key heads, d_head); starts (b + 1,) int32: where each row begins, and where the last one ends.
The last query of a row sees all its keys, the one before it all but one, and so on.
"""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (b, t, heads, d_head), k and v (b, m, key heads, d_head) -> as q. Causal without a mask (b or 1, 1, t or 1, m)."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return y.transpose(1, 2)


class Layout(ABC):
    """Keys, values and queries have a token's places, then (heads, d_head); those of last tokens alone (b, heads, d_head)."""

    positions: Tensor
    """Each token's place in its row, in the shape of the places or one that broadcasts to it."""

    def behind_prefix(self, layer: int, which: int, new: Tensor) -> Tensor:
        """A layer's new keys (which = 0) or values (1) behind those that the rows go on from, where they do."""
        return new

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each token sees what is before it in its row, and itself."""

    @abstractmethod
    def last(self, x: Tensor) -> Tensor:
        """(places, ...) -> (b, ...), what stands at each row's last token."""

    @abstractmethod
    def attend_last(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each row's last token sees all of its row."""


class Padded(Layout):
    """(b, t, ...): shorter rows are padded on the *right*, where nothing real can see the padding.

    `lengths` (b,) are the real tokens of each row. Every key stands at its row's own position, so causality is all that a mask
    has to hold. Without prefixes nothing here waits for the device of `lengths`, or for another.
    """

    def __init__(self, lengths: Tensor, longest: int, prefixes: Sequence[Tensor] | None = None) -> None:
        self._ends, self._prefixes = lengths - 1, prefixes
        self._keys = torch.arange(longest, device=lengths.device)
        self.positions, self._mask = self._keys[None], None
        if prefixes is not None:
            past = [prefix.shape[2] for prefix in prefixes]
            self.positions = indices(past, lengths.device)[:, None] + self._keys
            self._keys = torch.arange(max(past) + longest, device=lengths.device)
            self._mask = self._keys <= self.positions[:, None, :, None]

    @classmethod
    def of(cls, rows: Sequence[Tensor], prefixes: Sequence[Tensor] | None = None) -> tuple[Tensor, "Padded"]:
        """Rows (n_i, d) -> (b, t, d) and how they lie."""
        x = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        return x, cls(indices([len(row) for row in rows], x.device), x.shape[1], prefixes)

    def behind_prefix(self, layer: int, which: int, new: Tensor) -> Tensor:
        if self._prefixes is None:
            return new
        b, t, *head = new.shape
        if len(self._prefixes) == 1:
            return torch.cat((self._prefixes[0][layer, which].expand(b, -1, -1, -1), new), dim=1)
        # what is left behind the shorter ones is masked, but a stray NaN would come through
        out = new.new_zeros(b, len(self._keys), *head)
        for row, prefix in enumerate(self._prefixes):
            p = prefix.shape[2]
            out[row, :p], out[row, p : p + t] = prefix[layer, which], new[row]
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, self._mask)

    def last(self, x: Tensor) -> Tensor:
        b = len(self._ends)
        return x.expand(b, *x.shape[1:])[torch.arange(b, device=x.device), self._ends]

    def split(self, x: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """(b, t, ...) -> (n_i, ...) of each row."""
        return [row[:n] for row, n in zip(x, lengths, strict=True)]

    def attend_last(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q[:, None], k, v, self._keys <= self.last(self.positions)[:, None, None, None])[:, 0]


class Packed(Layout):
    """(n, ...): row behind row with nothing between. `kernel` is what attends to them."""

    def __init__(
        self, lengths: Sequence[int], device: torch.device, kernel: Kernel, prefixes: Sequence[Tensor] | None = None
    ) -> None:
        self._lengths, self._kernel, self._prefixes = list(lengths), kernel, prefixes
        b, total = len(lengths), sum(lengths)
        past = [prefix.shape[2] for prefix in prefixes] if prefixes else [0]
        if len(past) < b:
            past *= b
        self._longest, self._longest_seen = max(lengths), max(p + n for p, n in zip(past, lengths, strict=True))
        new, old = indices(lengths, device), indices(past, device)
        starts, starts_seen = (F.pad(n.cumsum(0), (1, 0)) for n in (new, old + new))
        self.positions = torch.arange(total, device=device) + (old - starts[:-1]).repeat_interleave(new, output_size=total)
        self._last = starts[1:] - 1
        self._starts, self._starts_seen = starts.int(), starts_seen.int()
        self._each = torch.arange(b + 1, dtype=torch.int32, device=device)
        if prefixes is not None and len(prefixes) < b:
            # each row's keys, by where they lie when the prefix of all stands once before all that is new
            total += sum(past)
            row = torch.arange(b, device=device).repeat_interleave(old + new, output_size=total)
            place = torch.arange(total, device=device) - starts_seen[row]
            self._shared = place + starts[row] * (place >= past[0])

    @classmethod
    def of(cls, rows: Sequence[Tensor], kernel: Kernel, prefixes: Sequence[Tensor] | None = None) -> tuple[Tensor, "Packed"]:
        """Rows (n_i, d) -> (n, d) and how they lie."""
        x = torch.cat(list(rows))
        return x, cls([len(row) for row in rows], x.device, kernel, prefixes)

    def behind_prefix(self, layer: int, which: int, new: Tensor) -> Tensor:
        if self._prefixes is None:
            return new
        old = [prefix[layer, which] for prefix in self._prefixes]
        if len(old) < len(self._lengths):
            return torch.cat((old[0], new))[self._shared]
        return torch.cat([part for pair in zip(old, torch.split(new, self._lengths), strict=True) for part in pair])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._kernel(q, k, v, self._starts, self._starts_seen, self._longest, self._longest_seen)

    def last(self, x: Tensor) -> Tensor:
        return x[self._last]

    def split(self, x: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """(n, ...) -> (n_i, ...) of each row."""
        return list(torch.split(x, list(lengths)))

    def attend_last(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._kernel(q, k, v, self._each, self._starts_seen, 1, self._longest_seen)
