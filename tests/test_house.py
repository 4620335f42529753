"""The shape of the house: imports go downwards only, heavy libraries stay where they belong (DESIGN section 2)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "e5v_search"
FLOORS = [
    {"errors"},
    {"config", "media", "render", "prompts", "embedder", "parallel", "scenes", "filters", "corpora"},
    {"backbones", "catalog", "index"},
    {"query", "hits"},  # the vocabulary of floor 3
    {"collection", "evaluation"},
    {"training"},
    {"map", "scale"},
    {"web"},
    {"cli"},
]
HOME = {
    "torch": {"backbones", "training", "index/torch_rows"},  # the last for GPUs that FAISS does not see
    "transformers": {"backbones", "training"},
    "sentence_transformers": {"backbones"},
    "faiss": {"index"},
    "pymilvus": {"index"},
    "sqlite_utils": {"catalog"},
    "sqlite3": {"catalog"},
    "click": {"cli"},
}
TOP = {"__init__", "__main__"}  # the public surface stands above all floors


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute names imported anywhere in a file, functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def name_of(path: Path) -> str:
    """Of a module or a folder, below the package."""
    return path.with_suffix("").relative_to(PACKAGE).as_posix() if PACKAGE in path.parents else ""


def floor(name: str) -> int:
    [at] = [i for i, names in enumerate(FLOORS) if name in names]
    return at


def test_imports_go_downwards() -> None:
    checked = 0
    for name, path in modules():
        if name in TOP:
            continue
        for imported, line in imports(path):
            parts = imported.split(".")
            if parts[0] != "e5v_search" or parts[1] in (name, "__version__"):
                continue
            assert floor(parts[1]) < floor(name), f"{path}:{line}: {name} may not import {parts[1]}"
            checked += 1
    assert checked > 30


@pytest.mark.parametrize("library", HOME)
def test_library_stays_at_home(library: str) -> None:
    homes = HOME[library]
    users = {path for _, path in modules() for imported, _ in imports(path) if imported.split(".")[0] == library}
    strangers = [str(path) for path in users if not homes & {name_of(path), *map(name_of, path.parents)}]
    assert not strangers, f"{library} is imported by {strangers}"


def test_no_module_is_longer_than_can_be_read() -> None:
    long = {str(path): n for _, path in modules() if (n := len(path.read_text(encoding="utf-8").splitlines())) > 500}
    assert not long


def test_cli_and_public_surface_load_nothing_heavy() -> None:
    heavy = {"torch", "faiss", "transformers", "numpy", "PIL", "sqlite3", "pymilvus", "grpc"}
    code = f"import sys, e5v_search.cli, e5v_search; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_are_all_there() -> None:
    import e5v_search

    for name in e5v_search.__all__:
        assert getattr(e5v_search, name).__name__ == name
    with pytest.raises(AttributeError, match="Nonsense"):
        e5v_search.Nonsense  # noqa: B018
