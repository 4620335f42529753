"""`index --ray`: two actors of a Ray cluster on this machine, started once for this file; and the shards that they write."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pictures
import pytest
from command_line import refused, run, write_photos

from e5v_search import Collection, Embedder, ModelChoice
from e5v_search.collection import engine
from e5v_search.collection.importing import import_folder
from e5v_search.collection.inputs import Input, Outcome, embed, prepare
from e5v_search.errors import ClusterError
from e5v_search.scale import cluster, shards
from e5v_search.scale.shards import Shards
from e5v_search.scale.team import Loaded, Task

PHOTOS = 40


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "cores", lambda: 2)
        with cluster._connected("local"):
            yield


@pytest.fixture(scope="module")
def tiny() -> Embedder:
    return Embedder.load("e5v-tiny", device="cpu")


def actors() -> list[int]:
    """Processes of actors at work: grandchildren of this one, named by Ray."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"ray::Embedding") and parent(
                parent(int(folder.name))
            ) == os.getpid():
                found.append(int(folder.name))
        except OSError:
            continue
    return sorted(found)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("[!.]*")}


def items(folder: Path, which: set[str]) -> int:
    return sum(int(json.loads((folder / name / "export.json").read_text())["items"]) for name in which)


def photo_inputs(paths: list[Path]) -> list[Input]:
    from e5v_search import media

    return [Input("image", media.content_hash(path), str(path)) for path in paths]


def write_shard(folder: Path, tiny: Embedder, paths: list[Path]) -> str:
    model = Loaded(tiny.fingerprint, tiny.dim, tiny.recalled_by)
    task = Task("image", photo_inputs(paths), ["retrieval"])
    name = shards.write(folder, model, task, embed(tiny, "image", [prepare(tiny, one) for one in task.inputs], task.of))
    assert name is not None
    return name


