"""Maps: places against plain linear algebra, the page as data, the command on a real collection."""

import base64
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import refused, run
from pictures import photo
from PIL import Image

from e5v_search import Collection, Embedder
from e5v_search.catalog import VIEW, Catalog, Item, Put
from e5v_search.config import ModelChoice
from e5v_search.errors import MissingPackage, UsageError
from e5v_search.map import draw_map
from e5v_search.map.page import page, thumbnails
from e5v_search.map.points import _shares, gather
from e5v_search.map.project import pca, project

# places


def scattered(n: int, d: int, seed: int = 0) -> np.ndarray:
    """Rows whose variance differs from axis to axis, in a turned frame, around a point that is not the origin."""
    rng = np.random.default_rng(seed)
    turned = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return (rng.normal(size=(n, d)) * np.linspace(3, 0.5, d)) @ turned + 1


@pytest.mark.parametrize(("n", "d"), [(500, 32), (40, 200), (3, 5), (2, 2), (7, 1)])
@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16])
def test_pca_is_that_of_the_singular_value_decomposition(n: int, d: int, kind: Any) -> None:
    x = scattered(n, d).astype(kind)
    xy, explained = pca(x)
    centred = x.astype(np.float64) - x.astype(np.float64).mean(axis=0)
    values, axes = np.linalg.svd(centred, full_matrices=False)[1:]
    expected = np.zeros((n, 2))
    for axis, direction in enumerate(axes[:2]):
        expected[:, axis] = centred @ direction * np.sign(direction[np.abs(direction).argmax()])
    np.testing.assert_allclose(xy, expected, atol=0.02 * np.abs(expected).max())
    np.testing.assert_allclose(explained, (values**2 / (values**2).sum())[:2], atol=1e-4)


def test_pca_of_more_rows_than_the_axes_are_found_from(monkeypatch: pytest.MonkeyPatch) -> None:
    x = scattered(3000, 8)
    whole, _ = pca(x)
    monkeypatch.setattr("e5v_search.map.project._SAMPLE", 1000)
    monkeypatch.setattr("e5v_search.map.project._BLOCK", 700)
    sampled, _ = pca(x)
    assert np.corrcoef(whole[:, 0], sampled[:, 0])[0, 1] > 0.98
    np.testing.assert_array_equal(pca(x)[0], sampled)


def test_rows_that_are_all_the_same_lie_on_one_point() -> None:
    for x in (np.ones((1, 4)), np.ones((5, 4), np.float16)):
        xy, explained = pca(x)
        np.testing.assert_array_equal(xy, 0)
        assert explained == [0, 0]


def test_umap_puts_clusters_apart_and_is_repeatable() -> None:
    pytest.importorskip("umap", reason="umap-learn is not installed")
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.normal(size=(16, 16)))[0][:2]
    x = (np.repeat(centres, 20, axis=0) + 0.05 * rng.normal(size=(40, 16))).astype(np.float16)
    xy, explained = project(x, "umap")
    assert (xy.shape, xy.dtype, explained) == ((40, 2), np.float32, [])
    between = np.linalg.norm(xy[:20].mean(axis=0) - xy[20:].mean(axis=0))
    assert between > 3 * max(xy[:20].std(), xy[20:].std()) / 2
    np.testing.assert_array_equal(project(x, "umap")[0], xy)
    with pytest.raises(UsageError, match="at least, and here are 4"):
        project(x[:4], "umap")


def test_umap_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(MissingPackage, match=r"pip install umap-learn$"):
        project(np.eye(9), "umap")
    with pytest.raises(UsageError, match="pca or umap"):
        project(np.eye(9), "tsne")


