"""Rows in a file: the few that are asked for, read without mapping it, and their exact scores."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from forked import assert_child_finds_the_same

from e5v_search.errors import CollectionError
from e5v_search.index import IndexDamaged, Recipe, Stamp, build, column, load
from e5v_search.index import rows as rows_module
from e5v_search.index.rows import Rows

D = 96


def written(folder: Path, n: int = 500) -> tuple[Path, np.ndarray]:
    """A file of rows, and what is in it (n, D) float16."""
    x = np.random.default_rng(n).standard_normal((n, D)).astype(np.float16)
    (folder / "r").write_bytes(x.tobytes())
    return folder / "r", x


@pytest.fixture(params=["read", "mapped", "small"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How rows are had: read, mapped as where no file can be read from the middle, or as those of a small file."""
    if request.param != "small":
        monkeypatch.setattr(rows_module, "_MAPPED", 0)
    if request.param == "mapped":
        monkeypatch.delattr(os, "preadv", raising=False)
    return str(request.param)


def test_rows_are_those_of_the_file(tmp_path: Path, way: str) -> None:
    path, x = written(tmp_path)
    rows = Rows.mapped(path, D, 400)  # behind them lies what nobody counts yet
    assert (rows.ntotal, rows.d) == (400, D)
    places = np.array([399, 0, 7, 7, 250])
    np.testing.assert_array_equal(rows.vectors(places), x[places].astype(np.float32))
    np.testing.assert_array_equal(rows.read(places), x[places].view(np.uint8))
    assert rows.read(np.empty(0, np.int64)).shape == (0, 2 * D)


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_candidates_are_ranked_by_their_exact_scores(
    tmp_path: Path, way: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "_COPIED", at_once * 2 * D)
    path, x = written(tmp_path)
    rows = Rows.mapped(path, D, 500)
    rng = np.random.default_rng(1)
    xq = rng.standard_normal((3, D)).astype(np.float32)
    candidates = np.stack([rng.permutation(500)[:60] for _ in xq])
    candidates[1, rng.permutation(60)[:50]] = -1  # ten are left
    candidates[2] = -1
    D_found, I_found = rows.ranked(xq, candidates, 25)
    for n, wanted in enumerate((25, 10, 0)):
        own = candidates[n][candidates[n] >= 0]
        scores = x[own].astype(np.float64) @ xq[n].astype(np.float64)
        order = np.argsort(-scores)[:25]
        np.testing.assert_array_equal(I_found[n], [*own[order], *[-1] * (25 - wanted)])
        np.testing.assert_allclose(D_found[n], [*scores[order], *[-np.inf] * (25 - wanted)], rtol=1e-5)


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="files are mapped where they cannot be read from the middle")
def test_what_a_disk_refuses_is_an_error_of_the_search_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_MAPPED", 0)
    path, x = written(tmp_path)
    rows = Rows.mapped(path, D, 500)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as disk:
        disk.setattr(os, "preadv", broken)
        with pytest.raises(CollectionError, match=r"r cannot be read: Input/output error"):
            rows.vectors(np.arange(3))
    os.truncate(path, 300 * 2 * D)
    with pytest.raises(CollectionError, match=r"r was cut short.*e5v-search rebuild"):
        rows.vectors(np.array([5, 400]))
    np.testing.assert_array_equal(rows.vectors(np.array([5])), x[[5]].astype(np.float32))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs a system that can be told what will be read")
@pytest.mark.parametrize(("at_hand", "told"), [(0.0, 30), (1e9, 10)])
def test_a_disk_that_is_waited_for_is_told_what_comes(
    tmp_path: Path, way: str, at_hand: float, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(column, "_AT_HAND", at_hand)
    path, x = written(tmp_path)
    asked: list[int] = []
    tell = os.posix_fadvise

    def counted(file: int, at: int, n: int, what: int) -> None:
        asked.append(at)
        tell(file, at, n, what)

    monkeypatch.setattr(os, "posix_fadvise", counted)
    rows = Rows.mapped(path, D, 500)
    for places in np.random.default_rng(0).permutation(500)[:30].reshape(3, 10):
        np.testing.assert_array_equal(rows.vectors(places), x[places].astype(np.float32))
    assert len(asked) == (told if way == "read" else 0)  # the first are always told: nothing is known of the disk


def test_a_file_that_is_gone_is_a_damaged_index(tmp_path: Path, way: str) -> None:
    with pytest.raises(IndexDamaged, match="r is missing"):
        Rows.mapped(tmp_path / "r", D, 1)
    path, _ = written(tmp_path)
    with pytest.raises(IndexDamaged, match="r is cut short"):
        Rows.mapped(path, D, 501)


def made(folder: Path, n: int = 3000) -> tuple[Path, np.ndarray]:
    x = np.random.default_rng(3).standard_normal((n, D))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    index = build(folder / "index.faiss", Recipe("one-bit"), D, [(np.arange(n), x)])
    index.stamp = Stamp("u", 1)
    index.save(folder / "index.faiss")
    return folder / "index.faiss", x


def resident(name: str) -> int:
    """Kilobytes of the mapped file `name` that count as this process's memory."""
    mine = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = line.endswith(name)
        elif inside and line.startswith("Rss:"):
            mine += int(line.split()[1])
    return mine


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's account of mapped files")
def test_of_the_file_nothing_comes_to_lie_in_memory(tmp_path: Path, way: str) -> None:
    path, x = made(tmp_path)
    index = load(path)
    [rows] = tmp_path.glob("*.rows")
    index.search(x[:5].astype(np.float32), 10)
    index.search(x[:5].astype(np.float32), 10, ids=np.arange(0, 3000, 50))
    index.vectors(np.arange(40))
    assert (resident(rows.name) == 0) == (way == "read")
    assert resident(next(tmp_path.glob("*.codes")).name) > 0


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's list of open files")
def test_files_are_closed_with_the_index(tmp_path: Path, way: str) -> None:
    path, x = made(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        index = load(path)
        index.search(x[:1].astype(np.float32), 3)
    assert len(os.listdir("/proc/self/fd")) > before
    del index
    assert len(os.listdir("/proc/self/fd")) == before


FORKED = """
import sys
from pathlib import Path
import numpy as np
from e5v_search.index import load, onebit

onebit._PART = 1000
index = load(Path(sys.argv[1]))
xq = index.vectors(np.arange(7))
def found():
    return [index.search(xq[:n], 5)[1].tolist() for n in (1, 7)]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_searches_too(tmp_path: Path) -> None:
    path, _ = made(tmp_path)
    assert_child_finds_the_same(FORKED, str(path), threads=3)
