"""Sums of queries, contrasts, comparisons and explanations, each against the plain formula over the model's own vectors."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from e5v_search import Collection, Embedder
from e5v_search.collection import Space
from e5v_search.errors import MediaError, QueryError, UsageError
from e5v_search.query import Input, Query, Term
from e5v_search.render import render

SAMPLES = Path(__file__).parent.parent / "e5v_search/samples"
CAT, RACCOON, COFFEE = (SAMPLES / f"{name}.jpg" for name in ("cat", "raccoon", "coffee"))


@pytest.fixture(scope="module")
def model() -> Embedder:
    return Embedder.load("e5v-tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def c(model: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collection]:
    with Collection.open(tmp_path_factory.mktemp("space") / "c", model) as collection:
        collection.ingest(sorted(SAMPLES.glob("*.jpg")))
        yield collection


@pytest.fixture(scope="module")
def xb(model: Embedder) -> tuple[list[Path], np.ndarray]:
    photos = sorted(SAMPLES.glob("*.jpg"))
    return photos, model.embed_images(photos)


def id_of(c: Collection, path: Path) -> int:
    item = c.catalog.item_by_path(str(path))
    assert item is not None
    return item.id


def test_terms_are_a_weighted_sum_of_cosines(c: Collection, model: Embedder, xb: tuple[list[Path], np.ndarray]) -> None:
    photos, x = xb
    base, snow, grass = model.embed_texts(["a dog", "snow", "grass"])
    [cat] = model.embed_images([CAT])
    expected = x @ base + 0.5 * (x @ snow) - x @ grass - 0.3 * (x @ cat)
    hits = c.search("a dog", plus=[("snow", 0.5)], minus=["grass", (CAT, 0.3)], k=len(photos))
    assert [hit.path for hit in hits] == [str(photos[i]) for i in np.argsort(-expected)]
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(expected)[::-1], atol=2e-3)  # stored in half precision
    by_id = c.search("a dog", plus=[("snow", 0.5)], minus=["grass", (id_of(c, CAT), 0.3)], k=len(photos))
    assert [hit.path for hit in by_id] == [hit.path for hit in hits]


def test_terms_alone(c: Collection, model: Embedder, xb: tuple[list[Path], np.ndarray]) -> None:
    _, x = xb
    a, b = model.embed_texts(["an animal", "a machine"])
    [best] = c.search(plus=[("an animal", 2)], minus=["a machine"], k=1)
    assert best.score == pytest.approx(float((x @ (2 * a - b)).max()), abs=2e-3)


def test_scores_of_sums_are_not_cut_at_one_but_cosines_are(c: Collection) -> None:
    assert c.search(image=CAT, plus=[CAT], k=1)[0].score == pytest.approx(2, abs=2e-3)
    assert c.search(image=CAT, k=1)[0].score <= 1
    assert c.search(plus=[(CAT, 3)], threshold=2.9)[0].path == str(CAT)
    with pytest.raises(QueryError, match="between -1 and 1"):
        c.search(image=CAT, threshold=2.9)
    with pytest.raises(QueryError, match="threshold"):
        c.search("a dog", plus=["snow"], threshold=float("nan"))


def test_minus_takes_what_it_names_to_the_end(c: Collection) -> None:
    worst = c.search("an animal", minus=[(CAT, 5)], k=1000)[-1]
    assert worst.path == str(CAT)


def test_a_picture_that_the_collection_holds_needs_no_model(c: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> Embedder:
        raise AssertionError("a model was asked for")

    monkeypatch.setattr(c, "embedder", never)
    monkeypatch.setattr(c.space, "embedder", never)
    assert len(c.search(image=CAT, minus=[COFFEE], plus=[(id_of(c, RACCOON), 0.5)], k=3)) == 3


def test_composed_with_terms_and_its_reference(c: Collection, model: Embedder, xb: tuple[list[Path], np.ndarray]) -> None:
    photos, x = xb
    [composed] = model.embed_composed([(CAT, "make it black and white")])
    [night] = model.embed_texts(["night"])
    expected = x @ (composed + 0.5 * night)
    kept = c.search(image=CAT, modify="make it black and white", plus=[("night", 0.5)], keep_reference=True, k=99)
    assert [hit.path for hit in kept] == [str(photos[i]) for i in np.argsort(-expected)]
    left_out = c.search(image=CAT, modify="make it black and white", plus=[("night", 0.5)], k=99)
    assert [hit.path for hit in left_out] == [hit.path for hit in kept if hit.path != str(CAT)]


def test_a_query_as_a_value_answers_as_its_keywords(c: Collection) -> None:
    query = Query("a dog", plus=(Term(Input("snow"), 0.5),))
    assert c.answer(query) == c.search("a dog", plus=[("snow", 0.5)])
    assert c.answer(query).query == {"text": "a dog", "plus": [{"text": "snow", "weight": 0.5}]}


def test_ask_ranks_by_the_difference(c: Collection, model: Embedder) -> None:
    wanted, unwanted = model.embed_texts(["a living thing", "a non-living object"])
    x = model.embed_images([CAT, COFFEE, RACCOON])
    difference = x @ wanted - x @ unwanted
    hits, failed = c.space.ask("a living thing", "a non-living object", [CAT, COFFEE, RACCOON])
    assert failed == []
    assert [hit.path for hit in hits] == [str([CAT, COFFEE, RACCOON][i]) for i in np.argsort(-difference)]
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(difference)[::-1], atol=2e-3)
    everything = c.search("a living thing", minus=["a non-living object"], k=1000)
    assert [hit.path for hit in everything if hit.path in {str(CAT), str(COFFEE), str(RACCOON)}] == [hit.path for hit in hits]


def test_ask_without_a_collection_goes_on_after_a_bad_picture(model: Embedder, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    space = Space(lambda: model)
    hits, failed = space.ask("red", "blue", [tmp_path / "bad.jpg", tmp_path / "red.png", tmp_path / "none.jpg"])
    assert [(hit.id, hit.rank, hit.path) for hit in hits] == [(None, 1, str(tmp_path / "red.png"))]
    assert [(f.path, f.reason.split(" (")[0]) for f in failed] == [
        (str(tmp_path / "bad.jpg"), "not a picture"),
        (str(tmp_path / "none.jpg"), "no such file or directory"),
    ]


def test_vectors_come_in_the_order_of_the_inputs(c: Collection, model: Embedder) -> None:
    inputs = [
        Input("a dog"),
        Input(image=CAT),
        Input(image=CAT, modify="at night"),
        Input(image=id_of(c, COFFEE)),
        Input("tea"),
    ]
    expected = np.concatenate(
        (
            model.embed_texts(["a dog"]),
            model.embed_images([CAT]),
            model.embed_composed([(CAT, "at night")]),
            model.embed_images([COFFEE]),
            model.embed_texts(["tea"]),
        )
    )
    np.testing.assert_allclose(c.space.vectors(inputs), expected, atol=2e-3)
    np.testing.assert_allclose(Space(lambda: model).vectors(inputs[:3]), expected[:3], atol=1e-5)


def test_other_prompts_are_embedded_even_if_the_collection_holds_the_picture(c: Collection, model: Embedder) -> None:
    np.testing.assert_allclose(c.space.vectors([Input(image=CAT)], "cirr"), model.embed_images([CAT], "cirr"), atol=1e-5)


def test_what_cannot_be_an_input(c: Collection, model: Embedder, tmp_path: Path) -> None:
    with pytest.raises(QueryError, match=r"has no item 777; ids are shown by search --json"):
        c.space.vectors([Input(image=777)])
    with pytest.raises(QueryError, match="item 3: ids belong to a collection"):
        Space(lambda: model).vectors([Input(image=3)])
    with pytest.raises(MediaError, match=r"none\.jpg: no such file"):
        c.space.vectors([Input(image=tmp_path / "none.jpg")])
    with pytest.raises(UsageError, match="has no image prompt"):
        c.space.vectors([Input(image=COFFEE)], "sts")


def test_the_documented_questions(c: Collection) -> None:
    dog = Path(__file__).parent.parent.parent / "shared/data/photos/n02099601_golden_retriever.jpg"
    if not dog.exists():
        pytest.skip("the photo of a golden retriever is in the shared data folder, which is not here")
    page = (Path(__file__).parent.parent / "docs/search.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z -]+) \| ([a-z -]+) \| (-?\d\.\d{3}) \| (-?\d\.\d{3}) \|$", page, re.MULTILINE)
    assert len(rows) == 6
    for positive, negative, *documented in rows:
        scores = {hit.path: hit.score for hit in c.space.ask(positive, negative, [dog, CAT])[0]}
        assert [scores[str(dog.resolve())], scores[str(CAT)]] == pytest.approx([float(x) for x in documented], abs=2e-3)


@pytest.fixture(scope="module")
def mixed(model: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collection]:
    """Four photos, and three texts as they are and rendered, each under two prompt sets."""
    base = tmp_path_factory.mktemp("mixed")
    (base / "texts.txt").write_text("a cat looks up\na cup of coffee on a table\na rocket in the night\n")
    with Collection.open(base / "c", model) as collection:
        collection.ingest([CAT, COFFEE, RACCOON, SAMPLES / "rocket-launch.jpg"], views=["retrieval", "cirr"])
        for kind in ("text", "rendered"):
            collection.ingest([base / "texts.txt"], kind=kind)
        yield collection


def test_a_composed_search_compares_with_photos_read_under_the_cirr_prompt(mixed: Collection, model: Embedder) -> None:
    photos = [CAT, COFFEE, RACCOON, SAMPLES / "rocket-launch.jpg"]
    [composed] = model.embed_composed([(CAT, "at night")])
    for keep in (True, False):
        hits = mixed.search(image=CAT, modify="at night", where=["kind=image"], keep_reference=keep)
        expected = {str(path): x for path, x in zip(photos, model.embed_images(photos, "cirr") @ composed, strict=True)}
        if not keep:
            del expected[str(CAT)]
        assert [hit.path for hit in hits] == sorted(expected, key=lambda path: -expected[path])
        np.testing.assert_allclose([hit.score for hit in hits], sorted(expected.values(), reverse=True), atol=2e-3)
    # a set that the collection has no view of compares with the view that every collection has
    [styled] = model.embed_composed([(CAT, "at night")], "fashioniq-dress")
    best = mixed.search(image=CAT, modify="at night", prompts="fashioniq-dress", where=["kind=image"], keep_reference=True)[0]
    assert best.score == pytest.approx(float((model.embed_images(photos) @ styled).max()), abs=2e-3)


def test_every_kind_is_found_and_told_apart(mixed: Collection, model: Embedder) -> None:
    hits = mixed.search("a cat looks up", k=100)
    assert sorted(hit.kind for hit in hits) == ["image"] * 4 + ["rendered"] * 3 + ["text"] * 3
    assert (hits[0].kind, hits[0].text, hits[0].part) == ("text", "a cat looks up", "1")
    assert hits[0].score == pytest.approx(1, abs=1e-3)
    for where, kinds in (
        ("kind=image|text", {"image", "text"}),
        ("kind=rendered", {"rendered"}),
        ("not kind=image", {"text", "rendered"}),
    ):
        assert {hit.kind for hit in mixed.search("a cat", where=[where], k=100)} == kinds


def test_items_of_every_kind_can_be_asked_with(mixed: Collection, model: Embedder) -> None:
    text, rendered = (mixed.search("a rocket in the night", where=[f"kind={kind}"], k=100) for kind in ("text", "rendered"))
    text_id = text[0].id
    rendered_id = next(hit.id for hit in rendered if hit.text == "a rocket in the night")
    assert text_id is not None
    assert rendered_id is not None
    assert mixed.search(image=text_id, k=1)[0].id == text_id
    assert mixed.search(image=rendered_id, k=1)[0].id == rendered_id
    drawn = render("a rocket in the night")
    np.testing.assert_allclose(
        mixed.space.vectors([Input(image=text_id), Input(image=rendered_id)], "prompt"),
        np.concatenate((model.embed_texts(["a rocket in the night"], "prompt"), model.embed_images([drawn], "prompt"))),
        atol=1e-5,
    )
    np.testing.assert_allclose(
        mixed.space.vectors([Input(image=rendered_id, modify="in red")]), model.embed_composed([(drawn, "in red")]), atol=1e-5
    )
    with pytest.raises(QueryError, match=f"item {text_id} is a text, no picture"):
        mixed.search(image=text_id, modify="in red")


def test_what_has_no_vector_in_a_view_yet_is_found_by_its_other_one(model: Embedder, tmp_path: Path) -> None:
    photos = [shutil.copy(path, tmp_path) for path in (CAT, COFFEE, RACCOON)]
    [composed] = model.embed_composed([(CAT, "at night")])
    with Collection.open(tmp_path / "c", model) as c:
        c.ingest(photos)
        (tmp_path / "coffee.jpg").rename(tmp_path / "away")  # cannot be looked at again
        c.ingest([tmp_path / "cat.jpg", tmp_path / "raccoon.jpg"], views=["retrieval", "cirr"])
        assert c.catalog.pending("cirr").tolist() == [id_of(c, Path(photos[1]))]
        hits = c.search(image=CAT, modify="at night", keep_reference=True)
        x = np.concatenate((model.embed_images([CAT, RACCOON], "cirr"), model.embed_images([COFFEE])))
        names = ["cat.jpg", "raccoon.jpg", "coffee.jpg"]
        assert [Path(hit.path or "").name for hit in hits] == [names[i] for i in np.argsort(-(x @ composed))]
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(x @ composed)[::-1], atol=2e-3)
        assert c.search(image=CAT, modify="at night", where=["path=away.jpg"]) == []
