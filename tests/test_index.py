import json
import os
import signal
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from e5v_search.catalog import VIEW, Catalog, Put
from e5v_search.errors import CollectionError, CollectionReadOnly, DiskFull
from e5v_search.index import FlatIndex, Index, IndexDamaged, Stamp, load, read_stamp, sealed

D = 24


def rows(n: int, seed: int = 0, d: int = D) -> np.ndarray:
    """(n, d) float16 of length 1, of low intrinsic dimension like real embeddings."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 6)) @ rng.standard_normal((6, d)) + 0.05 * rng.standard_normal((n, d))
    unit: np.ndarray = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    return unit


def brute_force(xb: dict[int, np.ndarray], xq: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(D, I) in float64, of equal scores the smaller id first."""
    ids = np.array(sorted(xb), dtype=np.int64)
    scores = xq.astype(np.float64) @ np.stack([xb[i] for i in ids.tolist()]).astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), ids[order]


def assert_same_neighbours(found: tuple[np.ndarray, np.ndarray], truth: tuple[np.ndarray, np.ndarray]) -> None:
    """Equal but for neighbours whose scores differ by no more than float32's rounding."""
    assert found[1].shape == truth[1].shape
    np.testing.assert_allclose(found[0], truth[0], atol=1e-5)
    for scores, got, expected in zip(truth[0], found[1], truth[1], strict=True):
        for score in scores:
            near = np.abs(scores - score) < 1e-5
            if not near[-1]:
                assert set(got[near]) == set(expected[near])


@pytest.fixture
def filled() -> Index:
    index = FlatIndex.build(D, [(np.arange(10, 310), rows(300))])
    index.stamp = Stamp("uid", 7)
    return index


# search


@pytest.mark.parametrize("d", [1, 24, 256, 4096])
def test_scores_are_the_inner_product(d: int) -> None:
    xb, xq = rows(200, 1, d), rows(7, 2, d).astype(np.float32)
    index = FlatIndex.build(d, [(np.arange(200) * 3 + 5, xb)])
    found = index.search(xq, 12)
    assert (found[0].dtype, found[1].dtype) == (np.float32, np.int64)
    assert_same_neighbours(found, brute_force(dict(zip((np.arange(200) * 3 + 5).tolist(), xb, strict=True)), xq, 12))


def test_a_row_is_its_own_best_match(filled: Index) -> None:
    scores, ids = filled.search(rows(300).astype(np.float32), 1)
    assert ids[:, 0].tolist() == list(range(10, 310))
    assert scores.min() > 0.999


def test_a_batch_gives_what_single_queries_give(filled: Index) -> None:
    xq = rows(40, 3).astype(np.float32)
    scores, ids = filled.search(xq, 15)
    for n in range(40):
        one = filled.search(xq[n : n + 1], 15)
        assert one[1].tolist() == [ids[n].tolist()]
        np.testing.assert_array_equal(one[0][0], scores[n])


@pytest.mark.parametrize("k", [1, 3, 10, 49, 50, 51, 99])
def test_of_equal_scores_the_smaller_id_comes_first(k: int) -> None:
    rng = np.random.default_rng(k)
    near, far = rows(2, 4)
    ids = rng.permutation(100).astype(np.int64)
    copies = np.where((ids % 2 == 0)[:, None], near, far)
    index = FlatIndex.build(D, [(ids[s : s + 7], copies[s : s + 7]) for s in range(0, 100, 7)])
    xq = near[None].astype(np.float32)
    expected = [*range(0, 100, 2), *range(1, 100, 2)]
    assert index.search(xq, k)[1].tolist() == [expected[:k]]
    some = rng.permutation(100)[:60]
    assert index.search(xq, k, ids=some)[1].tolist() == [[i for i in expected if i in some][:k]]


def test_fewer_rows_than_asked_for(filled: Index) -> None:
    xq = rows(3, 5).astype(np.float32)
    assert filled.search(xq, 1000)[1].shape == (3, 300)
    assert sorted(filled.search(xq, 10, ids=np.array([12, 11, 5000, 12]))[1][0]) == [11, 12]
    assert filled.search(xq, 10, ids=np.array([5000]))[1].shape == (3, 0)
    assert filled.search(xq, 10, ids=np.array([], dtype=np.int64))[1].shape == (3, 0)
    assert filled.search(xq, 0)[0].shape == (3, 0)
    assert filled.search(xq[:0], 5)[1].shape[0] == 0
    assert FlatIndex.empty(D).search(xq, 5)[1].shape == (3, 0)


