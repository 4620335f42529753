"""A collection out and in again, bit by bit; other programs' files; what does not fit, and what a kill may cost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import replica
from command_line import refused, run, start, write_photos
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from e5v_search import Collection, Embedder
from e5v_search.backbones.llava_next import LlavaNextEmbedder
from e5v_search.catalog import Catalog, Put
from e5v_search.collection.exporting import export
from e5v_search.collection.importing import import_folder
from e5v_search.errors import CollectionError, DiskFull, FingerprintMismatch, UsageError

ROOT = Path(__file__).parent.parent
D = 16


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> LlavaNextEmbedder:
    model = replica.build(tmp_path_factory.mktemp("model"))[0]
    return Embedder.load(str(model), device="cpu", dtype="float32")  # type: ignore[return-value]


def unit(n: int, d: int = D, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def fill(place: Path, puts: list[Put], views: tuple[str, ...] = ()) -> Path:
    """A collection of items made up by a test."""
    with Catalog.create(place) as catalog:
        catalog.bind("model@revision/retrieval/pil/auto/float", D, {"name": "model", "quantize": "4bit"})
        if views:
            catalog.add_views(views)
        catalog.add_roots([("/photos", "image"), (os.fsdecode(b"/texts \xe9"), "text")])
        catalog.commit(puts)
    return place


def numbered(n: int, **fields: Any) -> list[Put]:
    x = unit(n)
    return [Put(kind="text", content_hash=f"h{i}", text=f"text {i}", vectors={"retrieval": x[i]}, **fields) for i in range(n)]


def truth(place: Path) -> list[tuple[Any, ...]]:
    """All that a catalog holds of its items, vectors as bytes; and what it is bound to."""
    with Catalog.open(place) as c:
        rows: list[tuple[Any, ...]] = [(c.fingerprint, c.dim, c.model, c.views, c.roots())]
        for block in c.dump():
            for put in block:
                fields = {name: getattr(put, name) for name in Put.__dataclass_fields__ if name != "vectors"}
                rows.append((fields, {view: x.tobytes() for view, x in put.vectors.items()}))
        return rows


def there_and_back(place: Path, base: Path, items: str = "parquet") -> Path:
    with Collection.open(place, create=False) as c:
        export(c, base / "out", items)
    back = base / "back"
    import_folder(base / "out", back)
    with Collection.open(back, create=False) as c:
        assert c.verify() == []
    return back


# round trips


@pytest.mark.parametrize("items", ["parquet", "jsonl"])
def test_photos_come_back_and_are_recognised(tmp_path: Path, embedder: LlavaNextEmbedder, items: str) -> None:
    photos = tmp_path / os.fsdecode(b"photos \xe9")
    write_photos(photos, 7)
    with Collection.open(tmp_path / "c", embedder) as c:
        c.ingest([photos])
        c.forget([photos / "0003.jpg"])
        expected = c.search("a dog", k=10)
    back = there_and_back(tmp_path / "c", tmp_path, items)
    assert truth(back) == truth(tmp_path / "c")
    x = np.load(tmp_path / "out/vectors.npy", mmap_mode="r")
    assert (x.shape, x.dtype) == ((6, embedder.dim), np.float16)
    (photos / "0003.jpg").unlink()
    with Collection.open(back, embedder) as c:
        assert c.search("a dog", k=10) == expected
        report = c.ingest([photos])
        assert (report.added, report.unchanged, report.updated) == (0, 6, 0)


def test_texts_and_views_come_back_and_are_recognised(tmp_path: Path, embedder: LlavaNextEmbedder) -> None:
    photos, texts = tmp_path / "photos", tmp_path / "captions.jsonl"
    write_photos(photos, 2)
    lines = [{"id": "a", "text": "a dog", "price": 3}, {"text": "a cat"}, {"text": "a dog"}]
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Collection.open(tmp_path / "c", embedder) as c:
        c.ingest([photos], views=["cirr"])
        c.ingest([texts], kind="text")
        c.ingest([texts], kind="rendered")
    back = there_and_back(tmp_path / "c", tmp_path)
    assert truth(back) == truth(tmp_path / "c")
    before = truth(back)
    with Collection.open(back) as c:
        for kind, place, n in (("image", photos, 2), ("text", texts, 3), ("rendered", texts, 3)):
            report = c.ingest([place], kind=kind)  # without its model
            assert (report.added, report.unchanged, report.updated, report.removed, report.failed) == (0, n, 0, 0, [])
    assert truth(back) == before


_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)  # lone surrogates and control characters too
_WHOLE = st.integers(0, 2**62)
_FACT = st.one_of(_TEXT, st.integers(), st.floats(allow_nan=False), st.booleans())


@st.composite
def items(draw: st.DrawFn) -> list[Put]:
    puts = []
    n = draw(st.integers(1, 8))
    x = unit(2 * n, seed=draw(st.integers(0, 99)))
    for i in range(n):
        kind = draw(st.sampled_from(["image", "text", "rendered"]))
        path = f"/{i}/" + draw(_TEXT).replace("\0", "").replace("/", "") if kind == "image" or draw(st.booleans()) else None
        put = Put(
            kind=kind,
            content_hash=draw(_TEXT),
            path=path,
            part="" if kind == "image" or path is None else draw(st.text(min_size=1, max_size=3)).replace("\x1f", "x"),
            text=None if kind == "image" else draw(_TEXT),
            size=draw(_WHOLE) if path else 0,
            mtime_ns=draw(_WHOLE) if path else 0,
            on_mount=draw(st.booleans()) if path else False,
            width=draw(st.none() | st.integers(1, 99999)),
            height=draw(st.none() | st.integers(1, 99999)),
            taken_at=draw(st.none() | st.just("2023-05-01T10:00:00+02:00")),
            lat=draw(st.none() | st.floats(-90, 90)),
            lon=draw(st.none() | st.floats(-180, 180)),
            camera=draw(st.none() | _TEXT),
            format=draw(st.sampled_from([None, "JPEG"])),
            facts=draw(st.dictionaries(_TEXT, _FACT, max_size=3)),
            vectors={"retrieval": x[2 * i]} | ({"cirr": x[2 * i + 1]} if draw(st.booleans()) else {}),
        )
        puts.append(put)
    return puts


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(puts=items(), format=st.sampled_from(["parquet", "jsonl"]))
def test_anything_comes_back(puts: list[Put], format: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tmp_path_factory.mktemp("any")
    place = fill(base / "c", puts, ("cirr",))
    assert truth(there_and_back(place, base, format)) == truth(place)


def test_ids_are_kept_and_not_given_again(tmp_path: Path) -> None:
    place = fill(tmp_path / "c", numbered(5))
    with Catalog.open(place) as c:
        c.commit(gone=[1, 3])
    with Catalog.open(there_and_back(place, tmp_path)) as c:
        assert sorted(c.items(range(10))) == [2, 4, 5]
        assert c.commit(numbered(1)) == [6]


def test_an_export_says_what_it_is(tmp_path: Path) -> None:
    place = fill(tmp_path / "c", numbered(3), ("cirr",))
    with Collection.open(place) as c:
        export(c, tmp_path / "out")
    said = json.loads((tmp_path / "out/export.json").read_text())
    assert said["fingerprint"] == "model@revision/retrieval/pil/auto/float"
    assert (said["items"], said["dim"], said["prompts"]) == (3, D, "retrieval")
    assert said["files"]["vectors"] == {"retrieval": "vectors.npy", "cirr": "vectors-cirr.npy"}
    table = parquet.read_table(tmp_path / "out/items.parquet")
    assert json.loads(table.schema.metadata[b"e5v_search"]) == said
    assert table.column("id").to_pylist() == [1, 2, 3]
    x = np.load(tmp_path / "out/vectors.npy").astype(np.float32)
    assert np.allclose(x, unit(3), atol=1e-3)
    assert not np.load(tmp_path / "out/vectors-cirr.npy").any()  # no item has been seen under that view yet
    os.unlink(tmp_path / "out/export.json")  # then the Parquet file says the same
    done = import_folder(tmp_path / "out", tmp_path / "back")
    assert (done.fingerprint, done.views) == (said["fingerprint"], ["retrieval", "cirr"])
    assert truth(tmp_path / "back") == truth(place)


# other programs' files


def test_a_table_with_ids_and_texts(tmp_path: Path, embedder: LlavaNextEmbedder) -> None:
    texts = ["a dog", "a cat", "a red car"]
    np.save(tmp_path / "vectors.npy", 7 * embedder.embed_texts(texts))
    table = pa.table({"id": [30, 10, 20], "text": texts, "price": [1.5, None, 3.0], "author": ["x", "y", None]})
    parquet.write_table(table, tmp_path / "items.parquet")
    done = import_folder(tmp_path, tmp_path / "c", embedder)
    assert (done.items, done.normalised, done.fingerprint) == (3, 3, embedder.fingerprint)
    with Collection.open(tmp_path / "c", embedder) as c:
        hits = c.search("a cat", k=3)
        assert (hits[0].id, hits[0].text, hits[0].kind) == (10, "a cat", "text")
        assert hits[0].score > 0.999
        assert c.catalog.items([30])[30].facts == {"price": 1.5, "author": "x"}
        assert c.catalog.items([20])[20].facts == {"price": 3.0}
        assert c.verify() == []


def test_json_lines_of_photos(tmp_path: Path, embedder: LlavaNextEmbedder) -> None:
    paths = write_photos(tmp_path / "set/img", 3)
    np.save(tmp_path / "set/vectors.npy", embedder.embed_images(paths))
    lines = [{"path": f"img/{path.name}", "width": 60.0, "facts": {"n": i}, "split": "test"} for i, path in enumerate(paths)]
    (tmp_path / "set/items.jsonl").write_text("\ufeff" + "\r\n".join(map(json.dumps, lines)) + "\n\n")
    import_folder(tmp_path / "set", tmp_path / "c", embedder)
    with Collection.open(tmp_path / "c", embedder) as c:
        hits = c.search(image=paths[1], k=1)
        assert (hits[0].id, hits[0].path, hits[0].kind, hits[0].width) == (1, str(paths[1]), "image", 60)
        assert c.catalog.items([2])[2].facts == {"split": "test", "n": 2}
        assert c.ingest([tmp_path / "set/img"]).updated == 3  # what they said nothing of is found out


def test_bare_vectors_answer_for_each_other_only(tmp_path: Path, embedder: LlavaNextEmbedder) -> None:
    np.save(tmp_path / "vectors.npy", unit(9).astype(np.float64))
    assert "vectors of unknown" in run("import", tmp_path, "-c", tmp_path / "c").stdout
    hits = json.loads(run("search", "--image", "3", "-c", tmp_path / "c", "--json").stdout)["hits"]
    assert (hits[0]["id"], hits[0]["text"], len(hits)) == (3, "row 3", 9)
    x = unit(9) @ unit(9)[3]
    assert [hit["id"] for hit in hits] == np.argsort(-x).tolist()
    assert "of a model that is not known" in refused(3, "search", "dog", "-c", tmp_path / "c")
    assert run("verify", "-c", tmp_path / "c").exit_code == 0
    with pytest.raises(FingerprintMismatch, match="made by unknown"):
        Collection.open(tmp_path / "c", embedder)
    assert "is not known" in refused(3, "index", *write_photos(tmp_path / "photos", 1), "-c", tmp_path / "c", "--quiet")


# what does not fit


def broken(folder: Path, how: str) -> str:
    """Make an export unfit in one way -> what the refusal has to say."""
    x = np.load(folder / "vectors.npy")
    rows = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    said = json.loads((folder / "export.json").read_text())
    match how:
        case "no vectors":
            (folder / "vectors.npy").unlink()
            return "vectors.npy is not there"
        case "truncated":
            (folder / "vectors.npy").write_bytes((folder / "vectors.npy").read_bytes()[:-5])
            return "vectors.npy is cut short"
        case "no npy":
            (folder / "vectors.npy").write_bytes(b"hello")
            return "vectors.npy is cut short, or no .npy file"
        case "pickle":
            np.save(folder / "vectors.npy", np.array([[{}]], dtype=object), allow_pickle=True)
            return "no .npy file of numbers"
        case "whole numbers":
            np.save(folder / "vectors.npy", np.ones((5, D), dtype=np.int8))
            return "vectors.npy is 5 x 16 int8; rows of floating-point numbers are needed"
        case "flat":
            np.save(folder / "vectors.npy", x.reshape(-1))
            return "vectors.npy is 80 float16"
        case "dim":
            np.save(folder / "vectors.npy", x[:, :8])
            return "vectors.npy has 8 numbers a row, but the description of"
        case "nan":
            x[3, 2] = np.nan
            np.save(folder / "vectors.npy", x)
            return "vectors.npy, row 3 (from 0): the vector holds a number that is not finite"
        case "zeros":
            x[4] = 0
            np.save(folder / "vectors.npy", x)
            return "vectors.npy, row 4 (from 0): the vector is all zeros"
        case "rows":
            np.save(folder / "vectors.npy", x[:4])
            return "items.jsonl has 5 rows, but vectors.npy has 4"
        case "other view":
            said["files"]["vectors"]["cirr"] = "vectors-cirr.npy"
            np.save(folder / "vectors-cirr.npy", x[:3])
            expected = "vectors-cirr.npy is 3 x 16 float16, but vectors.npy is 5 x 16 float16"
        case "view out of the folder":
            said["files"]["vectors"]["../x"] = "x"
            expected = "view ../x"
        case "newer":
            said["version"] = 2
            expected = "a newer e5v-search"
        case "no description":
            said = []
            expected = "no description of an export"
        case "id twice":
            rows[4]["id"] = rows[1]["id"]
            expected = "items.jsonl, row 4 (from 0): it has the id of row 1"
        case "place twice":
            rows[2] |= {"path": "/a", "part": "1"}
            rows[3] |= {"path": "/a", "part": "1"}
            expected = "items.jsonl, row 3 (from 0): it has the path, kind and part of row 2"
        case "negative id":
            rows[0]["id"] = -1
            expected = "items.jsonl, line 1: id: -1 is below 0"
        case "id no number":
            rows[2]["id"] = "x"
            expected = "items.jsonl, line 3: id: a whole number is needed, not 'x'"
        case "huge id":
            rows[2]["id"] = 2**63
            expected = "items.jsonl, line 3: id: a whole number is needed, not 9223372036854775808"
        case "kind":
            rows[2]["kind"] = "video"
            expected = "items.jsonl, line 3: kind: 'video' is none of image, text, rendered"
        case "photo without path":
            rows[2]["kind"] = "image"
            expected = "items.jsonl, line 3: path: a photo needs one"
        case "facts":
            rows[2]["facts"] = [1]
            expected = "items.jsonl, line 3: facts: a JSON object is needed, not [1]"
        case "true":
            rows[2]["width"] = True
            expected = "items.jsonl, line 3: width: a whole number is needed, not True"
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "export.json").write_text(json.dumps(said))
    return expected


_WAYS = [line.split('"')[1] for line in Path(__file__).read_text().splitlines() if line.startswith('        case "')]


@pytest.mark.parametrize("how", _WAYS)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path, how: str) -> None:
    with Collection.open(fill(tmp_path / "c", numbered(5))) as c:
        export(c, tmp_path / "out", "jsonl")
    expected = broken(tmp_path / "out", how)
    with pytest.raises((UsageError, CollectionError)) as refusal:
        import_folder(tmp_path / "out", tmp_path / "back")
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "back").exists()


def test_lines_and_columns_that_are_nonsense(tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", unit(2))
    for content, expected in (
        (b'{"text": "a"}\n{"text": \n', "items.jsonl, line 2: no JSON"),
        (b'{"text": "a"}\n[1]\n', "items.jsonl, line 2: a JSON object is needed"),
    ):
        (tmp_path / "items.jsonl").write_bytes(content)
        with pytest.raises(CollectionError, match=expected):
            import_folder(tmp_path, tmp_path / "back")
    (tmp_path / "items.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(CollectionError, match=r"items.parquet cannot be read as Parquet"):
        import_folder(tmp_path, tmp_path / "back")
    parquet.write_table(pa.table({"id": [1, 2], "blob": [b"x", b"y"]}), tmp_path / "items.parquet")
    with pytest.raises(CollectionError, match=r"items.parquet, row 0: blob: .* can be no fact"):
        import_folder(tmp_path, tmp_path / "back")


def test_a_collection_with_items_is_not_imported_into(tmp_path: Path) -> None:
    place = fill(tmp_path / "c", numbered(3))
    with Collection.open(place) as c:
        export(c, tmp_path / "out")
    before = truth(place)
    with pytest.raises(CollectionError, match="holds items already"):
        import_folder(tmp_path / "out", place)
    assert truth(place) == before


# places to write to


def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    place, out = fill(tmp_path / "c", numbered(3)), tmp_path / "out"
    out.mkdir()
    with Collection.open(place) as c:
        export(c, out)  # an empty folder will do
        with pytest.raises(UsageError, match="--overwrite"):
            export(c, out)
        c.catalog.commit(numbered(1))
        export(c, out, "jsonl", overwrite=True)
        assert sorted(os.listdir(out)) == ["export.json", "items.jsonl", "vectors.npy"]
        assert len(np.load(out / "vectors.npy")) == 4
        (out / "mine.txt").write_text("x")
        for place, overwrite in ((out, True), (tmp_path, True), (tmp_path / "out/mine.txt", False)):
            with pytest.raises(UsageError, match="does not exist yet"):
                export(c, place, overwrite=overwrite)
        assert (out / "mine.txt").read_text() == "x"
    assert [name for name in os.listdir(tmp_path) if "unfinished" in name] == []


def test_an_empty_collection_is_not_exported(tmp_path: Path) -> None:
    Catalog.create(tmp_path / "c").close()
    assert "nothing to export" in refused(3, "export", "--out", tmp_path / "out", "-c", tmp_path / "c")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small disk needs root on Linux")
@pytest.mark.parametrize("items", ["parquet", "jsonl"])
def test_a_full_disk(tmp_path: Path, items: str) -> None:
    place = fill(tmp_path / "c", numbered(3000, facts={"long": "x" * 300}))
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        with Collection.open(place) as c, pytest.raises(DiskFull, match=r"no space left"):
            export(c, disk / "out", items)
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


# size, and kills

_MANY = """
import sys, numpy as np
from pathlib import Path
from e5v_search.catalog import Catalog, Put
n = int(sys.argv[2])
x = np.random.default_rng(0).normal(size=(n, 16)).astype(np.float32)
x /= np.linalg.norm(x, axis=1, keepdims=True)
with Catalog.create(Path(sys.argv[1])) as catalog:
    puts = (Put(kind="text", content_hash=str(i), text="text " * 40, item_id=i, vectors={"retrieval": x[i]}) for i in range(n))
    catalog.load(puts, "model@1/retrieval/pil/auto/float", 16, {"name": "m", "quantize": None}, [], [])
