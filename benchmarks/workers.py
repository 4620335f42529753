"""Whether several processes embed faster than one on the same cores: photos/s of an index run, in turns.

    python benchmarks/workers.py PHOTOS [--sample 400] [--rounds 4] [--way one --way team ...]

The ways: `one` process with a thread of torch for each core; `team`, a worker process for each core with one thread each
(`index --devices cpu,...`); `ray`, an actor for each core (`index --ray local`). Each run is a process of its own, which
indexes the same photos with e5v-tiny into a new collection. Photos/s are counted from the moment on in which a quarter of
them is in, so that starting and loading, which are given too, do not count; processor seconds are those of all processes,
for the whole run (of Ray's not all are told). Written to benchmarks/results/workers.json.
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
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from machine import save

from e5v_search import Collection, ModelChoice, Report, media
from e5v_search.parallel import cores

CHOICE = ModelChoice("e5v-tiny", device="cpu")
N = cores()


def say(line: str) -> None:
    print(line, file=sys.stderr)


def team(place: str) -> AbstractContextManager[Any]:
    from e5v_search.scale import processes

    return processes.team(CHOICE, ["cpu"] * N, say)


def ray(place: str) -> AbstractContextManager[Any]:
    from e5v_search.scale import cluster
    from e5v_search.scale.shards import Shards

    return cluster.team(CHOICE, cluster.LOCAL, Shards(Path(f"{place}-shards"), say), say)


ENGINES: dict[str, Callable[[str], AbstractContextManager[Any]]] = {
    "one": lambda place: nullcontext(),
    "team": team,
    "ray": ray,
}


def run(way: str, place: str, paths: list[str]) -> dict[str, Any]:
    """One run, in this process."""
    start = time.perf_counter()
    passed: list[tuple[int, float]] = []

    def note(report: Report, _: int) -> None:
        if report.added >= len(paths) / 4 and (not passed or report.added > passed[-1][0]):
            passed.append((report.added, time.perf_counter()))

    with Collection.open(place, CHOICE) as c, ENGINES[way](place) as engine:
        if engine is not None:
            c.embed_with(engine)
        report = c.ingest(paths, on_progress=note)
    assert report.added == len(paths), report
    (before, began), (after, ended) = passed[0], passed[-1]
    return {"photos_per_s": round((after - before) / (ended - began), 2), "s_to_a_quarter": round(began - start, 2)}


def child(way: str, place: Path, paths: list[str]) -> dict[str, Any]:
    threads = N if way == "one" else 1
    before = os.times()
    command = [sys.executable, __file__, "--run", way, "--place", str(place), "-"]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, input="\n".join(paths), stdout=subprocess.PIPE, text=True, check=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"processor_s": round(used, 1), "total_s": round(after.elapsed - before.elapsed, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos")
    parser.add_argument("--sample", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--way", action="append", choices=list(ENGINES))
    parser.add_argument("--run", choices=list(ENGINES), help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(run(args.run, args.place, sys.stdin.read().splitlines())))
        return
    ways = args.way or list(ENGINES)
    paths = [found.path for found in islice(media.Scan([args.photos]), args.sample)]
    rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(args.rounds):
            for way in ways if i % 2 else reversed(ways):
                rounds[way].append(child(way, Path(scratch) / f"{way}-{i}", paths))
                print(f"round {i + 1}, {way}: {rounds[way][-1]}, load {os.getloadavg()[0]:.1f}", flush=True)
    medians = {
        way: {key: round(statistics.median(one[key] for one in runs), 2) for key in runs[0]} for way, runs in rounds.items()
    }
    command = f"python benchmarks/workers.py PHOTOS --sample {args.sample} --rounds {args.rounds}"
    print(save("workers", {"command": command, "photos": len(paths), "workers": N, "medians": medians, "rounds": rounds}))


if __name__ == "__main__":
    main()
