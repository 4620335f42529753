"""kill -9 at random moments of an index run, over photos and texts: nothing committed is lost, embedded twice or damaged."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import replica
from PIL import Image

from e5v_search import Collection, Embedder

PHOTOS = 1000
KILLS = 24
TEXTS = 800
TEXT_KILLS = 6

# A process that has everything imported and forks a child for each run, so that a run can be killed in any of its
# moments and not mostly in its imports. Commits come often, so that there is something to lose at every moment.
ZYGOTE = """
import os, sys
import torch, faiss
torch.set_num_threads(1); faiss.omp_set_num_threads(1)
from e5v_search import Collection, ModelChoice
from e5v_search.collection import ingest
ingest.COMMIT_SECONDS = 0.02
source, kind, place, model = sys.argv[1:]
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        with Collection.open(place, ModelChoice(model, device="cpu", dtype="float32")) as c:
            c.ingest([source], kind)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""

SUICIDE = """
import os, signal, sys
from e5v_search import Collection
source, place = sys.argv[1:]
def stop(report, total):
    if report.added > 20:
        os.kill(os.getpid(), signal.SIGKILL)
with Collection.open(place) as c:
    c.ingest([source], "text", on_progress=stop)
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(PHOTOS):
        sub = folder / f"{i // 100:02d}"
        sub.mkdir(exist_ok=True)
        height, width = rng.integers(20, 90, 2)
        coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(sub / f"{i:04d}.jpg", quality=85)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return replica.build(tmp_path_factory.mktemp("model"))[0]


def committed(place: Path) -> dict[int, tuple[int, bytes]]:
    """What a reader of the database sees: item id -> (state of its vector, vector)."""
    with sqlite3.connect(f"file:{place / 'catalog.sqlite'}?mode=ro", uri=True) as db:
        return {i: (state, x) for i, state, x in db.execute("SELECT item_id, state, embedding FROM vectors")}


def kill_until_done(source: Path, kind: str, n: int, place: Path, model: Path, kills: int) -> None:
    """Runs over the `n` photos or texts of `source`, killed at random moments and looked at, until one comes to its end."""
    rng = random.Random(7)
    zygote = subprocess.Popen(
        [sys.executable, "-c", ZYGOTE, str(source), kind, str(place), str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert zygote.stdin is not None
    assert zygote.stdout is not None

    def start() -> int:
        assert zygote.stdin is not None
        assert zygote.stdout is not None
        zygote.stdin.write("\n")
        zygote.stdin.flush()
        return int(zygote.stdout.readline())

    killed, before, longest = 0, {}, 0.3
    try:
        while True:
            began = time.monotonic()
            pid = start()
            if killed < kills:
                time.sleep(rng.uniform(0, longest))
                os.kill(pid, signal.SIGKILL)  # not reaped yet if it has ended: no stranger can have its number
            status = int(zygote.stdout.readline())
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0
                if killed >= kills:
                    break
                longest = max(0.05, (time.monotonic() - began) * 0.8)
            killed += os.WIFSIGNALED(status)
            if not (place / "catalog.sqlite").exists():
                continue
            now = committed(place)
            assert before.items() <= now.items(), "something committed was lost or embedded again"
            before = now
            with Collection.open(place) as c:
                assert c.verify() == []
            if len(now) == n and killed < kills:
                before = {}
                for file in place.iterdir():  # all done before enough kills: begin anew
                    file.unlink()
    finally:
        zygote.stdin.close()
        zygote.wait(30)


def test_killed_runs_lose_no_photo(photos: Path, model: Path, tmp_path: Path) -> None:
    place = tmp_path / "killed"
    kill_until_done(photos, "image", PHOTOS, place, model, KILLS)
    embedder = Embedder.load(str(model), device="cpu", dtype="float32")
    with Collection.open(tmp_path / "calm", embedder) as calm, Collection.open(place, embedder) as killed:
        report = calm.ingest([photos])
        assert (report.added, report.failed) == (PHOTOS, [])
        assert killed.status()["items"]["image"] == PHOTOS
        assert killed.verify() == []
        for query in ("a dog on the grass", "red", "two children"):
            expected, got = ({hit.path: hit.score for hit in c.search(query, k=PHOTOS)} for c in (calm, killed))
            assert got.keys() == expected.keys()
            # batches were cut elsewhere: sums in another order, nothing more
            assert max(abs(got[path] - expected[path]) for path in got) < 2e-3


def test_killed_runs_lose_no_text(model: Path, tmp_path: Path) -> None:
    place, source = tmp_path / "killed", tmp_path / "texts.txt"
    texts = [f"text {n} of them" for n in range(TEXTS)]
    source.write_text("\n".join(texts))
    kill_until_done(source, "text", TEXTS, place, model, TEXT_KILLS)
    before = committed(place)
    # lines of before in another order, some of them new: kills while the file is compared
    changed = [f"new {n}" for n in range(TEXTS // 2)] + texts[: TEXTS // 4 : -1]
    source.write_text("\n".join(changed))
    os.utime(source, ns=(1, 1))  # a file system's clock may be coarser than this test is fast
    stopped = subprocess.run([sys.executable, "-c", SUICIDE, str(source), str(place)], check=False)
    assert stopped.returncode == -signal.SIGKILL
    with Collection.open(place) as c:
        assert c.verify() == []
        report = c.ingest([source], "text")
        assert report.failed == []
        assert c.verify() == []
        held = {row.part: row.item_id for row in c.catalog.parts(str(source), "text")}
        items = c.catalog.items(held.values())
        assert [items[held[str(n)]].text for n in range(1, len(changed) + 1)] == changed
        assert len(held) == len(changed)
    now = committed(place)
    same = [items[i].text for i in before.keys() & now.keys() if before[i] == now[i]]
    assert set(texts) & set(changed) <= set(same), "a text that stayed was embedded again"
