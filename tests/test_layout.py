"""Packed rows against padded ones, with attention by its formula in the place of a GPU's kernel."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import replica
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import noise
from torch import Tensor, nn
from vectors import cosines

from e5v_search.backbones import Embedder
from e5v_search.backbones.config import TextConfig
from e5v_search.backbones.layout import Kernel, Packed, Padded
from e5v_search.backbones.llava_next import LlavaNextEmbedder
from e5v_search.backbones.modules import TextDecoder
from e5v_search.backbones.varlen import flash, kernel_for, proven

CPU = torch.device("cpu")
D = 32
PICTURES = [noise(*size) for size in [(56, 56), (100, 100), (333, 500), (1, 5000), (120, 40)]]
CHANGES = ["make it red", "a", "two dogs, at night, in the snow"]


def plain(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int) -> Tensor:
    """Attention by its formula, row by row, in float64; asks for all that the kernel asks for but half precision."""
    assert starts_q.dtype == starts_k.dtype == torch.int32
    assert all(x.stride(-1) == 1 for x in (q, k, v, starts_q, starts_k))
    assert k.shape == v.shape
    assert (starts_q[0], starts_q[-1], starts_k[0], starts_k[-1]) == (0, len(q), 0, len(k))
    assert (longest_q, longest_k) == (starts_q.diff().max(), starts_k.diff().max())
    out = []
    for row in range(len(starts_q) - 1):
        some = q[starts_q[row] : starts_q[row + 1]].double()
        keys, values = (x[starts_k[row] : starts_k[row + 1]].double() for x in (k, v))
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (keys, values))
        assert 0 < len(some) <= len(keys)
        scores = torch.einsum("qhd,khd->hqk", some, keys) / q.shape[2] ** 0.5
        unseen = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(keys) - len(some))
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), values))
    return torch.cat(out).to(q.dtype)


def decoder(key_value_heads: int = 2, layers: int = 2) -> TextDecoder:
    made = TextDecoder(TextConfig("llama", 6, D, 48, layers, 4, key_value_heads))
    generator = torch.Generator().manual_seed(9)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3, generator=generator)
    return made.requires_grad_(False)


def drawn(lengths: list[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, D, generator=generator) for n in lengths]


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(
    lengths=LENGTHS, past=st.integers(0, 2), heads=st.sampled_from([1, 2, 4]), layers=st.integers(1, 3), seed=st.integers(0, 9)
)
def test_packed_rows_give_what_padded_ones_give(lengths: list[int], past: int, heads: int, layers: int, seed: int) -> None:
    """Rows by themselves, behind one prefix of all, behind a prefix each."""
    d, rows, before = decoder(heads, layers), drawn(lengths, seed), [[], [5], [1 + n * 3 % 8 for n in lengths]][past]
    beginnings = drawn(before, seed + 1)
    both = [lambda rows, p: Padded.of(rows, p), lambda rows, p: Packed.of(rows, plain, p)]
    prefixes = [d.prefill(*lay(beginnings, None), before) if before else None for lay in both]
    for a, b in zip(*([] if p is None else p for p in prefixes), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    padded, packed = (d(*lay(rows, p)) for lay, p in zip(both, prefixes, strict=True))
    assert torch.allclose(padded, packed, atol=1e-5)
    # and both are what each whole row gives alone
    whole = [torch.cat((*(beginnings[i : i + 1] if past == 2 else beginnings), row)) for i, row in enumerate(rows)]
    alone = torch.cat([d(*Padded.of([row])) for row in whole])
    assert torch.allclose(packed, alone, atol=1e-5)


def test_linear_layers_see_no_padding() -> None:
    d, rows = decoder(), drawn([7, 1, 3], 0)
    seen: list[torch.Size] = []
    handle = d.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    d(*Packed.of(rows, plain))
    d(*Padded.of(rows))
    handle.remove()
    assert seen == [(11, D), (3, 7, D)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(replica.build(tmp_path_factory.mktemp("replica"))[0])


def load(folder: str, kernel: Kernel | None) -> LlavaNextEmbedder:
    embedder = Embedder.load(folder, device="cpu", dtype="float32")
    assert isinstance(embedder, LlavaNextEmbedder)
    embedder.model.kernel, embedder.batches.packed = kernel, kernel is not None
    return embedder


def test_the_whole_engine_packed_equals_itself_padded(folder: str) -> None:
    padded, packed = load(folder, None), load(folder, plain)
    pairs = [(picture, change) for picture in PICTURES for change in CHANGES]

    def everything(embedder: LlavaNextEmbedder) -> Iterator[np.ndarray]:
        yield embedder.embed_texts(replica.SENTENCES[:1])
        yield embedder.embed_texts([*replica.SENTENCES, "a", "word " * 150, *CHANGES, ""])  # a beginning in common
        yield embedder.embed_images(PICTURES)
        for _ in range(2):  # the second time from memory
            yield embedder.embed_composed(pairs)
        yield from embedder.embed_views([embedder.prepare(p) for p in PICTURES], ["retrieval", "cirr"])
        embedder.batches.tokens = 200
        yield embedder.embed_texts([*replica.SENTENCES, *CHANGES])

    for a, b in zip(everything(padded), everything(packed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert cosines(a, b).min() > 0.999999


# the kernel, as far as it can be looked at without a GPU


def test_the_kernel_is_called_as_torch_itself_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its public function takes longer to import than a search may; it is this test's reference."""
    from torch.nn.attention.varlen import varlen_attn

    names = [argument.name for argument in torch.ops.aten._flash_attention_forward.default._schema.arguments]
    seen = []

    def called(*args: Any, **named: Any) -> tuple[Tensor, ...]:
        seen.append(dict(zip(names, args, strict=False)) | named)
        return tuple(args[0].clone() for _ in range(5))

    q, k, v = torch.randn(6, 4, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    starts_q, starts_k = torch.tensor([0, 5, 6], dtype=torch.int32), torch.tensor([0, 5, 9], dtype=torch.int32)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", called)
    flash(q, k, v, starts_q, starts_k, 5, 5)
    varlen_attn(q, k, v, starts_q, starts_k, 5, 5, window_size=(-1, 0), enable_gqa=True)
    ours, theirs = seen
    assert len(ours) == names.index("return_debug_mask") + 1
    for name, value in ours.items():
        other = theirs[name]
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other


@pytest.mark.parametrize("before", [[], [5], [5, 1, 3]])
def test_the_whole_model_goes_through_the_kernel_without_a_look_at_its_numbers(before: list[int]) -> None:
    """On a device that has none: shapes and precisions of everything, and that nothing waits for a value."""
    calls: list[tuple[Any, ...]] = []

    def seen(*args: Any) -> Tensor:
        calls.append(args)
        return flash(*args)

    with torch.device("meta"), torch.inference_mode():
        d = TextDecoder(TextConfig("llama", 50, 64, 96, 2, 4, 2)).bfloat16()
        rows, beginnings = ([torch.empty(n, 64, dtype=torch.bfloat16) for n in some] for some in ([3, 1, 2], before))
        prefixes = d.prefill(*Packed.of(beginnings, seen), before) if before else None
        out = d(*Packed.of(rows, seen, prefixes))
    assert (out.shape, out.dtype, out.device.type) == ((3, 64), torch.bfloat16, "meta")
    shared = sum(before) * (3 if len(before) == 1 else 1)
    (q, k, _, starts_q, starts_k, *longest), last = calls[-2:]
    assert (q.shape, k.shape, longest) == ((6, 4, 16), (6 + shared, 2, 16), [3, 3 + max(before, default=0)])
    assert (last[0].shape, last[1].shape, last[5]) == ((3, 4, 16), k.shape, 1)
    for *floats, starts_q, starts_k, _, _ in calls:
        assert {x.dtype for x in floats} == {torch.bfloat16}
        assert starts_q.dtype == starts_k.dtype == torch.int32
        assert all(x.device.type == "meta" and x.is_contiguous() for x in (*floats, starts_q, starts_k))


def test_without_a_gpu_or_half_precision_rows_are_padded(folder: str) -> None:
    embedder = Embedder.load(folder, device="cpu", dtype="bfloat16")
    assert isinstance(embedder, LlavaNextEmbedder)
    assert embedder.model.kernel is None
    assert not embedder.batches.packed
    c = embedder.model.config.text_config
    assert kernel_for(c, torch.device("cuda"), torch.float32) is None


@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype", "taken"),
    [
        ((9, 0), 16, torch.bfloat16, True),
        ((8, 0), 256, torch.float16, True),
        ((7, 5), 16, torch.float16, False),
        ((9, 0), 20, torch.bfloat16, False),
        ((9, 0), 264, torch.bfloat16, False),
        ((9, 0), 16, torch.float32, False),
    ],
)
def test_what_the_kernel_takes(
    capability: tuple[int, int], head_dim: int, dtype: torch.dtype, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Kernel] = []
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("e5v_search.backbones.varlen.proven", lambda kernel, *where: tried.append(kernel) or kernel)
    c = TextConfig("llama", 50, 64, 96, 2, 4, 2, head_dim=head_dim)
    assert kernel_for(c, torch.device("cuda"), dtype) is (flash if taken else None)
    assert tried == [flash] * taken


