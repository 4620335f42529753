"""Rows on GPUs. What FAISS does there stands in for itself on the processor; what is around it is as it runs everywhere."""

import gc
import logging
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest

from e5v_search.errors import CollectionError
from e5v_search.index import FlatIndex, Index, IndexDamaged, Recipe, Stamp, build, gpu, gpu_cagra, gpu_ivf, load, torch_rows
from e5v_search.index.base import Found
from e5v_search.index.rows import Rows
from e5v_search.index.scan import opened, serialised

D = 24
KINDS = ("gpu", "gpu-ivf", "gpu-cagra")
HERE = ": the rows of the index are scanned on the processor"


def rows(n: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, D))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def linked(number: int, rows: Rows, recipe: Recipe) -> faiss.IndexHNSWCagra:
    """Each row linked to the nearest and, that none is out of reach, to its neighbours in the order of storage."""
    x = rows.codes.view(np.float16).astype(np.float32)
    near = np.argsort(-(x @ x.T), axis=1)[:, 1 : recipe.links + 1]
    beside = (np.arange(len(x))[:, None] + np.arange(1, recipe.links + 1) - recipe.links // 2) % len(x)
    links = faiss.IndexHNSWCagra(D, recipe.links, faiss.METRIC_L2, faiss.Float16)
    links.base_level_only = True
    links.storage.add(x)
    links.ntotal = len(x)
    links.hnsw.prepare_level_tab(len(x), False)
    first, held = faiss.vector_to_array(links.hnsw.offsets)[:-1], faiss.vector_to_array(links.hnsw.neighbors)
    held[first.astype(np.int64)[:, None] + np.arange(2 * recipe.links)] = np.hstack([near, beside])
    faiss.copy_array_to_vector(held, links.hnsw.neighbors)
    return links


class Walked:
    """CAGRA, which takes and walks over halves, by L2 as it was told."""

    def __init__(self, number: int, links: Any) -> None:
        self._held = faiss.IndexScalarQuantizer(D, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_L2)
        self._held.add_sa_codes(Rows(faiss.downcast_index(links.storage)).codes)
        self._links = opened(serialised(links, faiss.IO_FLAG_SKIP_STORAGE), faiss.IO_FLAG_SKIP_STORAGE)
        self._links.storage, self._links.own_fields = self._held, False

    def search(self, x: np.ndarray, k: int, *, params: dict[str, int], numeric_type: int) -> Found:
        assert (x.dtype, numeric_type) == (np.float16, faiss.Float16)
        assert params["itopk_size"] % 32 == 0
        assert k <= params["itopk_size"] <= 512
        return self._links.search(x.astype(np.float32), k, params=faiss.SearchParametersHNSW(efSearch=params["itopk_size"]))


@pytest.fixture(params=[1, 3])
def gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """So many; and which of them were asked for."""
    asked: list[int] = []

    def on(number: int, index: Any) -> Any:
        asked.append(number)
        return index

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: request.param)
    monkeypatch.setattr(faiss, "SearchParametersCagra", dict, raising=False)
    monkeypatch.setattr(gpu, "_flat", lambda number, d: on(number, faiss.IndexFlatIP(d)))
    monkeypatch.setattr(gpu_ivf, "_ivf", lambda number, centres: on(number, faiss.clone_index(centres)))
    monkeypatch.setattr(gpu_ivf, "_nearest", faiss.IndexFlatL2)
    monkeypatch.setattr(gpu_cagra, "_links", linked)
    monkeypatch.setattr(gpu_cagra, "_on_gpu", lambda number, links: on(number, Walked(number, links)))
    monkeypatch.setattr(gpu_cagra, "_LEAST", 100)
    monkeypatch.setattr(gpu, "BLOCK", 100)
    return asked


def both(folder: Path, n: int, kind: str = "gpu", **keys: int) -> tuple[Index, FlatIndex]:
    """The same rows on GPUs, saved and opened again, and in memory."""
    ids, x = np.arange(5, n + 5), rows(n, 1)
    made = build(folder / "index.faiss", Recipe(kind, **keys), D, [(ids[:300], x[:300]), (ids[300:], x[300:])])
    made.stamp = Stamp("u", 1)
    made.save(folder / "index.faiss")
    return load(folder / "index.faiss"), FlatIndex.build(D, [(ids, x)])


