"""An index in Milvus, on milvus-lite: the same answers as FAISS, whatever is killed, and nothing of others' touched."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import refused, run
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from literal import Literal
from test_indexes import EXACT_WAYS, LikeADict, nobody, rows

pytest.importorskip(
    "milvus_lite", reason="milvus-lite is not installed: it brings faiss-cpu, which faiss-gpu takes the place of"
)

from milvus_server import MilvusServer

from e5v_search import Collection
from e5v_search.catalog import VIEW, Catalog, Put
from e5v_search.collection import indexes
from e5v_search.collection.importing import import_folder
from e5v_search.collection.indexes import Indexes
from e5v_search.collection.remote import CatalogSource
from e5v_search.collection.tuning import Target, tune
from e5v_search.collection.vectors import search_vectors
from e5v_search.config import load_recipe
from e5v_search.errors import CollectionBusy, QueryError, StoreError, UsageError
from e5v_search.filters import parse
from e5v_search.index import FlatIndex, MilvusIndex, Place, Recipe
from e5v_search.index.milvus import client, held, server
from e5v_search.index.milvus.fields import expression
from e5v_search.index.milvus.server import Server

N, D = 400, 24
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for collections of many names: opening one takes a while."""
    return tmp_path_factory.mktemp("milvus") / "lite.db"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusServer]:
    process = MilvusServer(tmp_path_factory.mktemp("server") / "served.db")
    yield process
    process.kill()


def in_milvus(store: str, **keys: Any) -> dict[str, Any]:
    return {"recipe": Recipe("milvus", store=store, **keys).to_json(), "why": "a test"}


def puts(x: np.ndarray, first: int = 0) -> list[Put]:
    """Items of all sorts, much of which is not known of each."""
    cameras = [None, "Canon EOS 5D", "NIKON D90"]
    return [
        Put(
            kind=("image", "image", "text", "rendered")[n % 4],
            content_hash=str(n),
            path=None if n % 11 == 0 else f"/photos/{n % 7}/caf\udce9 {n}.jpg",
            size=n,
            width=None if n % 5 == 0 else 100 * (n % 9),
            height=None if n % 7 == 0 else 300,
            camera=cameras[n % 3],
            format="jpeg" if n % 4 < 2 else None,
            text=None if n % 4 < 2 else f"text {n}" * (1 if n % 50 else 20_000),
            taken_at=None if n % 3 == 0 else f"20{n % 23:02d}-{1 + n % 12:02d}-17T18:30:59",
            lat=None if n % 2 else n % 90 / 1.5,
            lon=None if n % 2 else 2.5,
            facts={} if n % 4 < 2 else {"stars": n % 6, "tags": ["a", "b"]},
            vectors={VIEW: row},
        )
        for n, row in enumerate(x, start=first)
    ]


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    """N items; every third row is there twice or more, so that scores tie."""
    x = rows(N)
    x[::3] = x[np.random.default_rng(1).integers(0, 40, len(x[::3])) * 3]
    with Catalog.create(tmp_path / "c") as made:
        made.bind("model", D, {})
        made.commit(puts(x))
        yield made


# the language of places and filters


@pytest.mark.parametrize(
    ("text", "uri", "database", "written"),
    [
        ("milvus://host/photos", "http://host:19530", "", "milvus://host:19530/photos"),
        ("milvus+tls://Host.org:443/me/a_1", "https://host.org:443", "me", "milvus+tls://host.org:443/me/a_1"),
        ("milvus://[::1]:1/x", "http://[::1]:1", "", "milvus://[::1]:1/x"),
        ("milvus:/a/b.db/x", "/a/b.db", "", "milvus:/a/b.db/x"),
    ],
)
def test_places(text: str, uri: str, database: str, written: str) -> None:
    place = Place.parse(text)
    assert (place.uri, place.database, place.text) == (uri, database, written)
    assert Place.parse(written) == place


