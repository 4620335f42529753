"""Attention of packed rows on a CUDA device: the flash kernel for rows of any lengths that torch brings with it."""

import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from e5v_search.backbones.config import TextConfig
from e5v_search.backbones.layout import Kernel, Packed, Padded

_log = logging.getLogger(__name__)

_AMPERE = (8, 0)
_LARGEST_HEAD, _HEAD_STEP = 256, 8  # d_head that the kernel takes
_SAME = 0.999  # half precision stays above 0.9999; a key too many or too few falls far below

_ROWS, _PREFIXES = (70, 1, 9), (130, 1, 33)  # tokens, to check a kernel with

Lay = Callable[[Sequence[Tensor], Sequence[Tensor] | None], tuple[Tensor, Padded | Packed]]


def flash(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int) -> Tensor:
    """A `Kernel`. Half precision only."""
    # torch.nn.attention.varlen calls just this, but imports torch's compiler first, which takes as long as torch itself
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, starts_q, starts_k, longest_q, longest_k, 0.0, is_causal=True, return_debug_mask=False
    )[0]
    return out


def kernel_for(c: TextConfig, device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """`flash`, where device, precision and model are such that it can serve and it proves right; else None."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    if torch.cuda.get_device_capability(device) < _AMPERE or c.head_dim % _HEAD_STEP or c.head_dim > _LARGEST_HEAD:
        return None
    return proven(flash, c, device, dtype)


def proven(kernel: Kernel, c: TextConfig, device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """`kernel`, or None and a line in the log where it does not give what padded rows give."""
    try:
        cosine = agreement(kernel, c, device, dtype)
    except (RuntimeError, AttributeError, TypeError) as error:  # what torch raises for an operator it has not, or not so
        reason = str(error).partition("\n")[0]
    else:
        if cosine > _SAME:
            return kernel
        reason = f"it comes as near as {cosine:.4f} to what it should give"
    _log.warning("attention of packed rows does not work on %s (%s): rows are padded instead", device, reason)
    return None


def agreement(kernel: Kernel, c: TextConfig, device: torch.device, dtype: torch.dtype) -> float:
    """The least cosine, over all tokens and heads, of what a few packed rows get on `device` to what the same rows get
    padded, in float32 on a processor: by themselves, behind one prefix, and behind one each.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, c.head_dim, generator=generator).to(dtype)

    key_heads = c.num_key_value_heads
    rows = [[drawn(n, heads) for n in _ROWS] for heads in (c.num_attention_heads, key_heads, key_heads)]
    prefixes = [drawn(1, 2, n, key_heads) for n in _PREFIXES]
    cosines = []
    for some in ([], prefixes[:1], prefixes):
        there = [[x.to(device) for x in each] for each in rows], [x.to(device) for x in some]
        here = [[x.float() for x in each] for each in rows], [x.float() for x in some]
        got = _attended(*there, lambda rows, prefixes: Packed.of(rows, kernel, prefixes))
        cosines.append(F.cosine_similarity(got.float().cpu(), _attended(*here, Padded.of), dim=-1))
    return float(torch.cat(cosines).min())


def _attended(rows: list[list[Tensor]], prefixes: list[Tensor], lay: Lay) -> Tensor:
    """What every token, and then again every last one, gets of rows of queries, keys and values laid out by `lay`."""
    (q, layout), *new = (lay(some, prefixes or None) for some in rows)
    k, v = (layout.behind_prefix(0, j, x) for j, (x, _) in enumerate(new))
    return torch.cat([*layout.split(layout.attend(q, k, v), _ROWS), layout.attend_last(layout.last(q), k, v)])
