"""Each protocol on vectors that can be read off the inputs (tests/literal.py), with numbers worked out by hand."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from literal import Literal
from PIL import Image

from e5v_search.backbones import Embedder
from e5v_search.errors import DataError
from e5v_search.evaluation import protocols
from e5v_search.evaluation.made_scenes import scenes, shared
from e5v_search.evaluation.metrics import Ranked, Rated
from e5v_search.evaluation.protocols import captioned, cirr, cirr_submission, fashion_text, fashioniq, sts, sts_sentence
from e5v_search.evaluation.records import Caption, Captioned, Change, Composed, Drawn, Missing, Pair, PhotoFile, Rating, Scenes
from e5v_search.evaluation.submission import QUERIES, problems, write_submissions
from e5v_search.evaluation.vectors import Vectors
from e5v_search.render import render
from e5v_search.scenes import Group, Scene

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def picture(name: str, colour: tuple[int, int, int]) -> Drawn:
    return Drawn(name, lambda: Image.new("RGB", (4, 4), colour))


def composed(colours: Sequence[tuple[int, int, int]], *queries: Change) -> Composed:
    return Composed(tuple(picture(f"p{i}", colour) for i, colour in enumerate(colours)), queries)


def ranks(part: object) -> list[list[int]]:
    assert isinstance(part, Ranked)
    return part.ranks.tolist()


# red has two captions, the second of which is nearest to green; green's is as near to red; blue's is right
CAPTIONS = Captioned(
    (picture("red", RED), picture("green", GREEN), picture("blue", BLUE)),
    (Caption("3 2 1", (0,)), Caption("1 3 2", (0,)), Caption("2 2 1", (1,)), Caption("0 0 5", (2,))),
)
# scores: caption 0: .80 .53 .27; 1: .27 .80 .53; 2: .67 .67 .33; 3: 0 0 1
TO_IMAGE = [[1], [3], [2], [1]]
TO_TEXT = [[1, 3], [2, 0], [1, 0]]


def check_captioned(metrics: dict[str, float]) -> None:
    third, fourth = 1 / math.log2(3), 1 / math.log2(4)
    expected = {
        "t2i_r@1": 1 / 2,
        "t2i_r@5": 1,
        "t2i_mrr": (1 + 1 / 3 + 1 / 2 + 1) / 4,
        "i2t_r@1": 2 / 3,
        "i2t_fraction@1": (1 / 2 + 0 + 1) / 3,
        "i2t_mrr": (1 + 1 / 2 + 1) / 3,
        "i2t_ndcg@10": ((1 + fourth) / (1 + third) + third + 1) / 3,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx({n: 100 * v for n, v in expected.items()})
    assert metrics["t2i_median_rank"] == 1.5


def test_retrieval_both_ways(tmp_path: Path) -> None:
    embedder = Literal()
    outcome, _ = captioned(CAPTIONS, Vectors(embedder, tmp_path), Missing(False))
    assert ranks(outcome.parts["t2i"]) == TO_IMAGE
    assert ranks(outcome.parts["i2t"]) == TO_TEXT
    check_captioned(outcome.metrics())
    assert {(kind, prompts) for kind, prompts, _ in embedder.asked} == {("text", "retrieval"), ("image", "retrieval")}


def test_gap_between_pictures_and_captions(tmp_path: Path) -> None:
    """Pictures at (1, 0, 0) and (0, 1, 0), captions at (0, 1, 0) and (0, 0, 1): the means are (1/2, 1/2, 0), (0, 1/2, 1/2)."""
    data = Captioned((picture("red", RED), picture("green", GREEN)), (Caption("0 1 0", (0,)), Caption("0 0 1", (1,))))
    outcome, _ = captioned(data, Vectors(Literal(), tmp_path), Missing(False))
    assert outcome.gap is not None
    assert outcome.gap.n == (2, 2)
    assert outcome.gap.distance == pytest.approx(math.sqrt(1 / 2))
    assert outcome.gap.spread == pytest.approx(math.sqrt(1 / 2))
    one, _ = captioned(data.first(1), Vectors(Literal(), tmp_path), Missing(False))
    assert one.gap is None


def test_rendered_captions_are_seen_with_the_image_prompt(tmp_path: Path) -> None:
    pages = {render(caption.text).tobytes(): caption.text for caption in CAPTIONS.captions}
    embedder = Literal(pages)
    outcome, _ = captioned(CAPTIONS, Vectors(embedder, tmp_path), Missing(False), rendered=True)
    check_captioned(outcome.metrics())
    assert [(kind, prompts) for kind, prompts, _ in embedder.asked] == [("image", "retrieval")] * 7
    assert [image.size for _, _, image in embedder.asked[3:]] == [(800, 400)] * 4


def test_captions_that_cannot_be_drawn_count_as_missing(tmp_path: Path) -> None:
    captions = (*CAPTIONS.captions, Caption(" ", (2,)))
    data = Captioned(CAPTIONS.gallery, captions)
    embedder = Literal({render(c.text).tobytes(): c.text for c in CAPTIONS.captions})
    with pytest.raises(DataError, match=r"1 of 5 pictures cannot be used \( : nothing to draw"):
        captioned(data, Vectors(embedder, tmp_path), Missing(False), rendered=True)
    missing = Missing(True)
    outcome, used = captioned(data, Vectors(embedder, tmp_path), missing, rendered=True)
    check_captioned(outcome.metrics())
    assert len(used.captions) == 4
    assert list(missing.reasons) == [" "]


def test_missing_pictures_take_their_captions_with_them(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    gone, bad = PhotoFile("gone.jpg", None, "no such file"), PhotoFile("bad.jpg", tmp_path / "bad.jpg")
    gallery = (gone, CAPTIONS.gallery[0], bad, *CAPTIONS.gallery[1:])
    moved = {0: 1, 1: 3, 2: 4}
    shared = tuple(Caption(c.text, tuple(moved[i] for i in c.owners)) for c in CAPTIONS.captions)
    data = Captioned(gallery, (Caption("9 9 9", (0,)), *shared, Caption("9 0 9", (2,))))
    vectors = Vectors(Literal(), tmp_path / "cache")
    with pytest.raises(DataError, match=r"1 of 5 .*gone.jpg: no such file.*--allow-missing"):
        captioned(data, vectors, Missing(False))
    missing = Missing(True)
    outcome, used = captioned(data, vectors, missing)
    check_captioned(outcome.metrics())
    assert used.questions == CAPTIONS.questions
    assert set(missing.reasons) == {"gone.jpg", "bad.jpg"}


def test_nothing_left_is_refused(tmp_path: Path) -> None:
    data = Captioned((PhotoFile("a", None, "no such file"),), (Caption("1 0 0", (0,)),))
    with pytest.raises(DataError, match="nothing is left"):
        captioned(data, Vectors(Literal(), tmp_path), Missing(True))


def test_a_picture_without_captions_is_no_query_but_stays_in_the_gallery(tmp_path: Path) -> None:
    data = Captioned(CAPTIONS.gallery, CAPTIONS.captions[1:2])
    outcome, _ = captioned(data, Vectors(Literal(), tmp_path), Missing(False))
    assert ranks(outcome.parts["t2i"]) == [[3]]
    assert ranks(outcome.parts["i2t"]) == [[1]]


def test_a_caption_of_several_pictures_finds_each(tmp_path: Path) -> None:
    data = Captioned(CAPTIONS.gallery, (Caption("2 1 3", (0, 1)),))
    outcome, _ = captioned(data, Vectors(Literal(), tmp_path), Missing(False))
    assert ranks(outcome.parts["t2i"]) == [[2, 3]]
    assert outcome.metrics()["t2i_fraction@1"] == 0
    assert ranks(outcome.parts["i2t"]) == [[1], [1]]


# a composed query is three times its numbers. Query a asks for red from red: only by leaving the reference out is p1 first.
GALLERY = [RED, (250, 60, 0), GREEN, (0, 250, 60), BLUE, (60, 0, 250)]
CIRR = composed(
    GALLERY,
    Change("a", 0, ("1 0 0",), target=1, members=(2, 3, 4, 5, 1)),  # rank 1; in the set 1
    Change("b", 4, ("0 1 0.2",), target=2, members=(3, 2, 5)),  # p3 is nearer: rank 2; in the set 2
    Change("c", 2, ("0 0 1",), target=3, members=(4, 5, 3)),  # p4, p5 and then p3: rank 3; in the set 3
)


def test_cirr_masks_the_reference(tmp_path: Path) -> None:
    embedder = Literal()
    outcome, _ = cirr(CIRR, Vectors(embedder, tmp_path), Missing(False))
    assert ranks(outcome.parts[""]) == [[1], [2], [3]]
    assert ranks(outcome.parts["subset"]) == [[1], [2], [3]]
    thirds = {name: round(value * 3 / 100) for name, value in outcome.metrics().items() if "r@" in name}
    subset = {"subset_r@1": 1, "subset_r@2": 2, "subset_r@3": 3}
    assert thirds == {"r@1": 1, "r@5": 3, "r@10": 3, "r@50": 3} | subset
    assert {(kind, prompts) for kind, prompts, _ in embedder.asked} == {("image", "cirr"), ("composed", "cirr")}


def test_cirr_without_sets_has_no_subset_recall(tmp_path: Path) -> None:
    data = composed(GALLERY, Change("a", 0, ("1 0 0",), target=1))
    outcome, _ = cirr(data, Vectors(Literal(), tmp_path), Missing(False))
    assert list(outcome.parts) == [""]


def test_a_missing_picture_takes_its_queries_and_leaves_the_sets(tmp_path: Path) -> None:
    gallery = (*CIRR.gallery[:3], PhotoFile("p3", None, "no such file"), *CIRR.gallery[4:])
    missing = Missing(True)
    outcome, used = cirr(Composed(gallery, CIRR.queries), Vectors(Literal(), tmp_path), missing)
    assert [q.key for q in used.queries] == ["a", "b"]
    assert [used.gallery[i].name for i in used.queries[0].members] == ["p2", "p4", "p5", "p1"]
    assert ranks(outcome.parts[""]) == [[1], [1]]


def test_cirr_submission(tmp_path: Path) -> None:
    secret = Composed(CIRR.gallery, tuple(Change(q.key, q.reference, q.texts, None, q.members) for q in CIRR.queries))
    files, _ = cirr_submission(secret, Vectors(Literal(), tmp_path), Missing(False))
    assert files["recall"] == {
        "version": "rc2",
        "metric": "recall",
        "a": ["p1", "p5", "p2", "p3", "p4"],
        "b": ["p3", "p2", "p1", "p5", "p0"],
        "c": ["p4", "p5", "p3", "p0", "p1"],
    }
    assert files["recall_subset"] == {
        "version": "rc2",
        "metric": "recall_subset",
        "a": ["p1", "p5", "p2"],
        "b": ["p3", "p2", "p5"],
        "c": ["p4", "p5", "p3"],
    }


@pytest.fixture
def whole() -> tuple[dict[str, object], list[str]]:
    pairs = [str(12063 + i) for i in range(QUERIES)]
    names = [f"test1-1009-3-img{i}" for i in range(50)]
    return {"version": "rc2", "metric": "recall"} | dict.fromkeys(pairs, names), pairs


def test_a_whole_submission_fits_the_server(whole: tuple[dict[str, object], list[str]], tmp_path: Path) -> None:
    file, pairs = whole
    [path] = write_submissions({"recall": file}, tmp_path / "run.json", pairs)
    assert json.loads(Path(path).read_text()) == file
    assert Path(path).name == "run-recall.json"
    assert Path(path).stat().st_size < 5_000_000


def test_what_the_server_would_refuse(whole: tuple[dict[str, object], list[str]], tmp_path: Path) -> None:
    file, pairs = whole
    assert problems(file, 5_000_001, pairs) == ["5,000,001 bytes are more than 5,000,000"]
    assert "1 pairs have no answer, such as 12063" in problems({k: v for k, v in file.items() if k != "12063"}, 9, pairs)
    assert "1 answers are for no pair, such as 99" in problems(file | {"99": file["12063"]}, 9, pairs)
    assert "pair 12070 needs 50 different names and has 1" in problems(file | {"12070": ["x"] * 50}, 9, pairs)
    assert "the split has 4,147 pairs and not 4,148" in problems(file, 9, pairs[:-1])
    assert "rc2" in problems(file | {"version": "rc1"}, 9, pairs)[0]
    with pytest.raises(DataError, match="file for recall would be refused"):
        write_submissions({"recall": file}, tmp_path / "run.json", pairs[:-1])
    assert not list(tmp_path.iterdir())


# Raw vectors of the two orders are (2, 0, 9) and (1, 0, 18), of quite different lengths: their sum points to p1, the sum of
# their directions would point to p2.
FASHION = composed([RED, (28, 0, 252), (35, 0, 253), GREEN], Change("0", 0, ("1 0 0.?", " 0 0 9, "), target=1))


def test_fashioniq_adds_raw_vectors_of_both_orders(tmp_path: Path) -> None:
    embedder = Literal()
    outcome, _ = fashioniq({"dress": FASHION}, Vectors(embedder, tmp_path), Missing(False))
    assert ranks(outcome.parts["dress"]) == [[1]]
    assert [text for kind, _, text in embedder.asked if kind == "composed"] == ["1 0 0, 0 0 9", "0 0 9, 1 0 0"]
    directions = np.array([[2, 0, 9], [1, 0, 18]]) / np.linalg.norm([[2, 0, 9], [1, 0, 18]], axis=1, keepdims=True)
    gallery = np.array([[28, 0, 252], [35, 0, 253]])
    assert np.argmax(gallery @ directions.sum(axis=0) / np.linalg.norm(gallery, axis=1)) == 1


def test_fashioniq_does_not_mask_the_reference(tmp_path: Path) -> None:
    data = composed([RED, (250, 60, 0)], Change("0", 0, ("1 0 0", "1 0 0"), target=1))
    outcome, _ = fashioniq({"dress": data}, Vectors(Literal(), tmp_path), Missing(False))
    assert ranks(outcome.parts["dress"]) == [[2]]


def test_fashioniq_categories_prompts_and_average(tmp_path: Path) -> None:
    near = Composed(FASHION.gallery, FASHION.queries)
    far = composed([(i, 255 - i, 0) for i in range(12)], Change("0", 0, ("0 1 0", "0 1 0"), target=11))
    embedder = Literal()
    data = {"dress": near, "shirt": near, "toptee": far}
    outcome, _ = fashioniq(data, Vectors(embedder, tmp_path), Missing(False))
    metrics = outcome.metrics()
    expected = {"dress_r@10": 100, "shirt_r@10": 100, "toptee_r@10": 0, "toptee_r@50": 100, "average_r@50": 100}
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["average_r@10"] == pytest.approx(200 / 3)
    assert {prompts for _, prompts, _ in embedder.asked} == {"fashioniq-dress", "fashioniq-shirt", "fashioniq-toptee"}
    from e5v_search.prompts import load_prompts

    assert "this shirt" in load_prompts("fashioniq-toptee").get("composed")


ASKED = {  # by each protocol of the four, with "last" and with "prompt": which sets, of which kinds
    "retrieval": ({("text", "{}"), ("image", "{}")}, CAPTIONS, captioned),
    "cirr": ({("image", "cirr-{}"), ("composed", "cirr-{}")}, CIRR, cirr),
    "fashioniq": (
        {(kind, f"fashioniq-{part}-{{}}") for kind in ("image", "composed") for part in ("dress", "toptee")},
        {"dress": FASHION, "toptee": composed([GREEN, BLUE], Change("0", 0, ("1 1 0", "0 1 1"), target=1))},
        fashioniq,
    ),
    "sts": ({("text", "sts-{}")}, Rating({"sts12": (Pair("1 0 0", "0 1 0", 0), Pair("1 0 0", "1 0 0", 5))}), sts),
}


@pytest.mark.parametrize("how", ["last", "prompt"])
@pytest.mark.parametrize("name", ASKED)
def test_ablations_are_those_of_the_protocols_own_set(name: str, how: str, tmp_path: Path) -> None:
    expected, data, protocol = ASKED[name]
    embedder = Literal()
    protocol(data, Vectors(embedder, tmp_path), Missing(False), how)  # type: ignore[operator]
    assert {(kind, prompts) for kind, prompts, _ in embedder.asked} == {(kind, own.format(how)) for kind, own in expected}


def test_ablations_share_no_vectors_but_those_of_the_same_prompt(tmp_path: Path) -> None:
    """Three sets on CIRR's data and one cache: all is embedded three times, except what is bare in either of two sets."""
    embedder = Literal()
    vectors = Vectors(embedder, tmp_path)
    for asked in ("last", "prompt", "retrieval"):
        cirr(CIRR, vectors, Missing(False), asked)
    assert vectors.embedded == 3 * (len(CIRR.gallery) + len(CIRR.queries))
    fashioniq({"dress": CIRR}, vectors, Missing(False), "last")  # pictures bare as in "cirr-last"; the raw sums are its own
    assert vectors.embedded == 3 * (len(CIRR.gallery) + len(CIRR.queries)) + len(CIRR.queries)


