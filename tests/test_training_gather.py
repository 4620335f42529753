"""Two processes, joined by gloo, against one that has all rows."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from e5v_search.errors import UsageError
from e5v_search.training import losses
from e5v_search.training.cached import cached_backward
from e5v_search.training.gather import average_gradients, gather, processes, rank

PROCESSES, ROWS, WIDTH = 2, 4, 6
TOTAL = PROCESSES * ROWS
Triplets = tuple[Tensor, Tensor, Tensor]  # anchors, positives, negatives (n, d)
Loss = Callable[[Triplets], Tensor]

INPUTS = torch.randn(3, TOTAL, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TEACHER = torch.randn(TOTAL, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def offset() -> int:
    return rank() * ROWS


def equation_1(rows: Triplets) -> Tensor:
    anchors, positives, negatives = rows
    return losses.hard_negative_info_nce(anchors, gather(positives), gather(negatives), 20.0, offset())


def equation_1_of_all_anchors(rows: Triplets) -> Tensor:
    anchors, positives, negatives = map(gather, rows)
    return losses.hard_negative_info_nce(anchors, positives, negatives, 20.0)


def instruction(rows: Triplets) -> Tensor:
    queries, positives, negatives = rows
    return losses.instruction(queries, gather(positives), gather(negatives), k=3, offset=offset())


def distillation(rows: Triplets) -> Tensor:
    return losses.distillation(gather(rows[0]), TEACHER, 0.05)


def symmetric(rows: Triplets) -> Tensor:
    return losses.symmetric_info_nce(gather(rows[0]), gather(rows[1]), 20.0)


LOSSES: dict[str, Loss] = {f.__name__: f for f in (equation_1, equation_1_of_all_anchors, instruction, distillation, symmetric)}


def gradients(m: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in m.parameters() if p.grad is not None]


def own_rows() -> Tensor:
    return INPUTS[:, offset() : offset() + ROWS]


def exact(loss: Loss) -> tuple[float, list[Tensor]]:
    """The mean loss of all processes and its gradient; with one process, of all rows."""
    m = model()
    value = loss(tuple(m(x) for x in (own_rows() if processes() > 1 else INPUTS)))
    value.backward()  # type: ignore[no-untyped-call]
    average_gradients(m.parameters())
    return float(value.detach()), gradients(m)


def cached(loss: Loss) -> tuple[float, list[Tensor]]:
    """The same in pieces of three rows, of the anchors, positives and negatives of this process one after the other."""
    m = model()
    rows = own_rows().flatten(0, 1)
    value = cached_backward(m, rows.split(3), lambda h: loss(h.chunk(3)))
    average_gradients(m.parameters())
    return value, gradients(m)


def published() -> tuple[list[Tensor], float]:
    """Gathered with the others' rows as constants -> this process's gradient, and its gathered sum."""
    m = model()
    anchors, positives, negatives = (gather(m(x), local_only=True) for x in own_rows())
    losses.hard_negative_info_nce(anchors, positives, negatives, 20.0).backward()  # type: ignore[no-untyped-call]
    return gradients(m), float(anchors.sum().detach())


def refused() -> str:
    try:
        gather(torch.zeros(3 + rank(), 2))
    except UsageError as error:
        return str(error)
    return "accepted"


def half_without_gradient() -> list[Tensor]:
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 2))
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    one.sum().backward()  # type: ignore[no-untyped-call]
    if rank() == 0:
        other.sum().backward()  # type: ignore[no-untyped-call]
    average_gradients([one, frozen, other])
    assert frozen.grad is None
    return [p.grad for p in (one, other) if p.grad is not None]


def work(number: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=PROCESSES)
    found = {
        "exact": {name: exact(loss) for name, loss in LOSSES.items()},
        "cached": {name: cached(loss) for name, loss in LOSSES.items()},
        "published": published(),
        "refused": refused(),
        "half": half_without_gradient(),
        "rows": gather(torch.full((1, 1), float(number))),
        "constants": gather(torch.full((1, 1), float(number)), local_only=True),
    }
    torch.save(found, folder / f"{number}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, folder), nprocs=PROCESSES)
    return [torch.load(folder / f"{i}.pt") for i in range(PROCESSES)]


@pytest.mark.parametrize("way", ["exact", "cached"])
@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_give_the_gradient_of_one(found: list, name: str, way: str) -> None:
    expected, by_one = exact(LOSSES[name])
    values = [f[way][name][0] for f in found]
    assert sum(values) / PROCESSES == pytest.approx(expected, rel=1e-12)
    for f in found:
        for got, wanted in zip(f[way][name][1], by_one, strict=True):
            assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-12)
            assert wanted.abs().max() > 1e-6


def test_published_gradient_has_the_share_of_own_rows_alone(found: list) -> None:
    m = model()
    whole = [m(x) for x in INPUTS]
    for i in range(PROCESSES):
        mine = slice(i * ROWS, (i + 1) * ROWS)
        rows = [torch.cat((x[: mine.start].detach(), x[mine], x[mine.stop :].detach())) for x in whole]
        value = losses.hard_negative_info_nce(*rows, 20.0)  # type: ignore[arg-type]
        wanted = torch.autograd.grad(value, list(m.parameters()), retain_graph=True)
        got, total = found[i]["published"]
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(got, wanted, strict=True))
        assert total == pytest.approx(float(whole[0].sum().detach()))


def test_rows_come_in_the_order_of_ranks(found: list) -> None:
    for f in found:
        assert f["rows"].tolist() == [[0.0], [1.0]]
        assert f["constants"].tolist() == [[0.0], [1.0]]


def test_unequal_shares_are_refused_by_all(found: list) -> None:
    assert [f["refused"] for f in found] == ["processes bring 3, 4 rows to one batch: its size must be a multiple of 2"] * 2


def test_a_process_without_gradient_counts_with_zeros(found: list) -> None:
    for f in found:
        one, other = f["half"]
        assert one.tolist() == [1, 1]
        assert other.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_one_process_needs_no_group() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert gather(x) is x
    assert gather(x, local_only=True) is x
    assert (rank(), processes()) == (0, 1)
    x.sum().backward()  # type: ignore[no-untyped-call]
    average_gradients([nn.Parameter(x)])
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(3, 2))
