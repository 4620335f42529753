"""What every committed result says of where it was measured."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
VERSIONS = ("torch", "faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "numpy", "pillow", "sqlite-utils")


def describe() -> dict[str, Any]:
    """Machine, versions and commit of this run."""
    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: found for name in VERSIONS if (found := _installed(name)) is not None},
    }


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # of the packages of FAISS there is one
        return None


def arguments(words: Sequence[str]) -> str:
    """As they are kept in a result: of a path only its last part, which says nothing of this machine."""
    return " ".join(Path(word).name if "/" in word else word for word in words)


def save(name: str, result: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(describe() | result, indent=2) + "\n")
    return path
