"""Every kind of index, through whatever happens to a collection, finds what sorting all vectors would give."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from e5v_search.catalog import VIEW, Catalog, Put
from e5v_search.collection import indexes
from e5v_search.collection.indexes import Indexes
from e5v_search.errors import CollectionBusy, DiskFull
from e5v_search.index import FlatIndex, IndexDamaged, MappedIndex, Recipe, Stamp, build, by_size, load, onebit
from e5v_search.index import rows as rows_module

D = 24
# all rows are candidates: what is found must then be exactly the best
EXACT_WAYS = {
    "exact": Recipe("exact"),
    "one-bit": Recipe("one-bit", candidates=10_000, newer=3),
    "ivf": Recipe("ivf", candidates=10_000, lists=4, probes=4, newer=3),
    "ivf-few-probes": Recipe("ivf", candidates=10_000, lists=1, probes=1, newer=0),
    "hnsw": Recipe("hnsw", ef=10_000, newer=3),
}
MAPPED = [name for name in EXACT_WAYS if name != "exact"]


def rows(n: int, seed: int = 0, d: int = D) -> np.ndarray:
    """(n, d) float16 of length 1, of low intrinsic dimension like real embeddings."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 6)) @ np.random.default_rng(99).standard_normal((6, d)) + 0.2 * rng.standard_normal((n, d))
    unit: np.ndarray = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    return unit


