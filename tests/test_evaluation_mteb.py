"""The engine through mteb itself, on local data, beside our own protocols on the same data."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from literal import Literal
from PIL import Image

from e5v_search import media
from e5v_search.backbones import Embedder
from e5v_search.errors import MissingPackage, TextTooLong, UsageError
from e5v_search.evaluation import protocols
from e5v_search.evaluation.made_scenes import scenes
from e5v_search.evaluation.metrics import Outcome
from e5v_search.evaluation.mteb_adapter import MtebModel
from e5v_search.evaluation.records import Caption, Captioned, Missing, Pair, PhotoFile, Rating, Scenes, Source
from e5v_search.evaluation.vectors import Vectors

mteb = pytest.importorskip("mteb", reason="needs mteb: pip install 'e5v-search[mteb]'")

from datasets import Dataset, DatasetDict  # noqa: E402  mteb brings it
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402

SAMPLES = sorted((Path(__file__).parent.parent / "e5v_search/samples").glob("*.jpg"))


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder.load("e5v-tiny", device="cpu")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def metadata(name: str, type: str, category: str, score: str) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        type=type,
        category=category,
        modalities=["text"] if category == "t2t" else ["image", "text"],
        main_score=score,
        description="local data",
        dataset={"path": "local/data", "revision": "1"},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
    )


class Ratings(AbsTaskSTS):
    metadata = metadata("LocalRatings", "STS", "t2t", "cosine_spearman")
    pairs: Sequence[Pair] = ()

    def load_data(self, **kwargs: Any) -> None:
        columns = {
            "sentence1": [pair.a for pair in self.pairs],
            "sentence2": [pair.b for pair in self.pairs],
            "score": [pair.gold for pair in self.pairs],
        }
        self.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
        self.data_loaded = True


class Search(AbsTaskRetrieval):
    """`queries` and `corpus` by column; `right` has the ids of the right documents for each query's id."""

    queries: Mapping[str, Sequence[Any]]
    corpus: Mapping[str, Sequence[Any]]
    right: Mapping[str, Sequence[str]]

    def load_data(self, **kwargs: Any) -> None:
        split = {
            "queries": Dataset.from_dict(dict(self.queries)),
            "corpus": Dataset.from_dict(dict(self.corpus)),
            "relevant_docs": {query: dict.fromkeys(found, 1) for query, found in self.right.items()},
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class TextToImage(Search):
    metadata = metadata("LocalTextToImage", "Any2AnyRetrieval", "t2i", "ndcg_at_10")


class ImageToText(Search):
    metadata = metadata("LocalImageToText", "Any2AnyRetrieval", "i2t", "ndcg_at_10")


class ChangeToImage(Search):
    metadata = metadata("LocalChangeToImage", "Any2AnyRetrieval", "it2i", "hit_rate_at_1")
    ignore_identical_ids = True  # a query has the id of its reference, which is then no answer: CIRR's rule


class ImageToBoth(Search):
    metadata = metadata("LocalImageToBoth", "Any2AnyRetrieval", "i2it", "hit_rate_at_1")


def scores(model: MtebModel, task: Any, **fields: Any) -> dict[str, Any]:
    """What mteb says of the model on a task with these data."""
    assert isinstance(model, mteb.EncoderProtocol)
    made = task()
    for name, value in fields.items():
        setattr(made, name, value)
    [result] = mteb.evaluate(model, made, cache=None, show_progress_bar=False, co2_tracker=False).task_results
    found: dict[str, Any] = result.scores["test"][0]
    return found


def agree(theirs: Mapping[str, Any], ours: Mapping[str, float], direction: str, ks: Sequence[int] = (1, 5, 10)) -> None:
    """mteb rounds to five digits. Its recall is the share of the right documents; any hit is its hit rate."""
    for k in ks:
        hit = ours[f"{direction}r@{k}"]
        assert theirs[f"hit_rate_at_{k}"] == pytest.approx(hit / 100, abs=1e-5)
        assert theirs[f"recall_at_{k}"] == pytest.approx(ours.get(f"{direction}fraction@{k}", hit) / 100, abs=1e-5)
    assert theirs["ndcg_at_10"] == pytest.approx(ours[f"{direction}ndcg@10"] / 100, abs=1e-5)


def test_similarity_of_sentences(embedder: Embedder, tmp_path: Path) -> None:
    data = scenes().data
    assert isinstance(data, Scenes)
    pairs = (*data.rating.first(24).tasks["sts"], Pair('is it "red"?', "a red circle", 4.0), Pair("two  dogs", "a star", 0.5))
    outcome, _ = protocols.sts(Rating({"own": pairs}), Vectors(embedder, tmp_path), Missing(False))
    theirs = scores(MtebModel(embedder), Ratings, pairs=pairs)
    ours = outcome.metrics()["own"] / 100
    assert theirs["cosine_spearman"] == pytest.approx(ours, abs=1e-6)
    assert theirs["spearman"] == pytest.approx(ours, abs=1e-6)
    # and with another set of prompts these are other numbers
    other = scores(MtebModel(embedder, "last"), Ratings, pairs=pairs)
    assert other["cosine_spearman"] != pytest.approx(ours, abs=1e-6)


@pytest.fixture(scope="module")
def photos() -> Captioned:
    """Sample photos with two captions each."""
    words = [photo.stem.replace("-", " ") for photo in SAMPLES]
    captions = [Caption(f"{start}{word}", (i,)) for i, word in enumerate(words) for start in ("", "a photo of ")]
    return Captioned(tuple(PhotoFile(photo.name, photo) for photo in SAMPLES), tuple(captions))


def opened(sources: Sequence[Source]) -> list[Image.Image]:
    # copies, which know of no file format: `datasets` would write a JPEG a second time, with losses
    return [media.open_picture(source.picture()).copy() for source in sources]


def test_text_and_image_retrieval(embedder: Embedder, photos: Captioned, tmp_path: Path) -> None:
    outcome, _ = protocols.captioned(photos, Vectors(embedder, tmp_path), Missing(False))
    ours = outcome.metrics()
    texts = {"id": [f"t{i}" for i in range(len(photos.captions))], "text": [c.text for c in photos.captions]}
    images = {"id": [f"i{i}" for i in range(len(photos.gallery))], "image": opened(photos.gallery)}
    model = MtebModel(embedder)
    owners = {f"t{i}": [f"i{caption.owners[0]}"] for i, caption in enumerate(photos.captions)}
    agree(scores(model, TextToImage, queries=texts, corpus=images, right=owners), ours, "t2i_")
    own = {image: [text for text, [owner] in owners.items() if owner == image] for image in images["id"]}
    theirs = scores(model, ImageToText, queries=images, corpus=texts, right=own)
    agree(theirs, ours, "i2t_")
    assert theirs["hit_rate_at_5"] != theirs["recall_at_5"]  # so that the two cannot be mixed up above


def test_composed_retrieval(embedder: Embedder, tmp_path: Path) -> None:
    made = scenes().data
    assert isinstance(made, Scenes)
    data = made.composed.first(40)
    outcome, _ = protocols.cirr(data, Vectors(embedder, tmp_path), Missing(False))
    gallery = {"id": [f"i{i}" for i in range(len(data.gallery))], "image": opened(data.gallery)}
    queries = {
        "id": [f"i{query.reference}" for query in data.queries],
        "image": opened([data.gallery[query.reference] for query in data.queries]),
        "text": [query.texts[0] for query in data.queries],
    }
    right = {f"i{query.reference}": [f"i{query.target}"] for query in data.queries}
    theirs = scores(MtebModel(embedder), ChangeToImage, queries=queries, corpus=gallery, right=right)
    agree(theirs, Outcome({"": outcome.parts[""]}).metrics(), "")
    assert 0 < theirs["hit_rate_at_1"] < 1


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def plain(*colours: tuple[int, int, int]) -> list[Image.Image]:
    return [Image.new("RGB", (4, 4), colour) for colour in colours]


def test_document_with_picture_and_text_is_their_sum() -> None:
    """Red asks; d0 is green with a text of red, (1, 1, 0) in sum; d1 red with a text of blue, (1, 0, 1); d2 is red twice."""
    embedder = Literal()
    corpus = {"id": ["d0", "d1", "d2"], "image": plain(GREEN, RED, RED), "text": ["9 0 0", "0 0 9", "1 0 0"]}
    queries = {"id": ["q0"], "image": plain(RED)}
    theirs = scores(MtebModel(embedder), ImageToBoth, queries=queries, corpus=corpus, right={"q0": ["d2"]})
    assert theirs["hit_rate_at_1"] == 1
    assert {kind for kind, _, _ in embedder.asked} == {"image", "text"}
    task = ImageToBoth.metadata
    batch = {"image": plain(GREEN, RED), "text": ["9 0 0", "0 0 9"]}
    x = MtebModel(embedder).encode([batch], task_metadata=task, hf_split="test", hf_subset="default", prompt_type="document")
    assert x == pytest.approx(np.array([[1, 1, 0], [1, 0, 1]]) / np.sqrt(2), abs=1e-6)


def test_prompts_are_those_of_the_task() -> None:
    embedder = Literal()
    change, text, rated = ChangeToImage.metadata, TextToImage.metadata, Ratings.metadata
    for task, prompt_type, batch in (
        (change, "query", {"image": plain(RED), "text": ["1 2 3"]}),
        (change, "document", {"image": plain(RED)}),
        (text, "query", {"text": ["1 2 3"]}),
        (rated, None, {"text": ["1 2 3"]}),
    ):
        MtebModel(embedder).encode([batch], task_metadata=task, hf_split="", hf_subset="", prompt_type=prompt_type)
    asked = [(kind, prompts) for kind, prompts, _ in embedder.asked]
    assert asked == [("composed", "cirr"), ("image", "cirr"), ("text", "retrieval"), ("text", "sts")]
    assert embedder.asked[-1][2] == "1 2 3."
    MtebModel(embedder, "last").encode([{"image": plain(RED)}], task_metadata=change, hf_split="", hf_subset="")
    assert embedder.asked[-1][1] == "cirr-last"


class ShortSighted(Literal):
    """Takes no text of more than nine characters."""

    def embed_texts(self, texts: Sequence[str], prompts: str = "retrieval") -> np.ndarray:
        if any(len(text) > 9 for text in texts):
            raise TextTooLong("too long")
        return super().embed_texts(texts, prompts)


class Deaf(Literal):
    def embed_texts(self, texts: Sequence[str], prompts: str = "retrieval") -> np.ndarray:
        raise TextTooLong("too long")


def test_beginning_of_a_text_that_is_too_long() -> None:
    how: dict[str, Any] = {"task_metadata": TextToImage.metadata, "hf_split": "", "hf_subset": "", "prompt_type": "query"}
    with pytest.warns(UserWarning, match="read the first 5 of 11 characters"):
        x = MtebModel(ShortSighted()).encode([{"text": ["1 0 0", "0 2 0 9 9 9", "0 0 1"]}], **how)
    assert x == pytest.approx(np.eye(3))
    with pytest.raises(TextTooLong):
        MtebModel(Deaf()).encode([{"text": ["1 0 0"]}], **how)
    assert MtebModel(Literal()).encode([], **how).shape == (0, 3)


def test_refusals() -> None:
    how: dict[str, Any] = {"task_metadata": TextToImage.metadata, "hf_split": "", "hf_subset": ""}
    with pytest.raises(UsageError, match=r"LocalTextToImage .*\(audio, text\)"):
        MtebModel(Literal()).encode([{"audio": [0], "text": ["1 0 0"]}], **how)
    with pytest.raises(UsageError, match=r"no texts or pictures \(label\)"):
        MtebModel(Literal()).encode([{"label": [0]}], **how)
    with pytest.raises(UsageError, match="unknown prompt set 'nonsense'"):
        MtebModel(Literal(), "nonsense")


def test_results_of_different_settings_have_different_places(embedder: Embedder) -> None:
    a, b = (MtebModel(embedder, prompts).mteb_model_meta for prompts in (None, "last"))
    assert a.name == "e5v-search/e5v-tiny"
    assert a.revision == embedder.made_by.revision
    assert a.experiment_name != b.experiment_name


def test_mteb_is_loaded_when_it_is_needed_and_named_when_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, e5v_search.evaluation.mteb_adapter; print({'mteb', 'torch', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(MissingPackage, match=r"pip install 'e5v-search\[mteb\]'"):
        MtebModel(Literal())
