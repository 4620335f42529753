"""What the tests of the command line share: running it here or in a process of its own, and a folder of photos."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pictures
from click.testing import CliRunner, Result

from e5v_search.cli import cli


def run(*args: str | os.PathLike[str]) -> Result:
    result = CliRunner().invoke(cli, [os.fspath(arg) for arg in args], prog_name="e5v-search")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def refused(code: int, *args: str | os.PathLike[str]) -> str:
    """The one line on stderr of a command that ends with `code` and prints nothing."""
    result = run(*args)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("model auto:")]
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert len(lines) == 1, lines
    return lines[0]


def start(*args: str | os.PathLike[str], **options: Any) -> "subprocess.Popen[bytes]":
    """The command in a process of its own. Paths must be absolute: it starts in the project's root."""
    command = [sys.executable, "-m", "e5v_search", *(os.fspath(arg) for arg in args)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **({"cwd": Path(__file__).parent.parent} | pipes | options))


def follow_and_stop(*args: str) -> tuple[int, str]:
    """(exit code, stdout) of a command that goes on until it is told to, here after its first line."""
    root = Path(__file__).parent.parent
    process = start(*args, cwd=os.getcwd(), env=os.environ | {"PYTHONPATH": str(root)})
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    return process.returncode, (first + rest).decode()


def write_opener(folder: Path) -> Path:
    """A program that takes the place of the system's opener of files, and the list that it keeps of what it was given."""
    folder.mkdir(exist_ok=True)
    opened = folder / "opened"
    for name in ("xdg-open", "open"):
        (folder / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> "{opened}"\n')
        (folder / name).chmod(0o755)
    return opened


def write_photos(folder: Path, n: int, first: int = 0) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:04d}.jpg" for i in range(first, first + n)]
    for i, path in enumerate(paths, start=first):
        pictures.photo(60 + i % 7, 40 + i % 5, seed=i).save(path, quality=90)
    return paths


def write_recipe(folder: Path) -> None:
    """recipe.toml, which tunes e5v-tiny for a moment, and nli.csv, which it learns from."""
    words = ("dog", "cat", "car", "boat")
    rows = ("sent0,sent1,hard_neg", *(f"a {word} in the snow,a {word},no {word}" for word in words))
    (folder / "nli.csv").write_text("\n".join(rows))
    (folder / "recipe.toml").write_text(
        'name = "mine"\nmodel = "e5v-tiny"\nbatch = 2\nsteps = 2\nrate = 1e-3\nlora = { rank = 2 }\n'
        'examples = { kind = "triplets", file = "nli.csv" }\n'
    )
