"""--help is whole, its examples run as they stand, and asking for it loads nothing heavy."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np
import pictures
import pytest
from command_line import follow_and_stop, refused, run, write_opener, write_photos, write_recipe
from PIL import ExifTags, Image

from e5v_search.cli import cli
from e5v_search.cli.printing import printable, size

# not in any example: they speak for themselves, or the machine that runs the tests cannot serve them
WITHOUT_EXAMPLE = {"--adapter", "--debug", "--dim", "--help", "--quantize", "--revision", "--version"}
ROOT = Path(__file__).parent.parent


def examples() -> Iterator[tuple[str, str]]:
    for name, command in {"": cli, **cli.commands}.items():
        for line in (command.epilog or "").splitlines():
            if line.startswith("  e5v-search "):
                yield name, line.strip()


def options(command: click.Command) -> Iterator[click.Option]:
    yield from (parameter for parameter in command.params if isinstance(parameter, click.Option))


@pytest.mark.parametrize("name", cli.commands)
def test_every_command_and_option_is_explained_and_shown(name: str) -> None:
    command = cli.commands[name]
    text = run(name, "--help").stdout
    assert command.get_short_help_str(80).endswith("."), "the first sentence must fit the list of commands"
    shown = [line for of, line in examples() if of == name]
    assert shown
    for option in options(command):
        assert option.help, option.name
        assert all(flag in text for flag in option.opts)
        if not WITHOUT_EXAMPLE & set(option.opts):
            used = any(set(option.opts) & set(line.split()) for line in shown)
            assert used, f"{name}: no example with {option.opts}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the examples speak of: photos, a dog of 2020, a cat, captions, changes, two collections."""
    base = tmp_path_factory.mktemp("examples")
    write_photos(base / "photos", 3)
    write_photos(base / "photos/old", 1, first=10)
    write_photos(base / "photos", 1, first=20)
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2020:05:17 10:00:00"
    pictures.photo(66, 45, seed=20).save(base / "dog.jpg", quality=90, exif=exif)
    shutil.copy(ROOT / "e5v_search/samples/cat.jpg", base / "cat.jpg")
    (base / "captions.txt").write_text("a dog\na cat\n")
    (base / "photos/captions.csv").write_text("file,caption\n0000.jpg,a dog\n0001.jpg,a cat\n0002.jpg,a house\n")
    change = {"image": "dog.jpg", "text": "make it a cat"}
    (base / "changes.jsonl").write_text(json.dumps(change) + "\n")
    write_recipe(base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("E5V_HOME", str(base / "home"))
        write_opener(base / "bin")
        patch.setenv("PATH", f"{base / 'bin'}{os.pathsep}{os.environ['PATH']}")
        patch.chdir(base)
        for collection in ("default", "holidays"):
            run("index", "photos", "dog.jpg", "-c", collection)
        run("export", "--out", "old-export")
        (base / "my-vectors").mkdir()
        np.save(base / "my-vectors/vectors.npy", np.eye(3, 256, dtype=np.float32))
        np.save(base / "sentences.npy", np.eye(4, 256, dtype=np.float32))
        yield base


@pytest.mark.parametrize("line", [line for _, line in examples()])
def test_examples_run(place: Path, line: str) -> None:
    ours = re.split(r" [|>] ", line)[0]  # the rest is the shell's
    if "--watch" in ours or " serve" in ours:
        code, output = follow_and_stop(*shlex.split(ours)[1:])
        assert code == 0, output
        assert output
        return
    if "--ray" in ours:  # the cluster of the example is not there: all but that must be right
        assert "nothing answers at 127.0.0.1:6379" in refused(3, *shlex.split(ours)[1:])
        return
    result = run(*shlex.split(ours)[1:])
    if " milvus:" in ours and find_spec("milvus_lite") is None:  # it brings faiss-cpu, which faiss-gpu takes the place of
        assert "pip install" in result.stderr
        return
    assert result.exit_code == 0, result.output
    assert result.stdout or "--quiet" in ours


def modules_after(code: str) -> set[str]:
    """Top-level modules of a process that has run `code`."""
    program = f"{code}\nimport sys\nprint('loaded', *{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_help_loads_nothing_heavy() -> None:
    assert modules_after("import json, click") & {"numpy", "torch"} == set()
    loaded = modules_after("from e5v_search.cli import cli\ntry: cli(['search', '--help'])\nexcept SystemExit: pass")
    assert "click" in loaded
    assert not loaded & {"torch", "faiss", "numpy", "PIL", "rich", "sqlite_utils", "transformers", "platformdirs", "filelock"}


@pytest.mark.parametrize("command", [["status"], ["index"], ["search", "--image", "1"], ["verify"], ["forget", "none"]])
def test_what_needs_no_model_loads_no_torch(place: Path, command: list[str]) -> None:
    run("index")  # the examples have taken photos out
    loaded = modules_after(f"from e5v_search.cli import cli\ntry: cli({command!r})\nexcept SystemExit: pass")
    assert "sqlite_utils" in loaded
    assert not loaded & {"torch", "transformers", "pandas"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain näïve 日本 👍🏽 👩\u200d🚀 a\u202fb", "plain näïve 日本 👍🏽 👩\u200d🚀 a\u202fb"),
        ("a\nb\tc\x1b[2J\x7f", "a\\nb\\tc\\x1b[2J\\x7f"),
        ("x\u202egpj.exe", "x\\u202egpj.exe"),
        ("caf\udce9", "caf\\xe9"),
        ("lone \ud800", "lone \\ud800"),
        ("a\u2028b", "a\\u2028b"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("n", "shown"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (956_000, "956 kB"), (2.5e9, "2.5 GB"), (3e16, "30000 TB")],
)
def test_size(n: float, shown: str) -> None:
    assert size(n) == shown