def brute_force(xb: dict[int, np.ndarray], xq: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(D, I) in float64, of equal scores the smaller id first."""
    ids = np.array(sorted(xb), dtype=np.int64)
    scores = xq.astype(np.float64) @ np.stack([xb[i] for i in ids.tolist()]).astype(np.float64).T
    order = np.argsort(-scores.round(6), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), ids[order]


def assert_best(found: tuple[np.ndarray, np.ndarray], xb: dict[int, np.ndarray], xq: np.ndarray, k: int) -> None:
    """The scores are those of brute force, and each id has the score that stands beside it."""
    D, ids = brute_force(xb, xq, k) if xb else (np.empty((len(xq), 0)), np.empty((len(xq), 0), np.int64))
    np.testing.assert_allclose(found[0], D, atol=1e-5)
    assert found[1].shape == ids.shape
    for n, row in enumerate(found[1].tolist()):
        assert len(set(row)) == len(row)
        own = [float(xb[i].astype(np.float64) @ xq[n].astype(np.float64)) for i in row]
        np.testing.assert_allclose(found[0][n], own, atol=1e-5)


@contextmanager
def nobody() -> Iterator[None]:
    """The write lock of a collection that nobody else writes to."""
    yield


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(3)
    yield
    faiss.omp_set_num_threads(before)


class LikeADict(RuleBasedStateMachine):
    """Add, update, remove, search, save, rebuild by any recipe, reopen, lose or damage files: a dict knows the answer."""

    @initialize()
    def start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        self.catalog = Catalog.create(self.folder)
        self.catalog.bind("f", D, {})
        self.catalog.add_views(["cirr"])
        self.truth: dict[str, dict[int, np.ndarray]] = {VIEW: {}, "cirr": {}}
        self.made = 0
        self.held = False
        self.indexes = Indexes(self.catalog, self.lock)

    @contextmanager
    def lock(self) -> Iterator[None]:
        if self.held:
            raise CollectionBusy("another process is writing")
        yield

    def teardown(self) -> None:
        if hasattr(self, "catalog"):
            self.catalog.close()
            self._folder.cleanup()

    def _row(self, seed: int) -> np.ndarray:
        return rows(1, seed % 11)[0]  # few distinct rows, so that scores tie

    def _vectors(self, seed: int) -> dict[str, np.ndarray]:
        both = {VIEW: self._row(seed), "cirr": self._row(seed + 1)}
        return both if seed % 3 else {VIEW: both[VIEW]}

    def _note(self, item_id: int, vectors: dict[str, np.ndarray]) -> None:
        for view, held in self.truth.items():
            held.pop(item_id, None)
            if view in vectors:
                held[item_id] = vectors[view]

    @rule(seeds=st.lists(st.integers(0, 50), min_size=1, max_size=12))
    def add(self, seeds: list[int]) -> None:
        puts = []
        for seed in seeds:
            self.made += 1
            put = Put(kind="image", path=f"/{self.made}", content_hash=str(self.made), vectors=self._vectors(seed))
            puts.append(put)
        for item_id, seed in zip(self.catalog.commit(puts), seeds, strict=True):
            self._note(item_id, self._vectors(seed))

    @precondition(lambda self: self.truth[VIEW])
    @rule(pick=st.integers(0, 100), seed=st.integers(0, 50))
    def update(self, pick: int, seed: int) -> None:
        item_id = sorted(self.truth[VIEW])[pick % len(self.truth[VIEW])]
        put = Put(kind="image", path=f"/new{item_id}", content_hash="x", item_id=item_id, vectors=self._vectors(seed))
        self.catalog.commit([put])
        self._note(item_id, self._vectors(seed))

    @precondition(lambda self: self.truth[VIEW])
    @rule(picks=st.sets(st.integers(0, 100), max_size=5))
    def remove(self, picks: set[int]) -> None:
        gone = list({sorted(self.truth[VIEW])[pick % len(self.truth[VIEW])] for pick in picks})
        self.catalog.commit(gone=gone)
        for item_id in gone:
            self._note(item_id, {})

    @rule()
    def save(self) -> None:
        self.indexes.sync()
        assert not self.indexes.stale

    @rule(way=st.sampled_from([*EXACT_WAYS, "auto"]))
    def rebuild(self, way: str) -> None:
        chosen = None if way == "auto" else {"recipe": EXACT_WAYS[way].to_json(), "why": "a test"}
        self.catalog.choose_recipe(chosen)
        self.indexes.rebuild()

    @rule(way=st.sampled_from([*EXACT_WAYS]))
    def another_recipe(self, way: str) -> None:
        """The next save builds it beside the old one and swaps."""
        self.catalog.choose_recipe({"recipe": EXACT_WAYS[way].to_json(), "why": "a test"})

    @rule()
    def reopen(self) -> None:
        self.catalog.close()
        self.catalog = Catalog.open(self.folder)
        self.indexes = Indexes(self.catalog, self.lock)

    @rule(held=st.booleans())
    def someone_writes(self, held: bool) -> None:
        self.held = held

    @rule(pick=st.integers(0, 100), how=st.sampled_from(["lose", "cut"]))
    def damage(self, pick: int, how: str) -> None:
        files = sorted(self.folder.glob("index*"))
        if files:
            file = files[pick % len(files)]
            # a new file in its place, as a copy that has failed leaves it: those who have mapped the old one keep it
            data = file.read_bytes()
            file.unlink()
            if how == "cut":
                file.write_bytes(data[: len(data) // 2])
            self.indexes = Indexes(self.catalog, self.lock)

    @rule(k=st.integers(1, 12), share=st.integers(1, 4), seed=st.integers(0, 5))
    def search(self, k: int, share: int, seed: int) -> None:
        xq = rows(3, 1000 + seed).astype(np.float32)
        for view, truth in self.truth.items():
            index = self.indexes.current(view)
            assert sorted(index.ids().tolist()) == sorted(truth)
            assert index.ntotal == len(truth)
            assert_best(index.search(xq, k), truth, xq, k)
            some = {i: x for n, (i, x) in enumerate(sorted(truth.items())) if n % share == 0}
            wanted = np.array([*some, 10**6], np.int64)
            assert_best(index.search(xq, k, ids=wanted), some, xq, k)
            if some:
                np.testing.assert_array_equal(index.vectors(wanted[:-1]), np.stack(list(some.values())).astype(np.float32))

    @invariant()
    def no_file_is_left_over(self) -> None:
        if hasattr(self, "truth"):
            assert len(list(self.folder.glob("index*.rows"))) <= 2


LikeADict.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


class TestLikeADict(LikeADict.TestCase):
    @pytest.fixture(autouse=True)
    def _small_limits(self, monkeypatch: pytest.MonkeyPatch, three_threads: None) -> None:
        monkeypatch.setattr(indexes, "_BEHIND", 7)
        monkeypatch.setattr(indexes, "_AT_ONCE", 4)
        monkeypatch.setattr(onebit, "_PART", 40)  # bytes: three rows or so are scanned in a thread of their own
        monkeypatch.setattr(rows_module, "_COPIED", 4 * 2 * D)


@pytest.mark.parametrize("nq", [1, 2, 3, 9])
def test_parts_of_a_scan_side_by_side_find_what_the_whole_finds(
    tmp_path: Path, nq: int, three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = stored(tmp_path / "index.faiss", "one-bit", 1000)
    xq = rows(nq, 5).astype(np.float32)
    alone = load(tmp_path / "index.faiss")
    monkeypatch.setattr(onebit, "_PART", 1000)
    parts = load(tmp_path / "index.faiss")
    some = np.array(sorted(truth)[100:900])
    for ids in (None, some):
        chosen = truth if ids is None else {i: truth[i] for i in ids.tolist()}
        for index in (alone, parts):
            assert_best(index.search(xq, 20, ids=ids), chosen, xq, 20)


def test_probes_that_were_meant_for_other_lists_are_not_taken(tmp_path: Path) -> None:
    stored(tmp_path / "index.faiss", "ivf")
    index = load(tmp_path / "index.faiss")
    assert isinstance(index, MappedIndex)
    index.search_as(EXACT_WAYS["ivf-few-probes"])
    assert index.recipe == EXACT_WAYS["ivf"]
    index.search_as(Recipe("ivf", lists=4, probes=2))
    assert index.recipe.probes == 2


# which kind


@pytest.mark.parametrize(
    ("n", "d", "used", "kind"),
    [
        (0, 4096, None, "exact"),
        (20_000, 4096, None, "exact"),
        (20_001, 4096, None, "one-bit"),
        (300_000, 256, None, "exact"),
        (1_000_000, 4096, None, "one-bit"),
        (1_000_001, 4096, "one-bit", "ivf"),
        (15_000, 4096, "one-bit", "one-bit"),  # shrunk a little: nothing is built anew for that
        (13_000, 4096, "one-bit", "exact"),
        (800_000, 4096, "ivf", "ivf"),
        (600_000, 4096, "ivf", "one-bit"),
        (50_000, 4096, "hnsw", "one-bit"),
    ],
)
def test_the_kind_follows_from_the_size(n: int, d: int, used: str | None, kind: str) -> None:
    recipe, why = by_size(n, d, 64 * 10**9, used)
    assert recipe.kind == kind
    assert f"{n:,} vectors of {d:,} numbers" in why


def test_the_kind_follows_from_the_memory() -> None:
    assert by_size(20_000, 4096, 300 * 10**6)[0].kind == "one-bit"
    assert by_size(900_000, 4096, 800 * 10**6)[0].kind == "ivf"


def test_growth_makes_another_kind_right_and_shrinking_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from e5v_search.index import recipe

    monkeypatch.setattr(recipe, "EXACT_NUMBERS", 100 * D)
    monkeypatch.setattr(recipe, "ONE_BIT_NUMBERS", 300 * D)
    with Catalog.create(tmp_path) as catalog:
        catalog.bind("f", D, {})
        made = Indexes(catalog, nobody)
        truth: dict[int, np.ndarray] = {}
        kinds = []
        for start in range(0, 400, 50):
            x = rows(50, seed=start)
            puts = [Put(kind="image", path=f"/{start + n}", content_hash="x", vectors={VIEW: x[n]}) for n in range(50)]
            truth |= dict(zip(catalog.commit(puts), x, strict=True))
            made.sync()
            kinds.append(made.kind)
            xq = rows(2, 5).astype(np.float32)
            assert_best(made.current().search(xq, 5), truth, xq, 5)
        assert kinds == ["flat-fp16"] * 2 + ["one-bit"] * 4 + ["ivf"] * 2
        catalog.commit(gone=[i for i in truth if i > 30])
        made.sync()
        assert made.kind == "flat-fp16"
        assert sorted(path.name for path in tmp_path.glob("index*")) == ["index.faiss"]
        assert made.current().ntotal == 30


def test_an_item_that_loses_a_view_is_not_found_there(tmp_path: Path) -> None:
    both = {VIEW: rows(1, 1)[0], "cirr": rows(1, 2)[0]}
    with Catalog.create(tmp_path) as catalog:
        catalog.bind("f", D, {})
        catalog.add_views(["cirr"])
        (item,) = catalog.commit([Put(kind="image", path="/a", content_hash="a", vectors=both)])
        made = Indexes(catalog, nobody)
        made.sync()
        assert made.current("cirr").ids().tolist() == [item]
        catalog.commit([Put(kind="image", path="/a", content_hash="b", item_id=item, vectors={VIEW: rows(1, 3)[0]})])
        assert (made.current().ids().tolist(), made.current("cirr").ids().tolist()) == ([item], [])


# files


def stored(path: Path, kind: str, n: int = 400, seed: int = 0) -> dict[int, np.ndarray]:
    x = rows(n, seed)
    ids = np.arange(n) * 2 + 1
    index = build(path, EXACT_WAYS[kind], D, [(ids[: n // 2], x[: n // 2]), (ids[n // 2 :], x[n // 2 :])])
    index.stamp = Stamp("uid", 7)
    index.save(path)
    return dict(zip(ids.tolist(), x, strict=True))


@pytest.mark.parametrize("kind", MAPPED)
def test_little_is_written_for_what_is_added(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "index.faiss"
    truth = stored(path, kind)
    [before] = tmp_path.glob("*.rows")
    index = load(path)
    more = rows(20, 3)
    index.put(np.arange(1000, 1020), more)
    index.remove(np.arange(1, 41, 2))
    index.save(path)
    truth = {i: x for i, x in truth.items() if i > 40} | dict(zip(range(1000, 1020), more, strict=True))
    assert before.stat().st_size == 420 * 2 * D  # the same file, longer
    assert len(list(tmp_path.glob("*.codes"))) == (kind != "hnsw")
    again = load(path)
    xq = rows(4, 8).astype(np.float32)
    assert_best(again.search(xq, 30), truth, xq, 30)
    assert again.problems() == []
    assert not isinstance(again, FlatIndex)


@pytest.mark.parametrize("kind", MAPPED)
def test_who_has_it_open_goes_on_while_it_is_renewed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "index.faiss"
    truth = stored(path, kind)
    reader, writer = load(path), load(path)
    xq = rows(4, 8).astype(np.float32)
    writer.put(np.arange(1000, 1020), rows(20, 3))
    writer.save(path)
    assert_best(reader.search(xq, 9), truth, xq, 9)
    stored(path, "one-bit" if kind == "hnsw" else "hnsw", 100)  # all of its files are gone now
    assert_best(reader.search(xq, 9), truth, xq, 9)


@pytest.mark.parametrize("kind", MAPPED)
def test_files_that_are_cut_short_missing_or_swapped_are_noticed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "index.faiss"
    stored(path, kind)
    for file in [*tmp_path.glob("*.rows"), *tmp_path.glob("*.codes")]:
        data = file.read_bytes()
        file.unlink()
        with pytest.raises(IndexDamaged, match=f"{file.name} is missing"):
            load(path)
        file.write_bytes(data[:-1])
        with pytest.raises(IndexDamaged, match=f"{file.name} is cut short"):
            load(path)
        file.write_bytes(data + b"what a killed writer left")
        load(path)
        file.write_bytes(data)
    data = path.read_bytes()
    for at in (100, len(data) // 2, len(data) - 300):
        path.write_bytes(data[:at] + bytes([data[at] ^ 8]) + data[at + 1 :])
        with pytest.raises(IndexDamaged, match="checksum"):
            load(path)


@pytest.mark.parametrize("kind", ["one-bit", "ivf"])
def test_altered_codes_do_no_harm_and_are_found(tmp_path: Path, kind: str) -> None:
    """They are not looked at when a search opens them: at worst it finds other rows, with their right scores."""
    path = tmp_path / "index.faiss"
    truth = stored(path, kind)
    [codes] = tmp_path.glob("*.codes")
    data = bytearray(codes.read_bytes())
    data[5:9] = bytes(b ^ 255 for b in data[5:9])
    codes.unlink()
    codes.write_bytes(data)
    index = load(path)
    xq = rows(3, 8).astype(np.float32)
    D, ids = index.search(xq, 10)
    for n, row in enumerate(ids.tolist()):
        np.testing.assert_allclose(D[n], [truth[i].astype(np.float32) @ xq[n] for i in row], atol=1e-5)
    assert index.problems() == [f"the checksum of {codes.name} is wrong"]


def test_lists_that_point_out_of_the_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "index.faiss"
    stored(path, "ivf-few-probes")
    [codes] = tmp_path.glob("*.codes")
    data = codes.read_bytes()
    for wrong in (400, -1, 2**40):
        codes.write_bytes(data[:-8] + wrong.to_bytes(8, "little", signed=True))
        with pytest.raises(IndexDamaged, match="rows that are not there"):
            load(path)


GROW_AND_DIE = """
import os, signal, sys
from pathlib import Path
import numpy as np
from e5v_search.index import load, column, sealed

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

path, where = Path(sys.argv[1]), sys.argv[2]
index = load(path)
index.put(np.arange(5000, 5050), np.eye(50, index.d, dtype=np.float32))
index.remove(np.arange(1, 99))
if where == "rows":
    setattr(column.os, "fsync", die)
elif where == "seal":
    sealed.Summed = die
else:
    setattr(sealed.os, "replace", die)
index.save(path)
"""


@pytest.mark.parametrize("where", ["rows", "seal", "replace"])
@pytest.mark.parametrize("kind", ["one-bit", "ivf", "hnsw"])
def test_killed_while_it_grows(tmp_path: Path, kind: str, where: str) -> None:
    path = tmp_path / "index.faiss"
    truth = stored(path, kind)
    run = subprocess.run([sys.executable, "-c", GROW_AND_DIE, str(path), where], capture_output=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    index = load(path)
    xq = rows(3, 8).astype(np.float32)
    assert_best(index.search(xq, 10), truth, xq, 10)
    more = rows(30, 4)
    index.put(np.arange(7000, 7030), more)
    index.save(path)  # over what the killed one left
    truth |= dict(zip(range(7000, 7030), more, strict=True))
    assert_best(load(path).search(xq, 10), truth, xq, 10)
    assert load(path).problems() == []
    assert len(list(tmp_path.glob("*.rows"))) == 1
    assert len(list(tmp_path.glob("*.codes"))) == (kind != "hnsw")


def test_a_full_disk_leaves_the_old_index(tmp_path: Path) -> None:
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        path = tmp_path / "index.faiss"
        truth = stored(path, "one-bit", 300)
        files = sorted(os.listdir(tmp_path))
        index = load(path)
        index.put(np.arange(5000, 9000), rows(4000))
        with pytest.raises(DiskFull, match="no space left"):
            index.save(path)
        with pytest.raises(DiskFull, match="no space left"):
            stored(path, "ivf", 4000)
        assert sorted(os.listdir(tmp_path)) == files
        xq = rows(3, 8).astype(np.float32)
        assert_best(load(path).search(xq, 10), truth, xq, 10)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


# what is found, where not every row is a candidate


@pytest.mark.parametrize("d", [256, 1000])
@pytest.mark.parametrize("recipe", [Recipe("one-bit"), Recipe("ivf"), Recipe("hnsw")], ids=lambda recipe: recipe.kind)
def test_the_defaults_find_nearly_all(tmp_path: Path, d: int, recipe: Recipe) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((200, d))[rng.integers(0, 200, 6000)] + 0.8 * rng.standard_normal((6000, d))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    xb, xq = x[:5900], x[5900:].astype(np.float32)
    index = build(tmp_path / "index.faiss", recipe, d, [(np.arange(5900), xb)])
    truth = np.argsort(-(xq @ xb.astype(np.float32).T), axis=1)[:, :10]
    D, ids = index.search(xq, 10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids, truth, strict=True)]) >= 0.98
    assert (np.diff(D, axis=1) <= 0).all()
    chosen = np.arange(0, 5900, 7)
    D, ids = index.search(xq, 10, ids=chosen)
    exact = chosen[np.argsort(-(xq @ xb[chosen].astype(np.float32).T), axis=1)[:, :10]]
    np.testing.assert_array_equal(ids, exact)  # of few, all are looked at
    if recipe.kind != "hnsw":
        _, ids = index.search(xq[:20], 1000)  # more than there are candidates by the recipe
        far = np.argsort(-(xq[:20] @ xb.astype(np.float32).T), axis=1)[:, :1000]
        assert np.mean([len(set(a) & set(b)) / 1000 for a, b in zip(ids, far, strict=True)]) >= 0.98


def test_as_many_as_asked_for_come_whatever_is_probed(tmp_path: Path) -> None:
    x = rows(300)
    for recipe in (Recipe("ivf", lists=64, probes=1, candidates=1), Recipe("hnsw", links=2, ef_build=1, ef=1)):
        index = build(tmp_path / "index.faiss", recipe, D, [(np.arange(300), x)])
        _, ids = index.search(rows(5, 7).astype(np.float32), 250)
        assert ids.shape == (5, 250)
        assert all(len(set(row)) == 250 for row in ids.tolist())


def test_an_index_of_lists_is_made_anew_when_it_has_grown_much(tmp_path: Path) -> None:
    index = build(tmp_path / "index.faiss", Recipe("ivf"), D, [(np.arange(64), rows(64))])
    assert isinstance(index, MappedIndex)
    assert not index.worn
    index.put(np.arange(100, 2000), rows(1900))
    assert index.worn
    fixed = build(tmp_path / "index.faiss", Recipe("ivf", lists=8), D, [(np.arange(64), rows(64))])
    fixed.put(np.arange(100, 2000), rows(1900))
    assert isinstance(fixed, MappedIndex)
    assert not fixed.worn
    fixed.remove(np.arange(0, 17))
    assert fixed.worn
