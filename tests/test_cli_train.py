"""`train` as a user meets it: what it prints, what it leaves, how it ends."""

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pictures
import pytest
import replica
from command_line import refused, run, start, write_recipe

from e5v_search.backbones import Embedder

PRETRAINING = """
name = "made"
save_every = 1
evaluate_every = 10
held_out_scenes = 5
model = { vision = { width = 16, layers = 1, heads = 2, mlp = 16, tile = 32 }, pinpoints = [[32, 64]], decoder = { width = 16, \
layers = 1, heads = 2, mlp = 16, vocabulary = 600 } }
stages = [{ name = "base", steps = 1, photos = 2, scenes = 1, triplets = 2 }]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return replica.build(tmp_path_factory.mktemp("model"))[0]


@pytest.fixture
def place(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with recipe.toml for a small model, its data, and captions of three pictures, one of them broken."""
    write_recipe(tmp_path)
    recipe = (tmp_path / "recipe.toml").read_text().replace('"e5v-tiny"', json.dumps(str(model)))
    (tmp_path / "recipe.toml").write_text(recipe)
    for i in range(2):
        pictures.photo(60, 40, seed=i).save(tmp_path / f"{i}.jpg")
    (tmp_path / "2.jpg").write_bytes(b"no picture")
    (tmp_path / "captions.csv").write_text("file,caption\n0.jpg,a dog\n1.jpg,a cat\n2.jpg,a car\n")
    captions = recipe.replace('kind = "triplets", file = "nli.csv"', 'kind = "captions", file = "captions.csv"')
    (tmp_path / "captions.toml").write_text(captions.replace("batch = 2", 'batch = 3\nloss = { kind = "symmetric" }'))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_json_tells_where_everything_is(place: Path) -> None:
    result = run("train", "recipe.toml", "--merge", "--sentence-transformers", "sentences", "--device", "cpu", "--json", "-q")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert found.pop("seconds") > 0
    assert found.pop("loss") > 0
    assert found == {
        "recipe": "mine",
        "out": "runs/mine",
        "steps": 2,
        "measured": {},
        "skipped": [],
        "adapter": "runs/mine/adapter",
        "model": "runs/mine/model",
        "sentence_transformers": "sentences",
    }
    assert Embedder.load("./runs/mine/model", device="cpu").embed_texts(["a dog"]).shape == (1, 64)
    assert (place / "sentences/modules.json").exists()
    assert "holds something already" in refused(2, "train", "recipe.toml", "--sentence-transformers", "sentences")


def test_people_are_told_steps_loss_and_folders(place: Path) -> None:
    result = run("train", "recipe.toml", "--out", "here", "--set", "steps=3", "--device", "cpu")
    assert result.exit_code == 0, result.output
    first, second = result.stdout.splitlines()
    assert first.startswith("mine: 3 steps, loss ")
    assert second == "adapter: here/adapter"
    assert "weights learn from 4 examples, steps 0 to 3" in result.stderr
    assert "step 1/3  loss " in result.stderr
    again = run("train", "recipe.toml", "--out", "here", "--set", "steps=3", "--device", "cpu")
    assert again.stdout.splitlines()[0] == "mine: 3 steps"
    assert "another recipe" in run("train", "recipe.toml", "--out", "here", "--set", "rate=1").stderr


def test_a_picture_that_was_left_out_is_listed_and_tells_the_exit_code(place: Path) -> None:
    result = run("train", "captions.toml", "--device", "cpu", "-q")
    assert result.exit_code == 1, result.output
    [line] = result.stderr.splitlines()
    assert line.startswith("2.jpg: ")
    listed = json.loads(run("train", "captions.toml", "--out", "other", "--device", "cpu", "--json", "-q").stdout)["skipped"]
    assert [one["path"] for one in listed] == ["2.jpg"]


def test_what_cannot_be_done_is_said_in_a_line(place: Path) -> None:
    assert "rate: a number is needed, not 'fast'" in refused(2, "train", "recipe.toml", "--set", "rate=fast")
    assert "examples.kind" in refused(2, "train", "recipe.toml", "--set", "examples.kind=poems")
    (place / "nli.csv").write_text("sent0,sent1,hard_neg\na,b\n")
    assert refused(2, "train", "recipe.toml").startswith("Error: nli.csv:2: three sentences are needed")
    assert "nli.csv is not there" in refused(3, "train", "recipe.toml", "--set", "examples.file=other/nli.csv")


def stop(process: "subprocess.Popen[bytes]", log: Path, lines: int) -> str:
    """What a run says that gets Ctrl-C when its log has so many lines."""
    while not log.exists() or len(log.read_text().splitlines()) < lines:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert process.returncode == 130, told
    return told.decode()


def test_ctrl_c_saves_and_the_same_command_goes_on(place: Path) -> None:
    settings = ("--set", "steps=400", "--set", "save_every=1", "--device", "cpu")
    command = ("train", place / "recipe.toml", "--data", place, "--out", place / "out", *settings)
    log = place / "out/log.jsonl"
    told = stop(start(*command), log, 3)
    assert "the same command goes on from the last save" in told
    saved = int(m[1]) if (m := re.search(r"step (\d+) of 400 is saved", told)) else len(log.read_text().splitlines())
    assert f"steps {saved} to 400" in stop(start(*command), log, saved + 2)


def test_a_model_is_made_from_nothing_by_the_same_command(place: Path) -> None:
    flickr = place / "flickr8k"
    (flickr / "images").mkdir(parents=True)
    for i in range(2):
        shutil.copy(place / f"{i}.jpg", flickr / "images")
    for split in ("train", "dev"):
        (flickr / f"Flickr_8k.{split}Images.txt").write_text("0.jpg\n1.jpg\n")
    (flickr / "Flickr8k.token.txt").write_text("0.jpg#0\ta dog\n1.jpg#0\ta cat\n")
    (place / "nli").mkdir()
    shutil.copy(place / "nli.csv", place / "nli/nli_triplets.csv")
    (place / "made.toml").write_text(PRETRAINING)
    result = run("train", "made.toml", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"] == "runs/made/model"
    assert Embedder.load("./runs/made/model", device="cpu").embed_texts(["a dog"]).shape == (1, 16)
