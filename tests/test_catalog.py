import os
import random
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from e5v_search.catalog import (
    CATALOG,
    VIEW,
    Catalog,
    Failed,
    FileRow,
    Put,
    catalog,
    connection,
    files,
    migrations,
    store,
)
from e5v_search.errors import (
    CatalogDamaged,
    CollectionBusy,
    CollectionError,
    CollectionNotFound,
    CollectionReadOnly,
    DiskFull,
    FingerprintMismatch,
    SchemaTooNew,
)

DIM = 16


def unit(seed: int, dim: int = DIM) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal(dim).astype(np.float32)
    return x / np.linalg.norm(x)


def one(vector: np.ndarray) -> dict[str, np.ndarray]:
    return {VIEW: vector}


def photo(path: str, seed: int = 0, **fields: object) -> Put:
    values: dict[str, object] = {
        "kind": "image",
        "path": path,
        "size": 10,
        "mtime_ns": 20,
        "content_hash": f"hash{seed}",
        "vectors": one(unit(seed)),
    }
    return Put(**(values | fields))  # type: ignore[arg-type]


def text(path: str, part: str, content: str, **fields: object) -> Put:
    values: dict[str, object] = {
        "kind": "text",
        "path": path,
        "part": part,
        "content_hash": f"hash of {content}",
        "text": content,
        "vectors": one(unit(len(content))),
    }
    return Put(**(values | fields))  # type: ignore[arg-type]


def bad(path: str, reason: str) -> Failed:
    return Failed(path, "image", reason)


def stored(c: Catalog, item_id: int) -> np.ndarray:
    ((ids, x),) = c.vectors(ids=[item_id])
    assert ids.tolist() == [item_id]
    return x[0]


def everything(c: Catalog) -> tuple[object, ...]:
    vectors = {int(i): row.tobytes() for ids, x in c.vectors() for i, row in zip(ids, x, strict=True)}
    files = list(c.paths_under(["/"]))
    return c.state, c.count(), vectors, files, c.failures(), c.removed().tolist(), c.items(range(1, 100))


@contextmanager
def raw(c: Catalog) -> Iterator[sqlite3.Connection]:
    """The database without our checks, to plant faults."""
    with closing(sqlite3.connect(c.path)) as db, db:
        yield db


@pytest.fixture
def c(tmp_path: Path) -> Iterator[Catalog]:
    with Catalog.create(tmp_path / "c") as made:
        made.bind("model@1", DIM, {"name": "model", "revision": "1", "quantize": None})
        yield made


# items


def test_what_is_put_comes_back(c: Catalog) -> None:
    facts = {
        "width": 640,
        "height": 480,
        "taken_at": "2020-01-02T03:04:05",
        "lat": 1.5,
        "lon": -2.5,
        "camera": "é",
        "format": "JPEG",
    }
    first, second = c.commit([photo("/p/a.jpg", 1, on_mount=True, facts={"k": [1, "ü"]}, **facts), photo("/p/b.jpg", 2)])
    item = c.items([first, second, 99])[first]
    assert (item.id, item.kind, item.path, item.text, item.content_hash) == (first, "image", "/p/a.jpg", None, "hash1")
    assert {name: getattr(item, name) for name in facts} == facts
    assert item.facts == {"k": [1, "ü"]}
    assert c.item_by_path("/p/b.jpg") == c.items([second])[second]
    assert c.item_by_path("/p/c.jpg") is None
    assert c.known(["/p/a.jpg", "/p/none.jpg"]) == {"/p/a.jpg": FileRow("/p/a.jpg", first, 10, 20, True, "hash1")}
    assert c.count() == {"image": 2, "text": 0, "rendered": 0}
    assert stored(c, first).tobytes() == unit(1).astype("<f2").tobytes()
    assert c.verify() == []


def test_a_text_needs_no_file(c: Catalog) -> None:
    (item_id,) = c.commit([Put(kind="text", content_hash="t", text="a dog\non grass", vectors=one(unit(3)))])
    assert (c.items([item_id])[item_id].text, c.items([item_id])[item_id].path) == ("a dog\non grass", None)
    assert c.same_content(["t"], "image") == {}
    assert c.same_content(["t"], "text") == {"t": item_id}
    assert c.verify() == []


