"""What `make` would install, by what the machine has. Nothing is run: make only says what it would do."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def plan(tmp_path: Path, nvidia_smi: str, *arguments: str) -> str:
    """The commands of `make demo` in a fresh clone on a machine whose nvidia-smi is the given script."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{nvidia_smi}\n")
    tool.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["make", "-n", "demo", f"VENV={tmp_path}/venv", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout


def test_without_a_gpu_the_cpu_build_of_torch_comes_first(tmp_path: Path) -> None:
    [pinned] = [line for line in (ROOT / "constraints.txt").read_text().split() if line.startswith("torch==")]
    said = plan(tmp_path, "exit 9")
    assert said.index(f'"{pinned}+cpu"') < said.index(f'"{pinned}"')
    assert '-e ".[cpu]"' in said


def test_with_a_gpu_the_cuda_builds_are_taken(tmp_path: Path) -> None:
    said = plan(tmp_path, "echo 'GPU 0: NVIDIA H200 (UUID: GPU-0)'")
    assert "+cpu" not in said
    assert '-e ".[gpu]"' in said


def test_photos_of_ones_own_have_a_collection_of_their_own(tmp_path: Path) -> None:
    assert "-c demo/samples" in plan(tmp_path, "exit 9")
    said = plan(tmp_path, "exit 9", "PHOTOS=/my pictures")
    assert 'index "/my pictures" -c demo/photos' in said
    assert "samples" not in said
