"""`eval` from the command line: real photos, the bundled model, and every way to be refused in a line."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from command_line import refused, run
from test_evaluation_metrics import plain_ranks

from e5v_search.backbones import Embedder
from e5v_search.cli.eval import NAMES
from e5v_search.evaluation import modality_gap, read_composed, suite
from e5v_search.evaluation.paper import OURS, baselines, summary
from e5v_search.evaluation.records import Composed
from e5v_search.render import render

SAMPLES = sorted((Path(__file__).parent.parent / "e5v_search/samples").glob("*.jpg"))
SHARED = Path(__file__).parent.parent.parent / "shared/data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("own")
    lines = ["file,caption"]
    for photo in SAMPLES[:5]:
        shutil.copy(photo, base)
        words = photo.stem.replace("-", " ")
        lines += [f"{photo.name},{words}", f"{photo.name},a photo of {words}"]
    (base / "captions.csv").write_text("\n".join(lines))
    return base


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> None:
    patch = pytest.MonkeyPatch()
    patch.setenv("E5V_HOME", str(tmp_path_factory.mktemp("home")))


def test_names_are_those_of_the_suite() -> None:
    assert tuple(suite.DATASETS) == NAMES


def test_report_as_json(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    result = run("eval", "folder", "--data", folder, "--model", "e5v-tiny", "--json", "--out", out, "-q")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    promised = {"dataset", "model", "fingerprint", "protocol", "metrics", "paper", "queries", "gallery", "seconds"}
    assert promised <= found.keys()
    assert (found["dataset"], found["model"], found["queries"], found["gallery"]) == ("folder", "e5v-tiny", 10, 5)
    assert "/retrieval/" in found["fingerprint"]
    assert found["metrics"].keys() == found["intervals"].keys()
    assert all(low <= found["metrics"][name] <= high for name, (low, high) in found["intervals"].items())
    assert {"python", "torch", "numpy"} <= found["versions"].keys()
    saved = json.loads(out.read_text())
    assert saved.pop("per_query").keys() == {"t2i", "i2t"}
    assert saved == found
    # by the plain formula, from the engine itself
    embedder = Embedder.load("e5v-tiny", device="cpu")
    photos = SAMPLES[:5]
    captions = [f"{start}{photo.stem.replace('-', ' ')}" for photo in photos for start in ("", "a photo of ")]
    scores = embedder.embed_texts(captions) @ embedder.embed_images(photos).T
    first = [plain_ranks(row, {i // 2}, set())[0] for i, row in enumerate(scores)]
    assert found["metrics"]["t2i_r@1"] == pytest.approx(100 * np.mean([rank == 1 for rank in first]))
    assert found["metrics"]["t2i_mrr"] == pytest.approx(100 * np.mean([1 / rank for rank in first]), abs=1e-3)
    both = [plain_ranks(row, {2 * i, 2 * i + 1}, set()) for i, row in enumerate(scores.T)]
    gap = asdict(modality_gap(embedder.embed_images(photos), embedder.embed_texts(captions)))
    assert found["gap"].pop("n") == [5, 10] == list(gap.pop("n"))
    assert found["gap"] == pytest.approx(gap, abs=1e-3)  # float32 sums in other batches
    fraction = np.mean([sum(rank <= 5 for rank in row) / 2 for row in both])
    assert found["metrics"]["i2t_fraction@5"] == pytest.approx(100 * fraction)


def test_the_second_time_nothing_is_embedded(folder: Path, tmp_path: Path) -> None:
    command = ("eval", "folder", "--data", folder, "--cache", tmp_path, "--json")
    first, second = (json.loads(run(*command).stdout) for _ in range(2))
    assert (first["embedded"], second["embedded"]) == (15, 0)
    assert second["metrics"] == first["metrics"]


def test_prompt_sets_side_by_side(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs.json"
    result = run("eval", "folder", "--data", folder, "--prompts", "last,prompt,retrieval", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].split() == ["last", "prompt", "retrieval"]
    runs = json.loads(out.read_text())["runs"]
    [line] = [line for line in result.stdout.splitlines() if line.startswith("gap ")]
    cells = [f"{r['gap']['distance']:.2f} [spread {r['gap']['spread']:.2f}, told apart" for r in runs]
    assert all(cell in line for cell in cells)
    assert line.count(" told apart ") == 3
    assert [r["prompts"] for r in runs] == ["last", "prompt", "retrieval"]
    assert len({r["fingerprint"] for r in runs}) == 3
    assert len({r["questions"] for r in runs}) == 1
    assert "not a report of one run" in refused(3, "eval", "--compare", out, out)


def test_markdown(folder: Path) -> None:
    result = run("eval", "folder", "--data", folder, "--limit", "2", "--markdown")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:4] == ["### folder", "", "|  | e5v-tiny |", "| --- | ---: |"]
    assert any(line.startswith("| t2i_r@1 | ") for line in lines)
    assert "Caution: only the first 2 of the data (--limit): not to be compared with the whole." in lines


def test_compare(folder: Path, tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.json" for name in "abc")
    run("eval", "folder", "--data", folder, "--out", a)
    run("eval", "folder", "--data", folder, "--prompts", "last", "--out", b)
    run("eval", "folder", "--data", folder, "--limit", "2", "--out", c)
    found = json.loads(run("eval", "--compare", a, b, "--json").stdout)
    reports = [json.loads(path.read_text())["metrics"] for path in (a, b)]
    for name, both in found["metrics"].items():
        assert both["a"] == pytest.approx(reports[0][name], abs=1e-3)
        assert both["b"] == pytest.approx(reports[1][name], abs=1e-3)
        assert both["difference"] == pytest.approx(both["b"] - both["a"])
        assert both["low"] <= both["high"]
        assert 0 < both["p"] <= 1
    table = run("eval", "--compare", a, a).stdout
    assert "+0.00" in table
    assert "1.000" in table
    assert "did not answer the same queries" in refused(2, "eval", "--compare", a, c)
    a.write_text(a.read_text().replace('"data": "', '"data": "x'))
    assert "is damaged" in refused(3, "eval", "--compare", a, b)


def test_missing_photos(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "own")
    (tmp_path / "own" / SAMPLES[0].name).unlink()
    (tmp_path / "own" / SAMPLES[1].name).write_bytes(b"not a photo")
    line = refused(3, "eval", "folder", "--data", tmp_path / "own", "--model", "e5v-tiny")
    assert f"1 of 5 pictures cannot be used ({SAMPLES[0].name}: no such file)" in line
    result = run("eval", "folder", "--data", tmp_path / "own", "--allow-missing", "--json")
    assert result.exit_code == 1
    assert result.stderr.count(SAMPLES[0].name) == 1
    found = json.loads(result.stdout)
    assert set(found["missing"]) == {SAMPLES[0].name, SAMPLES[1].name}
    assert found["cautions"] == ["2 pictures could not be used and were left out, with what needs them"]
    assert (found["queries"], found["gallery"]) == (6, 3)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["sts"], "sts is not on the model hub: give the folder that it lies in with --data"),
        (["scenes", "--data", "."], "scenes are drawn and need no --data"),
        (["cirr-test", "--data", "."], "say where with --out FILE.json"),
        (["folder", "--data", "nowhere"], "nowhere is not a folder"),
        (["folder", "--data", "."], "has no file of captions"),
        (["cirr", "--data", ".", "--prompts", "last,sts-last"], "prompt set 'sts-last' has no image prompt"),
        (["i2i-coco", "--data", ".", "--prompts", "sts"], "prompt set 'sts' has no image prompt"),
        (["sts", "--data", ".", "--prompts", "retrieval,nonsense"], "unknown prompt set 'nonsense'"),
    ],
)
def test_refused_before_a_model_is_loaded(words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = 3 if "folder" in words[0] else 2
    assert line in refused(code, "eval", *words, "--model", "no/such")


@pytest.mark.parametrize("words", [[], ["nonsense"], ["sts", "--compare", "a", "b"], ["sts", "--json", "--markdown"]])
def test_usage(words: list[str]) -> None:
    assert run("eval", *words).exit_code == 2


def test_paper() -> None:
    for name in suite.DATASETS:
        own = baselines(name)
        assert not own or OURS in own
    # the table of one data set and the summary of all must say the same
    assert summary("coco")[OURS] == {m: v for m, v in baselines("coco")[OURS].items() if m.endswith("r@5")}
    assert summary("sts")[OURS]["average"] == baselines("sts")[OURS]["average"]
    assert summary("cirr")["last, not tuned"] == {"r@5": 7.4}
    assert "r@50" not in baselines("cirr-test")["LinCIR"]
    for method, row in baselines("sts").items():
        assert row["average"] == pytest.approx(np.mean([v for k, v in row.items() if k != "average"]), abs=0.006), method
    for method, row in baselines("fashioniq").items():
        for k in (10, 50):
            mean = np.mean([row[f"{category}_r@{k}"] for category in ("dress", "shirt", "toptee")])
            assert row[f"average_r@{k}"] == pytest.approx(mean, abs=0.06), method


@pytest.fixture
def composed_data(tmp_path: Path) -> Path:
    """CIRR's and FashionIQ's layout with a few sample photos."""
    names = [photo.stem for photo in SAMPLES[:6]]
    root = tmp_path / "data"
    for part in ("captions", "image_splits", "images"):
        (root / part).mkdir(parents=True)
    for photo in SAMPLES[:6]:
        shutil.copy(photo, root / "images")
    places = {name: f"./{name}.jpg" for name in names}
    query = {"reference": names[0], "caption": "at night", "img_set": {"members": names}}
    for split, target in (("val", {"target_hard": names[1]}), ("test1", {})):
        entries = [query | {"pairid": i} | target for i in range(2)]
        (root / f"captions/cap.rc2.{split}.json").write_text(json.dumps(entries))
        (root / f"image_splits/split.rc2.{split}.json").write_text(json.dumps(places))
    for category in ("dress", "shirt", "toptee"):
        entry = {"candidate": names[2], "target": names[3], "captions": ["is blue", "is long"]}
        (root / f"captions/cap.{category}.val.json").write_text(json.dumps([entry]))
        (root / f"image_splits/split.{category}.val.json").write_text(json.dumps(names))
    return root


def test_composed_protocols_with_the_real_model(composed_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    found = json.loads(run("eval", "cirr", "--data", composed_data, "--json").stdout)
    assert (found["queries"], found["gallery"]) == (2, 6)
    assert {"r@1", "r@50", "subset_r@3"} <= found["metrics"].keys()
    assert found["paper"] == {"r@5": 66.6}
    assert found["gap"] is None
    found = json.loads(run("eval", "fashioniq", "--data", composed_data, "--json").stdout)
    assert (found["queries"], found["gallery"]) == (3, 18)
    assert found["paper"]["average_r@50"] == 53.78
    refusal = refused(3, "eval", "cirr-test", "--data", composed_data, "--out", out, "--model", "e5v-tiny", "-q")
    assert "the split has 2 pairs and not 4,148" in refusal
    result = run("eval", "cirr-test", "--data", composed_data, "--out", out, "--limit", "2")
    assert result.exit_code == 0, result.output
    files = {metric: json.loads((tmp_path / f"run-{metric}.json").read_text()) for metric in ("recall", "recall_subset")}
    assert [len(files["recall"][key]) for key in ("0", "1")] == [5, 5]
    assert [len(files["recall_subset"][key]) for key in ("0", "1")] == [3, 3]
    result = run(
        "eval", "cirr-test", "--data", composed_data, "--out", out, "--limit", "2", "--prompts", "last,prompt", "--json"
    )
    written = [[Path(path).name for path in found["submissions"]] for found in json.loads(result.stdout)["runs"]]
    assert written == [[f"run-cirr-{how}-{metric}.json" for metric in files] for how in ("last", "prompt")]
    assert json.loads((tmp_path / "run-recall.json").read_text()) == files["recall"]


@pytest.mark.parametrize("name", ["cirr", "fashioniq", "scenes"])
def test_table_6_of_tasks_with_their_own_prompts(name: str, composed_data: Path, tmp_path: Path) -> None:
    data = ("--limit", "2") if name == "scenes" else ("--data", composed_data)
    command = ("eval", name, *data, "--prompts", "last,prompt,retrieval", "--cache", tmp_path / "cache")
    result = run(*command, "--json")
    assert result.exit_code == 0, result.output
    runs = json.loads(result.stdout)["runs"]
    assert [found["prompts"] for found in runs] == [f"{name}-last", f"{name}-prompt", name]
    assert [found["fingerprint"].split("/")[1] for found in runs] == [f"{name}-last", f"{name}-prompt", name]
    assert len({found["questions"] for found in runs}) == 1
    assert len({tuple(found["metrics"]) for found in runs}) == 1
    assert min(found["embedded"] for found in runs) > 0
    result = run(*command)
    assert result.stdout.splitlines()[0].split() == [f"{name}-last", f"{name}-prompt", name]
    theirs = [line.split("  ")[0] for line in result.stdout.splitlines() if "(paper)" in line]
    assert name == "scenes" or {"last, not tuned (paper)", "prompt (paper)", "E5-V (paper)"} <= set(theirs)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data beside the project")
def test_submission_for_the_real_split(tmp_path: Path) -> None:
    """All of CIRR's test queries with vectors drawn by lot: the files must be what the server takes."""
    from e5v_search.evaluation.ranks import top
    from e5v_search.evaluation.read_composed import cirr
    from e5v_search.evaluation.submission import write_submissions

    data = cirr(SHARED, "test1").data
    assert isinstance(data, Composed)
    rng = np.random.default_rng(0)
    xq, xb = (rng.standard_normal((n, 16)).astype(np.float32) for n in (len(data.queries), len(data.gallery)))
    names = [source.name for source in data.gallery]
    best = top(xq, xb, 50, [(q.reference,) for q in data.queries])
    recall = {q.key: [names[i] for i in row] for q, row in zip(data.queries, best, strict=True)}
    subset = {q.key: [names[i] for i in q.members[:3]] for q in data.queries}
    files = {
        metric: {"version": "rc2", "metric": metric} | answers
        for metric, answers in (("recall", recall), ("recall_subset", subset))
    }
    written = write_submissions(files, tmp_path / "x.json", [q.key for q in data.queries])
    assert all(Path(path).stat().st_size < 5_000_000 for path in written)
    assert not any(names[q.reference] in recall[q.key] for q in data.queries)


