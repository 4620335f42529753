"""The service under load, `search` with and without it, requests that make no sense, and the first paint of a large collection.

    python benchmarks/serve.py search COLLECTION [--rounds 5]     one cold and one warm `search` in turn
    python benchmarks/serve.py load COLLECTION [--clients 50] [--seconds 60]
    python benchmarks/serve.py fill COLLECTION --photos FOLDER [--items 100000]
    python benchmarks/serve.py paint COLLECTION                   needs playwright and chromium
    python benchmarks/serve.py fuzz [--requests 10000]            tests/test_web_fuzz.py with so many

COLLECTION is the folder of one (`index FOLDER -c ./COLLECTION/`); `fill` makes a large one without a model, for `paint`. What
each part finds is kept in benchmarks/results/serve.json.
"""

import argparse
import asyncio
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np
from machine import RESULTS, arguments, describe

from e5v_search.catalog import Put
from e5v_search.collection import Collection

WORDS = ["two", "dog", "cat", "child", "man", "woman", "red", "blue", "snow", "grass", "water", "runs", "plays", "jumps"]
E5V = [sys.executable, "-m", "e5v_search"]


@contextmanager
def serving(place: Path) -> Iterator[tuple[str, int]]:
    """The address of a service in a process of its own, and that process."""
    process = subprocess.Popen([*E5V, "serve", "-c", str(place), "--port", "0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    try:
        asyncio.run(warmed(address))
        yield address, process.pid
    finally:
        process.terminate()
        assert process.wait(60) == 0, "it did not stop cleanly"


def cost(command: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of a process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def search(args: argparse.Namespace) -> dict[str, Any]:
    place = args.collection
    rows: dict[str, list[tuple[float, float]]] = {"cold": [], "warm": []}
    with serving(place):
        for n in range(args.rounds + 1):
            ask = [*E5V, "search", f"two dogs play in the snow {n}", "-c", str(place), "--json"]
            costs = cost([*ask, "--no-service"]), cost(ask)
            if n:  # the first round fills the system's caches
                for name, each in zip(rows, costs, strict=True):
                    rows[name].append(each)
    found = {
        name: {
            "wall_s": round(statistics.median(w for w, _ in each), 3),
            "cpu_s": round(statistics.median(c for _, c in each), 3),
        }
        for name, each in rows.items()
    }
    ratios = [cold[1] / warm[1] for cold, warm in zip(rows["cold"], rows["warm"], strict=True)]
    walls = [cold[0] / warm[0] for cold, warm in zip(rows["cold"], rows["warm"], strict=True)]
    return {
        **found,
        "rounds": args.rounds,
        "ratio_cpu": round(statistics.median(ratios), 1),
        "ratio_wall": round(statistics.median(walls), 1),
    }


async def client(address: str, ids: list[int], end: float, seed: int, told: dict[str, list[float]], errors: list[str]) -> None:
    """What someone at the page does: new words, old words, small pictures, the next page; one after the other."""
    rng = random.Random(seed)
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    n = 0
    while time.perf_counter() < end:
        kind = rng.choices(["new", "repeated", "thumbnail", "items"], [2, 4, 6, 1])[0]
        new = f"{' '.join(rng.choices(WORDS, k=6))} {seed} {n}"
        path = {
            "new": f"/api/search?k=60&q={quote(new)}",
            "repeated": f"/api/search?k=60&q={quote(' '.join(random.Random(rng.randrange(20)).choices(WORDS, k=4)))}",
            "thumbnail": f"/api/items/{rng.choice(ids)}/thumbnail?size=512",
            "items": f"/api/items?n=100&start={rng.randrange(100)}",
        }[kind]
        n += 1
        start = time.perf_counter()
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(int(line.split(":")[1]) for line in head.lower().splitlines() if line.startswith("content-length"))
            body = await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError) as error:
            errors.append(f"{kind}: {error!r}")
            reader, writer = await asyncio.open_connection(host, int(port))
            continue
        if head.split()[1] != "200":
            errors.append(f"{kind}: {head.splitlines()[0]} {body[:100]!r}")
        elif kind == "repeated" and json.loads(body)["took_ms"]["embed"]:
            told["repeated, the first time"].append(time.perf_counter() - start)
        else:
            told[kind].append(time.perf_counter() - start)
        await asyncio.sleep(rng.expovariate(1 / THINK))
    writer.close()


THINK = 1.0  # seconds that a person looks before the next request, on average


def load(args: argparse.Namespace) -> dict[str, Any]:
    place = args.collection
    with Collection.open(place) as source:
        ids = source.catalog.newest(0, 300)

    async def all_clients(address: str) -> tuple[dict[str, list[float]], list[str]]:
        told: dict[str, list[float]] = {
            name: [] for name in ("new", "repeated", "repeated, the first time", "thumbnail", "items")
        }
        errors: list[str] = []
        end = time.perf_counter() + args.seconds
        await asyncio.gather(*(client(address, ids, end, seed, told, errors) for seed in range(args.clients)))
        return told, errors

    with serving(place) as (address, pid):
        alone = asyncio.run(repeated(address, pid))
        before = processor(pid)
        told, errors = asyncio.run(all_clients(address))
        spent = processor(pid) - before

    def percentile(values: list[float], share: float) -> float:
        return round(float(np.percentile(values, share)) * 1e3, 1) if values else float("nan")

    rows = {
        name: {"requests": len(values), **{f"p{share}_ms": percentile(values, share) for share in (50, 95, 99)}}
        for name, values in told.items()
    }
    every = [value for values in told.values() for value in values]
    return {
        "clients": args.clients,
        "seconds": args.seconds,
        "think_s": THINK,
        "requests": len(every),
        "per_s": round(len(every) / args.seconds, 1),
        "errors": len(errors),
        "first_errors": errors[:5],
        "p95_ms": percentile(every, 95),
        "processor_ms_a_request": round(1e3 * spent / max(len(every), 1), 2),
        "repeated_alone": alone,
        "kinds": rows,
    }


def processor(pid: int) -> float:
    """Seconds of processor time that a process has used (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def repeated(address: str, pid: int, n: int = 500) -> dict[str, float]:
    """The same query again and again by one client: milliseconds it waits, and of the service's processor time."""
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    times = []
    for each in range(n + 1):
        if each == 1:
            before = processor(pid)
        start = time.perf_counter()
        writer.write(f"GET /api/search?k=60&q=a+dog HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        await reader.readexactly(int(head.partition("content-length: ")[2].split()[0]))
        times.append(time.perf_counter() - start)
    spent = processor(pid) - before
    writer.close()
    p50, p95 = np.percentile(times[1:], [50, 95]) * 1e3
    return {
        "requests": n,
        "p50_ms": round(float(p50), 2),
        "p95_ms": round(float(p95), 2),
        "processor_ms": round(1e3 * spent / n, 2),
    }


async def warmed(address: str) -> None:
    """Until the model is loaded."""
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET /api/search?q=a HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    await reader.read()
    writer.close()


def fill(args: argparse.Namespace) -> dict[str, Any]:
    """A collection of so many photos: random vectors, the newest 200 photos real."""
    folder, items = args.collection, args.items
    real = sorted(path for path in args.photos.rglob("*") if path.suffix.lower() == ".jpg")[:200]
    rng = np.random.default_rng(0)

    def puts() -> Iterator[Put]:
        for n in range(items):
            x = rng.standard_normal(256, dtype=np.float32)
            path = folder.absolute() / f"photos/{n // 500}/{n}.jpg"
            if n < len(real):
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(real[n], path)
            year = 2024 if n < len(real) else 2000 + n % 23
            yield Put(
                kind="image", content_hash=f"{n:064x}", path=str(path), item_id=n + 1, width=400, height=300, format="JPEG",
                taken_at=f"{year}-{n % 12 + 1:02d}-{n % 28 + 1:02d}T10:00:00", vectors={"retrieval": x / np.linalg.norm(x)},
            )  # fmt: skip

    with Collection.open(f"{folder}/") as source:
        embedder = source.embedder()
        source.load(puts(), embedder.fingerprint, 256, {"name": embedder.name, "quantize": None}, ["retrieval"], [])
    return {"items": items}


def paint(args: argparse.Namespace) -> dict[str, Any]:
    from playwright.sync_api import sync_playwright

    with Collection.open(args.collection) as source:
        items = sum(source.catalog.count().values())
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    rows = []
    with serving(args.collection) as (address, _), sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(args.rounds):
            page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
            page.goto(address)
            page.wait_for_selector("#results li")
            tiles = page.evaluate("performance.now()")
            page.wait_for_function(
                "[...document.querySelectorAll('#results img')].filter((e) => e.getBoundingClientRect().top < innerHeight)"
                ".every((e) => e.complete && e.naturalWidth)"
            )
            pictures = page.evaluate("performance.now()")
            first = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
            rows.append((first, tiles, pictures))
            page.context.close()
        browser.close()
    names = ("first_paint_ms", "tiles_ms", "pictures_ms")
    medians = {name: round(statistics.median(each), 1) for name, each in zip(names, zip(*rows, strict=True), strict=True)}
    worst = round(max(row[0] for row in rows), 1)
    return {"items": items, "rounds": args.rounds, **medians, "first_paint_worst_ms": worst}


def fuzz(args: argparse.Namespace) -> dict[str, Any]:
    """So many requests that break the description of the API, and as many that keep to it, to a real service."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--timeout=7000", f"--junitxml={report}", "tests/test_web_fuzz.py"]
        done = subprocess.run(
            command, env=os.environ | {"E5V_FUZZ": str(args.requests)}, capture_output=True, text=True, check=False
        )
        told = {each.get("name"): json.loads(each.get("value", "")) for each in ElementTree.parse(report).iter("property")}
    malformed, allowed = told.get("negative", {}), told.get("positive", {})
    return {
        "malformed": sum(malformed.values()),
        "allowed": sum(allowed.values()),
        "passed": done.returncode == 0,
        "seconds": round(time.perf_counter() - start),
        "malformed_by_status": malformed,
        "allowed_by_status": allowed,
        **({} if done.returncode == 0 else {"told": done.stdout[-2000:]}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    kinds = {"search": search, "load": load, "fill": fill, "paint": paint, "fuzz": fuzz}
    for name in kinds:
        part = parts.add_parser(name)
        if name != "fuzz":
            part.add_argument("collection", type=Path)
        part.add_argument("--photos", type=Path)
        part.add_argument("--rounds", type=int, default=5)
        part.add_argument("--clients", type=int, default=50)
        part.add_argument("--seconds", type=float, default=60)
        part.add_argument("--items", type=int, default=100_000)
        part.add_argument("--requests", type=int, default=10_000)
    args = parser.parse_args()
    found = kinds[args.part](args)
    print(json.dumps(found, indent=2))
    if args.part == "fill":
        return
    path = RESULTS / "serve.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    options = arguments(sys.argv[3:] if args.part != "fuzz" else sys.argv[2:])
    shown = f"python benchmarks/serve.py {args.part}{' COLLECTION' if args.part != 'fuzz' else ''} {options}".strip()
    kept[args.part] = {"command": shown, **describe(), "load_average": os.getloadavg(), **found}
    path.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
