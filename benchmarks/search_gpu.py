"""Exact search on GPUs beside the time in which they read the rows once, and the other kinds of index there.

    python benchmarks/search_gpu.py [--size 1000000x4096] [--kinds gpu gpu-ivf gpu-cagra] [--out search-gpu]

A read of the rows is their bytes by the rate at which the first GPU copies, reading and writing counted. Times are by the
clock, of queries that come from the processor to answers that are there again, with their exact scores: of one, and of 64
together. The kind `torch` is what serves where FAISS has no GPU. Without a GPU all of it runs on the processor, and says so.
"""

import argparse
import json
import logging
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from machine import arguments, save
from search import BLOCK, NQ, K, drawn, nearest, recall

from e5v_search.index import Index, Recipe, Stamp, build, load
from e5v_search.index.recipe import ON_GPUS
from e5v_search.index.torch_rows import TorchRows, devices

BATCHES = (1, 64)
COPIED = 1 << 30  # bytes, or what a processor copies soon


def milliseconds(run: Callable[[], Any], times: int) -> float:
    """The median, once it has run."""
    run()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken)


def copy_rate(device: str) -> float:
    """Bytes a second, read and written."""
    x = torch.ones(COPIED if device != "cpu" else COPIED // 16, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)

    def copy() -> None:
        y.copy_(x)
        if x.is_cuda:
            torch.cuda.synchronize(device)

    return 2 * len(x) / (milliseconds(copy, 20) / 1e3)


class Said(logging.Handler):
    """What the index says of the GPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def timed(search: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]], xq: np.ndarray, read_ms: float) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for batch in BATCHES:
        turns = iter(range(10**9))
        taken = milliseconds(lambda batch=batch, turns=turns: search(np.roll(xq, next(turns), axis=0)[:batch], 10), 30)
        row |= {f"ms_batch_{batch}": round(taken, 3), f"reads_batch_{batch}": round(taken / read_ms, 2)}
    return row


def kind_of(kind: str, xb: np.ndarray, folder: Path, said: Said) -> tuple[dict[str, Any], Index]:
    """How long it takes to build, and to open with a first search, which brings the rows to the GPUs."""
    n, d = xb.shape
    path, ids = folder / "index.faiss", np.arange(n, dtype=np.int64)
    said.lines.clear()
    start = time.perf_counter()
    made = build(path, Recipe(kind), d, ((ids[i : i + BLOCK], xb[i : i + BLOCK]) for i in range(0, n, BLOCK)))
    made.stamp = Stamp("benchmark", 1)
    made.save(path)
    built = time.perf_counter()
    del made
    index = load(path)
    index.search(xb[:1].astype(np.float32), 10)
    seconds = {"build_s": round(built - start, 1), "open_s": round(time.perf_counter() - built, 1)}
    return {"kind": kind} | seconds | {"said": list(said.lines)}, index


def rows(size: str, kinds: list[str], folder: Path, said: Said) -> Iterator[dict[str, Any]]:
    n, d = map(int, size.split("x"))
    xb, xq = drawn(n, d, folder / "vectors.npy")
    truth = nearest(xb, xq)
    gpus = devices() or ["cpu"]
    rate = copy_rate(gpus[0]) * len(gpus)
    read_ms = 1e3 * 2 * d * n / rate
    yield {"kind": "one read", "n": n, "d": d, "gb_per_s": round(rate / 1e9), "ms": round(read_ms, 3), "queries": NQ}
    for kind in kinds:
        row, index = kind_of(kind, xb, folder, said)
        yield row | recall(index.search(xq, K)[1], truth) | timed(index.search, xq, read_ms)
        if kind == "gpu":
            own = TorchRows(index._scan.rows, gpus)  # type: ignore[attr-defined]
            row = {"kind": "torch", "said": gpus} | recall(own.search(xq, K)[1], truth)
            yield row | timed(own.search, xq, read_ms)
            del own
        del index
        for file in folder.glob("index.faiss*"):
            file.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1000000x4096")
    parser.add_argument("--kinds", nargs="+", default=list(ON_GPUS), choices=ON_GPUS)
    parser.add_argument(
        "--folder", type=Path, help="where there is room for the vectors twice; else the system's temporary folder"
    )
    parser.add_argument("--out", default="search-gpu")
    args = parser.parse_args()
    said = Said()
    log = logging.getLogger("e5v_search")
    log.addHandler(said)
    log.setLevel(logging.INFO)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    done = []
    try:
        for row in rows(args.size, args.kinds, folder, said):
            done.append(row)
            print(json.dumps(row), flush=True)
    finally:
        shutil.rmtree(folder)
    command = f"python benchmarks/search_gpu.py {arguments(sys.argv[1:])}".strip()
    names = [torch.cuda.get_device_name(n) for n in range(len(devices()))]
    save(args.out, {"command": command, "gpus": names, "of_faiss": faiss.get_num_gpus(), "rows": done})


if __name__ == "__main__":
    main()
