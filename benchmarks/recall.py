"""Metrics from vectors: COCO's 25,000 captions and 5,000 pictures both ways, and a gallery of a million.

    python benchmarks/recall.py [--dims 256 1024 4096] [--million 1000000x256]

Every case runs in a process of its own, whose largest memory is what is written down, the vectors themselves included.
Writes benchmarks/results/recall.json.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np
from machine import save

from e5v_search.evaluation import modality_gap
from e5v_search.evaluation.bootstrap import intervals
from e5v_search.evaluation.metrics import Outcome, Ranked
from e5v_search.evaluation.ranks import positive_ranks, ranks_both_ways

QUERIES = 1_000  # of the large gallery


def vectors(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Rows of length 1, made block by block: the largest memory must be that of the metrics."""
    x = np.empty((n, d), np.float32)
    for block in (x[i : i + 10_000] for i in range(0, n, 10_000)):
        rng.standard_normal(out=block, dtype=np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return x


def near(rng: np.random.Generator, x: np.ndarray, noise: float) -> np.ndarray:
    """Rows around those of x, in place."""
    for i in range(0, len(x), 1_000):
        block = x[i : i + 1_000]
        block += vectors(rng, len(block), x.shape[1]) * noise
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return x


def coco(d: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    xi = vectors(rng, 5_000, d)
    xt = near(rng, np.repeat(xi, 5, axis=0), 3.0)
    processor, start = time.process_time(), time.perf_counter()
    t2i, i2t = ranks_both_ways(xt, xi, [(i // 5,) for i in range(len(xt))])
    parts = {"t2i": Ranked(t2i), "i2t": Ranked(i2t)}
    metrics = Outcome(parts).metrics()
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    start = time.perf_counter()
    intervals(Outcome(parts))
    bootstrap = time.perf_counter() - start
    start = time.perf_counter()
    modality_gap(xi, xt)
    return {
        "case": f"25,000 × 5,000, both ways, d = {d}",
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor, 2),
        "bootstrap_seconds": round(bootstrap, 2),
        "gap_seconds": round(time.perf_counter() - start, 2),
        "t2i_r@5": round(metrics["t2i_r@5"], 2),
    }


def million(m: int, d: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    xb = vectors(rng, m, d)
    right = rng.choice(m, QUERIES, replace=False)
    xq = near(rng, xb[right], 2.0)
    processor, start = time.process_time(), time.perf_counter()
    metrics = Outcome({"": Ranked(positive_ranks(xq, xb, [(int(i),) for i in right]))}).metrics()
    return {
        "case": f"{QUERIES:,} × {m:,}, d = {d}",
        "seconds": round(time.perf_counter() - start, 2),
        "processor_seconds": round(time.process_time() - processor, 2),
        "vectors_mb": round((xb.nbytes + xq.nbytes) / 1e6),
        "r@5": round(metrics["r@5"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--million", default="1000000x256")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        kind, *numbers = args.case.split("x")
        row = coco(int(numbers[0])) if kind == "coco" else million(*map(int, numbers))
        row["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
        print(json.dumps(row))
        return
    rows = []
    for case in [*(f"cocox{d}" for d in args.dims), f"millionx{args.million}"]:
        done = subprocess.run([sys.executable, __file__, "--case", case], stdout=subprocess.PIPE, check=True)
        rows.append(json.loads(done.stdout))
        print(rows[-1])
    command = f"python benchmarks/recall.py --dims {' '.join(map(str, args.dims))} --million {args.million}"
    save("recall", {"command": command, "rows": rows})


if __name__ == "__main__":
    main()
