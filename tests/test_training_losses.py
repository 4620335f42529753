import math

import pytest
import torch
from torch import Tensor

from e5v_search.training import losses
from e5v_search.training.muon import Muon, orthogonal


def cosine(a: Tensor, b: Tensor) -> float:
    x, y = a.tolist(), b.tolist()
    return float(sum(p * q for p, q in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y))


def log_softmax_at(logits: list[float], i: int) -> float:
    return logits[i] - math.log(sum(math.exp(x) for x in logits))


@pytest.fixture
def three() -> tuple[Tensor, Tensor, Tensor]:
    a, b, c = torch.randn(3, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return a, b, c


def test_symmetric_info_nce_equals_plain_loops(three: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, _ = three
    expected = 0.0
    for i in range(7):
        expected -= log_softmax_at([3.0 * cosine(a[i], b[j]) for j in range(7)], i) / 14
        expected -= log_softmax_at([3.0 * cosine(a[j], b[i]) for j in range(7)], i) / 14
    assert float(losses.symmetric_info_nce(a, b, 3.0)) == pytest.approx(expected, abs=1e-6)


def test_equation_1_equals_plain_loops(three: tuple[Tensor, Tensor, Tensor]) -> None:
    anchors, positives, negatives = three
    expected = 0.0
    for i in range(7):
        logits = [cosine(anchors[i], p) / 0.05 for p in positives] + [cosine(anchors[i], n) / 0.05 for n in negatives]
        expected -= log_softmax_at(logits, i) / 7
    assert float(losses.hard_negative_info_nce(anchors, positives, negatives, 20.0)) == pytest.approx(expected, abs=1e-6)


def test_retrieval_equals_plain_loops(three: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, gallery, _ = three
    targets = torch.tensor([3, 3, 0, 6, 2, 1, 5])
    rows = [[2.0 * cosine(q, g) for g in gallery] for q in queries]
    expected = -sum(log_softmax_at(row, int(t)) for row, t in zip(rows, targets, strict=True)) / 7
    assert float(losses.retrieval(queries, gallery, targets, 2.0)) == pytest.approx(expected, abs=1e-6)


def test_embeddings_that_say_nothing_cost_the_logarithm_of_the_choices() -> None:
    zero = torch.zeros(6, 4)
    assert float(losses.symmetric_info_nce(zero, zero, 20.0)) == pytest.approx(math.log(6))
    assert float(losses.hard_negative_info_nce(zero, zero, zero, 20.0)) == pytest.approx(math.log(12))


def test_bag_of_words_equals_plain_loops(three: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, table, _ = three
    words = torch.rand(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    words /= words.sum(dim=1, keepdim=True)
    prior = torch.linspace(-3, 0, 7, dtype=torch.float64)
    expected = 0.0
    for i in range(7):
        logits = [float(hidden[i] @ table[w] + prior[w]) for w in range(7)]
        expected -= sum(float(words[i, w]) * log_softmax_at(logits, w) for w in range(7)) / 7
    assert float(losses.bag_of_words(hidden, table, words, prior)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (48, 48)])
def test_orthogonal_makes_all_singular_values_nearly_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 50
    values = torch.linalg.svdvals(orthogonal(matrix))
    # the iteration is tuned for speed: the smallest directions of a square matrix lag behind
    assert values.max() < 1.3
    assert (values > 0.6).float().mean() > 0.9


def test_muon_fits_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(4)
    x, truth = torch.randn(64, 8, generator=generator), torch.randn(8, 12, generator=generator)
    weight, bias = torch.nn.Parameter(torch.zeros(8, 12)), torch.nn.Parameter(torch.zeros(12))
    groups = [{"params": [weight], "orthogonal": True}, {"params": [bias]}]
    optimiser = Muon(groups, lr=0.05, betas=(0.9, 0.98))
    errors = []
    for _ in range(200):
        error = (x @ weight + bias - x @ truth - 1.0).square().mean()
        optimiser.zero_grad()
        error.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.05 * errors[0]
