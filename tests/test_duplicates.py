"""Duplicates: against brute force on vectors, and on real photos saved again in the ways in which photos multiply."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import refused, run
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pictures import photo
from PIL import Image, ImageEnhance

from e5v_search import Collection, Embedder
from e5v_search.catalog import VIEW, Catalog, Put
from e5v_search.collection import duplicates as module
from e5v_search.collection.chosen import stored
from e5v_search.collection.duplicates import Duplicates, find_duplicates, leaders, neighboured
from e5v_search.errors import UsageError
from e5v_search.media.look import look

SAMPLES = Path(module.__file__).parent.parent / "samples"


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# grouping


def brute_force(x: np.ndarray, threshold: float) -> list[int]:
    """One row after the other, in plain words."""
    cosines = unit(x.astype(np.float64)) @ unit(x.astype(np.float64)).T
    owner: list[int] = []
    for i in range(len(x)):
        near = [j for j in range(i) if owner[j] == j and cosines[i, j] >= threshold]
        owner.append(max(near, key=lambda j: (cosines[i, j], -j)) if near else i)
    return owner


@st.composite
def clustered(draw: st.DrawFn) -> np.ndarray:
    """Rows around few centres, some of them equal, so that groups, chains and ties are common."""
    n, centres = draw(st.integers(1, 60)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    around = rng.normal(size=(centres, 5))[rng.integers(0, centres, n)]
    noise = rng.normal(size=(n, 5)) * draw(st.sampled_from([0.0, 0.05, 0.3]))
    return unit(around + noise).astype(np.float16)


@settings(max_examples=150, deadline=None)
@given(clustered(), st.sampled_from([0.5, 0.9, 0.97, 0.999]), st.sampled_from([(1, 1), (3, 5), (16, 7), (1024, 4096)]))
def test_leaders_are_those_of_brute_force(x: np.ndarray, threshold: float, tile: tuple[int, int]) -> None:
    cosines = unit(x.astype(np.float64)) @ unit(x.astype(np.float64)).T
    assume(np.abs(cosines - threshold).min() > 1e-6)  # on the line, rounding decides
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROWS", tile[0])
        patch.setattr(module, "_COLUMNS", tile[1])
        owner, score = leaders(x, threshold)
    for i, (of, told, expected) in enumerate(zip(owner, score, brute_force(x, threshold), strict=True)):
        # equal but for rounding is as good
        assert of == expected or cosines[i, of] == pytest.approx(cosines[i, expected], abs=1e-6)
        if of != i:
            assert told == pytest.approx(cosines[i, of], abs=1e-6)
            assert told >= threshold - 1e-6
            assert owner[of] == of < i


def test_a_chain_does_not_become_one_group() -> None:
    """Ten steps of 8° each: neighbours score 0.990, next but one 0.961."""
    angles = np.deg2rad(8 * np.arange(10))
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert leaders(x, 0.98)[0].tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]
    middle_first = x[[1, 0, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert leaders(middle_first, 0.98)[0].tolist() == [0, 0, 0, 3, 3, 5, 5, 7, 7, 9]


def test_a_member_goes_with_the_most_similar_leader() -> None:
    angles = np.deg2rad([0.0, 20.0, 13.0])  # the third is within 15° of both
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert leaders(x, np.cos(np.deg2rad(15)))[0].tolist() == [0, 1, 1]


def test_thousands_of_equal_rows_are_one_group() -> None:
    rows = np.random.default_rng(0).normal(size=(200, 16))
    x = unit(np.concatenate([rows, np.tile(rows[:1], (5000, 1))])).astype(np.float16)
    assert leaders(x, 0.999)[0].tolist() == [*range(200), *[0] * 5000]
    assert neighboured(x, 0.999).sum() == 5001


def test_rows_are_alike_only_if_they_look_so() -> None:
    x = np.tile([1.0, 0.0], (6, 1))
    two = np.array([look(photo(200, 150, seed)) for seed in (1, 2)])
    assert leaders(x, 0.9, two[[0, 1, 0, 1, 1, 0]])[0].tolist() == [0, 1, 0, 1, 1, 0]
    assert leaders(x, 0.9)[0].tolist() == [0] * 6


@settings(max_examples=60, deadline=None)
@given(clustered(), st.sampled_from([0.5, 0.9, 0.999]), st.sampled_from([(1, 1), (3, 5), (7, 16)]))
def test_neighboured_rows(x: np.ndarray, threshold: float, tile: tuple[int, int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROWS", tile[0])
        patch.setattr(module, "_COLUMNS", tile[1])
        found = neighboured(x, threshold)
    cosines = unit(x.astype(np.float64)) @ unit(x.astype(np.float64)).T
    np.fill_diagonal(cosines, -1)
    clear = (np.abs(cosines - threshold) > 1e-5).all(axis=1)
    assert (found == (cosines >= threshold).any(axis=1))[clear].all()


def test_nothing_at_all() -> None:
    assert [len(part) for part in leaders(np.empty((0, 4)), 0.9)] == [0, 0]


# in a collection


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with Catalog.create(tmp_path / "c") as catalog:
        catalog.bind("made up", 2, {"name": "made up", "quantize": None})
        yield catalog


def put(name: str, angle: float = 0.0, content: str | None = None, **more: Any) -> Put:
    """A photo whose vector points to `angle` in degrees."""
    vector = np.array([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))])
    facts = {"width": 40, "height": 30, "size": 1000, "mtime_ns": 0} | more
    return Put(kind="image", path=f"/photos/{name}", content_hash=content or name, vectors={VIEW: vector}, **facts)


def names(found: Duplicates) -> list[tuple[str, list[str]]]:
    return [(group.kind, [photo.path.removeprefix("/photos/") for photo in group.items]) for group in found.groups]


def test_exact_and_near_groups(catalog: Catalog) -> None:
    catalog.commit(
        [
            put("a", 0, "same"),
            put("b", 0, "same"),
            put("alone", 90),
            put("c", 45, width=400, height=300, size=9000),
            put("c small", 46, width=20, height=15, size=500),
            put("c copy", 45, "c", width=400, height=300, size=9000),
        ]
    )
    catalog.commit([Put(kind="text", content_hash="c", text="no photo", vectors={VIEW: np.array([1.0, 0.0])})])
    found = find_duplicates(catalog, 0.99, by_vectors=True)
    assert names(found) == [("exact", ["a", "b"]), ("near", ["c", "c copy", "c small"])]
    assert [(group.keep.path, group.bytes) for group in found.groups] == [("/photos/a", 1000), ("/photos/c", 9500)]
    assert (found.photos, found.redundant, found.bytes) == (6, 3, 10500)
    small = found.groups[1].items[2]
    assert small.score == pytest.approx(np.cos(np.deg2rad(1)), abs=2e-4)
    told = found.to_json()
    assert [item["keep"] for group in told["groups"] for item in group["items"]] == [True, False, True, False, False]
    assert told["groups"][0] == {
        "kind": "exact",
        "keep": 1,
        "items": [
            {"id": n, "path": path, "score": 1.0, "width": 40, "height": 30, "bytes": 1000, "taken_at": None, "keep": n == 1}
            for n, path in ((1, "/photos/a"), (2, "/photos/b"))
        ],
    }
    assert names(find_duplicates(catalog, None)) == [("exact", ["c", "c copy"]), ("exact", ["a", "b"])]


@pytest.mark.parametrize(
    ("keep", "order"),
    [
        ("largest", ["big", "fat", "dated", "early", "b", "c"]),
        ("oldest", ["dated", "big", "fat", "early", "b", "c"]),
    ],
)
def test_which_one_to_keep(catalog: Catalog, keep: str, order: list[str]) -> None:
    """Each time the best is taken away, the next best of the rest is kept."""
    facts: dict[str, dict[str, Any]] = {
        "c": {"mtime_ns": 9},
        "b": {"mtime_ns": 9},
        "early": {"mtime_ns": 8},
        "dated": {"mtime_ns": 9, "taken_at": "2019-05-01T10:00:00+02:00"},
        "fat": {"size": 2000, "mtime_ns": 7},
        "big": {"width": 80, "height": 60, "mtime_ns": 6},
    }
    ids = dict(
        zip(facts, catalog.commit([put(name, i * 0.1, **more) for i, (name, more) in enumerate(facts.items())]), strict=True)
    )
    kept = []
    while True:
        groups = find_duplicates(catalog, 0.9, keep, by_vectors=True).groups
        if not groups:
            break
        kept.append(Path(groups[0].keep.path).name)
        catalog.commit(gone=[ids.pop(kept[-1])])
    assert [*kept, *ids] == order


def test_empty_collections_and_senseless_wishes(catalog: Catalog) -> None:
    assert find_duplicates(catalog).to_json()["groups"] == []
    catalog.commit([put("a")])
    assert find_duplicates(catalog).groups == []
    for threshold in (0.0, 1.5, float("nan")):
        with pytest.raises(UsageError, match="threshold"):
            find_duplicates(catalog, threshold)
    with pytest.raises(UsageError, match="largest or oldest"):
        find_duplicates(catalog, keep="best")


def test_stored_vectors_come_in_the_order_that_was_asked_for(catalog: Catalog) -> None:
    ids = catalog.commit([put(str(i), 10 * i) for i in range(9)])
    wanted = np.array([ids[5], 10**6, ids[0], ids[8]])
    have, x = stored(catalog, wanted)
    assert have.tolist() == [ids[5], ids[0], ids[8]]
    np.testing.assert_allclose(np.rad2deg(np.arctan2(x[:, 1], x[:, 0])), [50, 0, 80], atol=0.1)
    assert stored(catalog, wanted, view="cirr")[1].shape == (0, 2)


# real photos


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos, each with what becomes of photos, and a collection of them made by the bundled model."""
    base = tmp_path_factory.mktemp("duplicates")
    folder = base / "photos"
    folder.mkdir()
    for name in ("cat", "coffee", "horse-silhouette"):
        image = Image.open(SAMPLES / f"{name}.jpg").convert("RGB")
        shutil.copy(SAMPLES / f"{name}.jpg", folder)
        shutil.copy(SAMPLES / f"{name}.jpg", folder / f"{name} copy.jpg")
        image.save(folder / f"{name} again.jpg", quality=50)
        image.resize((image.width // 2, image.height // 2)).save(folder / f"{name} small.jpg")
        ImageEnhance.Contrast(image).enhance(1.1).save(folder / f"{name} contrast.jpg")
    embedder = Embedder.load("e5v-tiny", device="cpu", dtype="float32")
    with Collection.open(base / "c", embedder) as c:
        assert c.ingest([folder]).added == 15
    return folder


@pytest.fixture
def c(photos: Path) -> Iterator[Collection]:
    with Collection.open(photos.parent / "c") as c:
        yield c


def test_photos_saved_again_are_found(c: Collection, photos: Path) -> None:
    found = find_duplicates(c.catalog)
    told = {Path(group.keep.path).name.split(".")[0].split()[0]: group for group in found.groups}
    assert set(told) == {"cat", "coffee", "horse-silhouette"}
    assert len(found.groups) == 3
    for name, group in told.items():
        assert {Path(photo.path).name.split(".")[0].split()[0] for photo in group.items} == {name}
        assert len(group.items) == 5
        assert group.keep.width == max(photo.width for photo in group.items)
        others = [photo.score for photo in group.redundant]
        assert others == sorted(others, reverse=True)
    assert found.redundant == 12
    exact = find_duplicates(c.catalog, None)
    assert [len(group.items) for group in exact.groups] == [2, 2, 2]
    assert len(os.listdir(photos)) == 15


def real_files(catalog: Catalog, *paths: Path) -> None:
    """Photos of one content in the catalog, as these files are now."""
    puts = []
    for path in paths:
        status = path.stat()
        one = put(path.name, content="same", size=status.st_size, mtime_ns=status.st_mtime_ns)
        one.path = str(path)
        puts.append(one)
    catalog.commit(puts)


def removable(catalog: Catalog) -> tuple[list[str], list[str]]:
    safe, other = find_duplicates(catalog).removable()
    return [Path(photo.path).name for photo in safe], [Path(photo.path).name for photo in other]


def test_only_what_can_go_without_loss_is_removable(catalog: Catalog, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg")]
    for mtime, path in enumerate(paths):
        path.write_bytes(b"a photo")
        os.utime(path, ns=(mtime, mtime))
    real_files(catalog, *paths)
    assert removable(catalog) == (["b.jpg", "c.jpg", "d.jpg"], [])
    paths[1].unlink()
    os.utime(paths[2])  # written again: it may show something else now
    assert removable(catalog) == (["d.jpg"], ["b.jpg", "c.jpg"])
    paths[0].write_bytes(b"another photo in place of the one to keep")
    assert removable(catalog) == ([], ["b.jpg", "c.jpg", "d.jpg"])


def test_a_link_is_not_kept_in_place_of_what_it_leads_to(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "z.jpg").write_bytes(b"a photo")
    shutil.copy2(tmp_path / "z.jpg", tmp_path / "y.jpg")
    (tmp_path / "a.jpg").symlink_to("z.jpg")
    real_files(catalog, *(tmp_path / name for name in ("a.jpg", "y.jpg", "z.jpg")))
    assert Path(find_duplicates(catalog).groups[0].keep.path).name == "a.jpg"
    assert removable(catalog) == (["y.jpg"], ["z.jpg"])


def test_photos_that_cannot_be_looked_at(catalog: Catalog, tmp_path: Path) -> None:
    catalog.commit([put("gone", 0), put("gone too", 1), put("alone", 90)])
    found = find_duplicates(catalog)
    assert found.groups == []
    assert [failure.path for failure in found.failed] == ["/photos/gone", "/photos/gone too"]
    result = run("duplicates", "-c", str(tmp_path / "c"))
    assert (result.exit_code, result.stdout) == (1, "no duplicates among 3 photos\n")
    assert "/photos/gone: no such file or directory" in result.stderr
    assert run("duplicates", "-c", str(tmp_path / "c"), "--by-vectors").exit_code == 0


# the command


def test_the_command(photos: Path, tmp_path: Path) -> None:
    place = str(photos.parent / "c")
    told = json.loads(run("duplicates", "-c", place, "--exact", "--json").stdout)
    assert (told["threshold"], told["photos"], told["redundant"], len(told["groups"])) == (None, 15, 3, 3)
    assert told["bytes"] == sum(item["bytes"] for group in told["groups"] for item in group["items"] if not item["keep"])
    whole = run("duplicates", "-c", place)
    assert whole.stdout.count("  keep  ") == 3
    assert whole.stdout.splitlines()[-1].startswith("3 groups: 12 of 15 photos could go (")
    bare = run("duplicates", "-c", place, "--threshold", "0.9", "--paths", "-0")
    going = {os.fsdecode(path) for path in bare.stdout_bytes.split(b"\0")[:-1]}
    assert going == {
        item["path"]
        for group in json.loads(run("duplicates", "-c", place, "--json").stdout)["groups"]
        for item in group["items"]
        if not item["keep"]
    }
    assert all(os.path.exists(path) for path in going)
    strict = json.loads(run("duplicates", "-c", place, "--threshold", "1", "--keep", "oldest", "--json").stdout)
    assert 3 <= strict["redundant"] < 12


def test_what_the_command_refuses(photos: Path) -> None:
    place = str(photos.parent / "c")
    for words in (
        ["--json", "--paths"],
        ["-0"],
        ["--exact", "--threshold", "0.9"],
        ["--exact", "--by-vectors"],
        ["--threshold", "0"],
        ["--keep", "best"],
    ):
        assert run("duplicates", "-c", place, *words).exit_code == 2
    assert "no collection" in refused(3, "duplicates", "-c", str(photos.parent / "nowhere"))


def test_photos_that_changed_are_left_out_of_the_paths(catalog: Catalog, tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        shutil.copy2(SAMPLES / "cat.jpg", tmp_path / name)
    real_files(catalog, tmp_path / "a.jpg", tmp_path / "b.jpg")
    assert run("duplicates", "-c", str(tmp_path / "c"), "--paths").stdout == f"{tmp_path / 'b.jpg'}\n"
    os.utime(tmp_path / "a.jpg")
    result = run("duplicates", "-c", str(tmp_path / "c"), "--paths")
    assert result.stdout == ""
    assert "1 photo left out" in result.stderr
    assert run("duplicates", "-c", str(tmp_path / "c"), "--paths", "--quiet").stderr == ""


def test_only_what_passes_the_filters_counts(tmp_path: Path) -> None:
    pictures = [photo(200, 150, 1), photo(150, 200, 2)]
    with Collection.open(tmp_path / "c", Embedder.load("e5v-tiny", device="cpu")) as c:
        for i, picture in enumerate(pictures):
            picture.save(tmp_path / f"{i}.png")
            shutil.copy(tmp_path / f"{i}.png", tmp_path / f"{i} copy.png")
        c.ingest([tmp_path])
        assert len(find_duplicates(c.catalog, None).groups) == 2
        [group] = find_duplicates(c.catalog, None, where=["orientation=portrait"]).groups
        assert {Path(item.path).name for item in group.items} == {"1.png", "1 copy.png"}
        with pytest.raises(UsageError, match="no orientation"):
            find_duplicates(c.catalog, None, where=["orientation=round"])
