"""What share of the tokens in batches is padding, with the batches of a processor and of a GPU, padded and packed.

    python benchmarks/padding.py --photos DIR --texts FILE

Photos are counted as E5-V's 8B model reads them: 576 tokens for a tile of 336 pixels, and the prompt. Texts, one a line, are
counted by e5v-tiny's tokens. Nothing is embedded. Written to results/padding.json.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import arguments, save
from PIL import Image

from e5v_search import Embedder, media
from e5v_search.backbones.batches import TEXTS, WINDOW, Batches
from e5v_search.backbones.layout import Packed, Padded
from e5v_search.backbones.tiles import TileSpec, token_count
from e5v_search.backbones.varlen import flash

SPEC = TileSpec(336, 14, ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)), Image.Resampling.BICUBIC)
PROMPT = 20
N = 8192


def padding(lengths: list[int], window: int, tokens: int, packed: bool) -> float:
    """Of all places in the tensors that the decoder would get."""
    batches = Batches(torch.device("cpu"), lambda: 0, packed)
    batches.tokens = tokens
    held = 0
    for start in range(0, len(lengths), window):
        for some in batches.cut(lengths[start : start + window], lambda length: length):
            rows = [torch.empty(length, 1) for length in some]
            x, _ = Packed.of(rows, flash) if packed else Padded.of(rows)
            held += x.numel()
    return round(1 - sum(lengths) / held, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    args = parser.parse_args()
    rng = np.random.default_rng(0)

    def drawn(values: list[int]) -> list[int]:
        return [values[i] for i in rng.integers(0, len(values), N)]

    sizes = [Image.open(found.path).size[::-1] for found in media.Scan([str(args.photos)])]
    count: Callable[[tuple[int, int]], int] = lambda size: token_count(size, SPEC) + PROMPT  # noqa: E731
    encoder = Embedder.load("e5v-tiny", device="cpu").encoder  # type: ignore[attr-defined]
    texts = [line for line in args.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    lengths = {
        "photos": drawn([count(size) for size in sizes]),
        "texts": drawn([len(ids) for ids in encoder.ask("text", "retrieval", texts)]),
    }
    rows = [
        {
            "of": kind,
            "device": device,
            "window": window,
            "packed": packed,
            "padding": padding(lengths[kind], window, tokens, packed),
        }
        for kind, windows in (("photos", [WINDOW]), ("texts", [WINDOW, TEXTS]))
        for window in windows
        for device, tokens, packed in (("cpu", 2048, False), ("cuda", 32768, False), ("cuda", 32768, True))
    ]
    for row in rows:
        print(row)
    means = {kind: round(float(np.mean(values)), 1) for kind, values in lengths.items()}
    save("padding", {"command": f"python benchmarks/padding.py {arguments(sys.argv[1:])}", "mean_tokens": means, "rows": rows})


if __name__ == "__main__":
    main()
