"""What the user asks of inputs in words of their own: of a query, of a collection's items, of a data set, of a map."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import replica
import towers
import vision_models
from command_line import refused, run

from e5v_search import Collection
from e5v_search.backbones import Embedder
from e5v_search.collection.exporting import export, vectors_file
from e5v_search.errors import UsageError
from e5v_search.evaluation.vectors import Vectors
from e5v_search.prompts import load_prompts

ROOT = Path(__file__).parent.parent
SAMPLES = sorted((ROOT / "e5v_search/samples").glob("drawn-*.png"))[:4]
WORDS = "What colour/is it, in one word:"
VIEW = f"instruction:{WORDS}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return replica.build(tmp_path_factory.mktemp("model"))[0]


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Embedder:
    return Embedder.load(str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return towers.build(tmp_path_factory.mktemp("towers") / "clip", "clip")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("E5V_HOME", str(tmp_path / "home"))
    (tmp_path / "photos").mkdir()
    for path in SAMPLES:
        shutil.copy(path, tmp_path / "photos")
    (tmp_path / "photos/captions.csv").write_text("file,caption\n" + "".join(f"{p.name},{p.stem}\n" for p in SAMPLES))
    return tmp_path / "photos"


def test_items_are_asked_and_found_by_what_they_say(photos: Path, embedder: Embedder, tmp_path: Path) -> None:
    with Collection.open(str(tmp_path / "c"), embedder=embedder) as c:
        c.ingest([photos])
        plain = c.search("red", k=4)
        assert c.ingest([photos], views=[VIEW]).completed == 4
        assert c.catalog.views == ["retrieval", VIEW]
        x, xq = embedder.embed_images(SAMPLES, VIEW), embedder.embed_texts(["red"], VIEW)[0]
        assert np.abs(x - embedder.embed_images(SAMPLES)).max() > 0.01
        scores = dict(zip((p.name for p in SAMPLES), x @ xq, strict=True))
        found = c.search("red", k=4, prompts=VIEW)
        assert [Path(str(hit.path)).name for hit in found] == sorted(scores, key=lambda name: -scores[name])
        np.testing.assert_allclose([hit.score for hit in found], sorted(scores.values(), reverse=True), atol=2e-3)
        assert c.fingerprint == embedder.fingerprint
        assert [hit.score for hit in c.search("red", k=4)] == [hit.score for hit in plain]
        # what comes later is asked as well, and a text is asked as a text
        (tmp_path / "texts.txt").write_text("a red car\n")
        c.ingest([tmp_path / "texts.txt"], "text")
        [stored] = [x for _, x in c.catalog.vectors(view=VIEW, ids=[5])]
        assert stored[0] @ embedder.embed_texts(["a red car"], VIEW)[0] > 0.999
        assert c.verify() == []
        # another question is not that view: its query is asked, its photos are what they are
        assert c.search("red", k=1, prompts="instruction:Else")[0].score != c.search("red", k=1, prompts=VIEW)[0].score
        export(c, tmp_path / "out")
        assert (tmp_path / "out" / vectors_file(VIEW)).is_file()
        assert "/" not in vectors_file(VIEW)
    run("import", tmp_path / "out", "-c", tmp_path / "back")
    assert run("status", "-c", tmp_path / "back").stdout.count(VIEW) == 1


def test_index_map_and_search(photos: Path, folder: Path, tmp_path: Path) -> None:
    asked = ("--instruction", f" {WORDS} ")  # blanks around it mean nothing
    assert run("index", photos, "--model", folder, *asked).exit_code == 0
    told = json.loads(run("map", "--out", tmp_path / "map.html", *asked, "--json").stdout)
    assert (told["prompts"], told["items"]["image"]) == (VIEW, 4)
    first = json.loads(run("search", "red", *asked, "--json").stdout)["hits"][0]
    with Collection.open("default") as c:
        assert first["score"] == pytest.approx(c.search("red", k=1, prompts=VIEW)[0].score, abs=1e-5)
    assert "may hold none of" in refused(2, "index", photos, "--instruction", "<image> of what")
    assert "takes the place of --prompts" in refused_usage("map", "--out", "m.html", "--prompts", "last", *asked)


def refused_usage(*args: str) -> str:
    result = run(*args)
    assert result.exit_code == 2
    return result.stderr


def test_eval_asks_every_input(photos: Path, folder: Path, embedder: Embedder, tmp_path: Path) -> None:
    command = ("eval", "folder", "--data", photos, "--model", folder, "--cache", tmp_path / "cache", "--json", "-q")
    told = json.loads(run(*command, "--instruction", WORDS).stdout)
    assert told["fingerprint"] == str(embedder.made_by.with_prompts(VIEW))
    scores = embedder.embed_texts([p.stem for p in SAMPLES], VIEW) @ embedder.embed_images(SAMPLES, VIEW).T
    assert told["metrics"]["t2i_r@1"] == pytest.approx(100 * np.mean(scores.argmax(axis=1) == np.arange(4)))
    assert told["embedded"] == 8
    assert json.loads(run(*command, "--instruction", "Else").stdout)["embedded"] == 8


@pytest.mark.parametrize("command", ["index", "eval", "map", "search", "embed", "compare"])
def test_models_that_read_their_inputs_bare_say_so(command: str, photos: Path, clip: Path, tmp_path: Path) -> None:
    model = ("--model", clip, "--instruction", WORDS)
    if command in ("map", "search"):
        run("index", photos, "-c", "mine", "--model", clip)
    args: dict[str, Callable[[], tuple[object, ...]]] = {
        "index": lambda: (photos, "-c", "other"),
        "eval": lambda: ("folder", "--data", photos, "--cache", tmp_path / "cache", "-q"),
        "map": lambda: ("--out", tmp_path / "m.html", "-c", "mine", "-q"),
        "search": lambda: ("red", "-c", "mine"),
        "embed": lambda: ("--images", photos, "--out", tmp_path / "x.npy", "-q"),
        "compare": lambda: ("text:a", "text:b"),
    }
    line = refused(2, command, *map(str, args[command]()), *map(str, model))
    assert f"{clip} is a clip model; --instruction is for llava_next, qwen2_vl, " in line
    assert line.endswith("leave --instruction out")
    assert not (tmp_path / "home/other").exists()


def test_a_view_that_the_model_cannot_give_is_refused_before_it_is_kept(photos: Path, clip: Path, tmp_path: Path) -> None:
    towers_ = Embedder.load(str(clip), device="cpu")
    with Collection.open(str(tmp_path / "c"), embedder=towers_) as c:
        c.ingest([photos])
        with pytest.raises(UsageError, match="leave --instruction out"):
            c.ingest([photos], views=[VIEW])
        assert c.catalog.views == ["retrieval"]


def test_names_of_a_models_own_prompts_are_for_models_that_have_some(embedder: Embedder) -> None:
    with pytest.raises(UsageError, match="for models of sentence-transformers"):
        embedder.embed_texts(["a"], "model:query")


def test_what_a_file_asks_tells_cached_vectors_apart(tmp_path: Path) -> None:
    folder = vision_models.build(tmp_path / "qwen3_vl", "qwen3_vl")
    vectors = Vectors(Embedder.load(str(folder), device="cpu", dtype="float32"), tmp_path / "cache")
    path = tmp_path / "own.toml"
    found = []
    for told in ("Find a cat", "Find a dog"):
        path.write_text(f'text = "look: <sent>"\ninstruction = "{told}"\n')
        assert load_prompts(path).content("text") == f"look: <sent>\n{told}"
        found.append(vectors.texts(["a"], str(path)))
    assert np.abs(found[0] - found[1]).max() > 1e-3
    assert vectors.embedded == 2