@pytest.mark.parametrize(
    ("counts", "limit", "shares"),
    [
        ({"image": 10, "text": 10, "rendered": 10}, 100, {"image": 10, "text": 10, "rendered": 10}),
        ({"image": 1000, "text": 5000, "rendered": 0}, 600, {"image": 300, "text": 300, "rendered": 0}),
        ({"image": 7, "text": 5000, "rendered": 50}, 100, {"image": 7, "text": 46, "rendered": 47}),
        ({"image": 9, "text": 9, "rendered": 9}, 1, {"image": 1, "text": 0, "rendered": 0}),
    ],
)
def test_even_shares(counts: dict[str, int], limit: int, shares: dict[str, int]) -> None:
    told = _shares(counts, limit)
    assert list(told) == list(counts)
    assert sum(told.values()) == min(limit, sum(counts.values()))
    assert sorted(told.values()) == sorted(shares.values())
    assert all(told[kind] <= counts[kind] for kind in counts)


# the page


class Parsed(HTMLParser):
    """Scripts, styles and tags of a page as a browser finds them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": [], "title": []}
        self.feed(text)
        [data] = [t for (tag, attrs), t in zip(self.scripts, self.texts["script"], strict=True) if attrs.get("type")]
        self.data = json.loads(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in self.texts and data.strip():
            self.texts[self.tags[-1][0]].append(data)

    @property
    def scripts(self) -> list[tuple[str, dict[str, str | None]]]:
        return [(tag, attrs) for tag, attrs in self.tags if tag == "script"]


def item(n: int, kind: str, path: str | None, text: str | None = None, **more: Any) -> Item:
    facts = {"width": None, "height": None, "taken_at": None} | more
    rest = {"part": None, "content_hash": str(n), "lat": None, "lon": None, "camera": None, "format": None, "facts": {}}
    return Item(id=n, kind=kind, path=path, text=text, **(rest | facts))


FACTS = {"title": "holidays", "about": "3 items", "facts": "made by hand", "gaps": []}


def test_the_page_holds_its_items() -> None:
    items = [
        item(1, "image", "/photos/2019/dog.jpg", width=640, height=480, taken_at="2019-05-01T10:00:00"),
        item(2, "image", "/photos/2020/cat.jpg"),
        item(3, "text", "/photos/words.txt", "a  dog\nand a cat"),
    ]
    xy = np.array([[0.5, 1], [2, 3], [-4, 5]])
    data = Parsed(page(items, xy, ["aGk=", "", ""], FACTS)).data
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(data["xy"]), "<f4").reshape(-1, 2), xy)
    assert list(base64.b64decode(data["kind"])) == [0, 0, 1]
    assert [(kind["name"], kind["count"]) for kind in data["kinds"]] == [("image", 2), ("text", 1)]
    assert data["names"] == ["dog.jpg", "cat.jpg", "a dog and a cat"]
    assert [data["places"][n] for n in data["place"]] == ["2019", "2020", "words.txt"]
    assert data["notes"] == ["640×480 · 2019-05-01", "", ""]
    assert (data["thumbnails"], data["title"]) == (["aGk=", "", ""], "holidays")


HOSTILE = [
    "<img src=x onerror=alert(1)>.jpg",
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "{{js}} {{data}} \\u003c &lt; \" ' `",
    "\u2028\u2029 \u202egpj.exe",
    "no utf-8 \udce9\n",
]


def test_names_and_texts_are_only_ever_text() -> None:
    items = [item(n, "text", f"/a/{text}/b.txt", text) for n, text in enumerate(HOSTILE)]
    whole = page(items, np.zeros((len(items), 2)), [""] * len(items), FACTS | {"title": HOSTILE[1] + HOSTILE[3]})
    parsed = Parsed(whole)
    plain = Parsed(page([item(0, "text", "/a", "b")], np.zeros((1, 2)), [""], FACTS))
    assert [tag for tag, _ in parsed.tags] == [tag for tag, _ in plain.tags]
    assert parsed.data["names"][0] == HOSTILE[0]
    assert parsed.data["names"][3] == HOSTILE[3]
    assert all("\n" not in name and name.isprintable() for name in parsed.data["names"])
    assert whole.encode()  # no lone surrogate is left
    [title] = parsed.texts["title"]
    assert title == f"Map of {HOSTILE[1]}{HOSTILE[3]}"


def test_the_policy_lets_nothing_but_the_page_itself_run() -> None:
    parsed = Parsed(page([item(1, "image", "/a.jpg")], np.zeros((1, 2)), [""], FACTS))
    [policy] = [attrs["content"] for tag, attrs in parsed.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    told = dict(part.strip().split(" ", 1) for part in str(policy).split(";"))
    assert (told["default-src"], told["img-src"]) == ("'none'", "data:")
    for directive, text in (("style-src", parsed.texts["style"][0]), ("script-src", parsed.texts["script"][-1])):
        assert told[directive] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert not [
        attrs for _, attrs in parsed.tags if {"src", "href", "style"} & set(attrs) or any(a.startswith("on") for a in attrs)
    ]
    assert not re.search(r"https?://", page([item(1, "image", "/a.jpg")], np.zeros((1, 2)), [""], FACTS))


def test_thumbnails_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = []
    for n in range(12):
        path = tmp_path / f"{n}.jpg"
        photo(400, 300, n).save(path)
        items.append(item(n, "image", str(path)))
    items.append(item(12, "image", str(tmp_path / "missing.jpg")))
    items.append(item(13, "text", None, "no photo"))
    steps: list[tuple[int, int]] = []
    found = thumbnails(items, tmp_path / "cache", 100, on_progress=lambda done, total: steps.append((done, total)))
    assert [bool(each) for each in found] == [True] * 12 + [False] * 2
    assert steps[-1] == (13, 13)
    (tmp_path / "one.jpg").write_bytes(base64.b64decode(found[0]))
    assert Image.open(tmp_path / "one.jpg").size == (224, 168)
    assert sum(map(bool, thumbnails(items, tmp_path / "cache", 5))) <= 5
    assert thumbnails(items, tmp_path / "cache", 0) == [""] * 14
    monkeypatch.setattr("e5v_search.map.page._ALL_BYTES", 3 * max(map(len, found)))
    few = thumbnails(items, tmp_path / "cache", 100)
    assert 3 <= sum(map(bool, few)) < 12
    assert sum(map(len, few)) <= 3 * max(map(len, found))


# a collection


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos by the bundled model; texts and rendered texts put beside them."""
    base = tmp_path_factory.mktemp("map")
    (base / "photos").mkdir()
    for n in range(6):
        photo(90, 60, n).save(base / f"photos/{n}.jpg")
    embedder = Embedder.load("e5v-tiny", device="cpu", dtype="float32")
    with Collection.open(base / "c", embedder) as c:
        c.ingest([base / "photos"])
        texts = ["a dog", "a cat", "two red cars"]
        x = embedder.embed_texts(texts)
        puts = [
            Put(kind=kind, content_hash=text, path=str(base / "t.txt"), part=str(n), text=text, vectors={VIEW: x[n]})
            for kind in ("text", "rendered")
            for n, text in enumerate(texts)
        ]
        c.catalog.commit(puts)
    return base / "c"


