"""Large JPEGs, decoded whole and as far as the model sees them: time, and what it changes in the vectors.

    python benchmarks/decode.py [PHOTOS] [--side 4032] [--n 8]

Photos are enlarged to `--side` pixels, given the grain of a sensor, which enlarging has none of, and saved as a camera
would (quality 92). Both ways take turns over the same bytes in memory; processor time of decoding and cutting tiles.
Written to results/decode.json.
"""

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
from machine import arguments, save
from PIL import Image, ImageOps

from e5v_search import Embedder, media
from e5v_search.backbones.tiles import Tiles

SAMPLES = Path(media.__file__).parent.parent / "samples"
GRAIN = 6.0  # standard deviation, in steps of 8 bits


def enlarged(path: str, side: int, rng: np.random.Generator) -> bytes:
    image = ImageOps.contain(media.open_picture(path), (side, side), Image.Resampling.BICUBIC)
    grain = rng.normal(0, GRAIN, (image.height, image.width, 1))
    data = io.BytesIO()
    Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=92)
    return data.getvalue()


def timed(run: Callable[[], Tiles]) -> tuple[float, Tiles]:
    start = time.process_time()
    tiles = run()
    return (time.process_time() - start) * 1e3, tiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="?", default=str(SAMPLES))
    parser.add_argument("--model", default="e5v-tiny")
    parser.add_argument("--side", type=int, default=4032)
    parser.add_argument("--n", type=int, default=8)
    args = parser.parse_args()
    embedder = Embedder.load(args.model, device="cpu", dtype="float32")
    rng = np.random.default_rng(0)
    ms: dict[str, list[float]] = {"whole": [], "reduced": []}
    tiles: dict[str, list[Tiles]] = {"whole": [], "reduced": []}
    sizes = []
    for found in islice(media.Scan([args.photos]), args.n):
        data = enlarged(found.path, args.side, rng)
        sizes.append(len(data) / 1e6)
        ways = {
            "whole": lambda: embedder.prepare(media.open_picture(data)),  # noqa: B023 - called at once
            "reduced": lambda: embedder.open(data),  # noqa: B023
        }
        for name, way in ways.items():
            taken, made = timed(way)
            ms[name].append(taken)
            tiles[name].append(made)
    x, y = (embedder.embed_prepared(tiles[name]) for name in ("whole", "reduced"))
    cosines = (x * y).sum(1)
    result = {
        "command": f"python benchmarks/decode.py {arguments(sys.argv[1:])}",
        "photos": len(cosines),
        "megabytes": round(statistics.mean(sizes), 2),
        "median_ms": {name: round(statistics.median(taken), 1) for name, taken in ms.items()},
        "times_faster": round(statistics.median(a / b for a, b in zip(ms["whole"], ms["reduced"], strict=True)), 2),
        "cosine": {"least": round(float(cosines.min()), 5), "mean": round(float(cosines.mean()), 5)},
    }
    print(result)
    print(save("decode", result))


if __name__ == "__main__":
    main()
