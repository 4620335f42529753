"""Collections over real folders with a real (random, seeded) model; every picture is told from every other by its vector."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import replica
from PIL import Image

from e5v_search import Collection, Embedder, ModelChoice, Report
from e5v_search.backbones.llava_next import LlavaNextEmbedder
from e5v_search.errors import (
    CollectionBusy,
    CollectionNotFound,
    CollectionReadOnly,
    DiskFull,
    FingerprintMismatch,
    QueryError,
    UnreadableFile,
)


class Counting:
    """A real embedder that notes how many pictures it embeds."""

    def __init__(self, embedder: LlavaNextEmbedder) -> None:
        self.true, self.embedded = embedder, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.true, name)

    def embed_prepared(self, prepared: Sequence[Any], prompts: str = "retrieval") -> np.ndarray:
        self.embedded += len(prepared)
        return self.true.embed_prepared(prepared, prompts)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("models")
    return [replica.build(base / str(seed), seed=seed)[0] for seed in range(2)]


@pytest.fixture(scope="module")
def loaded(models: list[Path]) -> LlavaNextEmbedder:
    return Embedder.load(str(models[0]), device="cpu", dtype="float32")  # type: ignore[return-value]


@pytest.fixture
def embedder(loaded: LlavaNextEmbedder) -> Counting:
    return Counting(loaded)


def paint(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    height, width = rng.integers(30, 120, 2)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(path, quality=90)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for i in range(12):
        paint(folder / ("a" if i < 6 else "b/deep") / f"{i:02d}.jpg", i)
    return folder


@pytest.fixture
def c(tmp_path: Path, embedder: Counting) -> Iterator[Collection]:
    with Collection.open(tmp_path / "collection", embedder) as collection:  # type: ignore[arg-type]
        yield collection
        assert collection.verify() == []  # whatever a test did


def counts(report: Report) -> tuple[int, int, int, int, int]:
    return report.added, report.unchanged, report.updated, report.removed, len(report.failed)


def paths(c: Collection) -> set[str]:
    return {hit.path or "" for hit in c.search("anything", k=1000)}


def files(folder: Path) -> set[str]:
    return {str(p) for p in folder.rglob("*.jpg")}


# ingest


def test_first_run_then_nothing_to_do(c: Collection, photos: Path, embedder: Counting) -> None:
    assert counts(c.ingest([photos])) == (12, 0, 0, 0, 0)
    assert (embedder.embedded, paths(c)) == (12, files(photos))
    assert counts(c.ingest([photos])) == (0, 12, 0, 0, 0)
    assert embedder.embedded == 12


def test_unchanged_photos_do_not_load_the_model(c: Collection, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c.ingest([photos])
    monkeypatch.setattr(Embedder, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    with Collection.open(c.path) as again:
        assert counts(again.ingest([photos])) == (0, 12, 0, 0, 0)
        os.utime(photos / "a/00.jpg")  # touched, same content
        assert counts(again.ingest([photos])) == (0, 12, 0, 0, 0)
        shutil.copy(photos / "a/01.jpg", photos / "a/copy.jpg")  # same content elsewhere
        assert counts(again.ingest([photos])) == (1, 12, 0, 0, 0)
        (photos / "a/bad.jpg").write_bytes(b"")
        assert counts(again.ingest([photos])) == (0, 13, 0, 0, 1)
        assert counts(again.ingest([photos])) == (0, 13, 0, 0, 1)


def test_changed_photo_is_embedded_again_under_its_id(c: Collection, photos: Path, embedder: Counting) -> None:
    c.ingest([photos])
    path = str(photos / "a/00.jpg")
    [before] = [hit for hit in c.search("x", k=100) if hit.path == path]
    paint(photos / "a/00.jpg", 500)
    assert counts(c.ingest([photos])) == (0, 11, 1, 0, 0)
    assert embedder.embedded == 13
    best = c.search(image=path, k=1)[0]
    assert (best.path, best.id) == (path, before.id)
    assert best.score > 0.999


def test_moved_file_keeps_its_vector_and_a_copy_is_its_own_item(c: Collection, photos: Path, embedder: Counting) -> None:
    c.ingest([photos])
    (photos / "a/00.jpg").rename(photos / "b/moved.jpg")
    shutil.copy(photos / "a/01.jpg", photos / "b/copy.jpg")
    assert counts(c.ingest([photos])) == (2, 11, 0, 1, 0)
    assert embedder.embedded == 12
    assert paths(c) == files(photos)
    twins = c.search(image=photos / "b/copy.jpg", k=2)
    assert {hit.path for hit in twins} == {str(photos / "a/01.jpg"), str(photos / "b/copy.jpg")}
    assert all(hit.score > 0.999 for hit in twins)


def test_equal_files_in_one_run_are_embedded_once(c: Collection, tmp_path: Path, embedder: Counting) -> None:
    first = paint(tmp_path / "twins/0.jpg", 1)
    for i in range(1, 9):
        shutil.copy(first, tmp_path / f"twins/{i}.jpg")
    assert counts(c.ingest([tmp_path / "twins"])) == (9, 0, 0, 0, 0)
    assert (embedder.embedded, len(paths(c))) == (1, 9)


def test_equal_broken_files_all_fail(c: Collection, photos: Path) -> None:
    for name in ("x.jpg", "y.jpg", "z.jpg"):
        (photos / name).write_text("same text")
    report = c.ingest([photos])
    assert counts(report) == (12, 0, 0, 0, 3)
    assert {Path(f.path).name for f in report.failed} == {"x.jpg", "y.jpg", "z.jpg"}
    assert c.status()["failed"] == 3


def test_failed_file_that_is_mended_or_deleted_leaves_the_list(c: Collection, photos: Path) -> None:
    for name in ("x.jpg", "y.jpg"):
        (photos / name).write_bytes(b"\xff\xd8 broken")
    assert len(c.ingest([photos]).failed) == 2
    paint(photos / "x.jpg", 77)
    (photos / "y.jpg").unlink()
    assert counts(c.ingest([photos])) == (1, 12, 0, 0, 0)
    assert c.status()["failed"] == 0


def test_photo_that_breaks_later_keeps_its_last_good_item(c: Collection, photos: Path) -> None:
    c.ingest([photos])
    path = photos / "a/03.jpg"
    path.write_bytes(path.read_bytes()[:200])
    assert counts(c.ingest([photos])) == (0, 11, 0, 0, 1)
    assert str(path) in paths(c)


def test_photo_without_a_finite_vector_fails_alone(c: Collection, photos: Path, loaded: LlavaNextEmbedder) -> None:
    """What half precision does to some inputs must not end the run, nor take the batch with it."""

    class Overflowing(Counting):
        def embed_prepared(self, prepared: Sequence[Any], prompts: str = "retrieval") -> np.ndarray:
            x = super().embed_prepared(prepared, prompts)
            x[[p.size == size for p in prepared]] = np.nan
            return x

    with Image.open(photos / "a/04.jpg") as image:
        size = (image.height, image.width)
    shutil.copy(photos / "a/04.jpg", photos / "b/twin.jpg")
    c._embedder = Overflowing(loaded)  # type: ignore[assignment]
    report = c.ingest([photos])
    assert {Path(f.path).name for f in report.failed} == {"04.jpg", "twin.jpg"}
    assert "no finite vector" in report.failed[0].reason
    assert report.added == 11


def test_deleted_photo_leaves_the_results(c: Collection, photos: Path) -> None:
    c.ingest([photos])
    (photos / "a/00.jpg").unlink()
    shutil.rmtree(photos / "b/deep")
    assert counts(c.ingest([photos])) == (0, 5, 0, 7, 0)
    assert paths(c) == files(photos)


@pytest.mark.parametrize("how", ["gone", "empty"])
def test_unmounted_disk_forgets_nothing(c: Collection, photos: Path, embedder: Counting, tmp_path: Path, how: str) -> None:
    """An unmounted disk's folder is gone, or is there and empty (ANCHORS complaint 2)."""
    c.ingest([photos])
    expected = files(photos)
    photos.rename(tmp_path / "unplugged")
    if how == "empty":
        photos.mkdir()
    report = c.ingest([photos])
    assert counts(report)[3:] == (0, 0)
    assert str(photos) in "".join(report.warnings)
    assert paths(c) == expected
    if how == "empty":
        photos.rmdir()
    (tmp_path / "unplugged").rename(photos)
    assert counts(c.ingest([photos])) == (0, 12, 0, 0, 0)
    assert embedder.embedded == 12


