"""Filtered search in a collection of a million items: latency at selectivities from 0.01 % to 97 %, and what it costs.

    python benchmarks/filters.py [--folder DIR] [--items 1000000] [--rounds 9]

DIR keeps the collection for the next run (about 700 MB; made in some minutes). Writes benchmarks/results/filters.json.
Everything is warm: the process has asked once before. Each filter is timed right after the same search without one, and
the target is 1.5 times that or 20 ms, whichever is more.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import save

from e5v_search.catalog import VIEW, Catalog, Put
from e5v_search.collection.narrow import search
from e5v_search.filters import parse
from e5v_search.index import FlatIndex, Stamp, load

DIM, K, COMMIT = 64, 10, 20_000
CAMERAS = [
    f"{make} {model}{n}"
    for make, model in (("Canon", "EOS R"), ("Canon", "PowerShot G"), ("NIKON", "Z "), ("Apple", "iPhone "), ("SONY", "ILCE-"))
    for n in range(1, 11)
]
SHAPES = [(4000, 3000), (3000, 4000), (6000, 4000), (1920, 1080), (640, 480)]
INDEXES = (
    *("items_kind", "items_camera", "items_format", "items_place", "items_width", "items_height"),
    *("items_pixels", "items_shape", "files_size", "files_folder"),
)
FILTERS = [
    # an indexed column
    "kind=rendered",
    "taken=2015-03-01|2015-03-02|2015-03-03",
    "taken=2015-03",
    "taken>=2015",
    "width=333",
    "size>20MB",
    "orientation=square",
    "megapixels>=12",
    # folders, paths
    "folder=2015-03-09*",
    "folder='2015-03* trip'",
    "folder=2015",
    "folder=20*trip",
    "folder=/home/me/Pictures/2*",
    "path=/home/me/Pictures/2015/**/IMG_00001*.jpg",
    "path=*7777.jpg",
    # places
    "near=48.85,2.35,100km",
    "near=48.85,2.35,1300km",
    "near=0,0,9000km",
    # cameras
    "camera='leica m'",
    "camera~'shot g7'",
    "camera~canon or camera~nikon",
    # the text and its facts
    "text~'number 123'",
    "text~river",
    "facts.stars>=9990",
    "facts.stars>=5000",
    "facts.source.lang=fi",
    "facts.source.lang~E",
    # mixes
    "taken=2015 and camera~canon",
    "taken>=2015 and orientation=landscape",
    "taken>=2015 and camera~canon and folder='*03-09 trip'",
    "kind=image and taken=2015-03 and not camera~canon",
    "taken=2015-03 or facts.stars>=9000",
    "kind=text and facts.stars>=5000 and text~river",
    "taken<2010 and folder=2015",
    # negations
    "not camera~canon",
    "not kind=image",
    "not taken>=2005-01-08",
    "not folder=20*trip",
    "camera!=Canon* and kind=image and not near=0,0,19000km",
    "not (kind=image or folder=2015)",
]


def put(n: int, r: random.Random, x: np.ndarray) -> Put:
    year, month, day = r.randint(2005, 2024), r.randint(1, 12), r.randint(1, 28)
    folder = f"/home/me/Pictures/{year}/{year}-{month:02d}-{day:02d} {r.choice(['trip', 'home'])}"
    common: dict[str, Any] = {"content_hash": f"{n:032x}", "mtime_ns": n, "vectors": {VIEW: x}}
    if n % 5 == 4:
        facts = {"stars": r.randint(0, 9999), "source": {"lang": r.choice(["en", "de", "fr", "fi"]), "line": n}}
        text = f"this is text number {n} about {'the river' if r.random() < 0.05 else 'a dog on the grass'}"
        kind = "rendered" if n % 10_000 == 4 else "text"
        return Put(kind=kind, path=f"{folder}/text-{n:07d}.txt", size=90, text=text, facts=facts, **common)
    wide = r.random()
    width, height = (333, 333) if wide < 1e-4 else r.choice(SHAPES)
    placed = r.random() < 0.5
    return Put(
        kind="image",
        path=f"{folder}/IMG_{n:07d}.jpg",
        size=r.randint(30_000_000, 40_000_000) if r.random() < 1e-2 else r.randint(100_000, 9_000_000),
        width=width,
        height=height,
        taken_at=f"{year}-{month:02d}-{day:02d}T{r.randint(0, 23):02d}:{r.randint(0, 59):02d}:00",
        lat=r.uniform(-60, 70) if placed else None,
        lon=r.uniform(-180, 180) if placed else None,
        camera="Leica M" if r.random() < 1e-4 else r.choice(CAMERAS),
        format="JPEG",
        **common,
    )


def build(folder: Path, items: int, indexed: bool = True) -> float:
    """Seconds of the processor that the commits took. Vectors are random: neighbours have nothing in common with facts."""
    rng, r = np.random.default_rng(0), random.Random(0)
    seconds = 0.0
    with Catalog.create(folder) as catalog:
        catalog.bind("random@1", DIM, {})
        for name in () if indexed else INDEXES:
            catalog._db.execute(f"DROP INDEX {name}")
        for start in range(0, items, COMMIT):
            x = rng.standard_normal((COMMIT, DIM)).astype(np.float32)
            x /= np.linalg.norm(x, axis=1, keepdims=True)
            puts = [put(start + j, r, x[j]) for j in range(COMMIT)]
            began = time.process_time()
            catalog.commit(puts)
            seconds += time.process_time() - began
        index = FlatIndex.build(DIM, catalog.vectors())
        index.stamp = Stamp(catalog.uid, catalog.state)
        index.save(folder / "index.faiss")
    return seconds


def milliseconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def sizes(catalog: Catalog) -> dict[str, float]:
    """MB of each index and table that only filters need."""
    names = ", ".join(f"'{name}'" for name in (*INDEXES, "facts", "facts_item"))
    rows = catalog._rows(f"SELECT name, sum(pgsize) / 1e6 FROM dbstat WHERE name IN ({names}) GROUP BY name")
    return {name: round(size, 1) for name, size in rows}


def write_cost(items: int) -> dict[str, float]:
    """Seconds of the processor to commit so many items without and with the indexes, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        without, with_them = (build(Path(folder) / str(indexed), items, indexed) for indexed in (False, True))
    return {"items": items, "without_s": round(without, 2), "with_s": round(with_them, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/filters"))
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    if not (args.folder / "index.faiss").exists():
        build(args.folder, args.items)
    index = load(args.folder / "index.faiss")
    xq = np.random.default_rng(1).standard_normal((args.rounds, DIM)).astype(np.float32)
    xq /= np.linalg.norm(xq, axis=1, keepdims=True)
    rows = []
    with Catalog.open(args.folder) as catalog:
        for expression in FILTERS:
            where = parse([expression])
            first = milliseconds(lambda where=where: search(index, catalog, xq[0], K, where))
            passes = len(catalog.select(where))
            plain, filtered = [], []
            for q in xq:
                plain.append(milliseconds(lambda q=q: search(index, catalog, q, K)))
                filtered.append(milliseconds(lambda q=q, where=where: search(index, catalog, q, K, where)))
            without, with_it = statistics.median(plain), statistics.median(filtered)
            row = {
                "where": expression,
                "passes": passes,
                "share": passes / index.ntotal,
                "first_ms": round(first, 1),
                "plain_ms": round(without, 1),
                "filtered_ms": round(with_it, 1),
                "ratio": round(with_it / without, 2),
                "met": with_it <= max(1.5 * without, 20),
            }
            rows.append(row)
            print(
                f"{'ok  ' if row['met'] else 'MISS'} {row['share']:9.4%} {row['plain_ms']:6.1f} {row['filtered_ms']:7.1f} ms"
                f" (first {row['first_ms']:7.1f})  {expression}",
                flush=True,
            )
        filter_mb = sizes(catalog)
    result = {
        "command": f"python benchmarks/filters.py --items {args.items} --rounds {args.rounds}",
        "items": index.ntotal,
        "k": K,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "met": sum(row["met"] for row in rows),
        "of": len(rows),
        "write": write_cost(100_000),
        "catalog_mb": round((args.folder / "catalog.sqlite").stat().st_size / 1e6),
        "filter_mb": filter_mb,
        "rows": rows,
    }
    print(save("filters", result))


if __name__ == "__main__":
    main()
