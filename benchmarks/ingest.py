"""What `index` costs beyond the model, and how fast everything is that needs no model.

    python benchmarks/ingest.py throughput PHOTOS [--sample 300] [--rounds 6]
    python benchmarks/ingest.py whole PHOTOS
    python benchmarks/ingest.py memory PHOTOS [--items 20000]

`throughput`: photos/s of an index run against the bare model on tensors already in memory: the same process, photos and
threads, in turns, as the machine may be busy with other things. `whole`: an index of all of PHOTOS in a process of its
own, seconds and peak memory; the same again with nothing changed; seconds of `e5v-search --help`, and of a text search in
a fresh process, with the milliseconds that are the search's own. `memory`: what an index run of many small photos, made
of parts of PHOTOS and read as base tiles alone, holds in memory as it goes. Written to benchmarks/results/ingest-PART.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from machine import save

from e5v_search import Collection, Embedder, Report, media

CLI = [sys.executable, "-m", "e5v_search"]


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """(seconds, processor seconds)"""
    start, processor = time.perf_counter(), time.process_time()
    run()
    return round(time.perf_counter() - start, 2), round(time.process_time() - processor, 2)


def throughput(paths: list[str], rounds: int, scratch: Path) -> dict[str, Any]:
    embedder = Embedder.load("e5v-tiny")
    prepared = [embedder.prepare(media.decode(path)[0]) for path in paths]
    embedder.embed_prepared(prepared)  # the first calls pay for threads and caches

    def index(place: Path) -> None:
        with Collection.open(place, embedder) as c:
            report = c.ingest(paths)
            assert report.added == len(paths), report

    bare, ours = [], []
    for i in range(rounds):
        bare.append(timed(lambda: embedder.embed_prepared(prepared)))
        ours.append(timed(lambda: index(scratch / f"round-{i}")))  # noqa: B023 - called at once
        print(f"round {i + 1}: bare model {bare[-1]}, index {ours[-1]} (s, processor s)", flush=True)
    ratios, processor = ([a[j] / b[j] for a, b in zip(bare, ours, strict=True)] for j in range(2))
    return {
        "photos": len(paths),
        "bare_model_photos_per_s": [round(len(paths) / s, 2) for s, _ in bare],
        "index_photos_per_s": [round(len(paths) / s, 2) for s, _ in ours],
        "ratio_of_each_round": [round(x, 3) for x in ratios],
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_of_processor_time_median": round(statistics.median(processor), 3),
    }


def memory(paths: list[str], items: int, scratch: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    (scratch / "photos").mkdir()
    pictures = [media.open_picture(path).resize((224, 224)) for path in paths]
    for i in range(items):
        x, y = (int(n) for n in rng.integers(0, 224 - 96, 2))
        pictures[i % len(pictures)].crop((x, y, x + 96, y + 96)).save(scratch / f"photos/{i:06d}.jpg", quality=85)
    held: dict[int, int] = {}

    def note(report: Report, _: int) -> None:
        if report.added >= len(held) * items // 10:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            held[report.added] = round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)

    with Collection.open(scratch / "collection", Embedder.load("e5v-tiny", tiles="base")) as c:
        report = c.ingest([scratch / "photos"], on_progress=note)
    print(f"{report.added} photos in {report.seconds:.0f} s, MB held by items: {held}", flush=True)
    return {"added": report.added, "seconds": round(report.seconds), "mb_by_items": held}


def child(args: list[str], env: dict[str, str]) -> tuple[float, float, str]:
    """(seconds, peak resident MB, stdout) of one run in a process of its own."""
    start = time.perf_counter()
    process = subprocess.Popen([*CLI, *args], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):
        raise RuntimeError(f"{args} ended with {process.returncode}: {out}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024, out


def whole(photos: str, scratch: Path, repeat: int = 5) -> dict[str, Any]:
    env = os.environ | {"E5V_HOME": str(scratch / "home")}
    seconds, peak, out = child(["index", photos, "--json"], env)
    report = json.loads(out)
    print(f"index of {report['added']} photos: {seconds:.0f} s, peak {peak:.0f} MB", flush=True)
    again = [child(["index", photos, "--json"], env) for _ in range(repeat)]
    assert all(json.loads(out)["unchanged"] == report["added"] for _, _, out in again)
    helps = [child(["--help"], env)[0] for _ in range(repeat)]
    searches = [child(["search", "two dogs play in the snow", "--json"], env) for _ in range(repeat)]
    own = [json.loads(out)["took_ms"] for _, _, out in searches]
    result = {
        "photos": report["added"],
        "index_s": round(seconds, 1),
        "index_peak_mb": round(peak),
        "unchanged_s": [round(s, 2) for s, _, _ in again],
        "unchanged_s_median": round(statistics.median(s for s, _, _ in again), 2),
        "help_s_median": round(statistics.median(helps), 3),
        "cold_search_s": [round(s, 2) for s, _, _ in searches],
        "cold_search_s_median": round(statistics.median(s for s, _, _ in searches), 2),
        "search_ms_median": {key: round(statistics.median(took[key] for took in own), 1) for key in own[0]},
    }
    for key in ("unchanged_s_median", "help_s_median", "cold_search_s_median", "search_ms_median"):
        print(f"{key}: {result[key]}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["throughput", "whole", "memory"])
    parser.add_argument("photos")
    parser.add_argument("--sample", type=int, default=300, help="photos of the comparison with the bare model")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--items", type=int, default=20_000, help="photos of the look at memory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        paths = [found.path for found in islice(media.Scan([args.photos]), args.sample)]
        if args.part == "whole":
            result = whole(args.photos, Path(scratch))
        elif args.part == "memory":
            result = memory(paths, args.items, Path(scratch))
        else:
            result = throughput(paths, args.rounds, Path(scratch))
    print(save(f"ingest-{args.part}", {"command": f"python benchmarks/ingest.py {args.part} PHOTOS"} | result))


if __name__ == "__main__":
    main()
