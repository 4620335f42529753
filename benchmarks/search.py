"""Index recipes by size: build, bytes, cold start, recall and latency, beside plain FAISS and numpy on the same vectors.

    python benchmarks/search.py [--sizes 10000x4096 100000x4096] [--kinds exact one-bit ivf hnsw] [--out search]
    python benchmarks/search.py --collection 100000x4096

The second imports the vectors into a collection and asks it as `search --vectors` does. Writes benchmarks/results/*.json
and prints the rows of indexes/README.md. Vectors are drawn: clusters in a space whose spectrum has a heavy tail, or, with
--apart, without clusters, where neighbours are hardest to tell. Times are given twice, of the processor (all threads) and by
the clock, which on a machine with other work says little.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from machine import arguments, save

from e5v_search import Collection
from e5v_search.collection.importing import import_folder
from e5v_search.collection.vectors import search_vectors
from e5v_search.index import MappedIndex, Recipe, Stamp, build, load
from e5v_search.index.recipe import KINDS, NAMED

NQ = 256
BLOCK = 4096
K = 100


def drawn(n: int, d: int, path: Path, apart: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """xb (n, d) float16, mapped from `path`, and xq (NQ, d) float32 of the same distribution; rows of length 1.

    In clusters of 200 or, where they are to be `apart`, in none.
    """
    rng = np.random.default_rng(0)
    spectrum = (np.arange(1, d + 1, dtype=np.float32) ** -0.4)[rng.permutation(d)]
    centres = rng.standard_normal((max(n // 200, 20), d), dtype=np.float32) * spectrum * (not apart)

    def some(m: int) -> np.ndarray:
        x = centres[rng.integers(0, len(centres), m)] + 0.8 * spectrum * rng.standard_normal((m, d), dtype=np.float32)
        return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))

    xb = np.lib.format.open_memmap(path, "w+", np.float16, (n, d))
    for start in range(0, n, BLOCK):
        xb[start : start + BLOCK] = some(min(BLOCK, n - start))
    xb.flush()
    return np.load(path, mmap_mode="r"), some(NQ)


def nearest(xb: np.ndarray, xq: np.ndarray) -> np.ndarray:
    """Positions (nq, K) by a float32 product, block by block."""
    D = np.empty((len(xq), 0), np.float32)
    I = np.empty((len(xq), 0), np.int64)  # noqa: E741
    for start in range(0, len(xb), BLOCK):
        scores = xq @ xb[start : start + BLOCK].astype(np.float32).T
        D = np.concatenate([D, scores], axis=1)
        I = np.concatenate([I, np.broadcast_to(np.arange(start, start + scores.shape[1]), scores.shape)], axis=1)  # noqa: E741
        best = np.argpartition(-D, min(K, D.shape[1]) - 1, axis=1)[:, :K]
        D, I = np.take_along_axis(D, best, axis=1), np.take_along_axis(I, best, axis=1)  # noqa: E741
    return np.take_along_axis(I, np.argsort(-D, axis=1, kind="stable"), axis=1)


def recall(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    return {
        f"recall_at_{k}": round(
            float(np.mean([len(set(a[:k]) & set(b[:k])) / k for a, b in zip(found, truth, strict=True)])), 4
        )
        for k in (1, 10, 100)
    }


KINDS_OF_TIME = ("cpu", "clock")


def now() -> np.ndarray:
    """Seconds of the processor, and of the clock."""
    return np.array([time.process_time(), time.perf_counter()])


def milliseconds(run: Callable[[], Any]) -> np.ndarray:
    start = now()
    run()
    return (now() - start) * 1e3


def named(times: np.ndarray, batch: int | str, by: str = "") -> dict[str, float]:
    """Milliseconds a query as a row of the results has them; of several measurements (n, 2) the middle one."""
    middle = np.median(np.atleast_2d(times), axis=0)
    return {f"{by}{kind}_ms_batch_{batch}": round(float(ms), 3) for kind, ms in zip(KINDS_OF_TIME, middle, strict=True)}


def paired(one: Callable[[np.ndarray], Any], other: Callable[[np.ndarray], Any], xq: np.ndarray) -> dict[str, Any]:
    """Milliseconds a query of both, asked in turn, so that both meet the same load: one by one, and 64 at once.

    All queries were asked once before: what `one` takes for those, when pages of mapped files are touched for the first
    time, is "fresh".
    """
    times: dict[str, list[list[np.ndarray]]] = {"1": [], "64": []}
    one(xq[:1]), other(xq[:1])
    fresh = np.array([(milliseconds(lambda x=x: one(x[None])), milliseconds(lambda x=x: other(x[None])))[0] for x in xq])
    for n in range(60):
        x = xq[n % NQ][None]
        times["1"].append([milliseconds(lambda x=x: one(x)), milliseconds(lambda x=x: other(x))])
    for n in range(6):
        x = np.roll(xq, 64 * n, axis=0)[:64]
        times["64"].append([milliseconds(lambda x=x: one(x)) / 64, milliseconds(lambda x=x: other(x)) / 64])
    result: dict[str, Any] = named(fresh[:60], 1, "fresh_")
    for batch, both in times.items():
        pairs = np.array(both)  # (n, ours and theirs, processor and clock)
        result |= named(pairs[:, 0], batch) | named(pairs[:, 1], batch, "faiss_")
        for kind, ratio in zip(KINDS_OF_TIME, np.median(pairs[:, 0] / pairs[:, 1], axis=0), strict=True):
            result[f"{kind}_overhead_batch_{batch}"] = round(float(ratio) - 1, 3)
    return result


def plain(kind: str, index: Any, xb: np.ndarray) -> Callable[[np.ndarray], Any]:
    """The same search in FAISS's own calls, all in memory; trained parts are taken from `index`, the vectors encoded anew."""
    n, d = xb.shape
    half = faiss.IndexScalarQuantizer(d, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    half.add_sa_codes(np.ascontiguousarray(xb).view(np.uint8))
    if kind in ("exact", "gpu"):
        return lambda x: half.search(x, 10)
    recipe, head = index.recipe, np.frombuffer(index._scan.head, np.uint8)
    if kind == "hnsw":
        graph = faiss.deserialize_index(head, faiss.IO_FLAG_SKIP_STORAGE)
        graph.storage, graph.own_fields = half, False
        walk = faiss.SearchParametersHNSW(efSearch=recipe.ef)
        return lambda x, held=half: graph.search(x, 10, params=walk)
    coarse = faiss.deserialize_index(head)
    for start in range(0, n, BLOCK):
        coarse.add(xb[start : start + BLOCK].astype(np.float32))
    coarse.metric_type = faiss.METRIC_INNER_PRODUCT  # of the scores; IndexRefine wants the two to agree
    refine = faiss.IndexRefine(coarse, half)
    within: Any = faiss.RaBitQSearchParameters(qb=recipe.query_bits, centered=True)
    if kind == "ivf":
        within = faiss.IVFRaBitQSearchParameters(nprobe=recipe.probes, qb=recipe.query_bits, centered=True)
    asked = faiss.IndexRefineSearchParameters(
        k_factor=recipe.candidates / 10, base_index_params=faiss.SearchParametersPreTransform(index_params=within)
    )
    return lambda x: refine.search(x, 10, params=asked)


COLD = """
import json, sys, time
from pathlib import Path
import numpy as np
import faiss
from e5v_search.index import load
xq = np.load(sys.argv[2])

def kilobytes(what):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[what].split()[0])

def now():
    return np.array([time.process_time(), time.perf_counter()])

before = kilobytes("VmHWM")
start = now()
index = load(Path(sys.argv[1]))
opened = now()
index.search(xq[:1], 10)
first = now()
after_one = kilobytes("VmHWM")
for x in xq[1:65]:
    index.search(x[None], 10)
open_ms, first_ms = 1e3 * (opened - start), 1e3 * (first - opened)
print(json.dumps({"open_ms": open_ms[0], "open_clock_ms": open_ms[1], "first_ms": first_ms[0], "first_clock_ms": first_ms[1],
    "resident_mb_after_one": after_one / 1e3, "resident_mb": kilobytes("VmHWM") / 1e3, "of_that_before_mb": before / 1e3,
    "anonymous_mb": kilobytes("RssAnon") / 1e3}))
"""


def cold(path: Path, xq: np.ndarray) -> dict[str, float]:
    """A fresh process that opens the index and asks it: pages of files that the system holds count as resident too.

    Another one does so before, when the system holds nothing of the files: from the disk.
    """
    queries = path.with_name("xq.npy")
    np.save(queries, xq)

    def asked() -> dict[str, float]:
        done = subprocess.run([sys.executable, "-c", COLD, str(path), str(queries)], capture_output=True, text=True, check=True)
        return {name: round(value, 1) for name, value in json.loads(done.stdout).items()}

    for file in path.parent.glob(f"{path.name}*"):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    from_disk = asked()
    return {f"disk_{name}": from_disk[name] for name in ("open_clock_ms", "first_clock_ms")} | asked()


def measure(kind: str, xb: np.ndarray, xq: np.ndarray, truth: np.ndarray, folder: Path, beside_faiss: bool) -> dict[str, Any]:
    n, d = xb.shape
    path = folder / "index.faiss"
    ids = np.arange(n, dtype=np.int64)
    start = now()
    index = build(path, Recipe(kind), d, ((ids[i : i + BLOCK], xb[i : i + BLOCK]) for i in range(0, n, BLOCK)))
    index.stamp = Stamp("benchmark", 1)
    index.save(path)
    seconds = now() - start
    del index
    files = {file.suffix.lstrip("."): file.stat().st_size for file in folder.glob("index.faiss*")}
    row: dict[str, Any] = {"n": n, "d": d, "kind": kind}
    row |= {f"build_{name}_s": round(float(s), 1) for name, s in zip(KINDS_OF_TIME, seconds, strict=True)}
    row |= {"mb": {name: round(size / 1e6, 1) for name, size in files.items()}} | cold(path, xq)
    index = load(path)
    row |= recall(index.search(xq, K)[1], truth)
    row |= {"recipe": index.recipe.to_json()} | by_effort(index, xq, truth) if isinstance(index, MappedIndex) else {}
    ours = lambda x: index.search(x, 10)  # noqa: E731
    if beside_faiss:
        row |= paired(ours, plain(kind, index, xb), xq)
    else:
        row |= {name: value for name, value in paired(ours, ours, xq).items() if name.startswith((*KINDS_OF_TIME, "fresh"))}
    for file in folder.glob("index.faiss*"):
        file.unlink()
    return row


def by_effort(index: MappedIndex, xq: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """recall@10 with fewer and more candidates, or, along links, rows kept in view."""
    own = index.recipe
    key = "ef" if own.kind == "hnsw" else "candidates"
    found = {}
    for most in (50, 100, 200, 400, 800):
        index.search_as(replace(own, **{key: most}))  # type: ignore[arg-type]
        found[str(most)] = recall(index.search(xq, 10)[1], truth[:, :10])["recall_at_10"]
    index.search_as(own)
    return {f"recall_at_10_by_{key}": found}


def by_numpy(xb: np.ndarray, xq: np.ndarray) -> dict[str, Any]:
    """The product with all vectors in float32, held in memory, and the ten largest."""
    held = xb.astype(np.float32)

    def brute(x: np.ndarray) -> np.ndarray:
        return np.argpartition(-(x @ held.T), 10, axis=1)[:, :10]

    one = np.array([milliseconds(lambda x=x: brute(x[None])) for x in xq[:15]])
    many = np.array([milliseconds(lambda: brute(xq[:64])) / 64 for _ in range(3)])
    return {"n": len(xb), "d": xb.shape[1], "kind": "numpy"} | named(one, 1) | named(many, 64)


def recipes(size: str, kinds: list[str], folder: Path, beside_faiss: bool, apart: bool) -> Iterator[dict[str, Any]]:
    n, d = map(int, size.split("x"))
    xb, xq = drawn(n, d, folder / "vectors.npy", apart)
    truth = nearest(xb, xq)
    if beside_faiss:
        yield by_numpy(xb, xq)
    for kind in kinds:
        yield measure(kind, xb, xq, truth, folder, beside_faiss)


def collection(size: str, folder: Path) -> dict[str, Any]:
    """A collection made by `import`, asked as by `search --vectors`, beside plain FAISS and numpy."""
    n, d = map(int, size.split("x"))
    xb, xq = drawn(n, d, folder / "vectors.npy")
    truth = nearest(xb, xq)
    seconds = milliseconds(lambda: import_folder(folder, folder / "c")) / 1e3
    row: dict[str, Any] = {"n": n, "d": d}
    row |= {f"import_{name}_s": round(float(s), 1) for name, s in zip(KINDS_OF_TIME, seconds, strict=True)}
    with Collection.open(folder / "c", create=False) as c:
        index = c.indexes.current()
        row |= {"kind": index.kind, "mb": {"in all": round(sum(f.stat().st_size for f in (folder / "c").iterdir()) / 1e6)}}
        found = np.array([[hit.id for hit in hits] for hits in search_vectors(c, xq, k=10)])
        row["recall_at_10"] = recall(found, truth)["recall_at_10"]
        row |= paired(lambda x: list(search_vectors(c, x, k=10)), plain("exact" if n <= 20_000 else "one-bit", index, xb), xq)
    names = [f"{kind}_ms_batch_{batch}" for kind in KINDS_OF_TIME for batch in (1, 64)]
    numpy = by_numpy(xb, xq)
    row |= {f"numpy_{name}": numpy[name] for name in names}
    return row | {f"numpy_by_ours_{name}": round(numpy[name] / row[name], 1) for name in names}


def table(rows: list[dict[str, Any]]) -> None:
    columns = ("build_cpu_s", "recall_at_1", "recall_at_10", "recall_at_100")
    columns += tuple(f"{kind}_ms_batch_{batch}" for batch in (1, 64) for kind in KINDS_OF_TIME)
    columns += ("open_clock_ms", "first_clock_ms", "resident_mb")
    print("| vectors | kind | files MB | " + " | ".join(columns) + " |")
    for r in rows:
        files = " + ".join(f"{value:,.0f} {name}" for name, value in r.get("mb", {}).items())
        cells = [f"{r['n']:,} × {r['d']}", r["kind"], files]
        print("| " + " | ".join([*cells, *(str(r.get(name, "")) for name in columns)]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["10000x4096", "100000x4096"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=NAMED)
    parser.add_argument("--collection")
    parser.add_argument("--folder", type=Path, help="where there is room for the vectors; else the system's temporary folder")
    parser.add_argument("--without-faiss", action="store_true", help="ours alone, in the memory that it takes alone")
    parser.add_argument("--apart", action="store_true", help="vectors without clusters")
    parser.add_argument("--out", default="search")
    args = parser.parse_args()
    command = f"python benchmarks/search.py {arguments(sys.argv[1:])}".strip()
    rows: list[dict[str, Any]] = []
    for size in [args.collection] if args.collection else args.sizes:
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            done = (
                [collection(size, folder)]
                if args.collection
                else recipes(size, args.kinds, folder, not args.without_faiss, args.apart)
            )
            for row in done:
                rows.append(row)
                print(json.dumps(row), flush=True)
        finally:
            shutil.rmtree(folder)
    table(rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    machine = {"threads": faiss.omp_get_max_threads(), "load": round(os.getloadavg()[1], 1), "peak_mb": round(peak)}
    save(args.out, {"command": command} | machine | {"rows": rows})


if __name__ == "__main__":
    main()