def test_fashion_text() -> None:
    assert fashion_text([" is red. ", "?has, sleeves,."]) == "is red, has, sleeves"


def test_sts_joins_subsets_and_averages_tasks(tmp_path: Path) -> None:
    # cosines with (1, 0, 0): 1, .8, .6, 0; gold scores in the opposite order of the two in the middle
    pairs = tuple(Pair("1 0 0", b, gold) for b, gold in (("2 0 0", 5), ("4 3 0", 2), ("3 4 0", 3), ("0 0 1", 0)))
    embedder = Literal()
    outcome, _ = sts(Rating({"sts12": pairs, "sickr": pairs[:2]}), Vectors(embedder, tmp_path), Missing(False))
    # four ranks with two neighbours exchanged: 1 - 6 * 2 / (4 * 15)
    assert outcome.metrics() == pytest.approx({"sts12": 80, "sickr": 100, "average": 90})
    assert isinstance(outcome.parts["sts12"], Rated)
    assert {(kind, prompts) for kind, prompts, _ in embedder.asked} == {("text", "sts")}


@pytest.mark.parametrize(
    ("sentence", "read"),
    [
        ("a dog runs", "a dog runs."),
        ("a dog runs.", "a dog runs."),
        ("is it a dog?", "is it a dog."),
        ('he said "go"', "he said 'go'"),  # the quote ends it: no full stop is added
        ("the dogs'", "the dogs'"),
        ('"why?"', "'why?'"),
        ("what ?!", "what ?!."),
        ("  two   blanks \t here ", "two blanks here."),
        ("", ""),
    ],
)
def test_sts_punctuation(sentence: str, read: str) -> None:
    assert sts_sentence(sentence) == read