any_str = st.text(st.characters(exclude_categories=()), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=any_str, text=any_str)
def test_every_str_round_trips(c: Catalog, name: str, text: str) -> None:
    path = "/r/" + name.replace("/", "-")
    (item_id,) = c.commit([photo(path, text=text)], failed=[bad(path + ".bad", text)])
    assert list(c.known([path])) == [path]
    item = c.item_by_path(path)
    assert item is not None
    assert (item.id, item.path, item.text) == (item_id, path, text)
    assert [row.path for row in c.paths_under([path])] == [path]
    assert [row.path for row in c.unseen(["/r"], ["/r/other"])] == [path]
    assert list(c.unseen(["/r"], [path])) == []
    assert c.failures() == [bad(path + ".bad", text)]
    c.commit(gone=[item_id], recovered=[(path + ".bad", "image")])
    assert c.failures() == []


def test_a_name_in_other_bytes_is_that_of_the_file(c: Catalog, tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n.jpg")
    Path(path).write_bytes(b"x")
    c.commit([photo(path)])
    (row,) = c.paths_under([str(tmp_path)])
    assert os.path.exists(row.path)


def test_many_values_in_one_question(c: Catalog) -> None:
    n = 2 * store._CHUNK + 3
    ids = c.commit([photo(f"/p/{i}", i) for i in range(n)])
    assert {row.path: row.item_id for row in c.known([f"/p/{i}" for i in range(n)]).values()} == {
        f"/p/{i}": ids[i] for i in range(n)
    }
    assert c.same_content([f"hash{i}" for i in range(n)], "image") == {f"hash{i}": ids[i] for i in range(n)}
    assert len(c.items(ids)) == n
    assert [len(block) for block, _ in c.vectors(ids=ids)] == [n]


# commits


def test_a_commit_is_all_or_nothing(c: Catalog) -> None:
    a, _ = c.commit([photo("/p/a", 1), photo("/p/kept", 3)], failed=[bad("/p/x", "why")])
    before = everything(c)
    good = photo("/p/new", 5)
    wrong: list[tuple[list[Put], type[Exception]]] = [
        ([good, photo("/p/b", vectors=one(np.ones(DIM + 1)))], ValueError),
        ([good, photo("/p/b", vectors=one(np.full(DIM, np.nan)))], ValueError),
        ([good, photo("/p/b", vectors=one(np.full(DIM, 1e6)))], ValueError),  # no float16
        ([good, photo("/p/b", vectors={})], ValueError),
        ([good, photo("/p/b", 1, copy_from=a)], ValueError),  # both a vector and a source
        ([good, photo("/p/b", item_id=77)], ValueError),
        ([good, photo("/p/b", vectors={"cirr": unit(1)})], ValueError),  # none for the view that all have
        ([good, photo("/p/b", vectors={}, copy_from=77)], CollectionError),
        ([good, photo("/p/kept", 2)], sqlite3.IntegrityError),  # that path is another item's
        ([good, photo("/p/b", kind="sound")], sqlite3.IntegrityError),
    ]
    for puts, kind in wrong:
        with pytest.raises(kind):
            c.commit(puts, gone=[a], failed=[bad("/p/y", "why")], recovered=[("/p/x", "image")])
        assert everything(c) == before
    assert c.commit([good])  # the connection is none the worse


def test_vectors_need_a_fingerprint(tmp_path: Path) -> None:
    with Catalog.create(tmp_path) as c, pytest.raises(ValueError, match="bind"):
        c.commit([photo("/p/a")])


def test_ids_are_never_used_again(c: Catalog) -> None:
    a, b = c.commit([photo("/p/a", 1), photo("/p/b", 2)])
    c.commit(gone=[b])
    (again,) = c.commit([photo("/p/b", 2)])
    assert again > b > a
    assert c.removed().tolist() == [b]
    assert c.verify() == []


def test_the_state_moves_with_items_and_vectors_only(c: Catalog) -> None:
    (a,) = c.commit([photo("/p/a", 1)])
    row = c.known(["/p/a"])["/p/a"]
    assert c.state == 1
    c.commit(touched=[FileRow("/p/a", a, 11, 22, True, row.content_hash)], failed=[bad("/p/x", "why")])
    c.add_roots([("/p", "image")])
    c.commit(gone=[55])  # not there
    assert c.state == 1
    assert c.removed().tolist() == []
    assert c.known(["/p/a"])["/p/a"] == FileRow("/p/a", a, 11, 22, True, "hash1")
    c.commit([photo("/p/a", 2, item_id=a)])
    c.commit(gone=[a])
    assert c.state == 3


def test_later_vectors_and_removals(c: Catalog) -> None:
    ids = [c.commit([photo(f"/p/{i}", i)])[0] for i in range(5)]
    c.commit([photo("/p/1", 11, item_id=ids[1])], gone=[ids[0]])

    def later(after: int) -> list[int]:
        return [int(i) for block, _ in c.vectors(after=after) for i in block]

    assert later(0) == [ids[2], ids[3], ids[4], ids[1]]
    assert later(4) == [ids[4], ids[1]]
    assert later(6) == []
    assert [i.tolist() for i, _ in c.vectors(after=5, ids=ids)] == [[ids[1]]]
    assert (c.removed(5).tolist(), c.removed(6).tolist()) == ([ids[0]], [])
    assert stored(c, ids[1]).tobytes() == unit(11).astype("<f2").tobytes()


def test_an_item_that_loses_a_view_counts_as_removed_there(c: Catalog) -> None:
    both = {VIEW: unit(1), "cirr": unit(2)}
    a, b = c.commit([photo("/p/a", vectors=both), photo("/p/b", vectors=both)])
    c.commit([photo("/p/b", 3, item_id=b)])
    assert [c.removed(after, "cirr").tolist() for after in (0, 1, 2)] == [[b], [b], []]
    assert c.removed(0).tolist() == []
    c.commit(gone=[a])
    assert (c.removed(2).tolist(), c.removed(1, "cirr").tolist()) == ([a], [a, b])
    assert c.verify() == []


def test_blocks_of_vectors(c: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "BLOCK", 4)
    ids = c.commit([photo(f"/p/{i}", i) for i in range(10)])
    sizes, seen = [], []
    for block, x in c.vectors():  # what is committed between blocks is left for later
        assert block.dtype == np.int64
        assert x.dtype == np.float16
        assert x.shape == (len(block), DIM)
        sizes.append(len(block))
        seen += block.tolist()
        c.commit([photo(f"/q/{len(seen)}", 50 + len(seen))])
    assert seen == ids
    assert sizes == [4, 4, 2]
    assert [len(block) for block, _ in c.vectors(ids=ids)] == [4, 4, 2]


# copies


def test_a_copy_has_the_vector_and_the_facts_but_is_its_own_item(c: Catalog) -> None:
    (a,) = c.commit([photo("/p/a", 1, width=3, camera="cam", facts={"k": 1})])
    (b,) = c.commit([photo("/q/b", 1, vectors={}, copy_from=a, mtime_ns=99)])
    one, two = c.items([a, b])[a], c.items([a, b])[b]
    assert two.path == "/q/b"
    assert (
        (two.width, two.camera, two.facts)
        == (one.width, one.camera, one.facts)
        == (
            3,
            "cam",
            {"k": 1},
        )
    )
    assert stored(c, b).tobytes() == stored(c, a).tobytes()
    assert c.same_content(["hash1"], "image") == {"hash1": a}
    assert c.ids_of_content("hash1") == [a, b]
    c.commit(gone=[a])
    assert c.same_content(["hash1"], "image") == {"hash1": b}
    assert c.verify() == []


def test_a_moved_file_takes_the_vector_along(c: Catalog) -> None:
    (a,) = c.commit([photo("/p/a", 1)])
    (b,) = c.commit([photo("/q/a", 1, vectors={}, copy_from=a)], gone=[a])
    assert b != a
    assert list(c.items([a, b])) == [b]
    assert stored(c, b).tobytes() == unit(1).astype("<f2").tobytes()


def test_two_files_swap_their_contents(c: Catalog) -> None:
    a, b = c.commit([photo("/p/a", 1, width=1), photo("/p/b", 2, width=2)])
    swapped = [
        photo("/p/a", 2, item_id=a, vectors={}, copy_from=b),
        photo("/p/b", 1, item_id=b, vectors={}, copy_from=a),
    ]
    c.commit(swapped)
    assert stored(c, a).tobytes() == unit(2).astype("<f2").tobytes()
    assert c.items([a])[a].width == 2
    assert stored(c, b).tobytes() == unit(1).astype("<f2").tobytes()
    assert c.items([b])[b].width == 1


def test_a_source_that_has_changed_is_not_copied(c: Catalog) -> None:
    a, twin = c.commit([photo("/p/a", 1), photo("/p/twin", 1)])
    c.commit([photo("/p/a", 9, item_id=a)])
    copy = photo("/p/b", 1, vectors={}, copy_from=a)
    (b,) = c.commit([copy])
    assert stored(c, b).tobytes() == unit(1).astype("<f2").tobytes()
    c.commit(gone=[twin, b])
    with pytest.raises(CollectionError, match="changed in the meantime"):
        c.commit([copy])


# files


def test_failures_are_recorded_and_cleared(c: Catalog) -> None:
    c.commit(failed=[bad("/p/b", "first"), bad("/p/a", "truncated"), bad("/p/c", "empty")])
    c.commit(failed=[bad("/p/b", "second")])
    assert c.failures() == [bad("/p/a", "truncated"), bad("/p/b", "second"), bad("/p/c", "empty")]
    c.commit([photo("/p/b")], recovered=[("/p/a", "image")])
    assert c.failures() == [bad("/p/c", "empty")]


def test_failures_in_a_file_of_texts_are_told_by_kind_and_place(c: Catalog) -> None:
    lines = [Failed("/t", kind, "bad", place) for place in ("2", "10") for kind in ("rendered", "text")]
    c.commit(failed=lines)
    assert c.failures() == lines
    assert [failure.where for failure in lines[:3]] == ["/t:2", "/t:2", "/t:10"]
    c.commit([text("/t", "1", "a")])  # the rest of the file has still to be read
    assert c.failures() == lines
    c.commit(recovered=[("/t", "text")])
    assert c.failures() == [line for line in lines if line.kind == "rendered"]


def test_files_under_a_root(c: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", 2)
    paths = ["/a", "/a-b/x", "/a/1", "/a/2", "/a/b/3", "/a/b/4", "/a/b/5", "/a0", "/z/ü", "/z/\udcff"]
    c.commit([photo(path, n) for n, path in enumerate(paths)])

    def under(*roots: str) -> list[str]:
        return sorted(row.path for row in c.paths_under(roots))

    assert under("/a") == ["/a", "/a/1", "/a/2", "/a/b/3", "/a/b/4", "/a/b/5"]
    assert under("/a/b/", "/a", "/a/b", "/a/1") == under("/a")
    assert under("/") == sorted(paths)
    assert under("/z") == ["/z/ü", "/z/\udcff"]
    assert under("/nowhere") == [] == under()
    unseen = [row.path for row in c.unseen(["/a", "/a/b"], iter(["/a/2", "/a/b/4", "/z/ü", "/a/2", "/never"]))]
    assert sorted(unseen) == ["/a", "/a/1", "/a/b/3", "/a/b/5"]


def test_unseen_locks_nothing(c: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", 1)
    ids = c.commit([photo(f"/p/{n}", n) for n in range(4)])
    rows = c.unseen(["/p"], ["/p/3"])
    next(rows)
    with Catalog.open(c.path.parent) as other:
        other.commit([photo("/other", 8)])
    c.commit(gone=ids[:1])
    assert [row.path for row in rows] == ["/p/1", "/p/2"]
    assert [row.path for row in c.unseen(["/p"], [])] == ["/p/1", "/p/2", "/p/3"]


def test_roots(c: Catalog) -> None:
    c.add_roots([("/z\udcff", "image"), ("/a", "text")])
    c.add_roots([("/z\udcff", "rendered"), ("/a", "text")])
    assert c.roots() == [("/z\udcff", "image"), ("/a", "text"), ("/z\udcff", "rendered")]
    c.drop_roots(["/z\udcff", "/none"])
    assert c.roots() == [("/a", "text")]


def test_runs(c: Catalog) -> None:
    killed, done = c.start_run(), c.start_run()
    c.finish_run(done, {"added": 3})
    with raw(c) as db:
        rows = db.execute("SELECT id, finished_at IS NULL, counts FROM runs ORDER BY id").fetchall()
    assert rows == [(killed, 1, None), (done, 0, '{"added": 3}')]


# opening


def test_bound_once(c: Catalog) -> None:
    c.bind("model@1", DIM, {"name": "elsewhere"})
    assert (c.fingerprint, c.dim, c.model) == ("model@1", DIM, {"name": "model", "revision": "1", "quantize": None})
    for other in (("model@2", DIM), ("model@1", 8)):
        with pytest.raises(FingerprintMismatch, match=r"model@1.*not by model@"):
            c.bind(*other, {})
    with Catalog.open(c.path.parent) as again:
        assert (again.uid, again.fingerprint) == (c.uid, "model@1")


def test_create(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    with Catalog.create(folder) as one, Catalog.create(tmp_path / "two") as two:
        assert one.uid != two.uid
        assert (one.state, one.fingerprint, one.dim, one.model) == (0, None, None, None)
        assert list(one.vectors()) == []
        assert one.verify() == []
    assert os.listdir(folder) == [CATALOG]
    with pytest.raises(CollectionError, match="already"):
        Catalog.create(folder)
    with pytest.raises(CollectionError, match="cannot be written"):
        Catalog.create(folder / CATALOG / "below")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_several_create_at_once(tmp_path: Path) -> None:
    gate, go = os.pipe()

    def create(fd: int) -> None:
        os.close(go)
        os.read(gate, 1)
        with Catalog.create(tmp_path / "c") as c:
            c.bind("model@1", DIM, {})
            c.commit([photo(f"/p/{os.getpid()}", 1)])
            os.write(fd, c.uid.encode())

    children = [in_child(create) for _ in range(4)]
    os.close(go)
    os.close(gate)
    uids = []
    for pid, out in children:
        with open(out, "rb") as pipe:
            uids.append(pipe.read().decode())
        os.waitpid(pid, 0)
    made = [uid for uid in uids if uid]  # one that came when the catalog was there has been refused
    with Catalog.open(tmp_path / "c") as c:
        assert set(made) == {c.uid}
        assert c.count()["image"] == c.state == len(made)
    assert os.listdir(tmp_path / "c") == [CATALOG]


@pytest.mark.parametrize("links", [True, False])
def test_the_faster_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    publish = store._publish

    def overtaken(unfinished: Path, path: Path) -> None:
        monkeypatch.setattr(store, "_publish", publish)
        filled(tmp_path).close()
        publish(unfinished, path)

    def refused(*_: object) -> None:
        raise PermissionError(1, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(store, "_publish", overtaken)
    with Catalog.create(tmp_path) as c:
        assert c.count()["image"] == 3
    assert os.listdir(tmp_path) == [CATALOG]


def test_none_there(tmp_path: Path) -> None:
    with pytest.raises(CollectionNotFound, match="e5v-search index"):
        Catalog.open(tmp_path)
    assert os.listdir(tmp_path) == []


def damage_header(path: Path) -> None:
    path.write_bytes(b"no database at all" + path.read_bytes()[18:])


def damage_truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def damage_empty(path: Path) -> None:
    os.truncate(path, 0)


def damage_other(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE notes (text)")


def damage_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def damage_pages(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[32768:] = os.urandom(len(data) - 32768)
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [damage_header, damage_truncate, damage_empty, damage_other, damage_folder, damage_pages])
def test_a_damaged_catalog_is_refused(c: Catalog, damage: Callable[[Path], None]) -> None:
    c.commit([photo(f"/p/{n}", n) for n in range(50)])
    c.close()
    damage(c.path)
    for readonly in (False, True):
        with pytest.raises(CatalogDamaged, match=r"photos are untouched.*index again") as caught:
            Catalog.open(c.path.parent, readonly).close()
        assert str(c.path) in str(caught.value)


def test_damage_met_later(c: Catalog) -> None:
    c.commit([photo(f"/p/{n}", n, text="word " * 300) for n in range(200)])
    c.close()
    data = bytearray(c.path.read_bytes())
    pages = len(data) // 32768
    for page in range(pages - 8, pages):  # the schema at the front stays whole
        data[page * 32768 : page * 32768 + 64] = b"\xff" * 64
    c.path.write_bytes(data)
    with Catalog.open(c.path.parent) as opened:
        assert opened.verify()
        with pytest.raises(CatalogDamaged):
            everything(opened)


def test_a_newer_schema_is_refused(c: Catalog) -> None:
    with raw(c) as db:
        db.execute("INSERT INTO migrations VALUES (99, 'later', 'now')")
    before = c.path.read_bytes()
    with pytest.raises(SchemaTooNew, match=rf"schema 99.*up to {migrations.newest()}\b"):
        Catalog.open(c.path.parent)
    assert c.path.read_bytes() == before


# migrations


def with_steps(monkeypatch: pytest.MonkeyPatch, *steps: Callable[..., object]) -> None:
    later = tuple((step.__name__, step) for step in steps)
    monkeypatch.setattr(migrations, "MIGRATIONS", migrations.MIGRATIONS + later)


def add_rating(db: object) -> None:
    db.execute("ALTER TABLE items ADD COLUMN rating INTEGER DEFAULT 3")  # type: ignore[attr-defined]


def fail_halfway(db: object) -> None:
    db.execute("CREATE TABLE half (x)")  # type: ignore[attr-defined]
    db.execute("DELETE FROM items")  # type: ignore[attr-defined]
    db.execute("ALTER TABLE nowhere ADD COLUMN x")  # type: ignore[attr-defined]


def schema(c: Catalog) -> tuple[list[object], list[object]]:
    with raw(c) as db:
        return db.execute("SELECT number, name FROM migrations").fetchall(), db.execute(
            "SELECT sql FROM sqlite_master"
        ).fetchall()


@pytest.mark.parametrize("readonly", [False, True])
def test_an_older_schema_is_brought_up(c: Catalog, monkeypatch: pytest.MonkeyPatch, readonly: bool) -> None:
    c.commit([photo("/p/a", 1)])
    before = everything(c)
    c.close()
    with_steps(monkeypatch, add_rating)
    for _ in range(2):
        with Catalog.open(c.path.parent, readonly) as opened:
            assert everything(opened) == before
    with raw(c) as db:
        assert db.execute("SELECT rating FROM items").fetchall() == [(3,)]
    assert schema(c)[0][-1] == (len(schema(c)[0]), "add_rating")


def test_a_failing_step_is_rolled_back(c: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    c.commit([photo("/p/a", 1)])
    before, old = everything(c), schema(c)
    c.close()
    with monkeypatch.context() as patch:
        with_steps(patch, fail_halfway)
        with pytest.raises(sqlite3.OperationalError, match="nowhere"):
            Catalog.open(c.path.parent)
        assert schema(c) == old
    with monkeypatch.context() as patch:
        with_steps(patch, add_rating, fail_halfway)
        with pytest.raises(sqlite3.OperationalError, match="nowhere"):
            Catalog.open(c.path.parent)
        assert schema(c)[0] == [*old[0], (len(old[0]) + 1, "add_rating")]  # the step before it stays
    with_steps(monkeypatch, add_rating)
    with Catalog.open(c.path.parent) as opened:
        assert everything(opened) == before


# verify


PLANTED = [
    ("no vector", "DELETE FROM vectors WHERE item_id = 2"),
    ("points to a row of items", "INSERT INTO vectors SELECT 50, view, state, embedding FROM vectors WHERE item_id = 2"),
    ("vectors belong to no item", "INSERT INTO vectors SELECT 50, view, state, embedding FROM vectors WHERE item_id = 2"),
    ("files belong to no item", "INSERT INTO files VALUES (50, '/p/lost', 'image', '', 1, 1, 0)"),
    ("another kind", "UPDATE files SET kind = 'text' WHERE item_id = 2"),
    ("neither a file nor a text", "DELETE FROM files WHERE item_id = 2"),
    ("recorded as removed", "INSERT INTO removed VALUES (2, 1)"),
    ("written by a state", "UPDATE vectors SET state = 9 WHERE item_id = 2"),
    ("removed by a state", "INSERT INTO removed VALUES (70, 9)"),
    ("no fingerprint", "DELETE FROM meta WHERE key = 'dim'"),
    (f"not {DIM} numbers", "UPDATE vectors SET embedding = zeroblob(7) WHERE item_id = 2"),
    ("not finite", f"UPDATE vectors SET embedding = x'{'007e' * DIM}' WHERE item_id = 2"),
    ("length 1", "UPDATE vectors SET embedding = zeroblob(32) WHERE item_id = 2"),
]


@pytest.mark.parametrize(("problem", "fault"), PLANTED)
def test_verify_finds(c: Catalog, problem: str, fault: str) -> None:
    c.commit([photo(f"/p/{n}", n) for n in range(4)])
    assert c.verify() == []
    with raw(c) as db:
        db.execute(fault)
    assert any(problem in line for line in c.verify())


def test_a_short_vector_is_not_handed_out(c: Catalog) -> None:
    c.commit([photo("/p/a", 1), photo("/p/b", 2)])
    with raw(c) as db:
        db.execute("UPDATE vectors SET embedding = substr(embedding, 3) WHERE item_id = 1")
        db.execute("UPDATE vectors SET embedding = CAST(embedding || x'0000' AS BLOB) WHERE item_id = 2")
    with pytest.raises(CatalogDamaged, match="item 1"):
        list(c.vectors())


# several at once


def test_readers_see_whole_commits(c: Catalog) -> None:
    c.commit([photo("/p/a", 1)])
    with Catalog.open(c.path.parent, readonly=True) as reader:
        with reader.snapshot():
            assert reader.state == 1
            c.commit([photo("/p/b", 2)])
            assert reader.state == 1
            assert reader.count()["image"] == 1
        assert reader.state == 2
        assert reader.count()["image"] == 2
        with connection.transaction(c._db):
            c._db.execute("DELETE FROM items")
            assert reader.count()["image"] == 2


def test_a_second_writer_waits_and_is_then_refused(c: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BUSY_SECONDS", 0.05)
    with Catalog.open(c.path.parent) as other:
        with connection.transaction(c._db), pytest.raises(CollectionBusy, match="another run"):
            other.commit([photo("/p/a")])
        assert other.commit([photo("/p/a")])


def test_reading_writes_nothing(c: Catalog) -> None:
    c.commit([photo("/p/a")])
    with Catalog.open(c.path.parent, readonly=True) as reader, pytest.raises(CollectionReadOnly):
        reader.commit([photo("/p/b")])
    assert c.count()["image"] == 1


def in_child(work: Callable[[int], None]) -> tuple[int, int]:
    """Run `work(fd)` in a forked process; gives its pid and the end of the pipe to read what it writes to fd."""
    out, into = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(out)
        status = 1
        try:
            work(into)
            status = 0
        finally:
            os._exit(status)
    os.close(into)
    return pid, out


def answer(work: Callable[[], str]) -> str:
    """What `work` returns when it runs as a user who may write nothing."""

    def unprivileged(fd: int) -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        try:
            said = work()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        os.write(fd, said.encode())

    pid, out = in_child(unprivileged)
    with open(out, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(pid, 0)
    return said


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may read: pytest's own are private."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def filled(folder: Path, n: int = 3) -> Catalog:
    made = Catalog.create(folder)
    made.bind("model@1", DIM, {})
    made.commit([photo(f"/p/{i}", i) for i in range(n)])
    return made


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_folder_that_cannot_be_written(public: Path) -> None:
    folder = public / "c # ?%"

    def look() -> str:
        with Catalog.open(folder, readonly=True) as c:
            return f"{c.count()['image']} {sum(len(ids) for ids, _ in c.vectors())} {c.verify()}"

    def change() -> str:
        return str(Catalog.open(folder))

    c = filled(folder)
    os.chmod(folder, 0o555)
    try:
        assert answer(look) == "3 3 []"  # beside a writer
        c.close()
        assert os.listdir(folder) == [CATALOG]
        assert answer(look) == "3 3 []"
        assert answer(change).startswith("CollectionReadOnly")
        assert os.listdir(folder) == [CATALOG]
    finally:
        os.chmod(folder, 0o755)

    def die(fd: int) -> None:
        Catalog.open(folder).commit([photo("/p/new", 7)])
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(in_child(die)[0], 0)
    (folder / f"{CATALOG}-shm").unlink()
    os.chmod(folder, 0o555)
    try:
        assert "interrupted run" in answer(look)  # rather than what was there before it
    finally:
        os.chmod(folder, 0o755)
    with Catalog.open(folder) as mended:
        assert mended.count()["image"] == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment(tmp_path: Path) -> None:
    batch, kills = 16, 12
    filled(tmp_path / "c", 0).close()
    delays = random.Random(5)

    def write(fd: int) -> None:
        with Catalog.open(tmp_path / "c") as c:
            (old,) = c.commit([photo(f"/old/{c.state}", 1)])
            while True:
                n = c.state
                ids = c.commit([photo(f"/p/{n}/{i}", n * batch + i) for i in range(batch)], gone=[old])
                old = ids[0]
                os.write(fd, f"{ids[-1]}\n".encode())

    for _ in range(kills):
        pid, out = in_child(write)
        with open(out, "rb") as pipe:
            first = pipe.readline()
            time.sleep(delays.uniform(0, 0.03))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            last = int((first + pipe.read()).split()[-1])
        with Catalog.open(tmp_path / "c") as c:
            assert c.verify() == []
            assert last in c.items([last])  # what was acknowledged is there
            assert [len(ids) for ids, _ in c.vectors(ids=[last])] == [1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> None:
    with open(place / "ballast", "ab", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            return


def write_on(c: Catalog) -> None:
    for n in range(10_000):
        c.commit([photo(f"/p/{n}/{i}", i, text="x" * 1000) for i in range(50)])


def test_a_full_disk(small_disk: Path) -> None:
    c = filled(small_disk / "c", 0)
    (small_disk / "reserve").write_bytes(bytes(500_000))  # what is freed in the end
    with pytest.raises(DiskFull, match="free some space"):
        write_on(c)
    kept = c.count()["image"]
    assert kept
    assert kept % 50 == 0
    assert c.verify() == []
    c.close()
    (small_disk / "ballast").touch()
    (small_disk / "c" / f"{CATALOG}-shm").unlink(missing_ok=True)
    fill(small_disk)  # no room even for SQLite's shared memory
    for readonly in (True, False):
        with Catalog.open(small_disk / "c", readonly) as opened:
            assert opened.count()["image"] == kept
            assert opened.verify() == []
    with Catalog.open(small_disk / "c") as opened, pytest.raises(DiskFull):
        opened.commit([photo("/p/one", 1, text="x" * 100_000)])
    (small_disk / "ballast").unlink()
    (small_disk / "reserve").unlink()
    with Catalog.open(small_disk / "c") as opened:
        opened.commit([photo("/p/one", 1)])
        assert opened.count()["image"] == kept + 1
    with pytest.raises(DiskFull):
        fill_and_create(small_disk)


def fill_and_create(place: Path) -> None:
    fill(place)
    Catalog.create(place / "another")
