"""Files of many texts in the catalog, views, and catalogs made before there were either."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from e5v_search.catalog import CATALOG, VIEW, Catalog, Corpus, Failed, FileRow, Put, files, migrations

DIM = 16
LINES = "/t/captions.txt"


def unit(seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
    return x / np.linalg.norm(x)


def put(part: str, text: str, kind: str = "text", path: str = LINES, **fields: object) -> Put:
    values: dict[str, object] = {"vectors": {VIEW: unit(len(text))}, "text": text, "content_hash": f"#{text}"}
    return Put(kind=kind, path=path, part=part, **(values | fields))  # type: ignore[arg-type]


@pytest.fixture
def c(tmp_path: Path) -> Iterator[Catalog]:
    with Catalog.create(tmp_path / "c") as made:
        made.bind("model@1", DIM, {"name": "model", "quantize": None})
        yield made
        assert made.verify() == []


def parts(c: Catalog, kind: str = "text", path: str = LINES) -> dict[str, int]:
    return {row.part: row.item_id for row in c.parts(path, kind)}


def matched(c: Catalog, texts: list[tuple[str, str]]) -> tuple[list[int | None], list[int]]:
    """Ids claimed by the texts (part, text) of a reading in one go, and those that nobody claims."""
    with c.reading(LINES, "text") as reading:
        rows = reading.match([(part, f"#{text}") for part, text in texts])
        return [row and row.item_id for row in rows], list(reading.unclaimed())


def test_one_file_holds_many_items_of_two_kinds(c: Catalog) -> None:
    a, b, r = c.commit([put("1", "a dog"), put("2", "a cat"), put("1", "a dog", "rendered")])
    item = c.items([b])[b]
    assert (item.kind, item.path, item.part, item.text) == ("text", LINES, "2", "a cat")
    assert (parts(c), parts(c, "rendered")) == ({"1": a, "2": b}, {"1": r})
    assert [row.kind for row in c.paths_under(["/t"])] == ["rendered", "text", "text"]
    assert c.known([LINES]) == {}
    assert c.item_by_path(LINES) is None
    assert c.same_content(["#a dog"], "text") == {"#a dog": a}
    assert c.ids_of_content("#a dog") == [a, r]


def test_a_photo_has_no_part(c: Catalog) -> None:
    (a,) = c.commit([Put(kind="image", path="/p/a", content_hash="x", vectors={VIEW: unit(1)})])
    assert c.items([a])[a].part is None
    assert list(c.unseen_corpora("text", ["/"], [])) == []


def test_a_file_counts_as_read_only_while_nothing_in_it_changes(c: Catalog) -> None:
    whole = Corpus(LINES, "text", 10, 20, True, 2)

    def known() -> tuple[Corpus | None, set[tuple[int, int]]]:
        return c.corpora([LINES], "text").get(LINES), {(row.size, row.mtime_ns) for row in c.parts(LINES, "text")}

    unread = Corpus(LINES, "text", -1, -1, False, 0)
    a, b = c.commit([put("1", "a dog"), put("2", "a cat")])
    assert known()[0] == unread
    c.commit(read=[whole])
    assert known() == (whole, {(10, 20)})
    changes: list[dict[str, object]] = [
        {"puts": [put("3", "a bird")]},
        {"gone": [a]},
        {"moved": [FileRow(LINES, b, 10, 20, True, "#a cat", "text", "9")]},
    ]
    for change in changes:
        c.commit(read=[whole])
        c.commit(**change)  # type: ignore[arg-type]
        row = known()[0]
        assert row is not None
        assert (row.size, row.mtime_ns) == (-1, -1)
    c.commit(read=[whole])
    c.commit([put("1", "a dog", "rendered")])  # the same file as another kind
    assert known()[0] == whole
    c.commit(gone=list(parts(c).values()))
    assert c.corpora([LINES], "text") == {}
    assert list(c.corpora([LINES], "rendered")) == [LINES]


def test_unseen_files_of_texts(c: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", 2)
    paths = [f"/t/{n}.txt" for n in range(5)]
    for path in paths:
        c.commit([put(str(n), f"{path} {n}", path=path) for n in range(3)])
    c.commit([put("1", "x", "rendered", path="/t/6.txt")], read=[Corpus("/t/empty.txt", "text", 1, 2, False, 0)])
    assert [row.path for row in c.unseen_corpora("text", ["/t"], paths[1:])] == [paths[0], "/t/empty.txt"]
    assert [row.path for row in c.unseen_corpora("rendered", ["/t/6.txt"], [])] == ["/t/6.txt"]
    assert list(c.unseen(["/t"], [])) == []
    assert len(list(c.paths_under(["/t"]))) == 16
    assert len(list(c.parts(paths[0], "text"))) == 3


# reading a file again


def test_texts_are_met_again_wherever_they_stand(c: Catalog) -> None:
    a, b, x, again = c.commit([put("1", "a"), put("2", "b"), put("3", "x"), put("4", "a")])
    c.commit([put("1", "a", path="/t/other.txt"), put("1", "a", "rendered")])  # not of this file
    assert matched(c, [("1", "a"), ("2", "b"), ("3", "x"), ("4", "a")]) == ([a, b, x, again], [])
    assert matched(c, [("1", "new"), ("2", "a"), ("3", "b"), ("4", "x"), ("5", "a")]) == ([None, a, b, x, again], [])
    assert matched(c, [("1", "b"), ("2", "a"), ("3", "a"), ("4", "a")]) == ([b, a, None, again], [x])
    assert matched(c, []) == ([], [a, b, x, again])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.sampled_from("abcd"), max_size=12), st.integers(1, 5))
def test_no_text_that_stays_is_lost_or_claimed_twice(c: Catalog, before: list[str], after: list[str], window: int) -> None:
    for row in list(c.parts(LINES, "text")):
        c.commit(gone=[row.item_id])
    ids = c.commit([put(str(n), text) for n, text in enumerate(before)])
    claimed: list[int] = []
    with c.reading(LINES, "text") as reading:
        for start in range(0, len(after), window):
            texts = after[start : start + window]
            rows = reading.match([(str(start + n), f"#{text}") for n, text in enumerate(texts)])
            for text, row in zip(texts, rows, strict=True):
                if row is not None:
                    assert row.content_hash == f"#{text}"
                    claimed.append(row.item_id)
        left = list(reading.unclaimed())
    assert len(set(claimed)) == len(claimed) == sum(min(before.count(x), after.count(x)) for x in "abcd")
    assert sorted([*claimed, *left]) == ids


def test_a_moved_text_takes_the_place_of_another(c: Catalog) -> None:
    a, b, d = c.commit([put("1", "a"), put("2", "b"), put("3", "d")])
    state = c.state

    def row(item_id: int, part: str) -> FileRow:
        return FileRow(LINES, item_id, 1, 2, False, "", "text", part)

    c.commit(moved=[row(a, "2"), row(b, "3")])
    assert c.items([a, b, d])[d].part is None  # until the file has been read on
    assert {name: item_id for name, item_id in parts(c).items() if item_id != d} == {"2": a, "3": b}
    new, _ = c.commit([put("1", "new"), put("4", "d", item_id=d, vectors={}, copy_from=d)], moved=[])
    assert parts(c) == {"1": new, "2": a, "3": b, "4": d}
    assert c.state == state + 1


def test_a_copied_text_has_its_own_facts(c: Catalog) -> None:
    (a,) = c.commit([put("1", "a", facts={"year": 1990})])
    (b,) = c.commit([put("2", "a", facts={"year": 2000}, vectors={}, copy_from=a)])
    items = c.items([a, b])
    assert (items[a].facts, items[b].facts) == ({"year": 1990}, {"year": 2000})
    ((_, x),) = c.vectors(ids=[a, b])
    assert x[0].tobytes() == x[1].tobytes()


# views


def test_views(c: Catalog) -> None:
    assert c.views == [VIEW]
    a, b = c.commit([put("1", "a", vectors={VIEW: unit(1), "cirr": unit(2)}), put("2", "b")])
    c.add_views(["cirr", VIEW])
    assert c.views == [VIEW, "cirr"]
    assert (c.pending("cirr").tolist(), c.pending(VIEW).tolist()) == ([b], [])
    assert c.verify() == []  # what is pending is no damage
    state = c.state
    c.commit(completed=[(b, "cirr", unit(3))])
    assert c.pending("cirr").tolist() == []
    assert [(ids.tolist(), x.shape) for ids, x in c.vectors(after=state, view="cirr")] == [([b], (1, DIM))]
    assert list(c.vectors(after=state)) == []
    (copy,) = c.commit([put("3", "a", vectors={}, copy_from=a)])
    ((_, x),) = c.vectors(ids=[copy], view="cirr")
    assert x[0].tobytes() == unit(2).astype("<f2").tobytes()
    c.commit([put("1", "c", item_id=a)])  # other content: its old vectors are of no use
    assert c.pending("cirr").tolist() == [a]


# catalogs of before


def old_catalog(folder: Path) -> None:
    """As the first schema had it."""
    folder.mkdir()
    with closing(sqlite3.connect(folder / CATALOG)) as db, db:
        db.executescript("PRAGMA journal_mode = WAL;" + migrations._FIRST)
        db.execute("CREATE TABLE migrations (number INTEGER PRIMARY KEY, name TEXT NOT NULL, applied_at TEXT NOT NULL)")
        db.execute("INSERT INTO migrations VALUES (1, 'first', '2024-01-01')")
        meta = [("uid", "abc"), ("fingerprint", "model@1"), ("dim", DIM), ("model", '{"name": "model"}')]
        db.executemany("INSERT INTO meta VALUES (?, ?)", meta)
        for i in range(1, 4):
            db.execute("INSERT INTO items (kind, content_hash, width) VALUES ('image', ?, ?)", (f"#{i}", 10 * i))
            db.execute("INSERT INTO files VALUES (?, ?, 7, 8, ?)", (f"/p/{i}", i, i == 2))
            db.execute("INSERT INTO vectors VALUES (?, 'retrieval', ?, ?)", (i, i, unit(i).astype("<f2").tobytes()))
        db.execute("UPDATE meta SET value = 3 WHERE key = 'state'")
        db.execute("INSERT INTO failures VALUES ('/p/bad', 'truncated', '2024-01-01')")
        db.execute("INSERT INTO roots VALUES ('/p', 'image', '2024-01-01'), ('/a', 'image', '2024-01-01')")


@pytest.mark.parametrize("readonly", [False, True])
def test_a_catalog_of_the_first_schema_is_brought_up(tmp_path: Path, readonly: bool) -> None:
    old_catalog(tmp_path / "old")
    with Catalog.open(tmp_path / "old", readonly) as c:
        assert (c.uid, c.fingerprint, c.state, c.views) == ("abc", "model@1", 3, [VIEW])
        paths = [f"/p/{i}" for i in range(1, 4)]
        assert c.known(paths) == {f"/p/{i}": FileRow(f"/p/{i}", i, 7, 8, i == 2, f"#{i}") for i in range(1, 4)}
        assert [c.items([i])[i].width for i in range(1, 4)] == [10, 20, 30]
        assert c.failures() == [Failed("/p/bad", "image", "truncated")]
        assert c.roots() == [("/p", "image"), ("/a", "image")]
        ((ids, x),) = c.vectors()
        assert ids.tolist() == [1, 2, 3]
        assert x.tobytes() == b"".join(unit(i).astype("<f2").tobytes() for i in (1, 2, 3))
        assert c.verify() == []
    with Catalog.open(tmp_path / "old") as c:
        assert c.commit([put("1", "a text")], gone=[1]) == [4]
        assert c.verify() == []


def test_a_killed_migration_leaves_the_old_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_catalog(tmp_path / "old")
    monkeypatch.setattr(migrations, "_PARTS", migrations._PARTS + "DROP TABLE nowhere;")
    with pytest.raises(sqlite3.OperationalError, match="nowhere"):
        Catalog.open(tmp_path / "old")
    monkeypatch.undo()
    with Catalog.open(tmp_path / "old") as c:
        assert len(c.known([f"/p/{i}" for i in range(1, 4)])) == 3
