import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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


def test_soft_retrieval_equals_plain_loops(three: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, gallery, _ = three
    shares = torch.rand(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).softmax(dim=1)
    expected = 0.0
    for i in range(7):
        logits = [3.0 * cosine(queries[i], gallery[j]) for j in range(7)]
        expected -= sum(float(shares[i, j]) * log_softmax_at(logits, j) for j in range(7)) / 7
    assert float(losses.soft_retrieval(queries, gallery, shares, 3.0)) == pytest.approx(expected, abs=1e-6)


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


def test_equation_1_takes_own_anchors_out_of_a_gathered_batch(three: tuple[Tensor, Tensor, Tensor]) -> None:
    anchors, positives, negatives = three
    whole = losses.hard_negative_info_nce(anchors, positives, negatives, 20.0)
    shares = [losses.hard_negative_info_nce(anchors[i : i + 1], positives, negatives, 20.0, offset=i) for i in range(7)]
    assert float(torch.stack(shares).mean()) == pytest.approx(float(whole), abs=1e-12)


def test_equation_1_without_negatives_is_one_direction_of_info_nce(three: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, _ = three
    both = losses.hard_negative_info_nce(a, b, b[:0], 3.0) + losses.hard_negative_info_nce(b, a, a[:0], 3.0)
    assert float(both / 2) == pytest.approx(float(losses.symmetric_info_nce(a, b, 3.0)), abs=1e-12)


@pytest.mark.parametrize("temperature", [0.02, 0.5, 3.0])
def test_distillation_equals_plain_loops(three: tuple[Tensor, Tensor, Tensor], temperature: float) -> None:
    student, _, other = three
    teacher = torch.cat((other, other.sin()), dim=1)  # of another width
    expected = 0.0
    for i in range(7):
        s = [cosine(student[j], student[i]) / temperature for j in range(7)]
        t = [cosine(teacher[j], teacher[i]) / temperature for j in range(7)]
        for j in range(7):
            log_p, log_q = log_softmax_at(s, j), log_softmax_at(t, j)
            expected += math.exp(log_p) * (log_p - log_q) / 7  # the student first
    assert float(losses.distillation(student, teacher, temperature)) == pytest.approx(expected, abs=1e-6)


def test_a_student_like_its_teacher_has_nothing_to_learn(three: tuple[Tensor, Tensor, Tensor]) -> None:
    student = three[0].clone().requires_grad_()
    turned = student.detach() @ torch.linalg.qr(three[1][:5].clone()).Q * 4  # angles are all that counts
    value = losses.distillation(student, turned, 0.1)
    value.backward()  # type: ignore[no-untyped-call]
    assert float(value.detach()) == pytest.approx(0, abs=1e-12)
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-9


def plain_instruction(q: Tensor, c: Tensor, n: Tensor, temperature: float, beta: float, k: int, offset: int = 0) -> Tensor:
    """Query by query, in torch only where a gradient is asked for: which negatives are in is decided on numbers."""
    total = torch.zeros((), dtype=q.dtype)
    for i, query in enumerate(q):
        right = torch.cosine_similarity(query, c[offset + i], dim=0)
        others = [x for j, x in enumerate(c) if j != offset + i] + list(n)
        kept = [x for x in others if cosine(query, x) <= float(right.detach()) + beta]
        kept.sort(key=lambda x: -cosine(query, x))
        chosen = [kept[j % len(kept)] for j in range(k)] if kept else []
        logits = torch.stack([right, *(torch.cosine_similarity(query, x, dim=0) for x in chosen)]) / temperature
        total = total + torch.logsumexp(logits, dim=0) - logits[0]
    return total / len(q)


def gradients_of(loss: Callable[..., Tensor], inputs: Sequence[Tensor], *arguments: float) -> tuple[float, list[Tensor]]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = loss(*leaves, *arguments)
    return float(value.detach()), list(torch.autograd.grad(value, leaves, materialize_grads=True))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 6), st.integers(0, 6), st.integers(1, 9)),
    beta=st.sampled_from([-2.5, -0.5, 0.0, 0.1, 2.5]),
    temperature=st.sampled_from([0.02, 0.3]),
)
def test_instruction_equals_plain_loops(seed: int, shape: tuple[int, int, int], beta: float, temperature: float) -> None:
    m, negatives, k = shape
    generator = torch.Generator().manual_seed(seed)
    c, n, q = (torch.randn(rows, 3, dtype=torch.float64, generator=generator) for rows in (m, negatives, m))
    offset = seed % m
    arguments = (temperature, beta, k, offset)
    value, gradients = gradients_of(losses.instruction, (q[offset:], c, n), *arguments)
    expected, by_hand = gradients_of(plain_instruction, (q[offset:], c, n), *arguments)
    assert value == pytest.approx(expected, abs=1e-6)
    for got, wanted in zip(gradients, by_hand, strict=True):
        assert torch.allclose(got, wanted, atol=1e-6)


def on_circle(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def test_instruction_drops_false_negatives_and_repeats_what_is_left() -> None:
    query, positive = on_circle(0), on_circle(60)  # cosine 0.5, so that candidates above 0.6 are dropped
    dropped, hard, easy = on_circle(10, 45), on_circle(55), on_circle(180)
    e = [math.exp(x / 0.5) for x in (0.5, math.cos(55 * math.pi / 180), -1.0)]

    def value(negatives: Tensor, k: int) -> float:
        return float(losses.instruction(query, positive, negatives, temperature=0.5, k=k))

    both = torch.cat((easy, dropped, hard))
    assert value(both, 1) == pytest.approx(-math.log(e[0] / (e[0] + e[1])))
    assert value(both, 2) == pytest.approx(-math.log(e[0] / sum(e)))
    assert value(both, 3) == pytest.approx(-math.log(e[0] / (e[0] + 2 * e[1] + e[2])))  # the hardest comes again first
    assert value(both, 8) == pytest.approx(-math.log(e[0] / (e[0] + 4 * e[1] + 4 * e[2])))


def test_a_query_with_no_negative_left_costs_nothing() -> None:
    inputs = on_circle(0), on_circle(60), on_circle(10, 45)
    value, gradients = gradients_of(losses.instruction, inputs)
    assert value == 0
    assert all(not gradient.any() for gradient in gradients)


def test_half_precision_is_not_compared_in_half_precision() -> None:
    x = on_circle(0, 1.0, 2.0, 3.0).bfloat16()
    exact = losses.hard_negative_info_nce(x.double(), x.double(), x[:0].double(), 50.0)
    assert float(losses.hard_negative_info_nce(x, x, x[:0], 50.0)) == pytest.approx(float(exact), abs=1e-5)


def test_embeddings_that_say_nothing_cost_the_logarithm_of_the_choices() -> None:
    zero = torch.zeros(6, 4)
    assert float(losses.symmetric_info_nce(zero, zero, 20.0)) == pytest.approx(math.log(6))
    assert float(losses.hard_negative_info_nce(zero, zero, zero, 20.0)) == pytest.approx(math.log(12))


def test_next_token_equals_plain_loops(three: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, table, _ = three
    tokens = torch.tensor([2, 0, 6, 6, 1, 5, 3])
    logits = (hidden @ table.T).tolist()
    expected = -sum(log_softmax_at(row, int(t)) for row, t in zip(logits, tokens, strict=True)) / 7
    assert float(losses.next_token(hidden, table, tokens)) == pytest.approx(expected, abs=1e-6)


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
