"""The registry of models: ours, the user's own, and what is told of each."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import replica
from command_line import refused, run
from PIL import Image

from e5v_search.backbones import Embedder
from e5v_search.backbones.known import FAMILIES, known_models
from e5v_search.backbones.registry import BUNDLED, TINY, describe
from e5v_search.errors import ModelError, UnknownModel, UsageError
from e5v_search.prompts import WORDINGS

TINY_FOLDER = BUNDLED / TINY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return replica.build(tmp_path_factory.mktemp("model"))[0]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own file, empty."""
    monkeypatch.setenv("E5V_HOME", str(tmp_path))
    path = tmp_path / "models.toml"
    path.write_text("")
    return path


def declare(path: Path, name: str, folder: Path, more: str = "", dim: int = 64) -> None:
    lines = f'summary = "mine"\nfamily = "llava_next"\ndim = {dim}\nlicence = "mine"\nhub = {json.dumps(str(folder))}\n{more}'
    path.write_text(f'["{name}"]\n{lines}\n')


def test_ours_are_whole() -> None:
    models = known_models()
    assert list(models)[:2] == [TINY, "royokong/e5-v"]
    assert {known.family for known in models.values()} == set(FAMILIES) - {"sentence_transformers"}
    for name, known in models.items():
        assert known.origin is None
        assert known.revision is None or re.fullmatch("[0-9a-f]{40}", known.revision), name
        assert describe(name)["dim"] == known.dim


def test_a_model_of_the_users_needs_no_code(own: Path, folder: Path) -> None:
    declare(own, "mine", folder, 'wording = "mistral"')
    embedder = Embedder.load("mine", device="cpu", dtype="float32")
    plain = Embedder.load(str(folder), device="cpu", dtype="float32")
    assert embedder.made_by.model == "mine"
    assert embedder.fingerprint != plain.fingerprint
    told = plain.encoder.fill("[INST] <sent>\nSummary above sentence in one word:  [/INST]", ["a dog"])  # type: ignore[attr-defined]
    assert embedder.encoder.ask("text", "retrieval", ["a dog"]) == told  # type: ignore[attr-defined]
    assert json.loads(run("models", "--json").stdout)["models"][-1]["here"] is True
    assert "mine" in refused(3, "compare", "text:x", "text:y", "--model", "yours")


def test_words_of_ones_own_are_part_of_the_fingerprint(own: Path, folder: Path) -> None:
    prints = []
    for chat in ("Q: {}", "A: {}"):
        words = f'[mine.words]\nchat = "{chat}"\ntext = "say <sent>"\nimage = "<image> {{instruction}}"\n'
        words += '[mine.words.instructions]\nimage = "Look"\n'
        declare(own, "mine", folder, words)
        embedder = Embedder.load("mine", device="cpu", dtype="float32")
        [ids] = embedder.encoder.ask("image", "retrieval")  # type: ignore[attr-defined]
        assert [ids] == embedder.encoder.fill(f"{chat[:2]} <image> Look.", [""])  # type: ignore[attr-defined]
        prints.append(embedder.fingerprint)
    assert len(set(prints)) == 2
    assert describe("mine")["words"]["chat"] == "A: {}"


def test_a_folder_may_be_like_a_known_model(own: Path, folder: Path) -> None:
    own.write_text(f'[copy]\nlike = "royokong/e5-v"\nhub = {json.dumps(str(folder))}\ndim = 64\nleast_dim = 16\n')
    known = known_models()["copy"]
    assert (known.wording, known.revision, known.origin) == ("llama3", None, str(own))
    whole = Embedder.load("copy", device="cpu", dtype="float32")
    short = Embedder.load("copy", device="cpu", dtype="float32", dim=16)
    x, y = whole.embed_texts(replica.SENTENCES), short.embed_texts(replica.SENTENCES)
    np.testing.assert_allclose(y, x[:, :16] / np.linalg.norm(x[:, :16], axis=1, keepdims=True), atol=1e-6)
    assert (whole.dim, short.dim, short.fingerprint) == (64, 16, f"{whole.fingerprint}/16")
    pictures = [replica_picture()]
    cut = whole.embed_images(pictures)[:, :16]
    np.testing.assert_allclose(short.embed_images(pictures), cut / np.linalg.norm(cut), atol=1e-6)
    pairs = [(pictures[0], "make it snow")]
    np.testing.assert_allclose(
        short.embed_composed(pairs, normalise=False), whole.embed_composed(pairs, normalise=False)[:, :16], atol=1e-6
    )
    with pytest.raises(ModelError, match="loaded without --dim"):
        short.nearest_words(y)
    assert Embedder.load("copy", device="cpu", dtype="float32", dim=64).fingerprint == whole.fingerprint
    for dim in (8, 65):
        with pytest.raises(UsageError, match="can have 16 to 64 numbers"):
            Embedder.load("copy", device="cpu", dim=dim)


def replica_picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8))


