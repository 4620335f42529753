"""Packed texts against the padded rows that the engine's decoder takes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from e5v_search.backbones.config import TextConfig
from e5v_search.backbones.layout import Padded
from e5v_search.backbones.modules import TextDecoder
from e5v_search.training.packed import last_states, pack

VOCABULARY, D = 6, 32
CPU = torch.device("cpu")
Ids = list[list[int]]


def decoder(key_value_heads: int = 2, layers: int = 3) -> TextDecoder:
    made = TextDecoder(TextConfig("llama", VOCABULARY, D, 48, layers, 4, key_value_heads))
    generator = torch.Generator().manual_seed(9)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3, generator=generator)
    return made


def padded(d: TextDecoder, ids: Ids) -> Tensor:
    rows = [d.embed_tokens(torch.tensor(row)) for row in ids]
    out: Tensor = d(*Padded.of(rows))
    return out


def gradients(d: TextDecoder, hidden: Tensor) -> list[Tensor]:
    value = (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum()
    return list(torch.autograd.grad(value, list(d.parameters())))


# few tokens, so that rows begin alike, are beginnings of others, or the same
BATCHES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=8)


@settings(max_examples=50)
@given(ids=BATCHES, key_value_heads=st.sampled_from([1, 4]), layers=st.integers(1, 2))
def test_packed_rows_give_what_padded_ones_give(ids: Ids, key_value_heads: int, layers: int) -> None:
    d = decoder(key_value_heads, layers)
    got, wanted = last_states(d, pack(ids, CPU)), padded(d, ids)
    assert torch.allclose(got, wanted, atol=1e-5)
    for a, b in zip(gradients(d, got), gradients(d, wanted), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


def test_layers_computed_again_give_the_same() -> None:
    d = decoder()
    ids = [[1, 2, 3], [1, 2], [1, 4, 4, 5, 0]]
    kept = gradients(d, last_states(d, pack(ids, CPU)))
    d.checkpointing = True
    again = gradients(d, last_states(d, pack(ids, CPU)))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(kept, again, strict=True))


@given(ids=BATCHES)
def test_each_distinct_beginning_is_there_once(ids: Ids) -> None:
    packed = pack(ids, CPU)
    beginnings = {tuple(row[: j + 1]) for row in ids for j in range(len(row))}
    assert len(packed.tokens) == len(packed.first) == len(beginnings)
    longest = packed.rows.shape[1]
    for r, row in enumerate(ids):
        assert packed.tokens[packed.rows[r, : len(row)]].tolist() == row
        assert packed.last[r] == len(row) - 1
    # where a node first stands, that node stands
    assert packed.rows.flatten()[packed.first].tolist() == list(range(len(beginnings)))
    assert longest == max(map(len, ids))


def test_linear_layers_see_no_token_twice() -> None:
    d = decoder()
    seen: list[int] = []
    handle = d.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[0]))
    with torch.no_grad():
        last_states(d, pack([[1, 2, 3, 4], [1, 2, 3], [1, 2, 5], [1, 2, 5]], CPU))
    handle.remove()
    assert seen == [5]