def same(ours: Index, exact: FlatIndex, k: int = 10, ids: np.ndarray | None = None, least: float = 1.0) -> None:
    """Nearly all that is to be found, and nothing but with its exact score."""
    xq = rows(5, 77).astype(np.float32)
    found, expected = ours.search(xq, k, ids), exact.search(xq, k, ids)
    assert found[1].shape == expected[1].shape
    recall = np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found[1].tolist(), expected[1].tolist(), strict=True)])
    assert recall >= least
    for x, scores, places in zip(xq, *found, strict=True):
        np.testing.assert_allclose(exact.vectors(places) @ x, scores, atol=1e-6)
        assert (np.diff(scores) <= 0).all()
    if least == 1:
        np.testing.assert_array_equal(found[1], expected[1])


def test_what_faiss_is_asked_for_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its classes, those for GPUs too, take no attribute that they do not have."""

    class Cagra(faiss.IndexFlatL2):
        def __init__(self, resources: Any, d: int, metric: int, config: SimpleNamespace) -> None:
            super().__init__(d)
            assert (metric, config.device) == (faiss.METRIC_L2, 2)

        def copyFrom_ex(self, links: Any, numeric_type: int) -> None:
            assert numeric_type == faiss.Float16
            self.add(links.reconstruct_n())

    def flat(resources: Any, d: int, config: SimpleNamespace) -> faiss.IndexFlatIP:
        assert (config.device, config.useFloat16) == (2, True)
        return faiss.IndexFlatIP(d)

    def ivf(resources: Any, centres: faiss.Index, config: SimpleNamespace) -> faiss.Index:
        assert config.device == 2
        return faiss.clone_index(centres)

    made = {"GpuIndexFlatIP": flat, "GpuIndexIVFScalarQuantizer": ivf, "GpuIndexCagra": Cagra, "StandardGpuResources": object}
    configs = dict.fromkeys(("GpuIndexFlatConfig", "GpuIndexIVFScalarQuantizerConfig", "GpuIndexCagraConfig"), SimpleNamespace)
    for name, stand_in in (made | configs).items():
        monkeypatch.setattr(faiss, name, stand_in, raising=False)
    held = faiss.IndexFlatL2(D)
    held.add(rows(7, 1).astype(np.float32))
    assert (gpu._flat(2, D).d, gpu_ivf._ivf(2, held).ntotal, gpu_cagra._on_gpu(2, held).ntotal) == (D, 7, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_finds_what_a_scan_finds_through_changes(tmp_path: Path, gpus: list[int], kind: str, caplog: Any) -> None:
    least = 0.9 if kind == "gpu-cagra" else 1.0
    ours, exact = both(tmp_path, 1000, kind)
    assert ours.kind == kind
    assert gpus == []  # nothing is on them until it is searched
    same(ours, exact, least=least)
    assert sorted(set(gpus)) == list(range(faiss.get_num_gpus()))
    same(ours, exact, k=1000)
    same(ours, exact, ids=np.arange(5, 900, 3))
    gone = np.arange(5, 705)
    for index in (ours, exact):
        index.remove(gone)  # most of the rows that a GPU still has
        index.put(np.arange(2000, 2050), rows(50, 2))
    same(ours, exact, least=least)
    ours.save(tmp_path / "index.faiss")
    same(load(tmp_path / "index.faiss"), exact, k=40, least=least)
    assert load(tmp_path / "index.faiss").problems() == []
    assert caplog.records == []


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_rows_than_anything_asked_for(tmp_path: Path, gpus: list[int], kind: str) -> None:
    ours, exact = both(tmp_path, 2, kind)
    same(ours, exact)
    assert ours.search(rows(3, 4).astype(np.float32), 0)[1].shape == (3, 0)
    ours.remove(np.array([5, 6]))
    assert ours.search(rows(3, 4).astype(np.float32), 10)[1].shape == (3, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_of_copies_the_smaller_id_comes_first(tmp_path: Path, gpus: list[int], kind: str) -> None:
    near, far = rows(2, 4)
    ids = np.random.default_rng(0).permutation(180).astype(np.int64)
    x = np.where((ids % 2 == 0)[:, None], near, far)
    index = build(tmp_path / "i", Recipe(kind, lists=2) if kind == "gpu-ivf" else Recipe(kind), D, [(ids, x)])
    for k in (1, 10, 90, 120):
        assert index.search(near[None].astype(np.float32), k)[1].tolist() == [[*range(0, 180, 2), *range(1, 180, 2)][:k]]


def test_each_gpu_has_its_share(tmp_path: Path, gpus: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[int, list[int]] = {}
    flat = gpu._flat

    def counted(number: int, d: int) -> faiss.IndexFlatIP:
        index = flat(number, d)
        add = index.add
        index.add = lambda x: (sizes.setdefault(number, []).append(len(x)), add(x))
        return index

    monkeypatch.setattr(gpu, "_flat", counted)
    n = faiss.get_num_gpus()
    index = build(tmp_path / "index.faiss", Recipe("gpu"), D, [(np.arange(1000), rows(1000, 1))])
    index.search(rows(1, 2).astype(np.float32), 1)
    assert [sum(sizes[number]) for number in range(n)] == [1000 // n + (n == 3 and number == 2) for number in range(n)]
    assert max(size for of_one in sizes.values() for size in of_one) <= 100


# lists


def test_more_probes_find_more_and_are_taken_from_the_recipe(tmp_path: Path, gpus: list[int]) -> None:
    ours, exact = both(tmp_path, 3000, "gpu-ivf", lists=64, probes=1)
    xq = rows(50, 5).astype(np.float32)
    truth = exact.search(xq, 10)[1]

    def recall() -> float:
        return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ours.search(xq, 10)[1], truth, strict=True)]))

    few = recall()
    ours.search_as(Recipe("gpu-ivf", lists=64, probes=16))
    assert 0.1 < few < recall() < 1
    ours.search_as(Recipe("gpu-ivf", lists=64, probes=64))
    assert recall() == 1


def test_the_centres_are_kept(tmp_path: Path, gpus: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    both(tmp_path, 1000, "gpu-ivf")
    monkeypatch.setattr(gpu_ivf, "_train", None)
    ours = load(tmp_path / "index.faiss")
    ours.put(np.arange(3000, 3010), rows(10, 9))
    ours.save(tmp_path / "index.faiss")
    found = load(tmp_path / "index.faiss").search(rows(10, 9).astype(np.float32), 1)
    assert found[1][:, 0].tolist() == list(range(3000, 3010))


def test_the_processor_finds_the_same_centres(
    tmp_path: Path, gpus: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir(), (tmp_path / "c").mkdir()
    heads = [both(tmp_path / "a", 1000, "gpu-ivf")[0]._scan.head]
    monkeypatch.setattr(gpu_ivf, "_nearest", lambda d: faiss.IndexFlatL2(d + 1))
    heads.append(both(tmp_path / "b", 1000, "gpu-ivf")[0]._scan.head)
    assert "k-means failed on the GPU (" in caplog.text
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    heads.append(both(tmp_path / "c", 1000, "gpu-ivf")[0]._scan.head)
    assert heads[0] == heads[1] == heads[2]


@pytest.mark.parametrize("kind", ["ivf", "gpu-ivf"])
def test_rows_that_have_no_centres(tmp_path: Path, kind: str) -> None:
    with pytest.raises(CollectionError, match=r"FAISS failed \('.*input contains NaN's or Inf's\)"):
        build(tmp_path / "index.faiss", Recipe(kind), D, [(np.arange(9), np.full((9, D), np.nan, np.float16))])
    assert list(tmp_path.iterdir()) == []


# links


def test_links_are_kept_and_what_is_newer_is_scanned(tmp_path: Path, gpus: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, exact = both(tmp_path, 1000, "gpu-cagra")
    assert [n for n, _ in ours._scan.facts["graphs"]] == ([1000] if faiss.get_num_gpus() == 1 else [333, 333, 334])
    monkeypatch.setattr(gpu_cagra, "_links", None)
    for index in (ours, exact):
        index.put(np.arange(3000, 3200), rows(200, 9))
    ours.save(tmp_path / "index.faiss")
    ours = load(tmp_path / "index.faiss")
    same(ours, exact, least=0.9)
    assert ours.search(rows(200, 9).astype(np.float32), 1)[1][:, 0].tolist() == list(range(3000, 3200))
    assert not ours.worn
    ours.put(np.arange(4000, 4100), rows(100, 8))
    assert ours.worn


def test_links_are_found_on_fewer_gpus_than_they_were_made_on(
    tmp_path: Path, gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, exact = both(tmp_path, 1000, "gpu-cagra")
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    same(ours, exact, least=0.9)
    assert set(gpus) <= {0, 1}


def test_links_of_other_rows(tmp_path: Path, gpus: list[int]) -> None:
    ours, _ = both(tmp_path, 1000, "gpu-cagra")
    scan = ours._scan
    for graphs in ([[n + 1, size] for n, size in scan.facts["graphs"]], scan.facts["graphs"] * 2):
        with pytest.raises(IndexDamaged, match="links"):
            type(scan)(scan.rows, scan.recipe, scan.head * 2, scan.facts | {"graphs": graphs}, tmp_path)


def test_without_cagra_the_gpu_scans(
    tmp_path: Path, gpus: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def absent(*_: Any) -> None:
        raise AttributeError("module 'faiss' has no attribute 'GpuIndexCagraConfig'")

    monkeypatch.setattr(gpu_cagra, "_links", absent)
    ours, exact = both(tmp_path, 1000, "gpu-cagra")
    same(ours, exact)
    assert gpus
    assert [r.getMessage() for r in caplog.records] == [
        "rows cannot be linked on the GPU (module 'faiss' has no attribute 'GpuIndexCagraConfig'): the index has no links"
    ]


# where GPUs do not serve


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_gpu_the_rows_are_scanned_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    monkeypatch.setattr(torch_rows, "devices", list)
    ours, exact = both(tmp_path, 1000, kind)
    same(ours, exact)
    same(ours, exact, k=3)
    assert [r.getMessage() for r in caplog.records] == [f"there is no GPU that FAISS or torch can use{HERE}"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_that_is_full(
    tmp_path: Path, gpus: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("Error in malloc() at gpu.cu:7: Error: 'err == cudaSuccess' failed: out of memory\nand more")

    for module, name in ((gpu, "_flat"), (gpu_ivf, "_ivf"), (gpu_cagra, "_on_gpu")):
        monkeypatch.setattr(module, name, full)
    same(*both(tmp_path, 1000, kind))
    message = f"the rows of the index do not go onto the GPU ('err == cudaSuccess' failed: out of memory){HERE}"
    assert [r.getMessage() for r in caplog.records] == [message]


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_that_finds_something_else(
    tmp_path: Path, gpus: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    class Wrong:
        def __init__(self, number: int, links: Any) -> None:
            self._n = links.ntotal

        def search(self, x: np.ndarray, k: int, **_: Any) -> Found:
            return np.ones((len(x), k), np.float32), np.random.default_rng(0).integers(0, self._n, (len(x), k))

    def ivf(number: int, centres: Any) -> Any:
        index = faiss.clone_index(centres)
        add = index.add
        index.add = lambda x: add(np.ascontiguousarray(x[::-1]))
        return index

    monkeypatch.setattr(gpu, "_flat", lambda number, d: faiss.IndexFlat(d, faiss.METRIC_L1))
    monkeypatch.setattr(gpu_ivf, "_ivf", ivf)
    monkeypatch.setattr(gpu_cagra, "_on_gpu", Wrong)
    ours, exact = both(tmp_path, 1000, kind)
    same(ours, exact)
    [record] = caplog.records
    assert record.getMessage().startswith("the GPU misses ")
    assert record.getMessage().endswith(HERE)


@pytest.mark.parametrize("kind", KINDS)
def test_gpus_are_free_again_at_once(tmp_path: Path, gpus: list[int], monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    freed: list[str] = []

    def watched(make: Any) -> Any:
        def watch(*asked: Any) -> Any:
            index = make(*asked)
            weakref.finalize(index, freed.append, kind)
            return index

        return watch

    for module, name in ((gpu, "_flat"), (gpu_ivf, "_ivf"), (gpu_cagra, "_on_gpu")):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    ours, exact = both(tmp_path, 1000, kind)
    same(ours, exact, least=0.9)
    gc.disable()
    try:
        del ours
        assert freed == [kind] * faiss.get_num_gpus()
    finally:
        gc.enable()


def test_a_gpu_that_fails_in_the_middle(
    tmp_path: Path, gpus: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ours, exact = both(tmp_path, 1000)
    same(ours, exact)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error 700 an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "search_refined", fail)
    same(ours, exact)
    same(ours, exact, k=20)
    assert [r.getMessage() for r in caplog.records] == [
        f"a search on the GPU failed (CUDA error 700 an illegal memory access was encountered){HERE}"
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_torch_serves_where_faiss_has_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    monkeypatch.setattr(torch_rows, "devices", lambda: ["cpu", "cpu"])
    with caplog.at_level(logging.INFO):
        ours, exact = both(tmp_path, 1000, kind)
        same(ours, exact)
        same(ours, exact, ids=np.arange(5, 900, 3))
    ours.remove(np.arange(5, 705))
    exact.remove(np.arange(5, 705))
    same(ours, exact)
    assert [r.getMessage() for r in caplog.records] == ["FAISS has no GPU: torch scans the rows of the index on cpu, cpu"]
