"""How soon `index --watch` brings a change into the results, and what it costs while nothing happens.

    python benchmarks/watch.py PHOTOS [--changes 20]

A copy of the folder PHOTOS is followed by a process of its own. Its photos are put into the collection with made-up
vectors, as only the number of them matters here; the photos that the benchmark adds are embedded by e5v-tiny. Seconds from
the end of a file operation to the moment in which another process finds its outcome in the catalog; processor seconds and
memory of the watching process. Written to benchmarks/results/watch.json.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from machine import save

from e5v_search import Collection, Embedder
from e5v_search.catalog import Catalog, Put
from e5v_search.media import Scan, content_hash


def fill(place: Path, photos: Path) -> int:
    embedder = Embedder.load("e5v-tiny")
    rng = np.random.default_rng(0)

    def puts() -> Iterator[Put]:
        for i, found in enumerate(Scan([photos]), start=1):
            x = rng.normal(size=embedder.dim)
            yield Put(
                kind="image",
                content_hash=content_hash(found.path),
                path=found.path,
                size=found.size,
                mtime_ns=found.mtime_ns,
                item_id=i,
                vectors={"retrieval": x / np.linalg.norm(x)},
            )

    with Collection.open(place) as c:
        model = {"name": embedder.name, "quantize": embedder.quantize}
        return c.load(puts(), embedder.fingerprint, embedder.dim, model, [], [(str(photos), "image")])


def seconds_until(what: Callable[[], bool]) -> float:
    start = time.perf_counter()
    while not what():
        time.sleep(0.01)
    return time.perf_counter() - start


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(seconds), 2), "most": round(max(seconds), 2)}


def measure(place: Path, photos: Path, others: list[Path], pid: int) -> dict[str, Any]:
    catalog = Catalog.open(place)

    def known(path: Path) -> str | None:
        row = catalog.known([str(path)]).get(str(path))
        return row and row.content_hash

    def processor_seconds() -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().split()
        return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")

    seconds: dict[str, list[float]] = {"added": [], "changed": [], "renamed": [], "deleted": []}
    shutil.copy(others[0], photos / "first.jpg")
    loading = seconds_until(lambda: known(photos / "first.jpg") is not None)
    for i, other in enumerate(others[1:-1], start=1):
        path, renamed = photos / f"new {i}.jpg", photos / f"renamed {i}.jpg"
        shutil.copy(other, path)
        seconds["added"].append(seconds_until(lambda p=path: known(p) is not None))  # type: ignore[misc]
        before = known(path)
        shutil.copy(others[i + 1], path)
        seconds["changed"].append(seconds_until(lambda p=path, b=before: known(p) != b))  # type: ignore[misc]
        path.rename(renamed)
        seconds["renamed"].append(seconds_until(lambda p=renamed: known(p) is not None))  # type: ignore[misc]
        renamed.unlink()
        seconds["deleted"].append(seconds_until(lambda p=renamed: known(p) is None))  # type: ignore[misc]
    time.sleep(40)  # the index is saved meanwhile
    before_idle = processor_seconds()
    time.sleep(30)
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "first_change_with_loading_the_model_s": round(loading, 2),
        **{f"{name}_s": spread(each) for name, each in seconds.items()},
        "idle_processor_share": round((processor_seconds() - before_idle) / 30, 4),
        "resident_mb": round(int(status["VmRSS"].split()[0]) / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--changes", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        photos, place = Path(scratch) / "photos", Path(scratch) / "collection"
        sources = sorted(args.photos.iterdir())
        held_back = sources[: args.changes + 2]
        photos.mkdir()
        for path in sources[args.changes + 2 :]:
            shutil.copy2(path, photos)
        n = fill(place, photos)
        command = [sys.executable, "-m", "e5v_search", "index", "-c", str(place), "--watch", "--json"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        assert first["unchanged"] == n, first
        try:
            result = measure(place, photos, held_back, process.pid)
        finally:
            process.terminate()
            process.communicate()
    result = {"photos": n, "first_look_s": round(first["seconds"], 2), **result}
    print(json.dumps(result, indent=2))
    save("watch", result)


if __name__ == "__main__":
    main()
