"""Photos and texts per second of this program and of the published loop, on the same inputs and weights, in turns.

    python benchmarks/embed.py --size 100m|8b|tiny --photos DIR --texts FILE [--device cuda --dtype bfloat16]

Sizes 100m and 8b hold seeded random weights (benchmarks/models.py), tiny is e5v-tiny. The published loop
(benchmarks/published.py) runs at batch 1 and at the best of --batches, ours as `Embedder` does it, also with int8 on a
processor or fp8 on a GPU, and sentence-transformers on texts with the same weights where it is installed. Every round runs all
of them, one after the other, each in a process of its own; a ratio is the median of the ratios within a round. Processor
seconds stand beside seconds, as a machine may be busy with other things. At last come single queries to ours (queries.py): one
text against reading the weights once, and the second change to a photo against the first. Written to results/embed-SIZE.json.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flops import language, vision
from machine import arguments, save
from models import SIZES, write
from queries import measure

from e5v_search import media
from e5v_search.backbones import registry
from e5v_search.backbones.llava_next import LlavaNextEmbedder
from e5v_search.backbones.pieces import HUGE_PAGES
from e5v_search.backbones.tiles import cut, token_count

PEAK = "peak_mb"
Run = Callable[[str], np.ndarray]  # "texts" or "images" -> embeddings


class Work:
    """The inputs, and what they cost by count."""

    def __init__(self, embedder: LlavaNextEmbedder, photos: list[Path], texts: list[str]) -> None:
        c, self.photos, self.texts = embedder.model.config, photos, texts
        rows = embedder.encoder.encode("<sent>\nSummary above sentence in one word: ", texts)
        [image] = embedder.encoder.encode("<image>\nSummary above image in one word: ", [""])
        tiles = [cut(media.open_picture(photo), embedder.spec) for photo in photos]
        lengths = [token_count(t.size, embedder.spec) + len(image) - 1 for t in tiles]
        self.n = {"images": len(photos), "texts": len(texts)}
        self.tokens = {"images": sum(lengths), "texts": sum(map(len, rows))}
        self.flop = {
            "images": sum(vision(c, len(t.pixels)) + language(c, n) for t, n in zip(tiles, lengths, strict=True)),
            "texts": sum(language(c, len(row)) for row in rows),
        }


def contestant(name: str, folder: Path, args: argparse.Namespace, work: tuple[list[Path], list[str]]) -> Run:
    """One way to embed: `ours`, `ours int8`, `ours fp8`, `published N` (batches of N) or `sentence-transformers`."""
    photos, texts = work
    if name.startswith("ours"):
        quantize = name.partition(" ")[2] or None
        embedder = LlavaNextEmbedder.load(str(folder), device=args.device, dtype=args.dtype, quantize=quantize)
        return lambda kind: embedder.embed_texts(texts) if kind == "texts" else embedder.embed_images(photos)
    dtype = getattr(torch, args.dtype)
    if name == "sentence-transformers":
        from sentence_transformers import SentenceTransformer

        from e5v_search.training.sentence_folder import export_sentence_transformers

        with tempfile.TemporaryDirectory() as scratch:
            export_sentence_transformers(str(folder), Path(scratch) / "st")
            model = SentenceTransformer(f"{scratch}/st", device=args.device, model_kwargs={"dtype": dtype})
        return lambda kind: np.asarray(model.encode(texts if kind == "texts" else [str(p) for p in photos]))
    from published import Published

    batch = int(name.split()[1])
    loop = Published(folder, args.device, dtype)
    return lambda kind: loop.embed_texts(texts, batch) if kind == "texts" else loop.embed_images(photos, batch)


def timed(run: Callable[[], Any], device: str) -> tuple[float, float, Any]:
    """(seconds, processor seconds, result)"""
    start, processor = time.perf_counter(), time.process_time()
    result = run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - processor, result


def matrix_rate(device: str, dtype: torch.dtype, n: int) -> float:
    """FLOP/s of n³ matrix products, the best of ten; on a processor per second of its time, whatever else it does meanwhile."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(timed(lambda: a @ a, device)[device == "cpu"] for _ in range(10))


class Contestant:
    """One way to embed, in a process of its own: what one way does to memory and threads is not to help or hurt the others."""

    def __init__(self, name: str, folder: Path, args: argparse.Namespace, work: tuple[list[Path], list[str]]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, name, folder, args, work), daemon=True)
        self._process.start()
        other.close()

    def __call__(self, kind: str) -> tuple[float, float, np.ndarray]:
        """Embed all "texts" or "images" -> (seconds, processor seconds, embeddings)"""
        self._pipe.send(kind)
        answer: tuple[float, float, np.ndarray] = self._pipe.recv()
        return answer

    def end(self) -> int:
        """-> MB of the process at its largest, or of the GPU"""
        self._pipe.send(None)
        return int(self._pipe.recv())


def serve(pipe: Any, name: str, folder: Path, args: argparse.Namespace, work: tuple[list[Path], list[str]]) -> None:
    if not name.startswith("ours"):
        os.environ[HUGE_PAGES] = "0"  # as torch does by itself; ours has asked for them when it was imported
    run = contestant(name, folder, args, work)
    while kind := pipe.recv():
        pipe.send(timed(lambda: run(kind), args.device))
    on_gpu = args.device.startswith("cuda")
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.send(round(peak / 1e6))


