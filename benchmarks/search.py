"""The flat index: size, build, load, recall and latency, at several sizes.

    python benchmarks/search.py [--sizes 10000x256 100000x256 20000x4096]

Writes benchmarks/results/search.json and prints the rows of indexes/README.md.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import save

from e5v_search.index import Index


def unit(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Rows of low intrinsic dimension, so that neighbours mean something."""
    x = rng.standard_normal((n, 32), dtype=np.float32) @ rng.standard_normal((32, d), dtype=np.float32)
    x += 0.5 * rng.standard_normal((n, d), dtype=np.float32)
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def milliseconds(run: Any, repeat: int) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def measure(n: int, d: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    xb, xq = unit(rng, n, d), unit(rng, 64, d)
    ids = np.arange(n, dtype=np.int64)
    start = time.perf_counter()
    index = Index.build(d, ((ids[i : i + 4096], xb[i : i + 4096].astype(np.float16)) for i in range(0, n, 4096)))
    build = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.faiss"
        index.save(path)
        size = path.stat().st_size
        load = milliseconds(lambda: Index.load(path), 3)
    truth = np.argsort(-(xq @ xb.T), axis=1, kind="stable")[:, :10]
    _, found = index.search(xq, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(truth, found, strict=True)])
    return {
        "n": n,
        "d": d,
        "file_mb": round(size / 1e6, 1),
        "build_s": round(build, 2),
        "load_ms": round(load, 1),
        "recall_at_10": round(float(recall), 4),
        "ms_batch_1": round(milliseconds(lambda: index.search(xq[:1], 10), 15), 2),
        "ms_per_query_batch_64": round(milliseconds(lambda: index.search(xq, 10), 5) / 64, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["10000x256", "100000x256", "20000x4096"])
    args = parser.parse_args()
    rows = [measure(*map(int, size.split("x"))) for size in args.sizes]
    print("| vectors | file MB | build s | load ms | recall@10 | ms at batch 1 | ms a query at batch 64 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for r in rows:
        cells = [f"{r['n']:,} × {r['d']}", *(str(r[key]) for key in list(r)[2:])]
        print(f"| {' | '.join(cells)} |")
    save("search", {"command": f"python benchmarks/search.py --sizes {' '.join(args.sizes)}", "rows": rows})


if __name__ == "__main__":
    main()