"""
_PEAK = """
import resource, sys
from e5v_search import Collection
from e5v_search.collection.exporting import export
with Collection.open(sys.argv[1]) as c:
    export(c, sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def program(code: str, *args: object) -> str:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], check=True, cwd=ROOT, capture_output=True, text=True
    ).stdout


def test_a_hundred_thousand_rows_take_no_more_memory_than_ten_thousand(tmp_path: Path) -> None:
    peaks = []
    for n in (10_000, 100_000):
        program(_MANY, tmp_path / str(n), n)
        peaks.append(int(program(_PEAK, tmp_path / str(n), tmp_path / f"out {n}")))
    assert peaks[1] < peaks[0] + 40  # MB; all rows as Python objects take more than 200
    assert len(np.load(tmp_path / "out 100000/vectors.npy", mmap_mode="r")) == 100_000
    assert parquet.read_metadata(tmp_path / "out 100000/items.parquet").num_rows == 100_000


@pytest.mark.parametrize("command", ["export", "import"])
def test_a_kill_leaves_all_or_nothing(tmp_path: Path, command: str) -> None:
    n = 3_000
    program(_MANY, tmp_path / "c", n)
    with Collection.open(tmp_path / "c") as c:
        export(c, tmp_path / "given")
    out = tmp_path / "out"
    arguments = {"export": ["--out", out, "-c", tmp_path / "c"], "import": [tmp_path / "given", "-c", out]}[command]

    def whole() -> bool:
        if command == "export":
            assert not out.exists() or len(np.load(out / "vectors.npy")) == n
            return out.exists()
        if not (out / "catalog.sqlite").exists():
            return False
        with Catalog.open(out) as c:
            assert c.size() in (0, n)
            return bool(c.size())

    kills, wait = 0, 0.4
    while not whole():
        process = start(command, *arguments)
        time.sleep(wait)  # a little later each time, so that every stage is met
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        wait += 0.4
    assert kills >= 2
    if command == "import":
        with Collection.open(out) as c:
            assert len(c.search(image=0, k=n)) == n  # the index, if the kill came before it, is made anew
            assert c.verify() == []
