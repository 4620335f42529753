"""Search by rows of a matrix, and the tuning of an index: against sorting all vectors."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import refused, run

from e5v_search import Collection
from e5v_search.collection.importing import import_folder
from e5v_search.collection.tuning import Point, Target, _best, tune
from e5v_search.collection.vectors import search_vectors
from e5v_search.errors import CollectionBusy, CollectionNotFound, QueryError, UsageError
from e5v_search.index import KINDS, Recipe, read_recipe
from e5v_search.index.recipe import NAMED, read_bytes, resident_bytes

N, D = 3000, 64
ROOT = Path(__file__).parent.parent


def clustered(n: int, seed: int) -> np.ndarray:
    """(n, D) float32 of length 1."""
    centres = np.random.default_rng(0).standard_normal((60, D))
    rng = np.random.default_rng(seed)
    x = centres[rng.integers(0, 60, n)] + 0.7 * rng.standard_normal((n, D))
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of another program: N vectors, of which the even ones are photos, and a folder of collections."""
    base = tmp_path_factory.mktemp("imported")
    np.save(base / "vectors.npy", clustered(N, 1).astype(np.float16))
    rows = [{"id": 3 * i + 1, **({"path": f"{i}.jpg"} if i % 2 == 0 else {"text": f"text {i}"})} for i in range(N)]
    (base / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return base


@pytest.fixture
def place(imported: Path, tmp_path: Path) -> Path:
    import_folder(imported, tmp_path / "c")
    return tmp_path / "c"


def brute_force(xq: np.ndarray, k: int, of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores = xq @ clustered(N, 1).astype(np.float16).astype(np.float32)[of].T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), 3 * of[order] + 1


@pytest.mark.parametrize("kind", NAMED)
def test_each_row_finds_its_nearest(place: Path, kind: str) -> None:
    xq = clustered(130, 2)
    with Collection.open(place) as c:
        c.rebuild(read_recipe(kind))
        found = list(search_vectors(c, 7 * xq, k=5))  # of any length
        D_, ids = brute_force(xq, 5, np.arange(N))
        assert [hits.query for hits in found] == [{"vector": n} for n in range(130)]
        assert np.mean([[hit.id for hit in hits] == ids[n].tolist() for n, hits in enumerate(found)]) > 0.97
        np.testing.assert_allclose([hits[0].score for hits in found], D_[:, 0], atol=1e-4)
        photos = list(search_vectors(c, xq[:20], k=5, where=["kind=image"]))
        _, ids = brute_force(xq[:20], 5, np.arange(0, N, 2))
        assert [[hit.id for hit in hits] for hits in photos] == ids.tolist()
        few = list(search_vectors(c, xq[:20], k=50, threshold=0.6))
        expected, _ = brute_force(xq[:20], 50, np.arange(N))
        assert [len(hits) for hits in few] == (expected >= 0.6).sum(axis=1).tolist()
        assert c.verify() == []


def test_what_was_forgotten_meanwhile_does_not_come(place: Path) -> None:
    xq = clustered(3, 2)
    with Collection.open(place) as c, Collection.open(place) as other:
        c.rebuild(Recipe("one-bit"))
        first = next(iter(search_vectors(c, xq, k=4)))
        other.catalog.commit(gone=[hit.id for hit in first[:2]])
        again = next(iter(search_vectors(c, xq, k=2)))
        assert [hit.id for hit in again] == [hit.id for hit in first[2:]]


def test_what_makes_no_sense(place: Path, tmp_path: Path) -> None:
    xq = clustered(4, 2)
    with Collection.open(place) as c:
        for wrong in (xq[0], xq[:, :5]):
            with pytest.raises(QueryError, match=f"rows of {D} numbers"):
                search_vectors(c, wrong)
        with pytest.raises(QueryError, match="k must"):
            search_vectors(c, xq, k=0)
        xq[2] = 0
        with pytest.raises(QueryError, match=r"row 2 \(from 0\) is all zeros"):
            list(search_vectors(c, xq))
        xq[2, 0] = np.nan
        with pytest.raises(QueryError, match="not finite"):
            list(search_vectors(c, xq))
    with Collection.open(tmp_path / "empty") as c, pytest.raises(CollectionNotFound):
        search_vectors(c, xq)


def test_from_the_command_line(place: Path, tmp_path: Path) -> None:
    xq = clustered(70, 2)
    np.save(tmp_path / "q.npy", xq)
    lines = run("search", "--vectors", tmp_path / "q.npy", "-c", place, "-k", "3", "--json").stdout.splitlines()
    found = [json.loads(line) for line in lines]
    _, ids = brute_force(xq, 3, np.arange(N))
    assert [[hit["id"] for hit in one["hits"]] for one in found] == ids.tolist()
    assert set(found[0]) == {"query", "fingerprint", "took_ms", "hits"}
    assert found[69]["query"] == {"vector": 69}
    for more in (["a dog"], ["--image", "1"], ["--csv"], ["--explain"], []):
        json_too = [] if more in ([], ["--csv"]) else ["--json"]
        assert "--vectors goes with" in run("search", "--vectors", tmp_path / "q.npy", "-c", place, *more, *json_too).stderr
    assert "none.npy is not there" in run("search", "--vectors", tmp_path / "none.npy", "-c", place, "--json").stderr
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    assert "bad.npy is cut short" in refused(2, "search", "--vectors", tmp_path / "bad.npy", "-c", place, "--json")


# recipes


@pytest.mark.parametrize("kind", NAMED)
def test_recipes_of_the_folder_are_the_defaults(kind: str) -> None:
    assert read_recipe(str(ROOT / f"indexes/{kind}.toml")) == read_recipe(kind) == Recipe(kind)  # type: ignore[arg-type]


def test_all_that_is_wrong_with_a_recipe_is_said(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('kind = "one-bit"\nprobes = 3\ncandidates = 0\nquery_bits = 9\n')
    with pytest.raises(UsageError, match=r"candidates: 0 .*query_bits: 9 .*probes: this is a key of ivf"):
        read_recipe(str(path))
    path.write_text('kind = "flat"\nspeed = 1\n')
    with pytest.raises(UsageError, match=r"speed: unknown key .*'flat' is not one of 'exact'"):
        read_recipe(str(path))
    with pytest.raises(UsageError, match="neither a file nor one of: exact, one-bit, ivf, hnsw, gpu, gpu-ivf, gpu-cagra"):
        read_recipe("two-bit")


def test_a_recipe_holds_until_another_is_chosen(place: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('kind = "ivf"\nlists = 16\nprobes = 3\n')
    rebuilt = json.loads(run("rebuild", "-c", place, "--recipe", tmp_path / "mine.toml", "--json").stdout)
    assert (rebuilt["vectors"], rebuilt["kind"]) == (N, "ivf")
    status = run("status", "-c", place).stdout
    assert f"ivf, {N:,} vectors" in status
    assert "chosen with rebuild --recipe" in status
    assert json.loads(run("status", "-c", place, "--json").stdout)["index"] == {"kind": "ivf", "vectors": N, "stale": False}
    for path in place.glob("index*"):
        path.unlink()
    with Collection.open(place) as c:
        assert len(next(iter(search_vectors(c, clustered(1, 2))))) == 10
        assert c.indexes.kind == "ivf"
        assert c.verify() == []
    run("rebuild", "-c", place, "--recipe", "auto")
    assert "chosen by size" in run("status", "-c", place).stdout
    assert sorted(path.name for path in place.glob("index*")) == ["index.faiss"]


# tuning


def reads_no_more(one: Recipe, other: Recipe) -> bool:
    return all(getattr(one, name) <= getattr(other, name) for name in ("candidates", "probes", "ef"))


def test_quicker_but_larger_parameters_are_passed_over() -> None:
    small, large = Recipe("one-bit", candidates=25), Recipe("one-bit", candidates=100)
    slow = Point(small, 0.9935, 3.1, 10**6, read_bytes(small, N, D))
    quick = Point(large, 0.999, 2.9, 10**6, read_bytes(large, N, D))
    assert _best([slow, quick], Target(recall=0.99)) is slow
    assert _best([slow, quick], Target(recall=0.995)) is quick
    assert _best([slow, quick], Target(recall=0.99, latency=0.003)) is quick


def test_a_way_through_lists_is_as_large_as_what_it_reads() -> None:
    """By hand: 64 lists of 4,096 rows of 64 numbers; a code has 24 bytes, a row 128."""
    assert read_bytes(Recipe("ivf", lists=64, probes=4, candidates=100), 4096, 64) == 4 * 64 * 24 + 100 * 128
    assert read_bytes(Recipe("ivf", lists=64, probes=8, candidates=25), 4096, 64) == 8 * 64 * 24 + 25 * 128
    assert read_bytes(Recipe("one-bit", candidates=25), 4096, 64) == 4096 * 24 + 25 * 128
    assert read_bytes(Recipe("hnsw", ef=16), 4096, 64) == 16 * 128
    assert read_bytes(Recipe("exact"), 4096, 64) == read_bytes(Recipe("gpu"), 4096, 64) == 4096 * 128
    assert read_bytes(Recipe("gpu-ivf", lists=64, probes=4), 4096, 64) == 4 * 64 * 128
    assert read_bytes(Recipe("gpu-cagra", ef=16), 4096, 64) == 16 * 128


def test_what_a_machine_needs_for_an_index_on_gpus() -> None:
    """By hand: 4,096 rows of 64 numbers are on the GPUs; here are ids, centres, links and what leads to them."""
    assert resident_bytes(Recipe("gpu"), 4096, 64) == 4096 * 8
    assert resident_bytes(Recipe("gpu-ivf", lists=64), 4096, 64) == 4096 * 8 + 64 * 64 * 4
    assert resident_bytes(Recipe("gpu-cagra", links=32), 4096, 64) == 4096 * 8 + 4096 * (64 * 4 + 16)


@pytest.mark.parametrize("kind", ["one-bit", "ivf", "hnsw", "gpu-ivf", "gpu-cagra"])
def test_the_smallest_that_finds_enough_is_taken(place: Path, kind: str) -> None:
    with Collection.open(place) as c:
        c.rebuild(read_recipe(kind))
        tuned = tune(c, Target(recall=0.9), k=5)
        assert tuned.chosen is not None
        assert tuned.chosen.recipe.kind == kind
        smaller = [p for p in tuned.points if p is not tuned.chosen and reads_no_more(p.recipe, tuned.chosen.recipe)]
        assert not [p for p in smaller if p.recall >= 0.9]
        if kind != "ivf":  # which has two parameters that grow
            assert len(smaller) == tuned.points.index(tuned.chosen)
        assert "tuned for recall 0.9" in c.indexes.recipe()[1]
        # measured anew, by other means: the share of true neighbours of the very queries
        ids = np.sort(c.indexes.current().ids())[np.unique(np.linspace(0, N - 1, 200).astype(int))]
        x = clustered(N, 1).astype(np.float16).astype(np.float32)[(ids - 1) // 3]
        _, truth = brute_force(x, 6, np.arange(N))
        found = c.indexes.current().search(x, 6)[1]
        recall = np.mean([len((set(a) & set(b)) - {i}) / 5 for a, b, i in zip(found, truth, ids.tolist(), strict=True)])
        assert recall == pytest.approx(tuned.chosen.recall, abs=0.02)
    with Collection.open(place) as c:
        assert c.indexes.current().recipe == tuned.chosen.recipe  # type: ignore[attr-defined]


def test_more_asked_for_takes_more(place: Path) -> None:
    with Collection.open(place) as c:
        c.rebuild(Recipe("one-bit"))
        points = tune(c, Target(recall=0.5), dry_run=True).points
        assert [p.recipe.candidates for p in points] == sorted({p.recipe.candidates for p in points})
        assert points[-1].recall > 0.999
        assert points[0].recall < points[-1].recall
        assert c.indexes.recipe()[1] == "chosen with rebuild --recipe"
        assert c.indexes.current().recipe == Recipe("one-bit")  # type: ignore[attr-defined]


def test_memory_decides_the_kind(place: Path) -> None:
    with Collection.open(place) as c:
        assert c.indexes.kind == "flat-fp16"
        tuned = tune(c, Target(recall=0.95, memory=N * (D // 8 + 16 + 8)), xq=clustered(50, 3))
        assert c.indexes.kind == "one-bit"
        assert tuned.chosen is not None
        assert tuned.chosen.bytes <= N * (D // 8 + 16 + 8)
        assert tuned.queries == 50
        assert len(list(place.glob("index.faiss*"))) == 3


def test_what_cannot_be_met_changes_nothing(place: Path) -> None:
    before = sorted(path.name for path in place.glob("index*"))
    said = run("tune", "-c", place, "--latency", "1us", "--json")
    assert said.exit_code == 3
    assert "no index meets that, with a recall of 0.99" in said.stderr
    assert {p["recipe"]["kind"] for p in json.loads(said.stdout)["points"]} == set(KINDS)
    assert sorted(path.name for path in place.glob("index*")) == before
    assert "no kind of index fits" in refused(3, "tune", "-c", place, "--memory", "1k")


def test_what_is_interrupted_leaves_nothing(place: Path) -> None:
    before = sorted(path.name for path in place.glob("index*"))

    def stop(point: Point) -> None:
        if point.recipe.kind == "ivf":
            raise KeyboardInterrupt

    with Collection.open(place) as c:
        with pytest.raises(KeyboardInterrupt):
            tune(c, Target(latency=1e-9), on_point=stop)
        assert c.indexes.kind == "flat-fp16"
    assert sorted(path.name for path in place.glob("index*")) == before


def test_tuning_refuses_nonsense(place: Path, tmp_path: Path) -> None:
    assert "say what is to be met" in refused(2, "tune", "-c", place)
    assert "must be above 0 and at most 1" in refused(2, "tune", "-c", place, "--recall", "99")
    for option, value in (("--latency", "5 parsecs"), ("--memory", "-4G"), ("--memory", "0")):
        assert "give a number above 0" in run("tune", "-c", place, option, value).stderr
    with Collection.open(place) as c, pytest.raises(QueryError, match=f"finite rows of {D} numbers"):
        tune(c, Target(recall=0.9), xq=np.zeros((3, 5)))
    with Collection.open(place) as c, c.writing(), Collection.open(place) as other, pytest.raises(CollectionBusy):
        tune(other, Target(recall=0.9))
    with Collection.open(tmp_path / "empty") as c, pytest.raises(CollectionNotFound):
        tune(c, Target(recall=0.9))


def test_index_tune_is_the_same(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "chosen: exact" in run("index", "tune", "-c", place, "--recall", "0.9").stdout
    (tmp_path / "tune").mkdir()  # photos may lie in a folder of that name
    assert "No such option" in run("index", "tune", "-c", place, "--recall", "0.9").stderr
