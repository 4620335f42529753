"""Files of texts, as they are and rendered, in collections with a real (random, seeded) model; and views."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import replica
from command_line import write_photos

from e5v_search import Collection, Embedder, Report
from e5v_search.backbones.llava_next import LlavaNextEmbedder
from e5v_search.collection import check_first_run, engine
from e5v_search.config import ModelChoice
from e5v_search.errors import UnknownModel, UnreadableFile, UsageError
from e5v_search.render import render

QUERY = "anything"


class Counting:
    """A real embedder that notes what it embeds."""

    def __init__(self, embedder: LlavaNextEmbedder) -> None:
        self.true = embedder
        self.texts: list[str] = []
        self.pictures = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.true, name)

    def embed_texts(self, texts: Sequence[str], prompts: str = "retrieval") -> np.ndarray:
        x = self.true.embed_texts(texts, prompts)
        self.texts += texts
        return x

    def embed_prepared(self, prepared: Sequence[Any], prompts: str = "retrieval") -> np.ndarray:
        self.pictures += len(prepared)
        return self.true.embed_prepared(prepared, prompts)

    def embed_views(self, prepared: Sequence[Any], views: Sequence[str]) -> np.ndarray:
        self.pictures += len(prepared)
        return self.true.embed_views(prepared, views)

    def news(self) -> list[str]:
        """Texts embedded since the last call, in order."""
        texts, self.texts = sorted(set(self.texts) - {QUERY}), []
        return texts


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LlavaNextEmbedder:
    return Embedder.load(str(replica.build(tmp_path_factory.mktemp("model"))[0]), device="cpu", dtype="float32")  # type: ignore[return-value]


@pytest.fixture
def embedder(loaded: LlavaNextEmbedder) -> Counting:
    return Counting(loaded)


@pytest.fixture
def c(tmp_path: Path, embedder: Counting) -> Iterator[Collection]:
    with Collection.open(tmp_path / "collection", embedder) as collection:  # type: ignore[arg-type]
        yield collection
        assert collection.verify() == []  # whatever a test did


def counts(report: Report) -> tuple[int, int, int, int, int]:
    return report.added, report.unchanged, report.updated, report.removed, len(report.failed)


def held(c: Collection, kind: str = "text") -> dict[tuple[str, str], str]:
    """(file's name, part) -> text, as hits show them."""
    found = {}
    for hit in c.search(QUERY, k=1000):
        if hit.kind == kind:
            assert (Path(hit.path or "").name, hit.part or "") not in found
            found[Path(hit.path or "").name, hit.part or ""] = hit.text or ""
    return found


def ids(c: Collection) -> dict[str, int]:
    return {hit.text or "": hit.id for hit in c.search(QUERY, k=1000)}


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "texts" / "lines.txt"
    path.parent.mkdir()
    path.write_text("a dog\na cat\n\na red car\n")
    return path


def rewrite(path: Path, *texts: str) -> None:
    path.write_text("".join(f"{text}\n" for text in texts))


# first and second runs


def test_every_format_is_found_in_folders(c: Collection, tmp_path: Path, embedder: Counting) -> None:
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("one\ntwo\n")
    (folder / "deep/b.jsonl").write_text('{"text": "three", "id": "x", "year": 1990}\n')
    (folder / "c.csv").write_text("text,place\nfour,Paris\n")
    (folder / "d.md").write_text("# Head\nfive\nmore\n")
    (folder / "e.log").write_text("not looked at\n")
    assert counts(c.ingest([folder], "text")) == (5, 0, 0, 0, 0)
    assert held(c) == {
        ("a.txt", "1"): "one",
        ("a.txt", "2"): "two",
        ("b.jsonl", "x"): "three",
        ("c.csv", "2"): "four",
        ("d.md", "1"): "five more",
    }
    facts = {item.text: item.facts for item in c.catalog.items(ids(c).values()).values()}
    assert (facts["three"], facts["four"], facts["five more"]) == ({"year": 1990}, {"place": "Paris"}, {"heading": "Head"})
    assert len(embedder.news()) == 5
    assert counts(c.ingest([folder], "text")) == (0, 5, 0, 0, 0)
    assert counts(c.ingest()) == (0, 5, 0, 0, 0)


def test_texts_are_embedded_as_queries_are(c: Collection, lines: Path, loaded: LlavaNextEmbedder) -> None:
    c.ingest([lines], "text")
    for text in ("a dog", "a cat", "a red car"):
        best = c.search(text, k=1)[0]
        assert (best.text, best.kind, best.path) == (text, "text", str(lines))
        assert best.score > 0.999
    xb = loaded.embed_texts(["a dog", "a cat", "a red car"])
    scores = sorted(xb @ loaded.embed_texts(["snow"])[0], reverse=True)
    np.testing.assert_allclose([hit.score for hit in c.search("snow")], scores, atol=2e-3)


def test_unchanged_texts_do_not_load_the_model_nor_open_the_file(
    c: Collection, lines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from e5v_search import corpora

    c.ingest([lines], "text")
    monkeypatch.setattr(Embedder, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    with Collection.open(c.path) as again:
        os.utime(lines, ns=(1, 1))  # read again, and compared
        assert counts(again.ingest([lines], "text")) == (0, 3, 0, 0, 0)
        monkeypatch.setattr(corpora, "read", lambda path: pytest.fail("the file was read"))
        assert counts(again.ingest()) == (0, 3, 0, 0, 0)
        assert again.catalog.corpora([str(lines)], "text")[str(lines)].mtime_ns == 1
        assert {row.mtime_ns for row in again.catalog.parts(str(lines), "text")} == {1}


# changes


def test_a_line_put_in_at_the_top_embeds_itself_alone(c: Collection, lines: Path, embedder: Counting) -> None:
    c.ingest([lines], "text")
    before, state = ids(c), c.catalog.state
    embedder.news()
    rewrite(lines, "new", "a dog", "a cat", "a red car")
    assert counts(c.ingest([lines], "text")) == (1, 3, 0, 0, 0)
    assert embedder.news() == ["new"]
    assert held(c) == {("lines.txt", str(n)): t for n, t in enumerate(["new", "a dog", "a cat", "a red car"], start=1)}
    assert before.items() <= ids(c).items()  # who remembers an id finds the same text
    assert c.catalog.state == state + 1


def test_lines_are_edited_deleted_repeated_and_moved(c: Collection, lines: Path, embedder: Counting) -> None:
    c.ingest([lines], "text")
    before = ids(c)
    embedder.news()
    rewrite(lines, "a red car", "a dog!", "", "a red car")  # the first two lines are other texts, the last is what it was
    assert counts(c.ingest([lines], "text")) == (0, 1, 2, 0, 0)
    assert held(c) == {("lines.txt", "1"): "a red car", ("lines.txt", "2"): "a dog!", ("lines.txt", "4"): "a red car"}
    assert embedder.news() == ["a dog!"]
    rewrite(lines, "a red car")
    assert counts(c.ingest([lines], "text")) == (0, 1, 0, 2, 0)
    assert ids(c) == {"a red car": before["a dog"]}


def test_an_edited_line_keeps_its_id(c: Collection, lines: Path) -> None:
    c.ingest([lines], "text")
    before = ids(c)
    lines.write_text("a dog\na black cat\n\na red car\n")
    assert counts(c.ingest([lines], "text")) == (0, 2, 1, 0, 0)
    assert ids(c) == {"a dog": before["a dog"], "a black cat": before["a cat"], "a red car": before["a red car"]}


def test_rows_with_ids(c: Collection, tmp_path: Path, embedder: Counting) -> None:
    path = tmp_path / "rows.jsonl"

    def write(*rows: dict[str, Any]) -> tuple[int, int, int, int, int]:
        rewrite(path, *map(json.dumps, rows))
        return counts(c.ingest([path], "text"))

    assert write({"id": "a", "text": "x", "n": 1}, {"id": "b", "text": "y"}) == (2, 0, 0, 0, 0)
    before = ids(c)
    embedder.news()
    assert write({"id": "b", "text": "y"}, {"id": "a", "text": "x", "n": 1}) == (0, 2, 0, 0, 0)
    assert write({"id": "a", "text": "x", "n": 2}, {"id": "b", "text": "y"}) == (0, 1, 1, 0, 0)  # a fact alone
    assert c.catalog.items([before["x"]])[before["x"]].facts == {"n": 2}
    assert embedder.news() == []
    assert write({"id": "a", "text": "y"}, {"id": "b", "text": "x", "n": 2}) == (0, 2, 0, 0, 0)  # texts change ids
    assert ids(c) == before
    assert held(c) == {("rows.jsonl", "a"): "y", ("rows.jsonl", "b"): "x"}
    assert write({"id": "a", "text": "z"}) == (0, 0, 1, 1, 0)
    assert ids(c) == {"z": before["y"]}
    assert embedder.news() == ["z"]


@pytest.mark.parametrize("seed", range(6))
def test_any_edit_gives_what_a_new_collection_gives(
    c: Collection, lines: Path, embedder: Counting, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from e5v_search.collection import texts as stage

    monkeypatch.setattr(stage, "_LOOKUP", 3)
    monkeypatch.setattr(engine, "MAX_BATCH", 2)
    rng = np.random.default_rng(seed)
    words = [f"word {n}" for n in range(9)]
    known: set[str] = set()
    for _ in range(5):
        now = [words[n] for n in rng.integers(0, 9, rng.integers(0, 20))]
        rewrite(lines, *now)
        embedder.news()
        report = c.ingest([lines], "text")
        assert report.done == len(now)
        assert set(embedder.news()) <= set(now) - known
        known = set(now)
        assert (
            held(c) == {("lines.txt", str(n)): text for n, text in enumerate(now, start=1)}
            if now
            else not c.catalog.count()["text"]
        )
        assert c.verify() == []


def test_the_same_text_is_embedded_once(c: Collection, tmp_path: Path, embedder: Counting) -> None:
    for name in ("a.txt", "b.txt"):
        rewrite(tmp_path / name, "same", "same", f"of {name}", "same")
    assert counts(c.ingest([tmp_path / "a.txt", tmp_path / "b.txt"], "text")) == (8, 0, 0, 0, 0)
    assert embedder.news() == ["of a.txt", "of b.txt", "same"]
    assert len(held(c)) == 8


def test_a_text_that_goes_to_another_file_takes_its_vector_along(c: Collection, tmp_path: Path, embedder: Counting) -> None:
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    rewrite(a, "one", "two")
    rewrite(b, "three")
    c.ingest([a, b], "text")
    embedder.news()
    rewrite(a, "two")
    rewrite(b, "one", "three")
    assert counts(c.ingest([a, b], "text")) == (1, 2, 0, 1, 0)
    assert embedder.news() == []
    a.rename(tmp_path / "c.txt")
    assert counts(c.ingest([tmp_path / "c.txt", b], "text")) == (1, 2, 0, 0, 0)  # a.txt was not looked at
    assert embedder.news() == []


# kinds


def test_one_file_as_text_and_as_rendered(c: Collection, lines: Path, loaded: LlavaNextEmbedder, embedder: Counting) -> None:
    c.ingest([lines], "text")
    assert counts(c.ingest([lines], "rendered")) == (3, 0, 0, 0, 0)
    assert (len(embedder.news()), embedder.pictures) == (3, 3)
    assert c.status()["items"] == {"image": 0, "text": 3, "rendered": 3}
    assert held(c, "text") == held(c, "rendered")
    hit = next(hit for hit in c.search("a cat", k=6) if hit.kind == "rendered" and hit.text == "a cat")
    assert (hit.width, hit.height) == (None, None)
    ((_, x),) = c.catalog.vectors(ids=[hit.id])
    assert x[0].astype(np.float32) @ loaded.embed_images([render("a cat")])[0] > 0.999
    rewrite(lines, "a dog", "a bird")
    assert counts(c.ingest()) == (0, 2, 2, 2, 0)
    assert held(c, "text") == held(c, "rendered") == {("lines.txt", "1"): "a dog", ("lines.txt", "2"): "a bird"}


def test_a_mixed_collection_is_looked_through_kind_by_kind(c: Collection, tmp_path: Path, lines: Path) -> None:
    write_photos(tmp_path / "mixed", 3)
    shutil.copy(lines, tmp_path / "mixed")
    assert counts(c.ingest([tmp_path / "mixed"])) == (3, 0, 0, 0, 0)
    assert counts(c.ingest([tmp_path / "mixed"], "text")) == (3, 0, 0, 0, 0)
    assert counts(c.ingest()) == (0, 6, 0, 0, 0)
    (tmp_path / "mixed/0001.jpg").unlink()
    (tmp_path / "mixed/lines.txt").unlink()
    assert counts(c.ingest([tmp_path / "mixed"])) == (0, 2, 0, 1, 0)
    assert c.status()["items"] == {"image": 2, "text": 3, "rendered": 0}
    assert counts(c.ingest()) == (0, 2, 0, 3, 0)
    assert c.status()["items"] == {"image": 2, "text": 0, "rendered": 0}


# what is bad, and what goes away


def test_bad_lines_are_listed_with_their_place_until_they_are_mended(c: Collection, lines: Path, embedder: Counting) -> None:
    long = "word " * 3000  # more than the model takes
    lines.write_bytes(b"a dog\n\xff\n" + long.encode() + b"\nend\n")
    report = c.ingest([lines], "text")
    assert counts(report) == (2, 0, 0, 0, 2)
    assert {failure.path for failure in report.failed} == {f"{lines}:2", f"{lines}:3"}
    assert "tokens" in {failure.path: failure.reason for failure in report.failed}[f"{lines}:3"]
    assert held(c) == {("lines.txt", "1"): "a dog", ("lines.txt", "4"): "end"}
    assert counts(c.ingest([lines], "text")) == (0, 2, 0, 0, 2)
    assert c.status()["failed"] == 2
    rewrite(lines, "a dog", "good now", "end")
    assert counts(c.ingest([lines], "text")) == (1, 2, 0, 0, 0)
    assert c.status()["failed"] == 0
    bad = lines.with_name("bad.txt")
    bad.write_bytes(b"\xff\n")
    assert len(c.ingest([bad], "text").failed) == 1
    bad.unlink()
    assert counts(c.ingest([lines.parent], "text")) == (0, 3, 0, 0, 0)
    assert c.status()["failed"] == 0


def test_what_cannot_be_drawn_fails_alone(c: Collection, lines: Path) -> None:
    rewrite(lines, "a dog", "\U000e0001\U000e0041", "a cat")
    report = c.ingest([lines], "rendered")
    assert counts(report) == (2, 0, 0, 0, 1)
    assert report.failed[0].path == f"{lines}:2"


def test_a_row_that_turned_bad_keeps_its_last_good_text(c: Collection, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rewrite(path, '{"id": "a", "text": "x"}', '{"id": "b", "text": "y"}')
    c.ingest([path], "text")
    rewrite(path, '{"id": "a", "text": ""}', '{"id": "b", "text": "y"}')
    assert counts(c.ingest([path], "text")) == (0, 1, 0, 0, 1)
    assert held(c) == {("rows.jsonl", "a"): "x", ("rows.jsonl", "b"): "y"}


@pytest.mark.usefixtures("permissions_apply")
def test_a_file_that_cannot_be_read_keeps_its_texts(c: Collection, lines: Path) -> None:
    c.ingest([lines], "text")
    rewrite(lines, "other")
    lines.chmod(0)
    report = c.ingest([lines], "text")
    assert [(failure.path, failure.reason) for failure in report.failed] == [(str(lines), "permission denied")]
    assert len(held(c)) == 3
    lines.chmod(0o644)
    assert counts(c.ingest([lines], "text")) == (0, 0, 1, 2, 0)


def test_deleted_files_leave_the_results_and_unmounted_ones_do_not(c: Collection, lines: Path, tmp_path: Path) -> None:
    other = lines.parent / "other.txt"
    rewrite(other, "more")
    c.ingest([lines.parent], "text")
    lines.unlink()
    assert counts(c.ingest([lines.parent], "text")) == (0, 1, 0, 3, 0)
    assert held(c) == {("other.txt", "1"): "more"}
    lines.parent.rename(tmp_path / "unplugged")
    report = c.ingest()
    assert counts(report) == (0, 0, 0, 0, 0)
    assert "is not there" in report.warnings[0]
    assert held(c) == {("other.txt", "1"): "more"}
    (tmp_path / "unplugged").rename(lines.parent)
    assert counts(c.ingest()) == (0, 1, 0, 0, 0)


def test_forgotten_texts_come_back_when_they_are_asked_for(c: Collection, lines: Path, embedder: Counting) -> None:
    c.ingest([lines], "text")
    c.ingest([lines], "rendered")
    assert c.forget([lines]) == 6
    assert c.catalog.roots() == []
    assert c.status()["items"] == {"image": 0, "text": 0, "rendered": 0}
    assert counts(c.ingest([lines], "text")) == (3, 0, 0, 0, 0)


def test_an_interrupted_run_keeps_what_is_done(
    c: Collection, lines: Path, embedder: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "MAX_BATCH", 4)
    rewrite(lines, *(f"text {n}" for n in range(40)))
    done = 0

    def stop(report: Report, total: int) -> None:
        nonlocal done
        assert total == 40
        done = report.done
        if done >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        c.ingest([lines], "text", on_progress=stop)
    assert 10 <= done < 40
    assert c.status()["items"]["text"] == done
    assert counts(c.ingest([lines], "text")) == (40 - done, done, 0, 0, 0)
    assert len(embedder.news()) == 40


@pytest.mark.parametrize(
    ("paths", "kind", "views", "error", "said"),
    [
        (["texts/lines.txt"], "sound", [], UsageError, "no kind 'sound' of items; choose from: image, text, rendered"),
        (["nowhere.txt"], "text", [], UnreadableFile, "no such file or folder: .*nowhere.txt"),
        (["texts/a.log"], "text", [], UsageError, r"a\.log is no file of texts"),
        (["texts"], "text", ["none"], UsageError, "no view 'none'; choose from: retrieval, cirr, "),
        (["texts"], "text", ["sts"], UsageError, "no view 'sts'"),  # it has no prompt for pictures
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_done(
    c: Collection, lines: Path, tmp_path: Path, paths: list[str], kind: str, views: list[str], error: type[Exception], said: str
) -> None:
    (lines.parent / "a.log").write_text("x\n")
    absolute = [tmp_path / path for path in paths]
    sources = [(str(path), kind) for path in absolute]
    with pytest.raises(error, match=said):
        c.ingest(absolute, kind, views)
    assert (c.catalog.roots(), c.catalog.views, c.catalog.state) == ([], ["retrieval"], 0)
    with pytest.raises(error, match=said):
        check_first_run(tmp_path / "new", sources, views, ModelChoice())
    with pytest.raises(UnknownModel):
        check_first_run(tmp_path / "new", [(str(lines), "text")], [], ModelChoice("nonsense"))
    check_first_run(c.path, sources, views, ModelChoice())  # `ingest` says it
    assert not (tmp_path / "new").exists()


# views


def view(c: Collection, name: str) -> dict[int, np.ndarray]:
    return {int(i): row.astype(np.float32) for i, x in c.catalog.vectors(view=name) for i, row in zip(i, x, strict=True)}


def test_views_from_the_start(
    c: Collection, lines: Path, tmp_path: Path, loaded: LlavaNextEmbedder, embedder: Counting
) -> None:
    photos = write_photos(tmp_path / "photos", 3)
    c.ingest([tmp_path / "photos"], views=["cirr"])
    assert embedder.pictures == 3  # one look for both
    c.ingest([lines], "text")  # a collection keeps its views
    c.ingest([lines], "rendered")
    assert embedder.texts == ["a dog", "a cat", "a red car"]  # the same prompt in both sets
    assert c.catalog.views == ["retrieval", "cirr"]
    stored = view(c, "cirr")
    assert stored.keys() == view(c, "retrieval").keys()
    expected = loaded.embed_images(photos, "cirr")
    for path, x in zip(photos, expected, strict=True):
        item = c.catalog.item_by_path(str(path))
        assert item is not None
        assert stored[item.id] @ x > 0.999
    for item in c.catalog.items(stored).values():
        if item.kind == "text":
            np.testing.assert_array_equal(stored[item.id], view(c, "retrieval")[item.id])
        elif item.kind == "rendered":
            assert stored[item.id] @ loaded.embed_images([render(item.text or "")], "cirr")[0] > 0.999
    index = c.indexes.current("cirr")
    assert index.ntotal == 9
    assert (c.path / "index-cirr.faiss").exists()


def test_views_asked_for_later(
    c: Collection, lines: Path, tmp_path: Path, loaded: LlavaNextEmbedder, embedder: Counting
) -> None:
    photos = write_photos(tmp_path / "photos", 5)
    for kind in ("text", "rendered"):
        c.ingest([lines], kind)
    c.ingest([tmp_path / "photos"])
    pictures, state = embedder.pictures, c.catalog.state
    before = view(c, "retrieval")
    photos[1].unlink()  # its folder is not looked at
    photos[2].write_bytes(photos[3].read_bytes())  # nor what became of this one
    photos[4].write_bytes(b"")
    embedder.news()
    report = c.ingest([lines], "text", ["cirr"])
    assert counts(report) == (0, 3, 0, 0, 1)
    assert report.failed[0].path == str(photos[4])
    assert report.completed == 8
    assert "2 of the photos are not there" in report.warnings[0]
    assert embedder.news() == []  # the texts' vector is that of the same prompt
    assert embedder.pictures == pictures + 5
    assert view(c, "retrieval").keys() == before.keys()
    assert next(c.catalog.vectors(after=state), None) is None
    stored = view(c, "cirr")
    for path in (photos[0], photos[3]):
        item = c.catalog.item_by_path(str(path))
        assert item is not None
        assert stored[item.id] @ loaded.embed_images([path], "cirr")[0] > 0.999
    assert c.verify() == []
    assert len(c.catalog.pending("cirr")) == 3
    report = c.ingest()  # a changed photo gets all views, a vanished one goes
    assert counts(report) == (0, 8, 1, 1, 1)
    assert len(c.catalog.pending("cirr")) == 1
    photos[4].unlink()
    c.ingest()
    assert len(c.catalog.pending("cirr")) == 0
    assert view(c, "cirr").keys() == view(c, "retrieval").keys()


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_the_index_of_a_view_is_derived_too(c: Collection, lines: Path, damage: str) -> None:
    c.ingest([lines], "rendered", ["cirr"])
    path = c.path / "index-cirr.faiss"
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[:-50])
    assert any("index-cirr.faiss" in line and "e5v-search rebuild" in line for line in c.verify())
    assert c.status()["index"]["stale"] is True
    c.rebuild()
    assert c.verify() == []
    path.unlink()
    with Collection.open(c.path) as again:
        again.ingest()
    assert path.read_bytes() == whole or c.verify() == []


def test_views_of_the_same_prompt_are_embedded_once(c: Collection, lines: Path, embedder: Counting) -> None:
    c.ingest([lines], "rendered", ["fashioniq-shirt", "fashioniq-toptee"])  # which the paper's code asks alike
    assert embedder.pictures == 3
    for item_id, x in view(c, "fashioniq-shirt").items():
        np.testing.assert_array_equal(x, view(c, "fashioniq-toptee")[item_id])
        assert x @ view(c, "retrieval")[item_id] < 0.9999
