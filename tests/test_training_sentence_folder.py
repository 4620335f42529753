"""The exported folder in sentence-transformers itself, against our own vectors."""

import json
from pathlib import Path

import numpy as np
import pytest
import replica
from PIL import Image

from e5v_search.backbones import Embedder
from e5v_search.errors import UnknownModel, UsageError
from e5v_search.training.sentence_folder import export_sentence_transformers

st = pytest.importorskip("sentence_transformers", reason="pip install 'e5v-search[train]'")

TEXTS = [
    *replica.SENTENCES,
    "a",
    "",
    "say <image> or <|eot_id|> <s>",
    "  blanks \n",
    "word " * 60,
    'it said "{{ no }}" {% if %}',
]


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURES = [picture(60, 150), picture(333, 200), picture(56, 56)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    base = tmp_path_factory.mktemp("replicas")
    return {name: replica.build(base / name, mistral=name == "mistral") for name in ("llama", "mistral")}


def opened(folder: Path) -> "st.SentenceTransformer":
    return st.SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": "float32"})


def assert_same(theirs: object, ours: np.ndarray) -> None:
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(np.linalg.norm(theirs, axis=1), 1, atol=1e-5)
    assert (theirs * ours).sum(axis=1).min() > 0.99999


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("layout", ["published", "current"])
def test_gives_our_vectors(family: str, layout: str, folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    base = folders[family][layout == "current"]
    ours = Embedder.load(str(base), device="cpu", dtype="float32")
    export_sentence_transformers(str(base), tmp_path / "cirr", "cirr")
    model = opened(tmp_path / "cirr")
    expected = ours.embed_texts(TEXTS, "cirr")
    assert_same(model.encode(TEXTS), expected)
    assert_same(model.encode(TEXTS[::-1], batch_size=3)[::-1], expected)
    assert_same(model.encode([{"image": p} for p in PICTURES]), ours.embed_images(PICTURES, "cirr"))
    pairs = list(zip(PICTURES, TEXTS, strict=False))
    theirs = model.encode([{"image": p, "text": text} for p, text in pairs])
    assert_same(theirs, ours.embed_composed(pairs, "cirr"))
    assert np.abs(expected @ expected.T)[~np.eye(len(TEXTS), dtype=bool)].min() < 0.9


@pytest.mark.parametrize("prompts", ["retrieval", "sts", "last"])
def test_prompts_are_those_asked_for(prompts: str, folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    published = folders["llama"][0]
    export_sentence_transformers(str(published), tmp_path / "out", prompts)
    ours, model = Embedder.load(str(published), device="cpu", dtype="float32"), opened(tmp_path / "out")
    assert_same(model.encode(TEXTS), ours.embed_texts(TEXTS, prompts))
    if prompts == "sts":
        with pytest.raises(Exception, match="prompt set sts has no image prompt"):
            model.encode([{"image": PICTURES[0]}])
    with pytest.raises(Exception, match=f"prompt set {prompts} has no composed prompt"):
        model.encode([{"image": PICTURES[0], "text": "red"}])


def test_the_bundled_model(tmp_path: Path) -> None:
    export_sentence_transformers("e5v-tiny", tmp_path / "tiny")
    ours, model = Embedder.load("e5v-tiny", device="cpu", dtype="float32"), opened(tmp_path / "tiny")
    assert_same(model.encode(TEXTS), ours.embed_texts(TEXTS))
    assert_same(model.encode([{"image": p} for p in PICTURES]), ours.embed_images(PICTURES))
    # it stays a model folder of ours
    again = Embedder.load(str(tmp_path / "tiny"), device="cpu", dtype="float32")
    np.testing.assert_array_equal(again.embed_texts(TEXTS), ours.embed_texts(TEXTS))
    assert json.loads((tmp_path / "tiny" / "modules.json").read_text())[2]["path"] == "2_Normalize"
    card = (tmp_path / "tiny" / "README.md").read_text()
    assert "SentenceTransformer('tiny')" in card
    assert "photo.jpg" in card


def test_what_cannot_be_exported_leaves_nothing(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown prompt set"):
        export_sentence_transformers("e5v-tiny", tmp_path / "out", "nothing")
    with pytest.raises(UnknownModel):
        export_sentence_transformers("e5v-huge", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="is there already"):
        export_sentence_transformers("e5v-tiny", folders["llama"][0])
