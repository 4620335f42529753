"""What the memory of pictures saves: the first and the second change to a photo, and two views of it from one pass.

    python benchmarks/composed.py [--rounds 5] [--width 768] [--layers 10]

A model with seeded random weights and the tiles and patches of the 8B one (336 and 14 pixels): a 4:3 photo is 2,340 tokens.
Every round takes another photo: a change to it, another change, a third with the picture given decoded; then the same by
one pass over everything, as without a memory; then its vectors under two prompt sets from one pass and from two.
Written to benchmarks/results/composed.json.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import save
from PIL import Image, ImageOps

from e5v_search import media
from e5v_search.backbones import registry
from e5v_search.backbones.llava_next import LlavaNextEmbedder
from e5v_search.backbones.modules import LlavaNext
from e5v_search.backbones.prompt_encoder import load_tokenizer
from e5v_search.training.export import export
from e5v_search.training.initialise import initialise
from e5v_search.training.recipe import Decoder, Model, Vision

SAMPLES = Path(media.__file__).parent.parent / "samples"
PHOTOS = ["coffee", "cat", "raccoon", "astronaut", "rocket-launch", "staircase", "photographer"]
CHANGES = ["make it red", "the same at night, seen from further away", "add two people"]
VIEWS = ["retrieval", "cirr"]


def model(folder: Path, width: int, layers: int) -> LlavaNextEmbedder:
    tokenizer = load_tokenizer(registry.BUNDLED / registry.TINY)
    recipe = Model(
        Vision(width=384, layers=6, heads=6, mlp=1536, tile=336, patch=14),
        Decoder(width, layers, heads=width // 64, mlp=width * 8 // 3, positions=4096),
        ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    )
    untrained = LlavaNext(recipe.config(tokenizer.token_to_id("<image>")))
    initialise(untrained, torch.Generator().manual_seed(0))
    export(untrained, tokenizer, folder)
    return LlavaNextEmbedder.load(str(folder), device="cpu", dtype="float32")


def timed(run: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    x = run()
    return (time.perf_counter() - start) * 1e3, x


def one_round(embedder: LlavaNextEmbedder, path: Path) -> tuple[dict[str, float], float]:
    """(milliseconds of each way, the least cosine between an answer from memory and one without)"""
    ms: dict[str, float] = {}
    decoded = media.open_picture(path)
    embedder.memory.clear()
    ms["first"], _ = timed(lambda: embedder.embed_composed([(path, CHANGES[0])]))
    ms["second"], second = timed(lambda: embedder.embed_composed([(path, CHANGES[1])]))
    ms["third_given_decoded"], third = timed(lambda: embedder.embed_composed([(decoded, CHANGES[2])]))
    assert embedder.memory.hits == 2
    embedder.memory.hits = 0
    embedder.memory.clear()
    ms["one_pass_over_everything"], plain = timed(lambda: embedder.embed_images([path], "cirr"))
    embedder.memory.limit, limit = 0, embedder.memory.limit
    cold = np.concatenate([embedder.embed_composed([(path, change)]) for change in CHANGES[1:]])
    embedder.memory.limit = limit
    prepared = [embedder.prepare(decoded)]
    ms["two_views_from_one_pass"], views = timed(lambda: embedder.embed_views(prepared, VIEWS))
    ms["two_views_from_two_passes"], passes = timed(lambda: np.stack([embedder.embed_prepared(prepared, v) for v in VIEWS]))
    same = [(np.concatenate((second, third)) * cold).sum(1), (views * passes).sum(2), (views[1] * plain).sum(1)]
    return ms, min(float(x.min()) for x in same)


def large_photo(embedder: LlavaNextEmbedder, folder: Path, rounds: int) -> dict[str, float]:
    """Milliseconds for a 12-megapixel JPEG: to see that it is a known file, and to decode it and cut tiles."""
    path = folder / "large.jpg"
    with Image.open(SAMPLES / "coffee.jpg") as photo:
        ImageOps.fit(photo.convert("RGB"), (4032, 3024)).save(path, quality=90)
    known = statistics.median(timed(lambda: np.array(media.content_hash(path)))[0] for _ in range(rounds))
    cut = statistics.median(timed(lambda: embedder.prepare(media.open_picture(path)).pixels)[0] for _ in range(rounds))
    return {"megabytes": path.stat().st_size / 1e6, "hash_ms": known, "decode_and_cut_ms": cut}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=10)
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        embedder = model(folder / "model", args.width, args.layers)
        parameters = sum(p.numel() for p in embedder.model.parameters())
        print(f"{parameters / 1e6:.0f} million parameters, {torch.get_num_threads()} threads", flush=True)
        rounds, cosines = [], []
        for i in range(args.rounds + 1):
            path = folder / f"photo-{i}.jpg"
            with Image.open(SAMPLES / f"{PHOTOS[i % len(PHOTOS)]}.jpg") as photo:
                turned = photo.convert("RGB").rotate(2 * i)
                ImageOps.fit(turned, (640, 480)).save(path, quality=90)
            ms, cosine = one_round(embedder, path)
            if i:  # the first round pays for threads and caches
                rounds.append(ms)
                cosines.append(cosine)
                print(f"round {i}: " + ", ".join(f"{k} {v:.0f}" for k, v in ms.items()) + f", cosine {cosine:.7f}", flush=True)
        embedder.embed_composed([(path, CHANGES[0])])
        median = {k: round(statistics.median(r[k] for r in rounds), 1) for k in rounds[0]}
        result: dict[str, Any] = {
            "command": f"python benchmarks/composed.py --rounds {args.rounds} --width {args.width} --layers {args.layers}",
            "parameters": parameters,
            "threads": torch.get_num_threads(),
            "prefix_megabytes": round(embedder.memory.bytes / len(embedder.memory) / 1e6, 1),
            "median_ms": median,
            "rounds_ms": [{k: round(v, 1) for k, v in r.items()} for r in rounds],
            "first_by_second": round(statistics.median(r["first"] / r["second"] for r in rounds), 1),
            "two_passes_by_one": round(
                statistics.median(r["two_views_from_two_passes"] / r["two_views_from_one_pass"] for r in rounds), 2
            ),
            "least_cosine_to_the_plain_way": min(cosines),
            "photo_of_12_megapixels": {k: round(v, 1) for k, v in large_photo(embedder, folder, args.rounds).items()},
        }
    print({k: v for k, v in result.items() if k != "rounds_ms"})
    print(save("composed", result))


if __name__ == "__main__":
    main()
