"""Pieces of rows against all rows at once."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from e5v_search.backbones.pieces import PIECE, in_pieces


@given(shape=st.sampled_from([(1, 3), (PIECE, 3), (PIECE + 1, 3), (2, 700, 3), (3, 5, 211, 3)]), n=st.integers(1, 4))
def test_equals_the_whole(shape: tuple[int, ...], n: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(n))
    weight = torch.arange(3.0 * n).view(n, 3)
    seen = []

    def f(rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows.numel() // 3)
        return rows @ weight.T

    with torch.inference_mode():
        y = in_pieces(f, x)
    assert y.shape == (*shape[:-1], n)
    torch.testing.assert_close(y, x @ weight.T)
    assert max(seen) <= PIECE
    assert sum(seen) == x.numel() // 3


def test_a_gradient_goes_through_the_whole() -> None:
    x = torch.randn(2, PIECE, 3, requires_grad=True)
    calls: list[torch.Tensor] = []
    y = in_pieces(lambda rows: calls.append(rows) or rows * rows, x)
    assert len(calls) == 1
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * x.detach())
