"""`doctor`: whether everything is here that the program needs, each finding with what mends it."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from e5v_search.cli.options import debug_option, examples, json_option
from e5v_search.cli.printing import count, print_json, printable, size
from e5v_search.errors import E5VError, MissingPackage

_NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy", "pillow", "sqlite-utils", "rich")
_OPTIONAL = {"bitsandbytes": "no 4 or 8 bit weights", "pillow-heif": "no HEIC photos", "peft": "no adapters"}
_AGAIN = "install e5v-search again from its folder: pip install --force-reinstall ."
_LITTLE_DISK = 1e9
_LITTLE_MEMORY = 1.5e9

_COLOURS = {"ok": "green", "warn": "yellow", "bad": "red"}


@dataclass(frozen=True)
class Finding:
    name: str
    status: str  # ok, warn, bad
    detail: str
    remedy: str | None = None


@click.command(epilog=examples("e5v-search doctor", "e5v-search doctor --json"))
@json_option
@debug_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check that all is here that the program needs.

    Packages, FAISS, GPU, photo formats, memory, disk, collections, and the bundled model at work. Exit code 3 if
    something is bad.
    """
    findings = []
    for check in (_python, _packages, _faiss, _device, _formats, _memory, _data_home, _collections, _model):
        for finding in check():
            findings.append(finding)
            if not as_json:
                _show(finding)
    bad = any(finding.status == "bad" for finding in findings)
    if as_json:
        print_json({"healthy": not bad, "findings": [asdict(finding) for finding in findings]})
    if bad:
        ctx.exit(3)


def _show(finding: Finding) -> None:
    status = click.style(f"{finding.status:<4}", fg=_COLOURS[finding.status])
    click.echo(f"{status}  {finding.name:<16}  {printable(finding.detail)}")
    if finding.remedy:
        click.echo(f"{'':<24}{printable(finding.remedy)}")


def _python() -> Iterator[Finding]:
    from e5v_search import __version__
    from e5v_search.parallel import cores

    yield Finding("e5v-search", "ok", f"{__version__}, {Path(__file__).parent.parent}")
    yield Finding("Python", "ok", f"{platform.python_version()}, {sys.executable}")
    yield Finding("system", "ok", f"{platform.system()} {platform.machine()}, {count(cores(), 'core')}")


def _packages() -> Iterator[Finding]:
    versions = {name: _version(name) for name in (*_NEEDED, *_OPTIONAL)}
    missing = [name for name in _NEEDED if versions[name] is None]
    yield Finding("packages", "ok", ", ".join(f"{name} {version}" for name, version in versions.items() if version))
    if missing:
        yield Finding("packages", "bad", f"{', '.join(missing)} missing", f"pip install {' '.join(missing)}")
    for name, loss in _OPTIONAL.items():
        if versions[name] is None:
            yield Finding(name, "warn", f"missing: {loss}", f"pip install {name}")
    if (versions["torch"] or "").startswith("2.9."):
        yield Finding("torch", "warn", "2.9 has a slow convolution", "pip install -U torch")


def _version(distribution: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _faiss() -> Iterator[Finding]:
    from e5v_search.index import gpus_of_faiss

    try:
        seen = gpus_of_faiss()
    except MissingPackage as error:
        reason, _, remedy = str(error).partition("; mend it with: ")
        yield Finding("FAISS", "bad", reason, remedy)
        return
    wheels = [f"{name} {version}" for name in ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs") if (version := _version(name))]
    installed = ", ".join(wheels) or "installed, but by no wheel that is known here"
    yield Finding("FAISS", "ok", f"{installed}, which sees {count(seen, 'GPU') if seen else 'no GPU'}")


def _device() -> Iterator[Finding]:
    try:
        from e5v_search.backbones.checkpoint import free_cuda_bytes, pick_device
        from e5v_search.backbones.registry import choose

        device, free = pick_device("auto"), free_cuda_bytes()
    except (ImportError, OSError, E5VError) as error:
        yield Finding("device", "bad", f"torch does not work: {error}", "pip install --force-reinstall torch")
        return
    yield Finding("device", "ok", f"{device}" + ("" if free is None else f", {free / 2**30:.0f} GiB free"))
    yield Finding("model auto", "ok", choose(free)[2].removeprefix("model auto: "))


def _formats() -> Iterator[Finding]:
    from PIL import features

    if features.check("avif"):
        yield Finding("AVIF", "ok", "read by Pillow")
    else:
        yield Finding("AVIF", "warn", "this Pillow cannot read it", "pip install -U 'pillow>=11.3'")
    if _version("pillow-heif") is None:
        return  # told among the packages
    try:
        import pillow_heif
    except ImportError as error:
        yield Finding("HEIC", "warn", f"pillow-heif does not load: {error}", "pip install --force-reinstall pillow-heif")
    else:
        yield Finding("HEIC", "ok", f"read by libheif {pillow_heif.libheif_version()}")


def _memory() -> Iterator[Finding]:
    available = None
    with suppress(OSError, StopIteration):
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        available = int(line.split()[1]) * 1024
    if available is None:
        yield Finding("memory", "ok", "this system does not say how much is free")
    elif available < _LITTLE_MEMORY:
        needed = f"{size(available)} free; indexing takes up to {size(_LITTLE_MEMORY)}"
        yield Finding("memory", "warn", needed, "close other programs")
    else:
        yield Finding("memory", "ok", f"{size(available)} free")


def _data_home() -> Iterator[Finding]:
    from e5v_search.config import data_home

    home = data_home()
    place = next(folder for folder in (home, *home.absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        yield Finding("data folder", "bad", f"{home} cannot be written", "set E5V_HOME to a folder of yours")
        return
    free = shutil.disk_usage(place).free
    if free < _LITTLE_DISK:
        remedy = "free some space, or set E5V_HOME to another disk"
        yield Finding("data folder", "warn", f"{home}, only {size(free)} free", remedy)
    else:
        yield Finding("data folder", "ok", f"{home}, {size(free)} free")


def _collections() -> Iterator[Finding]:
    from e5v_search.catalog import CATALOG, Catalog
    from e5v_search.config import data_home

    folders = sorted(path.parent for path in data_home().glob(f"*/{CATALOG}"))
    if not folders:
        yield Finding("collections", "ok", "none in the data folder yet")
    for folder in folders:
        try:
            with Catalog.open(folder, readonly=True) as catalog:
                items = count(sum(catalog.count().values()), "item")
                yield Finding("collection", "ok", f"{folder.name}: {items}, made by {catalog.fingerprint or 'no model yet'}")
        except E5VError as error:
            yield Finding("collection", "bad", f"{folder.name}: {error}")


def _model() -> Iterator[Finding]:
    """The bundled model embeds a text: the whole chain from tokenizer to vector, on the processor."""
    try:
        import numpy as np

        from e5v_search.backbones import Embedder
        from e5v_search.backbones.registry import TINY

        [vector] = Embedder.load(TINY, device="cpu").embed_texts(["a dog in the snow"])
        length = float(np.linalg.norm(vector))
    except Exception as error:  # whatever is broken is what a doctor is asked for
        yield Finding("e5v-tiny", "bad", f"{type(error).__name__}: {error}", _AGAIN)
        return
    if abs(length - 1) < 1e-3:
        yield Finding("e5v-tiny", "ok", f"embeds a text: {len(vector)} numbers, length 1")
    else:
        yield Finding("e5v-tiny", "bad", f"gives a vector of length {length:.3f}", _AGAIN)