def test_a_selection_is_searched_exactly(filled: Index) -> None:
    xb = dict(zip(range(10, 310), rows(300), strict=True))
    xq = rows(5, 6).astype(np.float32)
    for share in (1, 3, 50):
        chosen = np.random.default_rng(share).choice(np.arange(10, 310), 300 // share, replace=False)
        truth = brute_force({i: xb[i] for i in chosen.tolist()}, xq, 5)
        assert_same_neighbours(filled.search(xq, 5, ids=chosen), truth)


@pytest.mark.parametrize("xq", [np.ones(D), np.ones((1, D + 1)), np.full((1, D), np.nan), np.full((1, D), np.inf)])
def test_queries_that_make_no_sense(filled: Index, xq: np.ndarray) -> None:
    with pytest.raises(ValueError, match="row"):
        filled.search(xq, 3)


def test_rows_that_make_no_sense(filled: Index) -> None:
    for ids, x in [
        (np.array([1, 1]), rows(2)),
        (np.array([1]), rows(2)),
        (np.array([1]), rows(1, d=D + 1)),
        (np.array([10]), np.full((1, D), np.nan)),
    ]:
        with pytest.raises(ValueError, match=r"row|ids"):
            filled.put(ids, x)
    assert filled.ntotal == 300
    assert filled.vectors(np.array([10])).tobytes() == rows(300)[:1].astype(np.float32).tobytes()


# changes


def test_of_an_id_built_twice_the_later_row_counts() -> None:
    x = rows(4)
    index = FlatIndex.build(D, [(np.array([5, 6]), x[:2]), (np.array([7, 5]), x[2:])])
    assert sorted(index.ids().tolist()) == [5, 6, 7]
    np.testing.assert_array_equal(index.vectors(np.array([5, 6, 7])), x[[3, 1, 2]].astype(np.float32))


def test_vectors_by_id(filled: Index) -> None:
    filled.remove(np.arange(20, 40))
    wanted = np.array([309, 10, 41])
    np.testing.assert_array_equal(filled.vectors(wanted), rows(300)[wanted - 10].astype(np.float32))
    for absent in (5, 25, 400):
        with pytest.raises(KeyError, match=str(absent)):
            filled.vectors(np.array([11, absent]))


class LikeADict(RuleBasedStateMachine):
    """Whatever is done to catalog and index, both hold what a dict holds."""

    @initialize()
    def start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        self.catalog = Catalog.create(self.folder)
        self.catalog.bind("f", D, {})
        self.index = FlatIndex.empty(D)
        self.index.stamp = Stamp(self.catalog.uid, 0)
        self.truth: dict[int, np.ndarray] = {}
        self.made = 0

    def teardown(self) -> None:
        if hasattr(self, "catalog"):
            self.catalog.close()
            self._folder.cleanup()

    def _row(self, seed: int) -> np.ndarray:
        return rows(1, seed % 7)[0]  # few distinct rows, so that scores tie

    @rule(seeds=st.lists(st.integers(0, 50), min_size=1, max_size=6))
    def add(self, seeds: list[int]) -> None:
        puts = []
        for seed in seeds:
            self.made += 1
            puts.append(Put(kind="image", path=f"/{self.made}", content_hash=str(self.made), vectors={VIEW: self._row(seed)}))
        for item_id, seed in zip(self.catalog.commit(puts), seeds, strict=True):
            self.truth[item_id] = self._row(seed)

    @precondition(lambda self: self.truth)
    @rule(pick=st.integers(0, 100), seed=st.integers(0, 50))
    def update(self, pick: int, seed: int) -> None:
        item_id = sorted(self.truth)[pick % len(self.truth)]
        put = Put(kind="image", path=f"/new{item_id}", content_hash="x", item_id=item_id, vectors={VIEW: self._row(seed)})
        self.catalog.commit([put])
        self.truth[item_id] = self._row(seed)

    @precondition(lambda self: self.truth)
    @rule(picks=st.sets(st.integers(0, 100), max_size=4))
    def remove(self, picks: set[int]) -> None:
        gone = list({sorted(self.truth)[pick % len(self.truth)] for pick in picks})
        self.catalog.commit(gone=gone)
        for item_id in gone:
            del self.truth[item_id]

    @rule()
    def catch_up(self) -> None:
        state = self.catalog.state
        self.index.remove(self.catalog.removed(self.index.stamp.state))
        for ids, x in self.catalog.vectors(after=self.index.stamp.state):
            self.index.put(ids, x)
        self.index.stamp = Stamp(self.catalog.uid, state)

    @rule()
    def rebuild(self) -> None:
        self.index = FlatIndex.build(D, self.catalog.vectors())
        self.index.stamp = Stamp(self.catalog.uid, self.catalog.state)

    @rule()
    def save_and_load(self) -> None:
        self.index.save(self.folder / "index.faiss")
        self.index = load(self.folder / "index.faiss")

    @rule()
    def reopen(self) -> None:
        self.catalog.close()
        self.catalog = Catalog.open(self.folder)

    @invariant()
    def holds_the_same(self) -> None:
        if not hasattr(self, "truth"):
            return
        held = {int(i): row for ids, x in self.catalog.vectors() for i, row in zip(ids, x, strict=True)}
        assert {i: row.tobytes() for i, row in held.items()} == {i: row.tobytes() for i, row in self.truth.items()}
        if self.index.stamp.state == self.catalog.state:
            assert sorted(self.index.ids().tolist()) == sorted(self.truth)
            xq = rows(2, 99).astype(np.float32)
            if self.truth:
                truth = brute_force(self.truth, xq, 5)
                found = self.index.search(xq, 5)
                assert found[1].tolist() == truth[1].tolist()
                np.testing.assert_allclose(found[0], truth[0], atol=1e-5)

    @rule()
    def check(self) -> None:
        assert self.catalog.verify() == []


LikeADict.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
test_like_a_dict = LikeADict.TestCase


# files


def test_saved_and_loaded(filled: Index, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9") / "index.faiss"
    path.parent.mkdir()
    filled.save(path)
    loaded = load(path)
    assert (loaded.stamp, loaded.d, loaded.ntotal, loaded.kind) == (Stamp("uid", 7), D, 300, "flat-fp16")
    assert read_stamp(path) == Stamp("uid", 7)
    xq = rows(3, 5).astype(np.float32)
    for one, other in zip(loaded.search(xq, 9), filled.search(xq, 9), strict=True):
        np.testing.assert_array_equal(one, other)
    loaded.put(np.array([1, 10]), rows(2, 8))
    assert loaded.ntotal == 301
    assert os.listdir(path.parent) == ["index.faiss"]


def test_plain_faiss_reads_it_too(filled: Index, tmp_path: Path) -> None:
    import faiss

    filled.save(tmp_path / "index.faiss")
    plain = faiss.read_index(str(tmp_path / "index.faiss"))
    xq = rows(3, 5).astype(np.float32)
    np.testing.assert_array_equal(plain.search(xq, 1)[1], filled.search(xq, 1)[1])


def test_an_empty_index_is_saved_too(tmp_path: Path) -> None:
    FlatIndex.empty(D).save(tmp_path / "i")
    assert load(tmp_path / "i").ntotal == 0


@pytest.fixture
def small(tmp_path: Path) -> Path:
    index = FlatIndex.build(8, [(np.arange(40), rows(40, d=8))])
    index.stamp = Stamp("0123456789abcdef", 3)
    index.save(tmp_path / "index.faiss")
    return tmp_path / "index.faiss"


def test_every_flipped_bit_is_noticed(small: Path) -> None:
    data = small.read_bytes()
    # every 97th byte, and every byte of the trailer
    for at in [*range(0, len(data), 97), *range(len(data) - 160, len(data))]:
        for bit in (0, 7) if at % 2 else (3,):
            altered = bytearray(data)
            altered[at] ^= 1 << bit
            small.write_bytes(altered)
            with pytest.raises(IndexDamaged):
                load(small)


def test_every_truncation_is_noticed(small: Path) -> None:
    data = small.read_bytes()
    for length in [*range(0, len(data), 53), *range(len(data) - 40, len(data))]:
        small.write_bytes(data[:length])
        for read in (load, read_stamp):
            with pytest.raises(IndexDamaged, match=r"cut short|checksum"):
                read(small)
    small.write_bytes(data + b"\0")
    with pytest.raises(IndexDamaged):
        load(small)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=300))