def test_only_what_was_asked_for_is_looked_at(c: Collection, photos: Path) -> None:
    c.ingest([photos])
    (photos / "a/00.jpg").unlink()
    assert counts(c.ingest([photos / "b"])) == (0, 6, 0, 0, 0)
    assert str(photos / "a/00.jpg") in paths(c)
    assert counts(c.ingest([photos / "b", photos, photos / "a"])) == (0, 11, 0, 1, 0)


def test_path_that_never_existed_is_refused_before_anything_is_done(c: Collection, photos: Path) -> None:
    with pytest.raises(UnreadableFile, match=r"no such file or folder: .*nowhere"):
        c.ingest([photos, photos / "nowhere"])
    assert c.status()["items"]["image"] == 0


def test_single_file_and_folder_link(c: Collection, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(photos)
    assert counts(c.ingest([photos / "a/00.jpg", tmp_path / "link"])) == (12, 0, 0, 0, 0)
    (photos / "loop").symlink_to(photos)
    assert counts(c.ingest([photos])) == (0, 12, 0, 0, 0)


def test_names_of_any_bytes(c: Collection, photos: Path) -> None:
    odd = [b"caf\xe9.jpg", b"new\nline.jpg", b"x" * 246 + b".jpg", b" lead ing.jpg", b"'; DROP TABLE items; --.jpg"]
    for i, name in enumerate(odd):
        shutil.copy(paint(photos / "tmp.jpg", 100 + i), os.path.join(os.fsencode(photos), name))
    (photos / "tmp.jpg").unlink()
    assert counts(c.ingest([photos])) == (17, 0, 0, 0, 0)
    assert counts(c.ingest([photos])) == (0, 17, 0, 0, 0)
    found = {os.fsencode(path).removeprefix(os.fsencode(photos) + b"/") for path in paths(c)}
    assert set(odd) <= found


def test_progress_counts_up_to_the_total(c: Collection, photos: Path) -> None:
    (photos / "bad.jpg").write_bytes(b"")
    seen: list[tuple[int, int]] = []
    report = c.ingest([photos], on_progress=lambda report, total: seen.append((report.done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (report.done, 13)


def test_interrupted_run_keeps_what_is_done(c: Collection, photos: Path, embedder: Counting) -> None:
    done = 0

    def stop(report: Report, total: int) -> None:
        nonlocal done
        done = report.added
        if done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        c.ingest([photos], on_progress=stop)
    assert 3 <= done < 12
    assert len(paths(c)) == done
    assert c.status()["index"]["stale"] is False
    assert counts(c.ingest([photos])) == (12 - done, done, 0, 0, 0)
    assert 12 <= embedder.embedded < 24  # what the model was at is embedded again


def test_the_model_is_at_the_next_batch_while_the_catalog_is_written(
    c: Collection, photos: Path, embedder: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    beginnings, committed = [], []
    commit, embed = c.catalog.commit, embedder.embed_prepared
    second = threading.Event()

    def begin(prepared: Sequence[Any], prompts: str = "retrieval") -> np.ndarray:
        beginnings.append(threading.current_thread())
        if len(beginnings) == 2:
            second.set()
        return embed(prepared, prompts)

    def write(**what: Any) -> Any:
        if what.get("puts"):
            committed.append(second.wait(60))  # in vain if the model waited for this
        return commit(**what)

    monkeypatch.setattr("e5v_search.collection.ingest.COMMIT_SECONDS", 0)
    monkeypatch.setattr(embedder, "embed_prepared", begin)
    monkeypatch.setattr(c.catalog, "commit", write)
    assert counts(c.ingest([photos])) == (12, 0, 0, 0, 0)
    assert len(committed) == len(beginnings) > 2
    assert all(committed)
    assert threading.current_thread() not in beginnings
    assert not any(thread.is_alive() for thread in beginnings)


# search


def test_search_ranks_as_brute_force_does(c: Collection, photos: Path, loaded: LlavaNextEmbedder) -> None:
    c.ingest([photos])
    names = sorted(files(photos))
    xb = loaded.embed_images(names)
    for text in ("a dog", "two children in the snow", "x"):
        scores = xb @ loaded.embed_texts([text])[0]
        hits = c.search(text, k=5)
        assert [hit.path for hit in hits] == [names[i] for i in np.argsort(-scores)[:5]]
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(scores)[::-1][:5], atol=2e-3)
        assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5]


def test_every_image_is_its_own_best_match(c: Collection, photos: Path, loaded: LlavaNextEmbedder, tmp_path: Path) -> None:
    c.ingest([photos])
    for path in sorted(files(photos)):
        hit = c.search(image=path, k=1)[0]
        assert hit.path == path
        assert hit.score >= 0.999
        # the same when it has to be embedded: a picture that is not known by its file
        embedded = c.search(image=Image.open(path), k=1)[0]
        assert (embedded.path, embedded.id) == (path, hit.id)
        assert embedded.score >= 0.999
        assert c.search(image=hit.id, k=1)[0].id == hit.id


def test_a_picture_comes_before_its_copies(c: Collection, photos: Path) -> None:
    copies = [Path(shutil.copy(photos / "a/02.jpg", photos / f"a/copy{i}.jpg")) for i in range(15)]
    c.ingest([photos])
    for path in (photos / "a/02.jpg", copies[7], copies[14]):
        first = c.search(image=path, k=1)[0]
        assert first.path == str(path)
        assert c.search(image=first.id, k=3)[0].id == first.id


def test_composed_search_is_the_cirr_prompt_and_leaves_its_reference_out(
    c: Collection, photos: Path, loaded: LlavaNextEmbedder
) -> None:
    shutil.copy(photos / "a/02.jpg", photos / "b/copy of 02.jpg")
    c.ingest([photos])
    reference = str(photos / "a/02.jpg")
    names = sorted(files(photos) - {reference, str(photos / "b/copy of 02.jpg")})
    xq = loaded.embed_composed([(reference, "make it blue")])[0]
    expected = [names[i] for i in np.argsort(-(loaded.embed_images(names) @ xq))]
    for image in (reference, c.search(image=reference, k=1)[0].id):
        hits = c.search(image=image, modify="make it blue", k=100)
        assert [hit.path for hit in hits] == expected


def test_text_and_image_together_are_the_sum(c: Collection, photos: Path, loaded: LlavaNextEmbedder) -> None:
    c.ingest([photos])
    reference = str(photos / "a/02.jpg")
    xq = loaded.embed_images([reference])[0] + loaded.embed_texts(["a dog"])[0]
    names = sorted(files(photos))
    scores = loaded.embed_images(names) @ (xq / np.linalg.norm(xq))
    hits = c.search("a dog", image=reference, k=3)
    assert [hit.path for hit in hits] == [names[i] for i in np.argsort(-scores)[:3]]


def test_threshold_and_k(c: Collection, photos: Path) -> None:
    c.ingest([photos])
    every = c.search("a dog", k=100)
    assert len(every) == 12
    cut = (every[4].score + every[5].score) / 2
    assert [hit.id for hit in c.search("a dog", k=100, threshold=cut)] == [hit.id for hit in every[:5]]
    assert [hit.id for hit in c.search("a dog", k=3)] == [hit.id for hit in every[:3]]
    assert c.search("a dog", threshold=0.9999) == []


def test_what_hits_say(c: Collection, photos: Path, loaded: LlavaNextEmbedder) -> None:
    c.ingest([photos])
    hits = c.search("a dog", k=2)
    data = hits.to_json()
    assert list(data) == ["query", "fingerprint", "took_ms", "hits"]
    assert data["query"] == {"text": "a dog"}
    assert data["fingerprint"] == loaded.fingerprint
    assert list(data["took_ms"]) == ["load", "embed", "search", "total"]
    assert list(data["hits"][0]) == ["rank", "id", "score", "kind", "path", "text", "width", "height", "taken_at", "part"]
    with Image.open(hits[0].path or "") as image:
        assert (hits[0].width, hits[0].height) == image.size


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "nothing to search for"),
        ({"text": " \n"}, "text is empty"),
        ({"modify": "blue"}, "--modify changes a picture"),
        ({"image": 1, "modify": ""}, "modify text is empty"),
        ({"text": "a", "image": 1, "modify": "b"}, "either a text or --modify"),
        ({"image": 999}, "no item 999"),
        ({"text": "a", "k": 0}, "k must be at least 1"),
        ({"text": "a " * 25_000}, "tokens"),
    ],
)
def test_queries_that_make_no_sense(c: Collection, photos: Path, query: dict[str, Any], message: str) -> None:
    c.ingest([photos])
    with pytest.raises((QueryError, Exception), match=message) as error:
        c.search(**query)
    assert error.value.exit_code == 2  # type: ignore[attr-defined]


