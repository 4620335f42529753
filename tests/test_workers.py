"""Several workers at one ingestion: the team by itself, with workers of a few lines that die as told; then real processes."""

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pictures
import pytest
import replica
import torch
from command_line import write_photos
from hypothesis import given
from hypothesis import strategies as st

from e5v_search import Collection, ModelChoice, Report
from e5v_search.backbones.checkpoint import all_devices
from e5v_search.collection import engine
from e5v_search.collection.engine import Pace
from e5v_search.collection.inputs import Input, Outcome
from e5v_search.errors import FingerprintMismatch, ModelError, UsageError
from e5v_search.scale import processes
from e5v_search.scale.team import Done, Event, Gone, Loaded, Task, Team, Tell

MODEL = Loaded("model@1", 2, {"name": "a-model"})


class Scripted:
    """A worker of this very process, which dies over the inputs in `poison`, and whenever the script of all says so."""

    def __init__(self, tell: Tell, poison: set[str], script: Iterator[bool], said: list[str], first: Event = MODEL) -> None:
        self._tell, self._poison, self._script, self._said = tell, poison, script, said
        self._dead = isinstance(first, Gone)
        tell(self, first)

    def send(self, task: Task) -> None:
        if self._dead:
            return
        texts = [one.text or "" for one in task.inputs]
        if self._poison & set(texts) or next(self._script, False):
            self._dead = True
            self._tell(self, Gone("was killed by signal 9"))
            return
        self._said += texts
        self._tell(self, Done([outcome(text) for text in texts], 0.0))

    def close(self) -> None:
        self._dead = True


def outcome(text: str) -> Outcome:
    return Outcome({"retrieval": np.full(2, int(text))})


def texts(n: int) -> list[str]:
    return [str(i) for i in range(n)]


def of_text(text: str) -> Input:
    return Input("text", text, text=text)


def through(team: Team, items: list[str]) -> list[tuple[str, Outcome]]:
    with team, closing(team.embedded("text", iter(items), of_text, ["retrieval"])) as done:
        return [pair for some in done for pair in some]


@given(
    n=st.integers(0, 40),
    workers=st.integers(1, 4),
    size=st.integers(1, 16),
    poison=st.sets(st.integers(0, 39), max_size=2),
    script=st.lists(st.booleans(), max_size=3),
    known=st.sets(st.integers(0, 39), max_size=10),
)
def test_every_input_has_its_outcome_whoever_dies(
    n: int, workers: int, size: int, poison: set[int], script: list[bool], known: set[int]
) -> None:
    deadly = {str(i) for i in poison - known}
    told, notes = iter(script), []  # type: ignore[var-annotated]
    said: list[str] = []
    team = Team(
        ModelChoice("a-model"),
        ["here"] * workers,
        lambda place, choice, tell: Scripted(tell, deadly, told, said),
        notes.append,
        lambda: Pace(size=size),
        lambda model, given, of: outcome(given.text or "") if int(given.text or "") in known else None,
    )
    found = through(team, texts(n))
    assert [item for item, _ in found] == texts(n), "in the order of the items"
    failed = {item for item, one in found if one.vectors is None}
    assert deadly & set(texts(n)) <= failed
    # two deaths by chance over one input, once it goes by itself, cannot be told from its own doing
    assert len(failed - deadly) <= sum(script) // 2
    assert all(one.vectors["retrieval"][0] == int(item) for item, one in found if one.vectors is not None)
    assert all("died" in (one.problem or "") for _, one in found if one.vectors is None)
    assert not set(said) & {str(i) for i in known}
    assert max(Counter(said).values(), default=1) == 1, "what was answered is not asked again"


def test_a_place_where_workers_only_die_is_given_up() -> None:
    notes: list[str] = []
    began = Counter[str]()

    def begin(place: str, choice: ModelChoice, tell: Tell) -> Scripted:
        began[place] += 1
        return Scripted(tell, set(), iter(()), [], Gone("was killed by signal 9") if place == "bad" else MODEL)

    assert all(one.vectors for _, one in through(Team(ModelChoice("m"), ["bad", "good"], begin, notes.append), texts(300)))
    assert began["bad"] <= 4
    with pytest.raises(ModelError, match="no worker is left: 4 in a row died on bad, the last was killed by signal 9"):
        through(Team(ModelChoice("m"), ["bad", "bad"], begin, notes.append), texts(3))


def test_nothing_is_started_for_nothing_and_auto_is_found_out_once() -> None:
    asked: list[str] = []

    def begin(place: str, choice: ModelChoice, tell: Tell) -> Scripted:
        asked.append(choice.name)
        return Scripted(tell, set(), iter(()), [])

    assert through(Team(ModelChoice(), ["a", "b"], begin, print), []) == []
    assert asked == []
    assert len(through(Team(ModelChoice(), ["a", "b"], begin, print), texts(200))) == 200
    assert asked == ["auto", "a-model"]


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (Gone(ModelError("device 'cuda' cannot be used")), "b: device 'cuda' cannot be used"),
        (Loaded("model@2", 2, {"name": "a-model"}), "b has loaded model@2, others model@1"),
    ],
)
def test_a_worker_that_cannot_begin_ends_the_run(others: Event, message: str) -> None:
    def begin(place: str, choice: ModelChoice, tell: Tell) -> Scripted:
        return Scripted(tell, set(), iter(()), [], MODEL if place == "a" else others)

    with pytest.raises(ModelError, match=message):
        through(Team(ModelChoice("m"), ["a", "b"], begin, print), texts(200))