def test_a_file_is_written_down_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Place.parse("milvus:a.db/x").text == f"milvus:{tmp_path}/a.db/x"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("http://host/photos", "none of these forms"),
        ("milvus://host", "the name is missing"),
        ("milvus://host/a/b/c", "a database and a collection at most"),
        ("milvus://host/2019", "not a digit first"),
        ("milvus://host:port/x", "Port"),
        ("milvus:photos/x", r"ends in \.db"),
        ("milvus:photos.db", r"ends in \.db"),
        ("milvus:photos.db/", "the name is missing"),
        ("milvus://me:secret@host/x", "set MILVUS_TOKEN"),
        ("", "none of these forms"),
    ],
)
def test_what_is_no_place(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as refusal:
        Place.parse(text)
    assert "secret" not in str(refusal.value)


ANSWERED = [
    "kind=image",
    "kind!=text",
    "kind=text|rendered and not has camera",
    "width>=300 and width<700",
    "not width>300",
    "width>299.5 and width<=399.9",
    "width!=300",
    "megapixels>=0.06 or has place",
    "not megapixels<0.03",
    "orientation=landscape",
    "not orientation=portrait",
    "orientation=square and has taken",
    "taken=2005",
    "taken!=2005",
    "taken<=2005-06 and taken>2003",
    "not (taken<2010 or has text)",
    "not (taken=2004-05 and kind=text)",
    "has path and has format and has width and has height",
    "width>99999999",
]
UNANSWERED = [
    "camera~canon",
    "near=10,2.5,3000km",
    "size>5",
    "facts.stars>=4",
    "text~'text 7'",
    "folder='/photos/3'",
    "kind=image and path~jpg",
    "width=0.5",
]


def test_milvus_tells_what_passes_as_the_catalog_does(catalog: Catalog, lite: Path) -> None:
    catalog.choose_recipe(in_milvus(f"milvus:{lite}/filters"))
    made = Indexes(catalog, nobody)
    made.sync()
    index = made.current()
    assert isinstance(index, MilvusIndex)
    for text in ANSWERED:
        passing = catalog.select(parse([text]))
        test, negated = (expression(parse([each])) for each in (text, f"not ({text})"))
        assert test is not None
        assert negated is not None
        assert sorted(row["id"] for row in index._server._query(test, "id")) == passing.tolist(), text
        assert len(index._server._query(negated, "id")) == N - len(passing), text
    for text in UNANSWERED:
        assert expression(parse([text])) is None, text
    assert len(catalog.select(parse(["text~'text 7'"]))) > 3


# the same as FAISS


def test_answers_are_those_of_faiss(catalog: Catalog, lite: Path) -> None:
    flat = FlatIndex.build(D, catalog.vectors())
    xq = rows(8, 7).astype(np.float32)
    some = catalog.select(parse(["facts.stars>=2"]))
    for name, keys in {"flat": {}, "hnsw": {"index": "HNSW", "build": {"M": 16}, "search": {"ef": 500}}}.items():
        catalog.choose_recipe(in_milvus(f"milvus:{lite}/{name}", candidates=60, **keys))
        made = Indexes(catalog, nobody)
        made.sync()
        index = made.current()
        assert (index.kind, index.d, index.ntotal) == ("milvus", D, N)
        for k in (1, 10, 100) if name == "flat" else (10,):
            for ids in (None, some):
                for expected, found in zip(flat.search(xq, k, ids), index.search(xq, k, ids), strict=True):
                    np.testing.assert_array_equal(found, expected)
        assert list(made.problems()) == []


def test_rows_beyond_what_one_expression_holds(catalog: Catalog, lite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog.choose_recipe(in_milvus(f"milvus:{lite}/chunks", candidates=2))
    monkeypatch.setattr(server.chunks, "__defaults__", (100,))
    monkeypatch.setattr(held, "MOST", 200)
    made = Indexes(catalog, nobody)
    made.sync()
    index, flat = made.current(), FlatIndex.build(D, catalog.vectors())
    xq, ids = rows(2, 7).astype(np.float32), np.arange(0, 350)
    for expected, found in zip(flat.search(xq, 30, ids), index.search(xq, 30, ids), strict=True):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(QueryError, match="at most 200 items at once, not 201"):
        index.search(xq, 201)


class InMilvus(LikeADict):
    """As any other index: add, update, remove, search, save, rebuild, reopen, lose the file that says where it is."""

    lite: Path
    made_stores = 0

    @initialize()
    def start(self) -> None:
        super().start()
        InMilvus.made_stores += 1
        self.way = in_milvus(f"milvus:{self.lite}/any{InMilvus.made_stores}", candidates=5)
        self.catalog.choose_recipe(self.way)

    @rule(way=st.sampled_from(["milvus", "milvus", *EXACT_WAYS]))
    def rebuild(self, way: str) -> None:
        if way == "milvus":
            self.catalog.choose_recipe(self.way)
            self.indexes.rebuild()
        else:
            super().rebuild(way)

    @rule(way=st.sampled_from(["milvus", "milvus", "exact"]))
    def another_recipe(self, way: str) -> None:
        if way == "milvus":
            self.catalog.choose_recipe(self.way)
        else:
            super().another_recipe(way)

    @rule(k=st.integers(1, 12), share=st.integers(1, 4), seed=st.integers(0, 5))
    def search(self, k: int, share: int, seed: int) -> None:
        # while another process is to fill it, an error rather than less than there is
        may_fail = pytest.raises(StoreError, match="is not filled yet") if self._must_fail() else nullcontext()
        with may_fail:
            super().search(k, share, seed)

    def _must_fail(self) -> bool:
        if not self.held:
            return False
        try:
            for view in self.truth:
                self.indexes.current(view)
        except StoreError:
            return True
        return False


InMilvus.TestCase.settings = settings(max_examples=6, stateful_step_count=20, deadline=None)


class TestInMilvus(InMilvus.TestCase):
    @pytest.fixture(autouse=True)
    def _small_limits(self, lite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(indexes, "_BEHIND", 7)
        monkeypatch.setattr(indexes, "_AT_ONCE", 4)
        monkeypatch.setattr(MilvusIndex, "newer", 7)
        monkeypatch.setattr(InMilvus, "lite", lite, raising=False)


# on the way there


def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each message with rows, as they are sent from now on, and the rows in it."""
    from pymilvus.client.prepare import Prepare

    real, sizes = Prepare.row_upsert_param, []

    def noted(*args: Any, **keywords: Any) -> Any:
        request = real(*args, **keywords)
        sizes.append((request.ByteSize(), request.num_rows))
        return request

    monkeypatch.setattr(Prepare, "row_upsert_param", noted)
    return sizes


def test_messages_are_bounded_and_sent_twice_they_change_nothing(
    catalog: Catalog, lite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MESSAGE", 90_000)
    sizes = sent(monkeypatch)
    catalog.choose_recipe(in_milvus(f"milvus:{lite}/messages"))
    made = Indexes(catalog, nobody)
    made.sync()
    assert sum(n for _, n in sizes) == N
    # an item with a long text is a message by itself; that is all that may be longer
    assert all(size <= 90_000 or n == 1 for size, n in sizes), sizes
    assert len(sizes) < 60
    index = made.current()
    assert isinstance(index, MilvusIndex)
    for ids, x in catalog.vectors():
        facts = [held.fields(item) for item in CatalogSource(catalog, VIEW).facts(ids)]
        index._server.upsert(ids[:50], x[:50], facts[:50])
    assert index._server.count(np.empty(0, np.int64)) == N
    assert list(made.problems()) == []


def test_rows_of_4096_numbers_fit_a_server(tmp_path: Path) -> None:
    facts = [{"path": "/photos/1.jpg", "facts": {}}] * 4096
    batches = list(server._batches(4 * 4096, facts))
    assert [n for batch in batches for n in batch] == list(range(4096))
    assert max(len(batch) for batch in batches) * 4 * 4096 <= 8 << 20
    assert len(batches) < 10


UPLOAD = """
import sys, time
from contextlib import nullcontext
from pathlib import Path
from e5v_search.catalog import Catalog, catalog as module
from e5v_search.collection.indexes import Indexes
from e5v_search.index.milvus.server import Server

module.BLOCK = 50
upsert = Server.upsert
def fifth(self, ids, *args):
    upsert(self, ids, *args)
    print(ids[0], flush=True)
    if ids[0] == 201:
        time.sleep(600)  # Milvus has the rows, but nobody has noted that yet
Server.upsert = fifth
with Catalog.open(Path(sys.argv[1])) as catalog:
    Indexes(catalog, nullcontext).sync()
"""


def test_killed_while_it_sends_it_goes_on_where_it_was(
    catalog: Catalog, service: MilvusServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.wait()
    catalog.choose_recipe(in_milvus(service.url("killed")))
    upload = subprocess.Popen(
        [sys.executable, "-c", UPLOAD, str(catalog.path.parent)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert upload.stdout is not None
    assert [int(upload.stdout.readline()) for _ in range(5)] == [1, 51, 101, 151, 201]
    upload.send_signal(signal.SIGKILL)
    assert upload.wait() == -signal.SIGKILL
    # what happens meanwhile is neither lost nor comes back
    catalog.commit(gone=[7, 120, 380])
    sizes = sent(monkeypatch)
    made = Indexes(catalog, nobody)
    made.sync()
    index = made.current()
    assert sum(n for _, n in sizes) == N - 200 - 1  # of those not noted yet one is gone
    assert index.ntotal == N - 3
    flat, xq = FlatIndex.build(D, catalog.vectors()), rows(5, 9).astype(np.float32)
    for expected, found in zip(flat.search(xq, 50), index.search(xq, 50), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert list(made.problems()) == []


def test_a_server_that_dies_and_comes_back_is_waited_for(
    catalog: Catalog, service: MilvusServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.wait()
    monkeypatch.setattr("e5v_search.catalog.catalog.BLOCK", 100)
    catalog.choose_recipe(in_milvus(service.url("dying")))
    real, times = Server.upsert, Counter[str]()

    def dying(self: Server, *args: Any) -> None:
        times["upsert"] += 1
        if times["upsert"] == 3:
            service.kill()
            threading.Timer(0.3, service.start).start()
        real(self, *args)

    monkeypatch.setattr(Server, "upsert", dying)
    made = Indexes(catalog, nobody)
    made.sync()
    assert times["upsert"] == 4
    assert made.current().ntotal == N
    assert list(made.problems()) == []


def test_a_server_that_stays_away_loses_nothing(tmp_path: Path, service: MilvusServer, monkeypatch: pytest.MonkeyPatch) -> None:
    service.wait()
    place, texts, url = tmp_path / "c", tmp_path / "texts.txt", service.url("away")
    texts.write_text("\n".join(f"{n} 1 2" for n in range(40)))
    np.save(tmp_path / "xq.npy", np.array([[1, 0, 0], [1, 1, 1]], np.float32))
    ask = ("search", "-c", place, "--vectors", tmp_path / "xq.npy", "--json", "-k", "60")
    with Collection.open(place, Literal()) as c:
        c.store_in(url)
        assert c.ingest([texts], "text").behind is None
        service.kill()
        texts.write_text("\n".join(f"{n} 1 2" for n in range(50)))
        os.utime(texts, ns=(1, 1))
        with monkeypatch.context() as impatient:
            for module, name in ((client, "CONNECTING"), (server, "CONNECTING"), (server, "PATIENCE")):
                impatient.setattr(module, name, 0.5)
            report = c.ingest([texts], "text")
            assert (report.added, report.failed) == (10, [])
            assert report.behind is not None
            assert f"{url} does not serve" in report.behind
            index = run("index", "-c", place)
            assert (index.exit_code, "unchanged 50" in index.stdout) == (3, True)
            assert index.stderr.splitlines()[-1].startswith(f"Error: {url} does not serve (")
            for line in (ask, ("rebuild", "-c", place), ("verify", "-c", place)):
                said = refused(3, *line)
                assert f"{url} does not serve (" in said
                assert "the collection itself is whole" in said
            assert "milvus, 50 vectors" in run("status", "-c", place).stdout  # which asks nobody
            assert "50 items" in run("export", "-c", place, "--out", tmp_path / "out").stdout
    service.start()
    service.wait()
    again = run("index", "-c", place)
    assert again.exit_code == 0, again.output
    assert [len(json.loads(line)["hits"]) for line in run(*ask).stdout.splitlines()] == [50, 50]
    assert run("verify", "-c", place).stdout == "no errors\n"


def test_who_reads_while_it_is_filled_anew_is_told(catalog: Catalog, lite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def busy() -> Iterator[None]:
        raise CollectionBusy("process 7 is writing")
        yield

    monkeypatch.setattr("e5v_search.catalog.catalog.BLOCK", 100)
    monkeypatch.setattr(MilvusIndex, "newer", 200)
    catalog.choose_recipe(in_milvus(f"milvus:{lite}/anew"))
    writer, reader = Indexes(catalog, nobody), Indexes(catalog, busy)
    writer.sync()
    assert reader.current().ntotal == N
    seen = []
    real = Server.upsert

    def looked_at(self: Server, *args: Any) -> None:
        with pytest.raises(StoreError, match=r"anew is not filled yet \(process 7 is writing\)"):
            reader.current()
        seen.append(len(args[0]))
        real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Server, "upsert", looked_at)
        writer.rebuild()
    assert seen == [100] * 4
    assert reader.current().ntotal == N
    # and who reads while others turn to another index goes with them
    catalog.choose_recipe(None)
    writer.rebuild()
    assert reader.current().kind == "flat-fp16"


# a collection


@pytest.fixture
def place(tmp_path: Path, lite: Path) -> Path:
    """A collection of 300 vectors that an import has made."""
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/vectors.npy", rows(300, 4))
    lines = [json.dumps({"id": n, "path": f"{n % 3}/{n}.jpg", "width": n, "height": 7}) for n in range(300)]
    (tmp_path / "in/items.jsonl").write_text("\n".join(lines))
    import_folder(tmp_path / "in", tmp_path / "c")
    return tmp_path / "c"


def test_a_collection_in_milvus_is_one_like_any_other(place: Path, lite: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "xq.npy", rows(3, 5).astype(np.float32))

    def ask(*more: str) -> list[Any]:
        found = run("search", "-c", place, "--vectors", tmp_path / "xq.npy", "--json", *more)
        assert found.exit_code == 0, found.output
        return [[(hit["id"], hit["score"]) for hit in json.loads(line)["hits"]] for line in found.stdout.splitlines()]

    questions = [(), ("-k", "40"), ("--where", "width>=100"), ("--where", "path~/1/ and width<50", "-k", "400")]
    in_files = [ask(*more) for more in questions]
    rebuilt = json.loads(run("rebuild", "-c", place, "--store", f"milvus:{lite}/like_any", "--json").stdout)
    assert (rebuilt["vectors"], rebuilt["kind"]) == (300, "milvus")
    assert sorted(path.name for path in place.glob("index*")) == ["index.faiss"]
    assert [ask(*more) for more in questions] == in_files
    run("export", "-c", place, "--out", tmp_path / "out", "--items", "jsonl")
    np.testing.assert_array_equal(np.load(tmp_path / "out/vectors.npy"), np.load(tmp_path / "in/vectors.npy"))
    assert "forgot 100 items" in run("forget", "-c", place, tmp_path / "in/1").stdout
    assert ask("--where", "path~/1/") == [[], [], []]
    with Collection.open(place) as c:
        assert c.indexes.current().ntotal == 200
        assert c.verify() == []
        assert c.status()["index"] == {"kind": "milvus", "vectors": 200, "stale": False}
        with pytest.raises(UsageError, match="the index is in Milvus"):
            tune(c, Target(recall=0.9))
    assert f"in milvus:{lite}/like_any" in run("status", "-c", place).stdout
    left = run("rebuild", "-c", place, "--recipe", "auto")
    assert "flat-fp16" in left.stdout
    assert "stay there" in left.stderr
    assert all(len(hits) == 10 for hits in ask())


def test_a_recipe_says_how_milvus_is_to_search(place: Path, lite: Path, tmp_path: Path) -> None:
    assert load_recipe(Recipe, ROOT / "indexes/milvus.toml") == Recipe("milvus")
    mine = tmp_path / "mine.toml"
    mine.write_text('kind = "milvus"\nindex = "HNSW"\ncandidates = 30\n[build]\nM = 8\n[search]\nef = 60\n')
    assert "write milvus://HOST" in refused(2, "rebuild", "-c", place, "--recipe", mine)
    assert "goes with a recipe of the kind milvus" in refused(
        2, "rebuild", "-c", place, "--recipe", "ivf", "--store", f"milvus:{lite}/mine"
    )
    run("rebuild", "-c", place, "--recipe", mine, "--store", f"milvus:{lite}/mine")
    with Collection.open(place) as c:
        index = c.indexes.current()
        assert isinstance(index, MilvusIndex)
        assert index._server._client.call(lambda c: c.describe_index("mine", "vector"))["index_type"] == "HNSW"
        before = list(search_vectors(c, rows(4, 5), k=5))
        # the same place again changes nothing of that
        c.store_in(f"milvus:{lite}/mine")
        assert c.indexes.recipe()[0].search == {"ef": 60}
        assert [[h.score for h in hits] for hits in search_vectors(c, rows(4, 5), k=5)] == [
            [h.score for h in b] for b in before
        ]


def test_what_is_not_as_it_should_be_is_found_and_made_anew(place: Path, lite: Path, tmp_path: Path) -> None:
    run("rebuild", "-c", place, "--store", f"milvus:{lite}/sound")
    shutil.copytree(place, tmp_path / "backup")
    with Collection.open(place) as c:
        index = c.indexes.current()
        assert isinstance(index, MilvusIndex)
        index._server.delete(np.array([5, 6]))
        index._server.upsert(
            np.array([7, 1000]), rows(2), [held.fields(i) for i in CatalogSource(c.catalog, VIEW).facts(np.array([7, 8]))]
        )
        assert [problem.split(": ")[1].split(";")[0] for problem in c.verify()] == [
            "2 vectors are missing",
            "1 vectors belong to no item",
            "1 vectors differ from the catalog's",
        ]
        c.rebuild()
        assert c.verify() == []
        c.forget([tmp_path / "in/1"])
    # an older state of the same catalog: what Milvus holds is of its future
    shutil.rmtree(place)
    shutil.copytree(tmp_path / "backup", place)
    with Collection.open(place) as c:
        assert c.indexes.current().ntotal == 300
        assert c.verify() == []
        index = c.indexes.current()
        assert isinstance(index, MilvusIndex)
        index._server.drop()
    with Collection.open(place) as c:
        assert len(next(iter(search_vectors(c, rows(1, 5), k=5)))) == 5
        assert c.verify() == []


def test_a_file_that_another_process_has_open_is_refused(place: Path, service: MilvusServer) -> None:
    service.wait()
    said = refused(3, "rebuild", "-c", place, "--store", f"milvus:{service.folder}/x")
    assert "milvus-lite lets one process in at a time" in said
    assert "flat-fp16" in run("status", "-c", place).stdout


def test_a_server_that_forgot_what_was_loaded_is_told(place: Path, lite: Path) -> None:
    run("rebuild", "-c", place, "--store", f"milvus:{lite}/loaded")
    with Collection.open(place) as c:
        index = c.indexes.current()
        assert isinstance(index, MilvusIndex)
        index._server._client.call(lambda each: each.release_collection("loaded"))
        assert len(next(iter(search_vectors(c, rows(1, 5), k=5)))) == 5


def test_others_collections_are_left_alone(place: Path, lite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pymilvus import MilvusClient

    them = MilvusClient(str(lite))
    them.create_collection("theirs", dimension=8)
    them.insert("theirs", [{"id": 1, "vector": [0.5] * 8}])
    said = refused(3, "rebuild", "-c", place, "--store", f"milvus:{lite}/theirs")
    assert "holds vectors that are not e5v-search's of 8 numbers, which are left alone" in said
    assert them.query("theirs", filter="id >= 0", output_fields=["count(*)"])[0]["count(*)"] == 1
    said = refused(3, "index", ROOT / "e5v_search/samples", "-c", place.parent / "new", "--store", f"milvus:{lite}/theirs")
    assert "left alone" in said
    assert not (place.parent / "new").exists()
    assert "flat-fp16" in run("status", "-c", place).stdout
    client.library.cache_clear()
    monkeypatch.setattr(client.util, "find_spec", lambda name: None)
    said = refused(3, "rebuild", "-c", place, "--store", "milvus://127.0.0.1:1/x")
    assert said.endswith("pip install pymilvus")
    said = refused(3, "rebuild", "-c", place, "--store", f"milvus:{lite}/x")
    assert said.endswith("pip install pymilvus milvus-lite")
    client.library.cache_clear()
