"""The command line over real collections: what it prints, its exit codes, and what it says to bad input."""

import csv
import io
import json
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pictures
import pytest
from click.testing import CliRunner
from command_line import refused, run, write_photos
from PIL import Image

from e5v_search.backbones.registry import BUNDLED
from e5v_search.cli import cli

TINY = BUNDLED / "e5v-tiny"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with five photos of a collection `default`. Tests that change anything take a copy."""
    base = tmp_path_factory.mktemp("library")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("E5V_HOME", str(base / "home"))
        write_photos(base / "photos", 5)
        result = run("index", base / "photos", "--json")
        assert json.loads(result.stdout)["added"] == 5, result.output
        yield base


@pytest.fixture
def copied(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The collection `default` alone, to be damaged. Its photos are those of `library`."""
    shutil.copytree(library / "home", tmp_path / "home")
    monkeypatch.setenv("E5V_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "default"


def paths_of(*query: str | Path) -> list[str]:
    result = run("search", *query, "--json")
    assert result.stdout, result.stderr
    return [hit["path"] for hit in json.loads(result.stdout)["hits"]]


# what programs rely on


def test_index_json(library: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 2, first=50)
    (tmp_path / "photos/bad.jpg").write_bytes(b"")
    result = run("index", tmp_path / "photos", "--json", "-c", str(tmp_path / "c"))
    report = json.loads(result.stdout.splitlines()[-1])
    assert list(report) == ["added", "unchanged", "updated", "removed", "failed", "seconds"]
    assert (report["added"], report["unchanged"], report["updated"], report["removed"]) == (2, 0, 0, 0)
    assert report["failed"] == [{"path": str(tmp_path / "photos/bad.jpg"), "reason": "the file is empty"}]
    assert result.exit_code == 1
    assert f"{tmp_path / 'photos/bad.jpg'}: the file is empty" in result.stderr.splitlines()


def test_search_json(library: Path) -> None:
    photo = library / "photos/0003.jpg"
    found = json.loads(run("search", "--image", photo, "-k", "3", "--json").stdout)
    assert list(found) == ["query", "fingerprint", "took_ms", "hits"]
    assert found["query"] == {"image": str(photo)}
    assert found["fingerprint"].startswith("e5v-tiny@")
    assert list(found["took_ms"]) == ["load", "embed", "search", "total"]
    assert len(found["hits"]) == 3
    for hit in found["hits"]:
        assert list(hit) == ["rank", "id", "score", "kind", "path", "text", "width", "height", "taken_at", "part"]
    first = found["hits"][0]
    assert (first["rank"], first["path"], first["kind"]) == (1, str(photo), "image")
    assert first["score"] >= 0.999
    assert [hit["score"] for hit in found["hits"]] == sorted((hit["score"] for hit in found["hits"]), reverse=True)


def test_status_json(library: Path) -> None:
    state = json.loads(run("status", "--json").stdout)
    assert list(state) == ["collection", "fingerprint", "items", "failed", "index", "bytes"]
    assert state["collection"] == str(library / "home/default")
    assert state["items"] == {"image": 5, "text": 0, "rendered": 0}
    assert state["failed"] == 0
    assert state["index"] == {"kind": "flat-fp16", "vectors": 5, "stale": False}
    assert state["bytes"] > 5 * 256 * 2


def test_csv_has_the_fields_of_the_json(library: Path) -> None:
    query = ("a dog", "-k", "4")
    rows = list(csv.DictReader(io.StringIO(run("search", *query, "--csv").stdout)))
    hits = json.loads(run("search", *query, "--json").stdout)["hits"]
    assert [row["path"] for row in rows] == [hit["path"] for hit in hits]
    assert list(rows[0]) == list(hits[0])


def test_a_name_that_is_no_text_survives(library: Path, tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/p/caf\xe9 \n one.jpg"
    os.mkdir(os.path.dirname(raw))
    shutil.copy(library / "photos/0000.jpg", raw)
    place = str(tmp_path / "c")
    assert run("index", tmp_path / "p", "-c", place).exit_code == 0
    query = ("--image", "1", "-c", place)
    assert run("search", *query, "--paths", "-0").stdout_bytes == raw + b"\0"
    assert run("search", *query, "--paths").stdout_bytes == raw + b"\n"
    assert [os.fsencode(path) for path in paths_of(*query)] == [raw]
    [row] = csv.DictReader(io.StringIO(run("search", *query, "--csv").stdout_bytes.decode("utf-8", "surrogateescape")))
    assert os.fsencode(row["path"]) == raw
    assert "caf\\xe9 \\n one.jpg" in run("search", *query).stdout


# what people see


def test_the_table_shows_paths_below_the_working_folder_as_relative(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(library)
    header, first = run("search", "--image", "2", "-k", "1").stdout.splitlines()
    assert header.split() == ["#", "score", "size", "path"]  # no photo has a date, so there is no such column
    assert first.split() == ["1", first.split()[1], "61×41", "photos/0001.jpg"]
    monkeypatch.chdir(library / "photos")
    assert run("search", "--image", "2", "-k", "1").stdout.split()[-1] == "0001.jpg"
    monkeypatch.chdir(library / "home")
    assert run("search", "--image", "2", "-k", "1").stdout.split()[-1] == str(library / "photos/0001.jpg")


def test_index_sums_up(copied: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_photos(photos, 2, first=60)
    assert run("index", photos).stdout.startswith("added 2 in ")
    (photos / "0060.jpg").unlink()
    Image.new("RGB", (50, 50), "red").save(photos / "0061.jpg")
    (photos / "bad.jpg").write_bytes(b"no picture")
    result = run("index", photos)
    assert result.stdout.startswith("added 0, updated 1, removed 1, failed 1 in ")
    assert result.exit_code == 1
    quiet = run("index", photos, "--quiet")
    assert quiet.stdout == ""
    assert [line.split(":")[0] for line in quiet.stderr.splitlines()] == [str(photos / "bad.jpg")]


def test_index_without_paths_looks_through_what_was_indexed(copied: Path, library: Path) -> None:
    assert json.loads(run("index", "--json").stdout)["unchanged"] == 5
    run("forget", library / "photos")
    assert "nothing was indexed" in run("index").stderr
    assert run("index").exit_code == 2


def test_nothing_found_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/text.txt").write_text("no photo")
    result = run("index", tmp_path / "empty", "-c", str(tmp_path / "c"))
    assert result.exit_code == 0
    assert f"no pictures found in {tmp_path / 'empty'}" in result.stderr
    assert " jpg " in result.stderr


def test_forget_verify_rebuild(copied: Path, library: Path) -> None:
    assert json.loads(run("forget", library / "photos/0001.jpg", "--json").stdout) == {"removed": 1}
    assert (library / "photos/0001.jpg").exists()
    assert json.loads(run("verify", "--json").stdout) == {"errors": []}
    rebuilt = json.loads(run("rebuild", "--json").stdout)
    assert rebuilt["vectors"] == 4
    assert run("verify").stdout == "no errors\n"
    assert "holds nothing of" in run("forget", "/nowhere/at/all").stderr


def test_a_composed_search_leaves_its_picture_out(library: Path, tmp_path: Path) -> None:
    photo = str(library / "photos/0002.jpg")
    assert sorted(paths_of("--image", photo)) == sorted(str(p) for p in (library / "photos").iterdir())
    assert photo not in paths_of("--image", photo, "--modify", "make it red")


def test_sheet(library: Path, tmp_path: Path) -> None:
    result = run("search", "a dog", "-k", "3", "--sheet", tmp_path / "found.png", "--json")
    assert len(json.loads(result.stdout)["hits"]) == 3
    with Image.open(tmp_path / "found.png") as sheet:
        assert sheet.width > sheet.height


def test_a_number_is_an_item_unless_a_file_has_that_name(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert paths_of("--image", "4", "-k", "1") == [str(library / "photos/0003.jpg")]
    shutil.copy(library / "photos/0001.jpg", "4")
    assert paths_of("--image", "4", "-k", "1") == [str(library / "photos/0001.jpg")]


def test_threshold(library: Path) -> None:
    hits = json.loads(run("search", "--image", "1", "--json").stdout)["hits"]
    between = (hits[0]["score"] + hits[1]["score"]) / 2
    assert len(json.loads(run("search", "--image", "1", "--threshold", str(between), "--json").stdout)["hits"]) == 1
    result = run("search", "--image", "1", "--modify", "x", "--threshold", "1")
    assert (result.stdout, result.exit_code) == ("", 0)
    assert "nothing found with a score of 1 or more" in result.stderr


def test_models_and_doctor(library: Path) -> None:
    known = json.loads(run("models", "--json").stdout)
    assert {model["name"]: model["here"] for model in known["models"]}["e5v-tiny"] is True
    assert set(known["auto"]) == {"model", "quantize"}
    assert "royokong/e5-v" in run("models").stdout

    health = json.loads(run("doctor", "--json").stdout)
    assert health["healthy"] is True
    statuses = {finding["name"]: finding["status"] for finding in health["findings"]}
    assert statuses["e5v-tiny"] == statuses["FAISS"] == statuses["collection"] == "ok"
    [faiss] = [finding["detail"] for finding in health["findings"] if finding["name"] == "FAISS"]
    assert re.fullmatch(r"faiss-\w+ [\d.]+, which sees (no GPU|1 GPU|\d+ GPUs)", faiss)


def test_doctor_finds_what_is_bad(copied: Path) -> None:
    (copied / "catalog.sqlite").write_bytes(b"no database" * 1000)
    result = run("doctor")
    assert result.exit_code == 3
    [line] = [line for line in result.stdout.splitlines() if line.startswith("bad ")]
    assert "default" in line
    assert "damaged" in line


# embed


def load(out: Path) -> np.ndarray:
    x: np.ndarray = np.load(out)
    assert x.dtype == np.float32
    return x


def test_embed_texts(library: Path, tmp_path: Path) -> None:
    texts, out = tmp_path / "texts.txt", tmp_path / "out.npy"
    long = b"dog " * 3000
    texts.write_bytes("\ufeffa dog\r\na dog\n\nna\u00efve".encode() + b"\nb\xe9te\n" + long + b"\na cat")
    result = run("embed", "--texts", texts, "--out", out, "--json")
    done = json.loads(result.stdout)
    x = load(out)
    assert result.exit_code == 1
    assert [(failure["row"], failure["input"]) for failure in done["failed"]] == [(n, f"{texts}:{n + 1}") for n in (2, 4, 5)]
    assert ["empty" in done["failed"][0]["reason"], "UTF-8" in done["failed"][1]["reason"]] == [True, True]
    assert "at most" in done["failed"][2]["reason"]
    assert (done["rows"], done["dim"], done["out"]) == (7, 256, str(out))
    assert x.shape == (7, 256)
    assert np.linalg.norm(x, axis=1) == pytest.approx([1, 1, 0, 1, 0, 0, 1], abs=1e-4)
    assert np.allclose(x[0], x[1], atol=1e-5)
    assert not np.allclose(x[0], x[6], atol=1e-3)


def test_embed_images_keeps_rows_with_their_inputs(library: Path, tmp_path: Path) -> None:
    out, photo = tmp_path / "out.npy", library / "photos/0001.jpg"
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"")
    arguments = (photo, tmp_path / "none.jpg", library / "photos", bad, photo)
    result = run("embed", "--images", *arguments, "--out", out, "--json", "--quiet")
    done, x = json.loads(result.stdout), load(out)
    folder = [str(path) for path in sorted((library / "photos").iterdir())]
    assert done["inputs"] == [str(photo), str(tmp_path / "none.jpg"), *folder, str(bad), str(photo)]
    assert [failure["row"] for failure in done["failed"]] == [1, 7]
    assert result.exit_code == 1
    assert not x[[1, 7]].any()
    same = [0, 2 + folder.index(str(photo)), 8]
    assert np.allclose(x[same] @ x[0], 1, atol=1e-4)
    [stored] = [hit["score"] for hit in json.loads(run("search", "--image", photo, "-k", "1", "--json").stdout)["hits"]]
    assert stored == pytest.approx(1, abs=1e-3)


def test_embed_composed(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(library)
    lines, out = tmp_path / "changes.jsonl", tmp_path / "out.npy"
    good = [{"image": "photos/0001.jpg", "text": "make it snow"}, {"image": "photos/0002.jpg", "text": "as a drawing"}]
    bad = ['{"image": "photos/0001.jpg"}', "[1, 2", '{"image": 7, "text": "x"}', '"text"', '{"image": "none.jpg", "text": "x"}']
    lines.write_text("\n".join([json.dumps(good[0]), *bad, json.dumps(good[1])]))
    result = run("embed", "--composed", lines, "--out", out, "--json")
    done, x = json.loads(result.stdout), load(out)
    assert done["prompts"] == "cirr"
    assert [(failure["row"], failure["input"]) for failure in done["failed"]] == [(n, f"{lines}:{n + 1}") for n in range(1, 6)]
    assert np.linalg.norm(x, axis=1) == pytest.approx([1, 0, 0, 0, 0, 0, 1], abs=1e-4)
    assert result.exit_code == 1


def test_embed_writes_whole_files_or_none(library: Path, tmp_path: Path) -> None:
    texts, out = tmp_path / "texts.txt", tmp_path / "out.npy"
    texts.write_text("a dog\n")
    out.write_bytes(b"before")
    assert "unknown model" in refused(3, "embed", "--texts", texts, "--out", out, "--model", "nonsense")
    assert out.read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", "texts.txt"]
    assert "cannot be written" in refused(3, "embed", "--texts", texts, "--out", tmp_path / "none/out.npy")
    result = run("embed", "--texts", texts, "--out", out, "--model", "e5v-tiny")
    assert result.exit_code == 0
    assert result.stdout.startswith("1 × 256 float32 in ")
    assert load(out).shape == (1, 256)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", "texts.txt"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give one of"),
        (("--texts", "a.txt", "--images", "b"), "give one of"),
        (("--texts", "a.txt", "more"), "only --images"),
    ],
)
def test_embed_wants_one_kind_of_input(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    result = run("embed", *arguments, "--out", tmp_path / "x.npy")
    assert result.exit_code == 2
    assert said in result.stderr


def test_embed_names_the_file_that_is_missing(tmp_path: Path) -> None:
    assert "none.txt: no such file" in refused(3, "embed", "--texts", tmp_path / "none.txt", "--out", tmp_path / "x.npy")
    texts = tmp_path / "texts.txt"
    texts.write_text("a dog\n")
    said = refused(2, "embed", "--texts", texts, "--out", tmp_path / "x.npy", "--prompts", "none")
    assert "unknown prompt set" in said
    assert not (tmp_path / "x.npy").exists()


# bad input


@pytest.mark.parametrize(
    "arguments",
    [
        ("search",),
        ("search", ""),
        ("search", " \t\n"),
        ("search", "--image", "1", "--modify", " "),
        ("search", "--modify", "red"),
        ("search", "a dog", "--image", "1", "--modify", "red"),
        ("search", "dog " * 12500),
        ("search", "--image", "777"),
        ("search", "a dog", "--prompts", "none"),
    ],
)
def test_queries_without_sense(library: Path, arguments: tuple[str, ...]) -> None:
    assert len(refused(2, *arguments)) < 200


@pytest.mark.parametrize(
    "options",
    [
        ("-k", "0"),
        ("-k", "-1"),
        ("-k", "many"),
        ("--threshold", "nan"),
        ("--threshold", "1.5"),
        ("--json", "--csv"),
        ("--paths", "--json"),
        ("-0",),
        ("--quantize", "2bit"),
    ],
)
def test_options_without_sense(library: Path, options: tuple[str, ...]) -> None:
    result = run("search", "a dog", *options)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_what_is_missing_is_named(library: Path, tmp_path: Path) -> None:
    assert f"no such file or folder: {tmp_path}/none" in refused(3, "index", tmp_path / "none", "-c", str(tmp_path / "c"))
    assert f"{tmp_path}/none.jpg: no such file" in refused(3, "search", "--image", tmp_path / "none.jpg")
    for command in (["search", "x"], ["status"], ["verify"], ["rebuild"], ["forget", "x"], ["index"]):
        assert "no collection at" in refused(3, *command, "-c", "none")
    assert not (library / "home/none").exists()


def test_names_in_errors_stay_on_their_line(library: Path) -> None:
    assert "a\\nb\\x1b[31m.jpg" in refused(3, "search", "--image", "/none/a\nb\x1b[31m.jpg")


def test_a_first_run_that_is_refused_leaves_no_collection(library: Path, tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("a dog\n")
    for options, code, said in (
        ([tmp_path / "none"], 3, "no such file or folder"),
        ([library / "photos", "--model", "nonsense"], 3, "unknown model"),
        ([tmp_path / "a.log", "--kind", "text"], 2, "is no file of texts"),
        ([library / "photos", "--views", "none"], 2, "no view 'none'; choose from: retrieval, cirr"),
    ):
        assert said in refused(code, "index", *options, "-c", str(tmp_path / "new/c"))
        assert not (tmp_path / "new").exists()
    result = run("index", library / "photos", "--kind", "sound", "-c", str(tmp_path / "new/c"))
    assert result.exit_code == 2
    assert "'--kind': 'sound' is not one of" in result.stderr
    assert not (tmp_path / "new").exists()


def test_texts_on_the_command_line(copied: Path, tmp_path: Path) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_bytes(b"a dog on the grass\n\xff\n" + "two\u202ekids, ".encode() * 20 + b"\n")
    result = run("index", captions, "--kind", "text", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert (report["added"], report["failed"]) == (2, [{"path": f"{captions}:2", "reason": "not UTF-8 (byte 1 of the line)"}])
    assert list(report) == ["added", "unchanged", "updated", "removed", "failed", "seconds"]
    hit = json.loads(run("search", "a dog on the grass", "-k", "1", "--json").stdout)["hits"][0]
    assert (hit["kind"], hit["path"], hit["part"], hit["text"]) == ("text", str(captions), "1", "a dog on the grass")
    table = run("search", "a dog", "-k", "9", "--where", "kind=text").stdout
    assert f"{captions}:1  a dog on the grass\n" in table
    [long] = [line for line in table.splitlines() if f"{captions}:3" in line]
    assert long.endswith("…")
    assert "two\\u202ekids" in long
    shown = run("index", captions, "--kind", "rendered", "--views", "cirr").stdout
    assert "added 2, failed 1, given views 7" in shown
    status = run("status").stdout
    assert "5 photos, 2 texts, 2 rendered texts" in status
    assert "retrieval, cirr" in status
    assert f"{captions} (rendered)" in status
    assert f"{captions}:2: not UTF-8" in status
    assert run("verify").stdout == "no errors\n"
    result = run("index", "--kind", "text")
    assert result.exit_code == 2
    assert "--kind says what PATHS are" in result.stderr


def test_broken_pictures_as_queries(library: Path, tmp_path: Path) -> None:
    for path, reason in pictures.write_bad(tmp_path / "bad").items():
        said = refused(3, "search", "--image", path)
        assert str(path) in said
        assert reason.lower() in said.lower()


def test_unknown_models(copied: Path, library: Path) -> None:
    write_photos(library / "more", 1, first=90)
    for command in (["search", "x"], ["index", library / "more"]):
        said = refused(3, *command, "--model", "nonsense")
        assert "unknown model 'nonsense'; known: e5v-tiny, royokong/e5-v" in said
        assert "no folder ./none" in refused(3, *command, "--model", "./none")


def test_a_folder_with_a_missing_shard(copied: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    weights = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    said = refused(3, "search", "x", "--model", model)
    assert "lacks 1 of 2 weight files: model-00002-of-00002.safetensors" in said


def test_another_model_is_refused_with_both_named(copied: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    for command in (["search", "a dog"], ["index"]):
        said = refused(3, *command, "--model", model)
        assert "was made by e5v-tiny@" in said
        assert "but the model here is local@" in said
    result = run("search", "a dog", "--model", model, "--allow-mismatch", "--paths")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 5


def test_a_collection_with_fewer_tiles_finds_its_setting_and_refuses_others(copied: Path, library: Path) -> None:
    assert run("index", library / "photos", "-c", "quick", "--tiles", "base").exit_code == 0
    found = json.loads(run("search", "a dog", "-c", "quick", "--json").stdout)
    assert "/base/float" in found["fingerprint"]
    assert len(found["hits"]) == 5
    for command in (["search", "a dog"], ["index"], ["compare", "1", "2"]):
        for model in ([], ["--model", "e5v-tiny"]):
            said = refused(3, *command, "-c", "quick", "--tiles", "full", *model)
            assert "/base/float, but the model here is e5v-tiny@" in said
            assert "/auto/float: their" in said
    assert run("index", "-c", "quick", "--model", "e5v-tiny", "--json").exit_code == 0
    assert "the most tiles of a picture, not 'few'" in refused(2, "search", "a dog", "-c", "quick", "--tiles", "few")


def test_a_newer_schema(copied: Path) -> None:
    with sqlite3.connect(copied / "catalog.sqlite") as db:
        db.execute("INSERT INTO migrations (number, name, applied_at) VALUES (999, 'later', '')")
    db.close()
    for command in ("status", "verify", "index"):
        assert "has schema 999, of a newer e5v-search" in refused(3, command)


def test_a_corrupt_database(copied: Path) -> None:
    data = (copied / "catalog.sqlite").read_bytes()
    (copied / "catalog.sqlite").write_bytes(b"\xff" * 200 + data[200:])
    for command in (["search", "--image", "1"], ["status"], ["index"]):
        said = refused(3, *command)
        assert "catalog.sqlite is damaged" in said
        assert "your photos are untouched" in said


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_index_is_made_anew(copied: Path, damage: str) -> None:
    file = copied / "index.faiss"
    before, data = paths_of("--image", "1"), bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 3] ^= 1
        file.write_bytes(data)
    result = run("verify")
    assert result.exit_code == 3
    assert "e5v-search rebuild" in result.stdout
    assert paths_of("--image", "1") == before
    assert run("verify").exit_code == 0


@contextmanager
def nobody() -> Iterator[None]:
    """Root passes over permissions; here it lays its identity down for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.skipif(not hasattr(os, "setresuid"), reason="needs setresuid")
def test_a_folder_that_cannot_be_written(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = (["index"], ["rebuild"], ["forget", "x"])
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to all but their owner
        os.chmod(name, 0o755)
        place = Path(name) / "home/default"
        shutil.copytree(library / "home", Path(name) / "home")
        monkeypatch.setenv("E5V_HOME", str(place.parent))
        before = paths_of("--image", "1", "-k", "1")
        for command in commands:  # while everything that they import can be read
            assert run(*command).exit_code == 0
        place.chmod(0o555)
        try:
            with nobody():
                assert paths_of("--image", "1", "-k", "1") == before
                assert json.loads(run("status", "--json").stdout)["items"]["image"] == 5
                assert run("verify").stdout == "no errors\n"
                for command in commands:
                    assert f"cannot write to {place}" in refused(3, *command)
        finally:
            place.chmod(0o755)


@pytest.mark.usefixtures("permissions_apply")
def test_what_cannot_be_read_is_listed_and_the_rest_indexed(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    [good, closed] = write_photos(photos, 2, first=70)
    write_photos(photos / "closed", 1, first=80)
    os.mkfifo(photos / "pipe.jpg")
    (photos / "loop").symlink_to(photos)
    closed.chmod(0)
    (photos / "closed").chmod(0)
    try:
        result = run("index", photos, "-c", str(tmp_path / "c"), "--json")
    finally:
        (photos / "closed").chmod(0o755)
    report = json.loads(result.stdout)
    assert result.exit_code == 1
    assert report["added"] == 1
    failed = {failure["path"] for failure in report["failed"]}
    assert failed == {str(closed), str(photos / "closed"), str(photos / "pipe.jpg")}
    assert paths_of("--image", good, "-c", str(tmp_path / "c")) == [str(good)]


def test_unexpected_errors_are_one_line_and_a_traceback_with_debug(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from e5v_search import Collection

    def fail(self: Collection) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Collection, "status", fail)
    said = refused(3, "status")
    assert said == "Unexpected error: ZeroDivisionError: a bug (run it again with --debug to see where)"
    for arguments in (["--debug", "status"], ["status", "--debug"]):
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 3
        assert "Traceback" in result.stderr
        assert "in fail" in result.stderr


# ask, compare, explain


def test_ask_json_has_the_fields_of_search(library: Path) -> None:
    photos = sorted((library / "photos").glob("*.jpg"))
    named = json.loads(run("ask", "--positive", "a dog", "--negative", "a cat", *photos[:3], "--json").stdout)
    whole = json.loads(run("ask", "--positive", "a dog", "--negative", "a cat", "--json").stdout)
    found = json.loads(run("search", "a dog", "--minus", "a cat", "--json").stdout)
    assert list(named) == list(whole) == ["query", "fingerprint", "took_ms", "hits"]
    assert whole["hits"] == found["hits"]
    scores = {hit["path"]: hit["score"] for hit in whole["hits"]}
    assert {hit["path"]: pytest.approx(hit["score"], abs=2e-3) for hit in named["hits"]} == {
        str(path): scores[str(path)] for path in photos[:3]
    }


def test_ask_goes_on_after_a_bad_picture(library: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"")
    result = run("ask", "--positive", "a dog", "--negative", "a cat", tmp_path / "bad.jpg", library / "photos/0000.jpg")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"{tmp_path}/bad.jpg: the file is empty"
    assert result.stdout.splitlines()[-1].endswith("photos/0000.jpg")


def test_ask_that_finds_nothing_says_so(library: Path, tmp_path: Path) -> None:
    question = ("ask", "--positive", "a dog", "--negative", "a cat")
    (tmp_path / "bad.jpg").write_bytes(b"")
    assert run(*question, tmp_path / "bad.jpg").stderr.splitlines()[-1] == f"{tmp_path}/bad.jpg: the file is empty"
    nothing = run(*question, "--where", "width>100000")
    assert (nothing.exit_code, nothing.stdout, nothing.stderr.splitlines()[-1]) == (0, "", "nothing found")
    assert (
        len(
            json.loads(run(*question, library / "photos/0000.jpg", library / "photos/0001.jpg", "-k", "1", "--json").stdout)[
                "hits"
            ]
        )
        == 1
    )


def test_ask_and_compare_need_no_collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E5V_HOME", str(tmp_path / "home"))
    [photo] = write_photos(tmp_path, 1)
    assert run("ask", "--positive", "a dog", "--negative", "a cat", photo).exit_code == 0
    assert "there is no collection to ask" in run("ask", "--positive", "a dog", "--negative", "a cat").stderr
    table = json.loads(run("compare", photo, "text:a dog", "--json").stdout)
    assert table["inputs"] == [{"image": str(photo)}, {"text": "a dog"}]
    assert np.allclose(np.diag(table["cosines"]), 1, atol=1e-5)
    assert table["cosines"][0][1] == table["cosines"][1][0]
    assert "ids belong to a collection" in refused(2, "compare", "1")
    assert "no collection at" in refused(3, "compare", photo, "-c", "none")
    assert not (tmp_path / "home").exists()


def test_another_model_leaves_an_unnamed_collection_alone(library: Path) -> None:
    photo = library / "photos/0000.jpg"
    for command in (["compare", photo], ["explain", photo], ["ask", "--positive", "a", "--negative", "b", photo]):
        assert run(*command, "--model", TINY).exit_code == 0
        assert "made by" in refused(3, *command, "--model", TINY, "-c", str(library / "home/default"))


def test_explain_says_words_and_those_shared(library: Path) -> None:
    alone = json.loads(run("explain", "text:a dog in the snow", "-k", "7", "--json").stdout)
    assert len(alone["words"]) == 7
    assert [word["score"] for word in alone["words"]] == sorted((word["score"] for word in alone["words"]), reverse=True)
    both = json.loads(run("explain", "1", "text:a dog in the snow", "--json").stdout)
    assert (both["input"], both["other"]) == ({"image": 1}, {"text": "a dog in the snow"})
    assert run("explain", "1", "--modify", "at night", "-k", "3").stdout.count("\n") == 3
    hits = json.loads(run("search", "a dog", "--explain", "-k", "2", "--json").stdout)["hits"]
    assert all(hit["words"] and all(isinstance(word, str) for word in hit["words"]) for hit in hits)
    assert ", ".join(hits[0]["words"]) in run("search", "a dog", "--explain", "-k", "2").stdout
    assert next(csv.DictReader(io.StringIO(run("search", "a dog", "--explain", "--csv").stdout)))["words"]


@pytest.mark.parametrize(
    ("term", "said"),
    [
        ("snow:0", "column 6"),
        ("snow:-1", "the weight '-1'"),
        ("", "the query text is empty"),
        ("image:", "the name of the picture is empty"),
        ("image:777", "no item 777"),
    ],
)
def test_bad_terms_are_named(library: Path, term: str, said: str) -> None:
    for option in ("--plus", "--minus"):
        assert said in refused(2, "search", "a dog", option, term)