@pytest.mark.parametrize("model", ["e5v-tiny", "FOLDER"])
def test_vectors_of_models_that_were_not_trained_for_it_are_not_cut(model: str, own: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match="not known to be trained for shorter vectors"):
        Embedder.load(str(folder) if model == "FOLDER" else model, device="cpu", dim=16)
    with pytest.raises(UsageError, match="dim must be 1 or more"):
        Embedder.load(model, dim=0)


def test_a_collection_keeps_the_length(own: Path, tmp_path: Path) -> None:
    own.write_text('[short]\nlike = "e5v-tiny"\nleast_dim = 32\n' + f"hub = {json.dumps(str(TINY_FOLDER))}\n")
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in sorted((TINY_FOLDER.parent.parent / "samples").glob("drawn-red*.png")):
        shutil.copy(path, photos)
    assert run("index", photos, "-c", "short", "--model", "short", "--dim", "32").exit_code == 0
    found = json.loads(run("search", "a red circle", "-c", "short", "--json").stdout)
    assert found["fingerprint"].endswith("/float/32")
    assert len(found["hits"]) == 3
    assert json.loads(run("status", "-c", "short", "--json").stdout)["fingerprint"] == found["fingerprint"]
    again = json.loads(run("search", "a red circle", "-c", "short", "--json", "--model", "short").stdout)
    assert again["hits"] == found["hits"]
    said = refused(3, "search", "a red circle", "-c", "short", "--model", "short", "--dim", "64")
    assert "/float/32" in said
    assert "/float/64" in said


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("not toml", ["models"]),
        ("mine = 3\n", ["mine: a table is needed"]),
        ('[mine]\nlike = "nothing"\n', ["mine.like: 'nothing' is not one of e5v-tiny"]),
        ('[mine]\nfamily = "blip"\n', ["summary: missing", "dim: missing", "licence: missing"]),
        (
            '[a]\nlike = "e5v-tiny"\nfamily = "blip"\nwording = "loud"\n[b]\nlike = "e5v-tiny"\nleast_dim = 300\ncolour = 1\n',
            ["'blip' is not one of llava_next", "'loud' is not one of llama3", "colour: unknown key"],
        ),
        ('[b]\nlike = "e5v-tiny"\nleast_dim = 300\n', ["1 <= least_dim <= dim"]),
        ('[b]\nlike = "e5v-tiny"\nmin_pixels = 30\nmax_pixels = 3\n', ["min_pixels <= max_pixels"]),
        ('[b]\nlike = "e5v-tiny"\nprompts = ["loud"]\n', ["no set 'loud'"]),
        ('[b]\nlike = "e5v-tiny"\n[b.words]\nchat = "none"\ntext = "x"\n', ["chat: {} is needed once", "text: <sent>"]),
    ],
)
def test_every_problem_of_a_file_is_said_with_its_place(text: str, problems: list[str], own: Path) -> None:
    own.write_text(text)
    with pytest.raises(UsageError) as error:
        known_models()
    assert all(problem in str(error.value) for problem in [*problems, str(own)])


def test_the_file_may_stand_elsewhere(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "more.toml"
    elsewhere.write_text('[second]\nlike = "e5v-tiny"\n')
    own.write_text('[first]\nlike = "e5v-tiny"\n')
    assert "first" in known_models()
    monkeypatch.setenv("E5V_MODELS", str(elsewhere))
    assert {"first", "second"} & set(known_models()) == {"second"}
    monkeypatch.setenv("E5V_MODELS", str(tmp_path / "none.toml"))
    assert "none.toml" in refused(2, "models")


def test_another_family_than_declared_is_refused(own: Path, folder: Path) -> None:
    declare(own, "mine", folder)
    own.write_text(own.read_text().replace("llava_next", "clip"))
    with pytest.raises(ModelError, match=r"declared as clip, but .* holds a llava_next model; set its family right in"):
        Embedder.load("mine", device="cpu")


def test_show(own: Path, folder: Path) -> None:
    told = json.loads(run("models", "show", "royokong/e5-v", "--json").stdout)
    assert told["dim"] == 4096
    assert told["words"]["chat"] == WORDINGS["llama3"].chat
    assert (told["pooling"], told["normalised"], told["here"]) == ("last token", True, False)
    assert told["takes"] == ["4bit", "8bit", "adapter", "instruction", "int8", "fp8", "tiles"]
    assert told["memory_gib"] == {"16bit": 14.6, "4bit": 4.9}
    text = run("models", "show", "royokong/e5-v").stdout
    assert "\\n\\n \\n" in text
    assert "0c1f22679417b3ae925d779442221c40cd1861ab" in text
    assert json.loads(run("models", "show", folder, "--json").stdout)["family"] == "llava_next"
    assert "nothing is known of 'owner/name'; known: e5v-tiny" in refused(3, "models", "show", "owner/name")
    with pytest.raises(UnknownModel):
        describe("owner/name")