def test_any_other_file_is_refused(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with pytest.raises(IndexDamaged):
            load(Path(file.name))


def reseal(path: Path, **facts: object) -> None:
    """A trailer with other facts and right checksums."""
    data = path.read_bytes()
    start = data.rindex(b'{"uid"')
    end = len(data) - sealed.FOOTER.size
    text = json.dumps(json.loads(data[start:end]) | facts).encode()
    path.write_bytes(data[:start] + text + sealed.FOOTER.pack(zlib.crc32(text), len(text), sealed.MAGIC))


def test_files_that_are_whole_but_not_ours_to_read(small: Path) -> None:
    reseal(small, ntotal=41)
    with pytest.raises(IndexDamaged, match="trailer"):
        load(small)
    reseal(small, ntotal=40, kind="later-kind")
    with pytest.raises(IndexDamaged, match="later-kind"):
        load(small)
    reseal(small, kind="flat-fp16")
    assert load(small).ntotal == 40
    body = b"not FAISS" * 20
    small.write_bytes(body + small.read_bytes()[small.read_bytes().rindex(b'{"uid"') :])
    reseal(small, crc32=zlib.crc32(body))
    with pytest.raises(IndexDamaged, match="FAISS cannot read it"):
        load(small)


def test_missing_or_unreadable(tmp_path: Path) -> None:
    with pytest.raises(IndexDamaged, match="missing"):
        load(tmp_path / "none")
    with pytest.raises(IndexDamaged, match="cannot be read"):
        load(tmp_path)


SAVE_AND_DIE = """
import os, signal, sys
from pathlib import Path
import numpy as np
from e5v_search.index import FlatIndex, Stamp

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

where, path = sys.argv[1], Path(sys.argv[2])
x = np.eye(64, dtype=np.float32)
index = FlatIndex.build(64, [(np.arange(64), x)])
index.stamp = Stamp("new", 2)
if where == "body":  # killed with part of FAISS's bytes written
    import e5v_search.index.flat as flat
    import e5v_search.index.sealed as sealed
    flat.CHUNK = 256
    class Dying(sealed.Summed):
        def write(self, data):
            done = super().write(data)
            self._file.flush()
            if self._file.tell() > 4096:
                die()
            return done
    sealed.Summed = Dying
else:
    setattr(os, where, die)
index.save(path)
print("saved")
"""


@pytest.mark.parametrize("where", ["body", "fsync", "replace"])
def test_killed_while_saving(filled: Index, tmp_path: Path, where: str) -> None:
    path = tmp_path / "index.faiss"
    filled.save(path)
    before = path.read_bytes()
    run = subprocess.run([sys.executable, "-c", SAVE_AND_DIE, where, str(path)], check=False, capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    (left,) = tmp_path.glob("*.tmp")
    assert path.read_bytes() == before
    filled.save(path)
    assert left.exists()  # it might be another process's that is still at it
    os.utime(left, (0, 0))
    filled.save(path)
    assert os.listdir(tmp_path) == ["index.faiss"]


def test_a_full_disk_leaves_the_old_index(filled: Index, tmp_path: Path) -> None:
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        path = tmp_path / "index.faiss"
        filled.save(path)
        large = FlatIndex.build(D, [(np.arange(5000), rows(5000))])
        with pytest.raises(DiskFull, match="no space left"):
            large.save(path)
        assert os.listdir(tmp_path) == ["index.faiss"]
        assert load(path).stamp == Stamp("uid", 7)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        with pytest.raises(CollectionReadOnly, match="cannot be written"):
            filled.save(path)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_folder_that_is_gone(filled: Index, tmp_path: Path) -> None:
    with pytest.raises(CollectionError, match="cannot be written"):
        filled.save(tmp_path / "none" / "index.faiss")


# the package


def ask_about_faiss(*wheels: str, folder: Path, shadow: bool = False) -> str:
    """What a fresh interpreter says of FAISS when these distributions are installed too; `shadow`: and faiss is broken."""
    for wheel in wheels:
        info = folder / f"{wheel.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {wheel}\nVersion: 1.0\n")
    if shadow:
        (folder / "faiss.py").write_text("raise ImportError('libfaiss.so: cannot open')")
    code = """
import sys
from e5v_search.errors import MissingPackage
import e5v_search.index as index
assert "faiss" not in sys.modules
print(index.faiss_problem())
try:
    index.FlatIndex.empty(4)
    print("works")
except MissingPackage as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    return subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True).stdout


def test_one_wheel_is_right(tmp_path: Path) -> None:
    assert ask_about_faiss(folder=tmp_path) == "None\nworks\n"


def test_two_wheels_in_one_folder(tmp_path: Path) -> None:
    said, again = ask_about_faiss("faiss-cpu", "faiss-gpu", folder=tmp_path).splitlines()
    assert "pip uninstall -y faiss-cpu faiss-gpu && pip install faiss-cpu" in said
    assert again == said


def test_a_wheel_that_does_not_load(tmp_path: Path) -> None:
    assert "pip install --force-reinstall" in ask_about_faiss(folder=tmp_path, shadow=True)


def test_no_wheel(tmp_path: Path) -> None:
    code = """
import pathlib, sys
import e5v_search.index as index
sys.path = [p for p in sys.path if not p.endswith("-packages")]
print(index.faiss_problem())
try:
    index.load(pathlib.Path(sys.argv[1]))
except Exception as error:
    print(type(error).__name__, error)
"""
    FlatIndex.empty(4).save(tmp_path / "i")
    environment = os.environ | {"PYTHONPATH": str(Path(sealed.__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "i")], env=environment, check=True, capture_output=True, text=True
    )
    said, raised = run.stdout.splitlines()
    assert "not installed" in said
    assert "pip install faiss-cpu" in said
    assert raised == f"MissingPackage {said}"
