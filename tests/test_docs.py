"""Every command and every piece of Python in README and docs is run, in the order of its page."""

import os
import re
import shlex
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from command_line import follow_and_stop, write_opener, write_recipe

from e5v_search.cli import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SAMPLES = sorted((ROOT / "e5v_search/samples").glob("*.jpg"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "sh") for line in block.splitlines() if line.strip()]


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a few pictures, as the pages assume it; no network."""
    pictures = tmp_path / "Pictures" / "2019"
    pictures.mkdir(parents=True)
    for photo in SAMPLES[:6]:
        shutil.copy(photo, pictures)
    shutil.copy(SAMPLES[2], tmp_path / "cat.jpg")
    shutil.copy(SAMPLES[0], tmp_path / "dog.jpg")
    rows = (f"2019/{photo.name},{photo.stem.replace('-', ' ')}" for photo in SAMPLES[:6])
    (tmp_path / "Pictures/captions.csv").write_text("\n".join(["file,caption", *rows]))
    (tmp_path / "sentences.txt").write_text("a dog\na cat\n")
    np.save(tmp_path / "sentences.npy", np.eye(4, 256, dtype=np.float32))
    (tmp_path / "captions.txt").write_text("a dog on the grass\ntwo children in the snow\n")
    (tmp_path / "Notes").mkdir()
    (tmp_path / "Notes/trip.md").write_text("# Trip\n\nWe went to the sea.\n")
    (tmp_path / "changes.jsonl").write_text('{"image": "cat.jpg", "text": "at night"}\n')
    write_recipe(tmp_path)
    write_opener(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("E5V_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def run(line: str) -> tuple[int, str]:
    """One line of a page; what a shell does behind a pipe or an arrow is left to the shell."""
    words = [os.path.expanduser(word) for word in shlex.split(re.split(r"\s[|>]\s", line)[0], comments=True)]
    assert words[0] == "e5v-search"
    if "--watch" in words or words[1] == "serve":
        return follow_and_stop(*words[1:])
    result = CliRunner().invoke(cli, words[1:], prog_name="e5v-search")
    return result.exit_code, result.output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(page: Path, user: Path) -> None:
    lines = commands(page)
    program = [line for line in lines if line.startswith("e5v-search")]
    for line in lines:
        if line.startswith("make"):
            target = shlex.split(line, comments=True)
            assert subprocess.run([*target, "-n"], cwd=ROOT, capture_output=True, check=False).returncode == 0, line
        else:
            assert line in program, f"{page.name}: this test does not know how to run {line!r}"
    if program and page.name != "collections.md":
        assert run("e5v-search index ~/Pictures")[0] == 0
    for line in program:
        code, output = run(line)
        if hub := re.search(r"--model ([\w-]+/\S+)", line):  # not to be had here: all but the weights must be right
            assert code == 3, output
            assert f"{hub[1]} is not on this machine" in output
        elif " milvus:" in line and find_spec("milvus_lite") is None:  # it brings faiss-cpu
            assert "pip install" in output
        elif "--ray" in line:
            assert code == 3, output
            assert "nothing answers at 127.0.0.1:6379" in output
        elif re.search(r"-c big\b", line):
            assert code == 3, output
            assert re.search("no collection|is empty", output)
        else:
            assert code == 0, f"{line}\n{output}"


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.name)
def test_python(page: Path, user: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), {})
    assert capsys.readouterr().out


def test_links_lead_somewhere() -> None:
    checked = 0
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
            checked += 1
    assert checked > 8


def test_toml_of_the_pages_is_a_prompt_set(tmp_path: Path) -> None:
    from e5v_search.prompts import PROMPT_SETS, load_prompts

    [block] = blocks(ROOT / "docs/search.md", "toml")
    path = tmp_path / "mine.toml"
    path.write_text(block)
    prompts = load_prompts(path)
    assert (prompts.text, prompts.composed) == (PROMPT_SETS["retrieval"].text, PROMPT_SETS["cirr"].composed)


def test_toml_of_the_models_page_declares_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from e5v_search.backbones.known import Known, known_models
    from e5v_search.prompts import WORDINGS

    page = ROOT / "docs/models.md"
    [block] = blocks(page, "toml")
    (tmp_path / "models.toml").write_text(block)
    monkeypatch.setenv("E5V_MODELS", str(tmp_path / "models.toml"))
    models = known_models()
    assert models["my-qwen"].least_dim == 64
    assert models["shouting"].words is not None
    told = page.read_text(encoding="utf-8")
    assert all(f"`{name}`" in told for name in WORDINGS)
    assert all(f"`{name}`" in told for name in set(Known.__dataclass_fields__) - {"name", "origin"})


def test_toml_of_the_training_page_is_a_recipe(tmp_path: Path) -> None:
    from e5v_search.training.recipes import read_recipe

    [block] = blocks(ROOT / "docs/train.md", "toml")
    (tmp_path / "recipe.toml").write_text(block)
    assert read_recipe(tmp_path / "recipe.toml").name == "mine"


def test_every_option_is_shown_in_the_pages() -> None:
    words: dict[str, set[str]] = {}
    for page in PAGES:
        for line in commands(page):
            _, name, *rest = [*shlex.split(re.split(r"\s[|>]\s", line)[0], comments=True), ""]
            words.setdefault(name, set()).update(rest)
    hidden = {"--adapter", "--debug", "--dim", "--quantize", "--revision"}  # shown where a model can be had for them
    for name, command in cli.commands.items():
        for option in command.params:
            if isinstance(option, click.Option) and not hidden & set(option.opts):
                assert words[name] & set(option.opts), f"no page shows {name} {option.opts[0]}"