def write_pictures(data: Composed, folder: Path, suffix: str) -> None:
    """Each picture that the data speak of, as its name drawn small."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in data.gallery:
        render(source.name).resize((80, 40)).save(folder / f"{source.name}{suffix}")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data beside the project")
def test_real_annotations_with_drawn_pictures(tmp_path: Path) -> None:
    """The releases' own files, with pictures for the first queries alone: `--limit` must need no others."""
    for name in ("cirr", "fashioniq"):
        shutil.copytree(SHARED / name, tmp_path / name)
    whole = read_composed.cirr(tmp_path).data
    fashion = read_composed.fashioniq(tmp_path).data
    assert isinstance(whole, Composed)
    assert isinstance(fashion, dict)
    some = whole.first(3)
    write_pictures(some, tmp_path / "cirr/img_raw/dev", ".png")
    for part in fashion.values():
        write_pictures(part.first(2), tmp_path / "fashioniq/images", ".jpg")
    found = json.loads(run("eval", "cirr", "--data", tmp_path, "--limit", "3", "--json").stdout)
    assert (found["queries"], found["gallery"]) == (3, len(some.gallery))
    assert {"r@1", "subset_r@3"} <= found["metrics"].keys()
    found = json.loads(run("eval", "fashioniq", "--data", tmp_path, "--limit", "2", "--json").stdout)
    assert found["queries"] == 6
    assert found["metrics"]["average_r@50"] == 100
    assert "no such file" in refused(3, "eval", "cirr", "--data", tmp_path, "--limit", "9", "--model", "e5v-tiny")