@given(st.text())
def test_sts_sentences_end_as_they_must(text: str) -> None:
    read = sts_sentence(text)
    assert read == "" or read[-1] in ".'"
    assert '"' not in read


def test_protocol_names_its_numbers() -> None:
    assert protocols.CIRR_KS == (1, 5, 10, 50)
    assert protocols.FASHION_KS == (10, 50)


def test_scenes_are_the_same_everywhere_and_all_differ() -> None:
    first, again, other = scenes(12), scenes(12), scenes(12, "another")
    assert first.questions == again.questions != other.questions
    assert isinstance(first.data, Scenes)
    assert isinstance(again.data, Scenes)
    gallery = [source.content() for source in first.data.composed.gallery]
    assert gallery == [source.content() for source in again.data.composed.gallery]
    assert len(set(gallery)) == len(gallery) == 24
    assert gallery[:12] == [source.content() for source in first.data.captioned.gallery]
    assert [(q.reference, q.target) for q in first.data.composed.queries] == [(i, 12 + i) for i in range(12)]


def test_rated_captions() -> None:
    a, b = Group("circle", "red"), Group("square", "blue")
    scene = Scene((a, b), "white", "left")
    assert shared(scene, Scene((b, a), "white", "right")) == 5  # the same in other words
    # background, six things said of two shapes, a place: eight, of which colour and place change
    blue = Scene((Group("circle", "blue"), b), "white", "left")
    assert shared(scene, blue) == 5 * 6 / 10
    assert shared(scene, Scene((Group("star", "pink", 3),), "brown")) == 0


def test_scenes_have_all_four_types_of_task(tmp_path: Path) -> None:
    loaded = scenes(6)
    assert isinstance(loaded.data, Scenes)
    vectors = Vectors(Embedder.load("e5v-tiny", device="cpu"), tmp_path)
    outcome, _ = protocols.scenes(loaded.data, vectors, Missing(False))
    assert list(outcome.parts) == ["t2i", "i2t", "rendered_t2i", "rendered_i2t", "composed", "sts"]
    metrics = outcome.metrics()
    assert {"t2i_r@1", "rendered_i2t_r@10", "composed_r@1", "sts"} <= metrics.keys()
    assert metrics["t2i_r@1"] > 100 / 6  # it was trained on such scenes
    assert metrics["composed_r@5"] > 100 * 5 / 11