def rounds(runs: dict[str, Contestant], work: Work, args: argparse.Namespace) -> dict[str, Any]:
    reference = {kind: runs["published 1"](kind)[2] for kind in args.kinds}
    result: dict[str, Any] = {}
    for kind in args.kinds:
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        cosines = {}
        for i in range(args.rounds + 1):
            for name, run in runs.items():
                seconds, processor, x = run(kind)
                cosines[name] = float((x * reference[kind]).sum(1).min())
                if i:  # the first round pays for threads and caches
                    taken[name].append((seconds, processor))
        best = min((n for n in runs if n.startswith("published")), key=lambda n: statistics.median(s for s, _ in taken[n]))
        among = reference[kind] @ reference[kind].T
        result[kind] = {
            "n": work.n[kind],
            "tokens": work.tokens[kind],
            "teraflop": round(work.flop[kind] / 1e12, 4),
            "mean_cosine_of_two_inputs": round(float(among[np.triu_indices(len(among), 1)].mean()), 4),
            "best_published": best,
            "rows": {
                name: row(taken[name], taken["published 1"], taken[best], work, kind)
                | {"least_cosine": round(cosines[name], 6)}
                for name in runs
            },
        }
        for name, found in result[kind]["rows"].items():
            print(f"{kind:7}{name:24}", ", ".join(f"{k} {v}" for k, v in found.items() if k != "rounds_s"), flush=True)
    return result


def row(
    own: list[tuple[float, float]], one: list[tuple[float, float]], best: list[tuple[float, float]], work: Work, kind: str
) -> dict[str, Any]:
    seconds, processor = (statistics.median(values) for values in zip(*own, strict=True))

    def times(others: list[tuple[float, float]], which: int) -> float:
        return round(statistics.median(b[which] / a[which] for a, b in zip(own, others, strict=True)), 2)

    return {
        "per_s": round(work.n[kind] / seconds, 3),
        "tokens_per_s": round(work.tokens[kind] / seconds, 1),
        "gigaflop_per_s": round(work.flop[kind] / seconds / 1e9, 1),
        "processor_s": round(processor, 3),
        "times_published_1": times(one, 0),
        "times_published_1_by_processor_time": times(one, 1),
        "times_best_published": times(best, 0),
        "rounds_s": [round(s, 3) for s, _ in own],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", *SIZES], required=True)
    parser.add_argument("--photos", type=Path, default=Path(media.__file__).parent.parent / "samples")
    parser.add_argument("--texts", type=Path, required=True, help="a text a line")
    parser.add_argument("--n-photos", type=int, default=8)
    parser.add_argument("--n-texts", type=int, default=64)
    parser.add_argument("--kinds", nargs="+", choices=["texts", "images"], default=["texts", "images"])
    parser.add_argument("--batches", type=int, nargs="*", default=[4, 16], help="of the published loop, besides 1")
    parser.add_argument("--skip", nargs="*", default=[], help="ways to leave out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    photos = [Path(found.path) for found in islice(media.Scan([str(args.photos)]), args.n_photos)]
    texts = [line for line in args.texts.read_text(encoding="utf-8").splitlines() if line.strip()][: args.n_texts]
    with tempfile.TemporaryDirectory() as scratch:
        folder = registry.BUNDLED / registry.TINY if args.size == "tiny" else Path(scratch) / args.size
        if args.size in SIZES:
            write(args.size, folder, getattr(torch, args.dtype))
        ways = ["ours", "published 1", *(f"published {n}" for n in args.batches), "sentence-transformers"]
        ways += ["ours int8" if args.device == "cpu" else "ours fp8"]
        ways = [way for way in ways if way not in args.skip]
        runs = {way: Contestant(way, folder, args, (photos, texts)) for way in ways}
        embedder = LlavaNextEmbedder.load(str(folder), device=args.device, dtype=args.dtype)
        work = Work(embedder, photos, texts)
        dtype = getattr(torch, args.dtype)
        rate = matrix_rate(args.device, dtype, 2048 if args.device == "cpu" else 8192)
        result = rounds(runs, work, args)
        for kind in args.kinds:
            for found in result[kind]["rows"].values():
                seconds = found["processor_s"] if args.device == "cpu" else work.n[kind] / found["per_s"]
                found["share_of_matrix_rate"] = round(work.flop[kind] / seconds / rate, 3)
        memory = {way: run.end() for way, run in runs.items()}
        result["queries"] = measure(embedder, photos, texts, args.rounds)
    print(PEAK, memory)
    print("queries", result["queries"])
    command = f"OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/embed.py {arguments(sys.argv[1:])}"
    head = {
        "command": command,
        "load_at_the_end": os.getloadavg()[0],
        "matrix_gigaflop_per_s": round(rate / 1e9, 1),
        PEAK: memory,
    }
    gpu = {"gpu": torch.cuda.get_device_name()} if args.device.startswith("cuda") else {}
    print(save(f"embed-{args.size}", gpu | head | result))


if __name__ == "__main__":
    main()