TEXT = TextConfig("llama", 50, 64, 96, 2, 8, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_right_kernel_is_taken(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    assert proven(plain, TEXT, CPU, dtype) is plain
    assert not caplog.records


def looks_from_the_first_key(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | int) -> Tensor:
    """Causal as if the first query were the first key."""
    starts_q, starts_k = rest[:2]
    some = [slice(int(a), int(a) + int(n)) for a, n in zip(starts_k, starts_q.diff(), strict=False)]
    k, v = (torch.cat([x[part] for part in some]) for x in (k, v))
    return plain(q, k, v, starts_q, starts_q, rest[2], rest[2])


def groups_heads_otherwise(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | int) -> Tensor:
    order = torch.arange(q.shape[1]).view(-1, k.shape[1]).t().flatten()
    return plain(q[:, order], k, v, *rest)[:, order.argsort()]


def leaves_one_number_out(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | int) -> Tensor:
    out = plain(q, k, v, *rest)
    out[-1, -1, -1] = torch.nan
    return out


def mixes_rows(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, *rest: int) -> Tensor:
    ends_q, ends_k = starts_q[[0, -1]], starts_k[[0, -1]]
    return plain(q, k, v, ends_q, ends_k, len(q), len(k))


def is_not_there(*inputs: Tensor | int) -> Tensor:
    return torch.ops.aten._no_such_operator(*inputs)


def is_called_otherwise(q: Tensor) -> Tensor:
    return q


WRONG = [
    looks_from_the_first_key,
    groups_heads_otherwise,
    leaves_one_number_out,
    mixes_rows,
    is_not_there,
    is_called_otherwise,
    flash,
]


@pytest.mark.parametrize("kernel", WRONG)
def test_a_wrong_kernel_is_not_taken_and_the_log_says_so(kernel: Kernel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert proven(kernel, TEXT, CPU, torch.bfloat16) is None
    [record] = caplog.records
    assert "rows are padded instead" in record.getMessage()
    assert len(record.getMessage().splitlines()) == 1