@pytest.fixture
def c(place: Path) -> Iterator[Collection]:
    with Collection.open(place, ModelChoice("e5v-tiny", "cpu", "float32")) as c:
        yield c


def test_stored_vectors_need_no_model(c: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Embedder, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    drawn = draw_map(c)
    assert drawn.items == drawn.of == {"image": 6, "text": 3, "rendered": 3}
    assert [(a, b) for a, b, _ in drawn.gaps] == [("image", "text"), ("image", "rendered"), ("text", "rendered")]
    assert (drawn.prompts, drawn.thumbnails, len(drawn.explained)) == ("retrieval", 6, 2)
    assert draw_map(c, prompts="retrieval").page == drawn.page
    data = Parsed(drawn.page).data
    assert [len(data[name]) for name in ("names", "notes", "place", "thumbnails")] == [12] * 4
    assert data["gaps"][0]["distance"] == drawn.gaps[0][2].distance


def test_another_prompt_set_is_embedded_for_the_map_alone(c: Collection, tmp_path: Path) -> None:
    state = c.catalog.state
    steps: list[tuple[int, int]] = []
    points = gather(c, "last", None, on_progress=lambda done, total: steps.append((done, total)))
    assert [each.kind for each in points.items] == ["image"] * 6 + ["text"] * 3 + ["rendered"] * 3
    assert steps[-1] == (12, 12)
    embedder = c.embedder()
    photos = [str(each.path) for each in points.items[:6]]
    np.testing.assert_allclose(points.of_kind("image"), embedder.embed_images(photos, "last"), atol=1e-5)
    texts = [str(each.text) for each in points.items[6:9]]
    np.testing.assert_allclose(points.of_kind("text"), embedder.embed_texts(texts, "last"), atol=1e-5)
    assert np.abs(points.of_kind("text") - embedder.embed_texts(texts)).max() > 1e-3
    assert c.catalog.state == state
    assert c.catalog.views == [VIEW]
    with pytest.raises(UsageError, match="has no image prompt"):
        gather(c, "sts", None)
    with pytest.raises(UsageError, match="unknown prompt set"):
        gather(c, "nonsense", None)


def test_what_cannot_be_read_again_is_left_out(tmp_path: Path) -> None:
    for n in range(3):
        photo(90, 60, n).save(tmp_path / f"{n}.jpg")
    with Collection.open(tmp_path / "c", ModelChoice("e5v-tiny", "cpu", "float32")) as c:
        c.ingest([tmp_path / f"{n}.jpg" for n in range(3)])
        (tmp_path / "1.jpg").unlink()
        drawn = draw_map(c, prompts="prompt")
    assert drawn.items == {"image": 2, "text": 0, "rendered": 0}
    assert [failure.path for failure in drawn.failed] == [str(tmp_path / "1.jpg")]
    assert drawn.gaps == []


def test_the_command(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.html"
    told = json.loads(run("map", "-c", str(place), "--out", out, "--limit", "6", "--thumbnails", "1", "--json").stdout)
    assert (told["items"], told["of"]["image"], told["thumbnails"]) == ({"image": 2, "text": 2, "rendered": 2}, 6, 1)
    assert (told["out"], told["bytes"], told["failed"]) == (str(out), out.stat().st_size, [])
    assert {"a", "b", "distance", "spread", "accuracy", "chance", "n"} == set(told["gaps"][0])
    lines = run("map", "-c", str(place), "--out", out).stdout.splitlines()
    assert lines[0] == "6 photos, 3 texts, 3 rendered texts; prompt set retrieval"
    assert lines[1].startswith("photo and text: means ")
    assert lines[-1].endswith("open it in a browser")
    assert Parsed(out.read_text()).data["title"] == "c"
    assert [path.name for path in tmp_path.iterdir()] == ["map.html"]


def test_what_the_command_refuses(place: Path, tmp_path: Path) -> None:
    assert "choose another place with --out" in refused(3, "map", "-c", str(place), "--out", tmp_path / "no/map.html")
    Catalog.create(tmp_path / "empty").close()
    assert "is empty" in refused(3, "map", "-c", str(tmp_path / "empty"), "--out", tmp_path / "map.html")
    assert "has no image prompt" in refused(2, "map", "-c", str(place), "--out", tmp_path / "map.html", "--prompts", "sts")
    assert run("map", "-c", str(place)).exit_code == 2
    assert not (tmp_path / "map.html").exists()


def test_only_what_passes_the_filters_is_drawn(c: Collection) -> None:
    drawn = draw_map(c, where=["kind=image"])
    assert drawn.items["image"] == draw_map(c).items["image"]
    assert {kind for kind, n in drawn.items.items() if n} == {"image"}
    assert drawn.gaps == []
    with pytest.raises(UsageError, match="left to draw where width>100000"):
        draw_map(c, where=["width>100000"])