# processes


@pytest.fixture(scope="module")
def choice(tmp_path_factory: pytest.TempPathFactory) -> ModelChoice:
    return ModelChoice(str(replica.build(tmp_path_factory.mktemp("model"))[0]), dtype="float32")


@pytest.fixture(scope="module")
def notes() -> list[str]:
    return []


@pytest.fixture(scope="module")
def team(choice: ModelChoice, notes: list[str]) -> Iterator[Team]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with processes.team(choice, ["cpu", "cpu"], notes.append) as found:
            yield found


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos", 30)
    pictures.write_bad(tmp_path / "photos/bad")
    return tmp_path / "photos"


def pids() -> set[int]:
    """Of the workers that this process has."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"e5v_search.scale.worker" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
        except OSError:
            continue
    return found


def held(c: Collection) -> dict[tuple[str, str], tuple[int, bytes]]:
    """(path, view) -> id and vector"""
    found = {}
    for view in c.catalog.views:
        for ids, x in c.catalog.vectors(view=view):
            items = c.catalog.items(ids.tolist())
            found |= {(str(items[i].path), view): (i, row.tobytes()) for i, row in zip(ids.tolist(), x, strict=True)}
    return found


@pytest.mark.usefixtures("one_thread")
def test_two_processes_make_what_one_makes_though_one_is_killed(
    choice: ModelChoice, team: Team, notes: list[str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "MAX_BATCH", 1)  # the same batches, and the same threads, for the same sums
    killed: list[int] = []

    def kill(report: Report, total: int) -> None:
        if report.added >= 5 and not killed:
            killed.append(sorted(pids())[0])
            os.kill(killed[0], signal.SIGKILL)

    with Collection.open(tmp_path / "one", choice) as one, Collection.open(tmp_path / "two", choice) as two:
        two.embed_with(team)
        alone = one.ingest([photos], views=["cirr"])
        together = two.ingest([photos], views=["cirr"], on_progress=kill)
        assert killed
        assert held(two) == held(one)
        assert (together.added, sorted(together.failed, key=str)) == (alone.added, sorted(alone.failed, key=str))
        assert alone.added == 30
        assert len(alone.failed) == len(pictures.BAD)
        assert two.verify() == []
        lines = [line for line in notes if "killed by signal 9" in line]
        assert len(lines) == 1, notes
        assert "a worker on cpu was killed by signal 9" in lines[0]
        # and again, with nothing to do and with texts: the team is still there
        assert two.ingest([photos], views=["cirr"]).unchanged == 30
        (tmp_path / "texts.txt").write_text("a dog\na cat\n")
        assert two.ingest([tmp_path / "texts.txt"], "text").added == 2


def test_workers_of_another_model_are_refused(choice: ModelChoice, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1\n")
    (tmp_path / "b.txt").write_text("2\n")
    with Collection.open(tmp_path / "c", choice) as c:
        c.ingest([tmp_path / "a.txt"], "text")
        c.embed_with(Team(choice, ["here"], lambda place, model, tell: Scripted(tell, set(), iter(()), []), print))
        with pytest.raises(FingerprintMismatch, match=r"was made by local@.* but the model here is model@1"):
            c.ingest([tmp_path / "b.txt"], "text")
        assert c.status()["items"]["text"] == 1


@pytest.mark.parametrize("devices", ["", "cuda:x", "cpu,tpu", "cpu,,cpu"])
def test_devices_that_are_none(devices: str) -> None:
    with pytest.raises(UsageError, match="devices must be auto, or cpu, mps, cuda or cuda:N"):
        processes.parse(devices)


def test_devices() -> None:
    assert processes.parse("cuda:0, cuda:1") == ["cuda:0", "cuda:1"]
    assert processes.parse("auto") == all_devices()


def test_a_gpu_is_all_that_its_worker_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    seen = {name: processes._seen_alone(name) for name in ("cuda:0", "cuda:1", "cuda:2", "cuda", "cpu")}
    assert [(env["CUDA_VISIBLE_DEVICES"], name) for env, name in seen.values()] == [
        ("2", "cuda"), ("5", "cuda"), ("2,5", "cuda:2"), ("2,5", "cuda"), ("2,5", "cpu"),
    ]  # fmt: skip
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    env, name = processes._seen_alone("cuda:1")
    assert (env["CUDA_VISIBLE_DEVICES"], name) == ("1", "cuda")


def test_a_stopped_run_leaves_no_worker(team: Team, photos: Path, choice: ModelChoice, tmp_path: Path) -> None:
    stopped: list[threading.Timer] = []

    def stop(report: Report, total: int) -> None:
        if report.added >= 3 and not stopped:
            stopped.append(threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)))
            stopped[0].start()

    write_photos(photos, 400)
    with Collection.open(tmp_path / "c", choice) as c:
        c.embed_with(team)
        with pytest.raises(KeyboardInterrupt):
            c.ingest([photos], on_progress=stop)
        assert 3 <= c.status()["items"]["image"] < 400
        assert c.verify() == []
    assert pids() == set()


def test_a_worker_ends_when_nobody_is_there() -> None:
    command = [sys.executable, "-c", processes._PROGRAM, *sys.path]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 1
