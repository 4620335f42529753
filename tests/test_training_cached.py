"""Cached gradients against the plain computation on a small real decoder, with dropout."""

import weakref
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from e5v_search.backbones.config import TextConfig
from e5v_search.backbones.layout import Padded
from e5v_search.backbones.modules import TextDecoder
from e5v_search.training import losses
from e5v_search.training.cached import cached_backward

D = 32
TRIPLETS = 8
LENGTHS = torch.randint(3, 15, (3 * TRIPLETS,), generator=torch.Generator().manual_seed(5)).tolist()
ROWS = [torch.randn(n, D, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(LENGTHS)]


class Encoder(nn.Module):
    """Rows of input embeddings through a LLaMA decoder, with dropout before and after it."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.decoder = TextDecoder(TextConfig("llama", 8, D, 48, 2, 4))
        self.dropout = nn.Dropout(dropout)
        generator = torch.Generator().manual_seed(9)
        for p in self.parameters():
            nn.init.normal_(p, std=0.2, generator=generator)

    def forward(self, rows: Sequence[Tensor]) -> Tensor:
        x, layout = Padded.of(rows)
        h: Tensor = self.decoder(self.dropout(x), layout)
        return self.dropout(h)

    def gradient(self) -> Tensor:
        gradients = [p.grad.flatten() for p in self.parameters() if p.grad is not None]
        self.zero_grad()
        return torch.cat(gradients)


def pieces_of(size: int) -> list[list[Tensor]]:
    return [ROWS[i : i + size] for i in range(0, len(ROWS), size)]


def equation_1(h: Tensor) -> Tensor:
    return losses.hard_negative_info_nce(*h.chunk(3), 20.0)  # type: ignore[arg-type]


def instruction(h: Tensor) -> Tensor:
    return losses.instruction(*h.chunk(3), temperature=0.1, k=3)  # type: ignore[arg-type]


def distillation(h: Tensor) -> Tensor:
    return losses.distillation(h, torch.stack([row.mean(dim=0) for row in ROWS]), 0.1)


def draws(h: Tensor) -> Tensor:
    """A loss that asks chance itself."""
    return equation_1(h + 0.1 * torch.randn_like(h))


@pytest.mark.parametrize("size", [1, 5, 8, 24, 100])
@pytest.mark.parametrize("loss", [equation_1, instruction, distillation, draws])
def test_the_gradient_is_that_of_the_plain_full_batch(loss, size: int) -> None:  # type: ignore[no-untyped-def]
    encoder = Encoder()
    torch.manual_seed(3)
    value = loss(torch.cat([encoder(piece) for piece in pieces_of(size)]))
    value.backward()
    plain, after = encoder.gradient(), torch.rand(())

    torch.manual_seed(3)
    cached = cached_backward(encoder, pieces_of(size), loss)
    assert cached == pytest.approx(float(value.detach()), rel=1e-6)
    assert torch.rand(()) == after  # chance goes on as it would have
    assert (encoder.gradient() - plain).norm() < 1e-5 * plain.norm()


def test_without_dropout_pieces_make_no_difference() -> None:
    encoder = Encoder(dropout=0)
    values = [(cached_backward(encoder, pieces_of(size), equation_1), encoder.gradient()) for size in (24, 1, 7)]
    for value, gradient in values[1:]:
        assert value == pytest.approx(values[0][0], rel=1e-6)
        assert (gradient - values[0][1]).norm() < 1e-5 * gradient.norm()


def test_other_chance_in_the_second_pass_would_be_seen() -> None:
    encoder = Encoder()
    torch.manual_seed(3)
    equation_1(torch.cat([encoder(piece) for piece in pieces_of(5)])).backward()  # type: ignore[no-untyped-call]
    plain = encoder.gradient()
    torch.manual_seed(4)
    cached_backward(encoder, pieces_of(5), equation_1)
    assert (encoder.gradient() - plain).norm() > 1e-2 * plain.norm()


def test_gradients_are_added_to_what_is_there() -> None:
    encoder = Encoder(dropout=0)
    cached_backward(encoder, pieces_of(7), equation_1)
    once = encoder.gradient()
    for _ in range(2):
        cached_backward(encoder, pieces_of(7), equation_1)
    assert torch.allclose(encoder.gradient(), 2 * once, rtol=1e-5, atol=1e-8)


def test_activations_of_one_piece_are_held_at_a_time() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    held: weakref.WeakSet[object] = weakref.WeakSet()
    most = 0

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, w: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x, w)
            if ctx.needs_input_grad[1]:
                held.add(ctx)
            return x @ w

        @staticmethod
        def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:  # type: ignore[no-untyped-def]
            x, _ = ctx.saved_tensors
            return None, x.T @ gradient

    def encode(x: Tensor) -> Tensor:
        nonlocal most
        h: Tensor = Kept.apply(x, weight)
        if torch.is_grad_enabled():
            most = max(most, len(held))
        return h

    pieces = list(torch.randn(10, 3, 4, generator=torch.Generator().manual_seed(0)))
    cached_backward(encode, pieces, lambda h: h.square().sum())
    assert most == 1
    plain = [encode(piece) for piece in pieces]
    assert (most, len(plain)) == (10, 10)  # the count counts


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1))
def test_pieces_may_have_any_sizes(sizes: list[int]) -> None:
    weight = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64).view(3, 2))
    pieces = torch.randn(sum(sizes), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).split(sizes)

    def loss(h: Tensor) -> Tensor:
        return losses.symmetric_info_nce(h, h.flip(1), 5.0)

    value = cached_backward(lambda x: x @ weight, pieces, loss)
    expected = loss(torch.cat(pieces) @ weight)
    assert value == pytest.approx(float(expected.detach()))
    assert weight.grad is not None
    assert torch.allclose(weight.grad, torch.autograd.grad(expected, weight)[0])