def test_empty_collection_says_so(c: Collection) -> None:
    with pytest.raises(CollectionNotFound, match="is empty; fill it with: e5v-search index"):
        c.search("a dog")


# the index is derived


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "flipped", "foreign", "garbage"])
def test_damaged_index_is_rebuilt_without_embedding(
    c: Collection, photos: Path, embedder: Counting, tmp_path: Path, damage: str
) -> None:
    c.ingest([photos])
    expected = [(hit.id, hit.score) for hit in c.search("a dog", k=100)]
    path = c.indexes.path()
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":
        with Collection.open(tmp_path / "other", embedder) as other:  # type: ignore[arg-type]
            other.ingest([photos / "a"])
            shutil.copy(other.indexes.path(), path)
    else:
        flipped = data[:700] + bytes([data[700] ^ 4]) + data[701:]
        path.write_bytes(
            {"empty": b"", "truncated": data[: len(data) // 2], "flipped": flipped, "garbage": b"x" * 5000}[damage]
        )
    embedded = embedder.embedded
    with Collection.open(c.path, embedder) as again:  # type: ignore[arg-type]
        assert again.verify() != [] or damage == "foreign"
        assert again.status()["index"]["stale"] is True or damage == "flipped"  # status reads the stamp alone
        assert [(hit.id, hit.score) for hit in again.search("a dog", k=100)] == expected
        assert again.verify() == []
    assert embedder.embedded == embedded


def test_rebuild_and_index_that_is_behind(c: Collection, photos: Path) -> None:
    c.ingest([photos / "a"])
    old = c.indexes.path().read_bytes()
    (photos / "a/00.jpg").unlink()
    paint(photos / "a/01.jpg", 300)
    c.ingest([photos])
    expected = [(hit.id, pytest.approx(hit.score, abs=1e-5)) for hit in c.search("a dog", k=100)]
    c.indexes.path().write_bytes(old)  # what a kill between commit and save leaves
    with Collection.open(c.path, c.embedder()) as again:
        assert again.status()["index"]["stale"] is True
        assert [(hit.id, hit.score) for hit in again.search("a dog", k=100)] == expected
    assert c.rebuild() == 11


def test_verify_finds_an_index_that_lies(c: Collection, photos: Path) -> None:
    c.ingest([photos])
    index = c.indexes.current()
    x = index.vectors(index.ids()[:1])
    index.put(index.ids()[:1], -x)
    index.save(c.indexes.path())
    [problem] = c.verify()
    assert "1 vectors differ from the catalog's" in problem
    c.rebuild()


# other models, other processes


def test_collection_of_another_model_is_refused_with_both_named(c: Collection, photos: Path, models: list[Path]) -> None:
    c.ingest([photos])
    stranger = Embedder.load(str(models[1]), device="cpu", dtype="float32")
    with pytest.raises(FingerprintMismatch) as error:
        Collection.open(c.path, stranger)
    assert c.fingerprint is not None
    assert c.fingerprint in str(error.value)
    assert stranger.fingerprint in str(error.value)
    with Collection.open(c.path, ModelChoice(str(models[1]))) as late, pytest.raises(FingerprintMismatch):
        late.ingest([photos])
    with Collection.open(c.path, stranger, allow_mismatch=True) as insists:
        assert len(insists.search("a dog")) == 10


def test_the_collections_own_model_is_found_again(c: Collection, photos: Path) -> None:
    c.ingest([photos])
    with Collection.open(c.path) as again:
        assert [hit.id for hit in again.search("a dog")] == [hit.id for hit in c.search("a dog")]


def test_second_writer_is_refused_and_readers_are_not(c: Collection, photos: Path, embedder: Counting) -> None:
    c.ingest([photos / "a"])
    outcome: list[object] = []

    def meanwhile(report: Report, total: int) -> None:
        if report.added and not outcome:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    def other() -> None:
        with Collection.open(c.path, embedder) as reader:  # type: ignore[arg-type]
            outcome.append(len(reader.search("a dog", k=100)))
            try:
                reader.ingest([photos])
            except CollectionBusy as error:
                outcome.append(str(error))

    assert counts(c.ingest([photos], on_progress=meanwhile)) == (6, 6, 0, 0, 0)
    assert outcome[0] in range(6, 13)
    assert f"process {os.getpid()} is writing" in str(outcome[1])


def test_forget_takes_items_out_and_leaves_files(c: Collection, photos: Path) -> None:
    c.ingest([photos])
    assert c.forget([photos / "a", photos / "b/deep/06.jpg"]) == 7
    assert len(paths(c)) == 5
    assert len(files(photos)) == 12
    assert c.forget([photos / "nowhere"]) == 0


def test_thumbnails_are_kept_and_serve_while_the_photo_is_away(c: Collection, photos: Path) -> None:
    c.ingest([photos])
    hit = c.search("a dog", k=1)[0]
    path = c.thumbnail(hit.id, 32)
    assert path.is_relative_to(c.path / "thumbnails")
    with Image.open(path) as image:
        assert max(image.size) == 32
    Path(hit.path or "").unlink()
    assert c.thumbnail(hit.id, 32) == path
    with pytest.raises(UnreadableFile):
        c.thumbnail(hit.id, 64)
    with pytest.raises(QueryError, match="item 999"):
        c.thumbnail(999)


def test_status(c: Collection, photos: Path) -> None:
    assert c.status()["items"] == {"image": 0, "text": 0, "rendered": 0}
    c.ingest([photos])
    status = c.status()
    assert list(status) == ["collection", "fingerprint", "items", "failed", "index", "bytes"]
    assert status["index"] == {"kind": "flat-fp16", "vectors": 12, "stale": False}
    assert status["bytes"] > 12 * 64 * 2


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a disk needs root on Linux")
def test_read_only_collection_can_be_searched_and_refuses_to_change(photos: Path, embedder: Counting, tmp_path: Path) -> None:
    place = tmp_path / "collection"
    with Collection.open(place, embedder) as c:  # type: ignore[arg-type]
        c.ingest([photos])
        expected = [hit.id for hit in c.search("a dog")]
    if subprocess.run(["mount", "--bind", "-o", "ro", place, place], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow bind mounts")
    try:
        with Collection.open(place, embedder) as c:  # type: ignore[arg-type]
            assert [hit.id for hit in c.search("a dog")] == expected
            assert c.verify() == []
            for change in (lambda: c.ingest([photos]), lambda: c.forget([photos]), c.rebuild):
                with pytest.raises(CollectionReadOnly, match=str(place)):
                    change()
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small disk needs root on Linux")
def test_full_disk_stops_with_a_clear_line_and_keeps_what_was_committed(
    photos: Path, embedder: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from e5v_search.collection import engine, ingest

    monkeypatch.setattr(ingest, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(engine, "MAX_BATCH", 8)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        for i in range(20, 400):
            paint(photos / "many" / f"{i}.jpg", i)
        with Collection.open(disk / "c", embedder) as c:  # type: ignore[arg-type]
            c.ingest([photos / "a"])
            (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 2_500_000))
            with pytest.raises(DiskFull, match=str(disk)):
                c.ingest([photos])
            kept = c.status()["items"]["image"]
            assert 6 < kept < 392
        embedded = embedder.embedded
        with Collection.open(disk / "c", embedder) as c:  # type: ignore[arg-type]
            assert len(c.search("a dog", k=1000)) == kept
            assert [p for p in c.verify() if "index.faiss" not in p] == []
            (disk / "ballast").unlink()
            report = c.ingest([photos])
            assert (report.added, report.unchanged) == (392 - kept, kept)
            assert embedder.embedded == embedded + 392 - kept
            assert c.verify() == []
    finally:
        subprocess.run(["umount", disk], check=True)