def test_actors_do_what_no_shard_holds_though_they_are_killed(
    ray: None, tiny: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "MAX_BATCH", 3)
    monkeypatch.setattr(cluster, "_FIRST_SHARD", 3)
    paths = write_photos(tmp_path / "photos", PHOTOS)
    (tmp_path / "photos/bad.jpg").write_bytes(pictures.BAD["truncated.jpg"][0]())
    folder, place = tmp_path / "shards", tmp_path / "many"
    (folder / ".killed.unfinished").mkdir(parents=True)
    before = {write_shard(folder, tiny, paths[i : i + 5]) for i in range(0, PHOTOS // 2, 5)}

    def kill() -> None:
        while len(names(folder)) == len(before):
            time.sleep(0.01)
        for pid in actors():  # only one may have begun
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    done = run("index", tmp_path / "photos", "-c", place, "--model", "e5v-tiny", "--ray", "local", "--shards", folder, "--json")
    killer.join()
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert report["added"] == PHOTOS
    [failed] = report["failed"]
    assert Path(failed["path"]).name == "bad.jpg"
    assert "truncated JPEG" in failed["reason"]
    died = [line for line in done.stderr.splitlines() if "died" in line]
    assert died
    assert all(line.startswith("a worker on the cluster (") for line in died)
    assert any(line.endswith("inputs that it held are done again") for line in died)
    made = names(folder) - before
    # what an actor had written but not told of when it was killed is there twice
    assert PHOTOS // 2 <= items(folder, made) <= PHOTOS // 2 + 6
    assert not (folder / ".killed.unfinished").exists()
    expected = tiny.embed_images(paths)
    with Collection.open(place) as c:
        assert c.verify() == []
        for path, vector in zip(paths, expected, strict=True):
            item = c.catalog.item_by_path(str(path))
            assert item is not None
            assert (item.width, item.height, item.format) == (60 + int(path.stem) % 7, 40 + int(path.stem) % 5, "JPEG")
            [(_, x)] = c.catalog.vectors(ids=[item.id])
            assert float(x[0].astype(np.float32) @ vector) > 0.999
    done_again = import_folder(folder / min(made), tmp_path / "imported")
    assert (done_again.items, done_again.fingerprint) == (items(folder, {min(made)}), tiny.fingerprint)


def test_pictures_can_be_prepared_on_other_cores(ray: None, tiny: Embedder, tmp_path: Path) -> None:
    """As where there are GPUs; here without an actor's process in between."""
    import ray as library

    given = photo_inputs(write_photos(tmp_path / "photos", 3))
    actor = cluster.Embedding(ModelChoice("e5v-tiny", device="cpu"), tmp_path)
    assert isinstance(actor.load(), Loaded)
    task = Task("image", given, ["cirr"])
    elsewhere = [library.remote(num_cpus=1)(cluster._prepare).remote(ModelChoice("e5v-tiny"), given[:2])]
    elsewhere.append(library.put(cluster._prepare(ModelChoice("e5v-tiny"), given[2:])))
    there, here = actor.embed(task, elsewhere), actor.embed(task, [])
    assert isinstance(there, cluster.Done)
    assert isinstance(here, cluster.Done)
    for one, other in zip(there.outcomes, here.outcomes, strict=True):
        assert one.vectors is not None
        assert other.vectors is not None
        np.testing.assert_allclose(one.vectors["cirr"], other.vectors["cirr"], atol=1e-5)
    assert names(tmp_path) == {"photos"}, "a later view alone is no export"


def test_shards_give_back_what_was_written(tiny: Embedder, tmp_path: Path) -> None:
    model = Loaded(tiny.fingerprint, tiny.dim, tiny.recalled_by)
    odd = tmp_path / os.fsdecode(b"no utf-8 \xff.jpg")
    write_photos(tmp_path, 1)[0].rename(odd)
    inputs = [*photo_inputs([odd]), Input("image", "gone", str(tmp_path / "gone.jpg"))]
    task = Task("image", inputs, ["retrieval", "cirr"])
    outcomes = embed(tiny, "image", [prepare(tiny, one) for one in inputs], task.of)
    folder = tmp_path / "shards"
    notes: list[str] = []
    written = shards.write(Shards(folder, notes.append).folder, model, task, outcomes)
    [good, bad] = Shards(folder, notes.append).outcomes(written, [None, "no such file or directory"])
    assert bad == Outcome(problem="no such file or directory")
    assert good.facts == outcomes[0].facts
    for found, of in ((good, task.of), (Shards(folder, notes.append).find(model, inputs[0], ["retrieval"]), ["retrieval"])):
        assert found is not None
        assert found.vectors is not None
        assert list(found.vectors) == of
        assert outcomes[0].vectors is not None
        for view in of:
            np.testing.assert_array_equal(found.vectors[view], outcomes[0].vectors[view].astype(np.float16))
    again = Shards(folder, notes.append)
    assert again.find(model, inputs[1], ["retrieval"]) is None
    assert again.find(model, inputs[0], ["retrieval", "sts"]) is None
    assert again.find(Loaded("another", 2, {}), inputs[0], ["retrieval"]) is None
    assert notes == []
    assert written is not None
    (folder / written / "items.parquet").write_bytes(b"PAR1")
    assert Shards(folder, notes.append).find(model, inputs[0], ["retrieval"]) is None
    assert len(notes) == 1
    assert "is embedded again" in notes[0]
    assert shards.write(folder, model, Task("image", inputs[1:], task.of), outcomes[1:]) is None


def test_the_command_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos(tmp_path / "photos", 1)
    asked = ("index", tmp_path / "photos", "-c", tmp_path / "c", "--model", "e5v-tiny")
    said = refused(3, *asked, "--ray", "127.0.0.1:9")
    assert "nothing answers at 127.0.0.1:9 (" in said
    assert "ray start --head" in said
    assert "give HOST:PORT, auto or local" in refused(3, *asked, "--ray", "nonsense")
    assert not (tmp_path / "c").exists()
    for more in (["--device", "cpu"], ["--devices", "cpu"], ["--watch"]):
        assert run(*asked, "--ray", "local", *more).exit_code == 2
    assert run(*asked, "--shards", tmp_path).exit_code == 2
    for address in ("127.0.0.1:x", "127.0.0.1:99999999", ":1"):
        with pytest.raises(ClusterError):
            cluster.reach(address)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert refused(3, *asked, "--ray", "local") == "Error: a cluster needs Ray: pip install 'e5v-search[ray]'"
