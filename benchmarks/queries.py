"""What a person waits for: one text, and one change to a photo after another.

Part of embed.py. A single text goes through every weight of the decoder's layers once, for few tokens: on a GPU it can take no
less time than reading them does.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from e5v_search.backbones.llava_next import LlavaNextEmbedder

_LARGEST = 2**31  # bytes, to see how fast memory is read


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def weights(embedder: LlavaNextEmbedder) -> int:
    """Bytes of the decoder's layers."""
    return sum(p.nbytes for p in embedder.model.language_model.layers.parameters())


def reading(n: int, device: torch.device) -> float:
    """Milliseconds in which `n` bytes are read: a sum over as many, or over the most that are tried, the best of twenty."""
    size = min(n, _LARGEST)
    memory = torch.ones(size // 4, device=device)
    return min(milliseconds(memory.sum, device) for _ in range(20)) * n / size


def measure(embedder: LlavaNextEmbedder, photos: list[Path], texts: list[str], rounds: int) -> dict[str, Any]:
    """Medians over `rounds` of 16 texts, and of the first two changes to a photo."""
    texts = texts[:16]
    n = [len(row) for row in embedder.encoder.ask("text", "retrieval", texts)]
    of_texts: list[float] = []
    for i in range(rounds + 2):  # a length is recorded when it comes for the second time
        taken = [milliseconds(lambda text=text: embedder.embed_texts([text]), embedder.device) for text in texts]  # type: ignore[misc]
        of_texts += taken if i > 1 else []
    of_photos: list[list[float]] = []
    for i in range(rounds + 1):
        embedder.memory.clear()
        changes = [[(photos[i % len(photos)], text)] for text in texts[:2]]
        taken = [milliseconds(lambda one=one: embedder.embed_composed(one), embedder.device) for one in changes]  # type: ignore[misc]
        of_photos += [taken] if i else []
    read = reading(weights(embedder), embedder.device)
    text = statistics.median(of_texts)
    return {
        "tokens_of_a_text": statistics.mean(n),
        "text_ms": round(text, 3),
        "weights_mb": round(weights(embedder) / 1e6, 1),
        "reading_the_weights_ms": round(read, 3),
        "text_against_reading_the_weights": round(text / read, 2),
        "first_change_ms": round(statistics.median(first for first, _ in of_photos), 2),
        "second_change_ms": round(statistics.median(second for _, second in of_photos), 2),
        "second_against_first": round(statistics.median(second / first for first, second in of_photos), 3),
    }
