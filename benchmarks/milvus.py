"""An index in milvus-lite, served over TCP on this machine, beside the exact index in memory, over the same collection.

    OMP_NUM_THREADS=1 python benchmarks/milvus.py [--items 4000] [--dim 4096] [--queries 20]

Says how fast rows are sent, what a resend costs, how long searches take with and without filters, and whether all answers
are the same. Writes benchmarks/results/milvus.json. milvus-lite is for tests: nothing here tells of a cluster.
"""

import argparse
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from machine import arguments, save

from e5v_search.catalog import VIEW, Catalog, Put
from e5v_search.collection import narrow
from e5v_search.collection.indexes import Indexes
from e5v_search.collection.remote import CatalogSource
from e5v_search.filters import EVERYTHING, parse
from e5v_search.index import FlatIndex, Recipe

K = 10
FILTERS = {"none": EVERYTHING, "answered by Milvus": parse(["width<500"]), "answered by the catalog": parse(["path~/07/"])}


def filled(folder: Path, n: int, d: int) -> Catalog:
    rng = np.random.default_rng(0)
    catalog = Catalog.create(folder)
    catalog.bind("drawn", d, {})
    centres = rng.standard_normal((100, d))
    for start in range(0, n, 1000):
        x = centres[rng.integers(0, 100, min(1000, n - start))] + rng.standard_normal((min(1000, n - start), d))
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        catalog.commit(
            [
                Put(
                    kind="image",
                    content_hash=str(i),
                    path=f"/photos/{i % 100:02d}/{i}.jpg",
                    width=i % 1000,
                    height=300,
                    vectors={VIEW: row.astype(np.float32)},
                )
                for i, row in enumerate(x, start=start)
            ]
        )
    return catalog


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def served(folder: Path) -> tuple["subprocess.Popen[bytes]", int]:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    program = [sys.executable, "-c", "from milvus_lite.cmdline import main; main()", "server", "--host", "127.0.0.1"]
    process = subprocess.Popen([*program, "--port", str(port), "--data-dir", str(folder)], stdout=subprocess.DEVNULL)
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return process, port


def memory(pid: int) -> int:
    """Resident bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=4000)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, filled(Path(folder, "c"), given.items, given.dim) as catalog:
        process, port = served(Path(folder, "served"))
        try:
            result = measured(catalog, port, given.queries) | {"server MB": round(memory(process.pid) / 1e6)}
        finally:
            process.kill()
            process.wait()
    result = {"arguments": arguments(sys.argv[1:]), "items": given.items, "dim": given.dim} | result
    result["milvus"] = {name: version(name) for name in ("milvus-lite", "pymilvus")}
    for name, value in result.items():
        print(f"{name}: {value}")
    print(save("milvus", result))


def measured(catalog: Catalog, port: int, queries: int) -> dict[str, Any]:
    flat = FlatIndex.build(catalog.dim or 1, catalog.vectors())
    recipe = Recipe("milvus", store=f"milvus://127.0.0.1:{port}/drawn")
    catalog.choose_recipe({"recipe": recipe.to_json(), "why": "measured"})
    indexes = Indexes(catalog, nullcontext)
    sending, _ = seconds(indexes.sync)
    # as a search does that finds the file lost: what is there is asked for, and kept
    indexes.path().unlink()
    again, _ = seconds(lambda: Indexes(catalog, nullcontext).sync())
    index = indexes.current()
    rng = np.random.default_rng(1)
    xq = np.concatenate([x for _, x in catalog.vectors()])[rng.integers(0, catalog.size(), queries)].astype(np.float32)
    xq += 0.5 * rng.standard_normal(xq.shape).astype(np.float32) / np.sqrt(xq.shape[1])
    sample = catalog.sample(400)
    rows = statistics.median(seconds(lambda: CatalogSource(catalog, VIEW).rows(sample))[0] for _ in range(9))
    searches: dict[str, Any] = {"rows of 400 candidates from the catalog, ms": round(1e3 * rows, 1)}
    for name, where in FILTERS.items():
        times: dict[str, list[float]] = {"milvus": [], "memory": []}
        same = 0
        for row in xq:
            found = {}
            for kind, each in (("milvus", index), ("memory", flat)):
                took, found[kind] = seconds(partial(narrow.search, each, catalog, row, K, where))
                times[kind].append(1e3 * took)
            same += all(np.array_equal(a, b) for a, b in zip(found["milvus"], found["memory"], strict=True))
        searches[name] = {f"{kind} ms": round(statistics.median(each), 1) for kind, each in times.items()}
        searches[name]["same answers"] = f"{same} of {queries}"
    return {"rows a second": round(catalog.size() / sending), "nothing to send, s": round(again, 2), "searches": searches}


if __name__ == "__main__":
    main()
