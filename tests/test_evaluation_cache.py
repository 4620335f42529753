"""The cache of vectors: what is there stays there, whatever a kill, a full disk or a damaged file does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from literal import Literal
from PIL import Image

from e5v_search.backbones import Embedder
from e5v_search.errors import E5VError, ModelError, TextTooLong
from e5v_search.evaluation.cache import VectorFile
from e5v_search.evaluation.records import Drawn, PhotoFile
from e5v_search.evaluation.vectors import Vectors

ROOT = Path(__file__).parent.parent


def key(n: int) -> bytes:
    return n.to_bytes(32, "big")


def rows(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 5)).astype(np.float32)


def fill(folder: Path, n: int, first: int = 0) -> np.ndarray:
    x = rows(n, first)
    with VectorFile(folder, "model", 5) as file:
        file.put([key(first + i) for i in range(n)], x)
    return x


def test_vectors_come_back_as_they_were(tmp_path: Path) -> None:
    x = np.concatenate([fill(tmp_path, 4), fill(tmp_path, 3, first=4)])
    with VectorFile(tmp_path, "model", 5) as file:
        found = file.get([key(i) for i in range(9)])
    assert set(found) == {key(i) for i in range(7)}
    assert (np.stack([found[key(i)] for i in range(7)]) == x).all()


def test_other_models_have_other_files(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    with VectorFile(tmp_path, "another", 5) as file:
        assert file.get([key(0)]) == {}


@pytest.mark.parametrize("torn", [1, 20, 30, 59])
def test_a_torn_block_is_cut_off(tmp_path: Path, torn: int) -> None:
    x = fill(tmp_path, 3)
    [path] = tmp_path.glob("*.vectors")
    os.truncate(path, path.stat().st_size - torn)  # a record has 56 bytes
    kept = 2 if torn <= 56 else 1
    with VectorFile(tmp_path, "model", 5) as file:
        assert sorted(file.get([key(i) for i in range(3)])) == [key(i) for i in range(kept)]
        file.put([key(7)], x[2:])
    with VectorFile(tmp_path, "model", 5) as file:
        assert sorted(file.get([key(i) for i in range(9)])) == [*(key(i) for i in range(kept)), key(7)]


def test_a_damaged_record_counts_as_absent(tmp_path: Path) -> None:
    x = fill(tmp_path, 3)
    [path] = tmp_path.glob("*.vectors")
    data = bytearray(path.read_bytes())
    data[-70] ^= 1  # in the vector of the second record
    path.write_bytes(data)
    with VectorFile(tmp_path, "model", 5) as file:
        assert set(file.get([key(i) for i in range(3)])) == {key(0), key(2)}
        file.put([key(1)], x[1:2])
        assert (file.get([key(1)])[key(1)] == x[1]).all()


def test_a_file_that_is_not_ours_is_begun_anew(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    [path] = tmp_path.glob("*.vectors")
    path.write_bytes(b"something else")
    with VectorFile(tmp_path, "model", 5) as file:
        assert file.get([key(0)]) == {}
    fill(tmp_path, 2)
    with VectorFile(tmp_path, "model", 5) as file:
        assert len(file.get([key(0), key(1)])) == 2


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    with VectorFile(tmp_path, "model", 5):
        with pytest.raises(E5VError, match="another run"):
            VectorFile(tmp_path, "model", 5)
        VectorFile(tmp_path, "another", 5).__exit__()
    fill(tmp_path, 1)


def test_a_place_that_cannot_be_written(tmp_path: Path, permissions_apply: None) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(E5VError, match=r"cannot be used \(Permission denied\)"):
        VectorFile(tmp_path / "new", "model", 5)


def test_nothing_is_embedded_twice(tmp_path: Path) -> None:
    first = Literal()
    vectors = Vectors(first, tmp_path)
    x = vectors.texts(["1 2 2", "3 0 4", "1 2 2"], "retrieval")
    np.testing.assert_allclose(x, [[1 / 3, 2 / 3, 2 / 3], [0.6, 0, 0.8], [1 / 3, 2 / 3, 2 / 3]], atol=1e-7)
    assert [text for _, _, text in first.asked] == ["1 2 2", "3 0 4"]
    again = Literal()
    assert (Vectors(again, tmp_path).texts(["3 0 4", "0 1 0", "1 2 2"], "retrieval")[[0, 2]] == x[1:]).all()
    assert [text for _, _, text in again.asked] == ["0 1 0"]


def test_other_prompts_are_other_vectors(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    embedder = Literal()
    vectors = Vectors(embedder, tmp_path / "cache")
    for text in ("<sent> one", "<sent> two", "<sent> one"):  # the file keeps its name and changes what it says
        mine.write_text(f"text = '{text}'\n")
        vectors.texts(["1 0 0"], str(mine))
    vectors.texts(["1 0 0"], "sts")
    assert [prompts for _, prompts, _ in embedder.asked] == [str(mine), str(mine), "sts"]


def test_pictures_are_known_by_content(tmp_path: Path) -> None:
    for name, colour in (("a.png", "red"), ("b.png", "red"), ("c.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    sources = [PhotoFile(name, tmp_path / name) for name in ("a.png", "bad.png", "b.png", "gone.png", "c.png")]
    embedder = Literal()
    x, bad = Vectors(embedder, tmp_path / "cache").pictures(sources, "retrieval")
    assert len(embedder.asked) == 2
    assert (x == [[1, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1]]).all()
    assert set(bad) == {1, 3}
    assert "not a picture" in bad[1]
    drawn = [Drawn("red", lambda: Image.new("RGB", (8, 8), "red")), Drawn("wide", lambda: Image.new("RGB", (16, 4), "red"))]
    Vectors(embedder, tmp_path / "cache").pictures(drawn, "retrieval")
    assert len(embedder.asked) == 4  # a drawing is known by its pixels, and by its shape


def test_raw_and_normalised_are_kept_apart(tmp_path: Path) -> None:
    source = Drawn("red", lambda: Image.new("RGB", (8, 8), "red"))
    vectors = Vectors(Literal(), tmp_path)
    assert vectors.composed([(source, "0 0 4")], "cirr", normalise=False).tolist() == [[0, 0, 12]]
    assert vectors.composed([(source, "0 0 4")], "cirr").tolist() == [[0, 0, 1]]


def test_what_is_no_number_is_refused_and_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no numbers"):
        Vectors(Literal(), tmp_path).texts(["nan 1 1"], "retrieval")
    embedder = Literal()
    with pytest.raises(ModelError):
        Vectors(embedder, tmp_path).texts(["nan 1 1"], "retrieval")
    assert embedder.asked


def test_a_text_that_is_too_long_is_named(tmp_path: Path) -> None:
    vectors = Vectors(Embedder.load("e5v-tiny", device="cpu"), tmp_path)
    with pytest.raises(TextTooLong, match="'long long"):
        vectors.texts(["short", "long " * 3000, "short again"], "retrieval")


PROGRAM = """
import sys
from pathlib import Path
from e5v_search.backbones import Embedder
from e5v_search.evaluation.vectors import Vectors
vectors = Vectors(Embedder.load("e5v-tiny", device="cpu"), Path(sys.argv[1]))
x = vectors.texts([f"{n} dogs" for n in range(600)], "retrieval")
print(vectors.embedded, *map(float, x.sum(axis=1)))
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    def run(folder: Path) -> "subprocess.Popen[str]":
        return subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT)

    killed = run(tmp_path / "cache")
    until = time.monotonic() + 120
    record = 32 + 4 * 256 + 4
    while sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.vectors")) < 4096 + 256 * record:
        assert killed.poll() is None
        assert time.monotonic() < until
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    embedded, *sums = run(tmp_path / "cache").communicate()[0].split()
    assert 0 < int(embedded) <= 600 - 256
    assert len(sums) == 600
    undisturbed = Embedder.load("e5v-tiny", device="cpu").embed_texts([f"{n} dogs" for n in range(0, 600, 50)])
    np.testing.assert_allclose(np.array(sums[::50], float), undisturbed.sum(axis=1), atol=1e-4)
