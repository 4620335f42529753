"""Our training step against a loop written as the published one, on the same model and the same triplets in one run.

    python benchmarks/train.py NLI.csv [--triplets 24] [--rounds 3] [--width 512] [--layers 18] [--piece 512]

A LLaVA-NeXT with seeded random weights, whose lm_head has the 8B model's share of the decoder, 7 %, and e5v-tiny's
tokenizer; LoRA on all of the language model's linear layers, its rank scaled with the width from 64 at 4,096, dropout
0.05; equation 1; AdamW; float32, one thread. Published: transformers' whole model through peft, rows padded on the left to
the longest of the batch, logits computed, all hidden states kept, with gradient checkpointing (as published) and without.
Ours: the whole batch at once, and in pieces with cached gradients. Nothing of ours checkpoints.

First, without dropout, loss and gradient of all ways are compared and multiply-adds counted. Then in each round every way
takes an optimiser step on the same triplets. Times are of the processor, as the machine may be shared. Peak memory is what
the resident set grows by during a step. Written to benchmarks/results/train.json.
"""

import argparse
import ctypes
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from machine import save
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaNextForConditionalGeneration
from transformers.utils import logging

from e5v_search.backbones import registry
from e5v_search.backbones.llava_next import Row
from e5v_search.backbones.modules import LlavaNext
from e5v_search.backbones.prompt_encoder import load_tokenizer
from e5v_search.training import losses
from e5v_search.training.cached import cached_backward
from e5v_search.training.data import read_triplets
from e5v_search.training.export import export
from e5v_search.training.initialise import initialise
from e5v_search.training.recipe import Decoder, Model, Vision
from e5v_search.training.tuned import TARGETS, Lora, Tuned

TEMPERATURE, RATE = 0.05, 1e-4
Step = Callable[[Sequence[Row]], float]


def build(folder: Path, width: int, layers: int) -> None:
    tokenizer = load_tokenizer(registry.BUNDLED / registry.TINY)
    vision = Vision(width=64, layers=1, heads=1, mlp=64, tile=336, patch=14)  # never asked
    decoder = Decoder(width, layers, heads=width // 64, mlp=width * 43 // 16, vocabulary=16 * width)
    if decoder.vocabulary < tokenizer.get_vocab_size():
        raise SystemExit(f"--width: {-(-tokenizer.get_vocab_size() // 16)} at least, for the tokenizer's vocabulary")
    model = LlavaNext(Model(vision, decoder, ((336, 672),)).config(tokenizer.token_to_id("<image>")))
    initialise(model, torch.Generator().manual_seed(0))
    export(model, tokenizer, folder)


def equation_1(h: Tensor) -> Tensor:
    anchors, positives, negatives = h.chunk(3)
    return losses.hard_negative_info_nce(anchors, positives, negatives, 1 / TEMPERATURE)


class Ours:
    def __init__(self, folder: Path, lora: Lora, piece: int) -> None:
        self.tuned = Tuned.load(str(folder), device="cpu", dtype="float32", lora=lora)
        self.piece = piece
        self.parameters = self.tuned.trainable()
        generator = torch.Generator().manual_seed(1)
        for name, parameter in self.parameters.items():
            if "lora_B" in name:  # zero at first, which would leave lora_A without a gradient to compare
                torch.nn.init.normal_(parameter, std=0.02, generator=generator)

    def at_once(self, rows: Sequence[Row]) -> float:
        return cached_backward(self.tuned.embed, [rows], equation_1)

    def in_pieces(self, rows: Sequence[Row]) -> float:
        self.tuned.encoder.batches.tokens, before = self.piece, self.tuned.encoder.batches.tokens
        cuts = list(self.tuned.encoder.batches.cut(range(len(rows)), lambda i: rows[i].length))
        back = torch.tensor([i for cut in cuts for i in cut]).argsort()
        loss = cached_backward(self.tuned.embed, [[rows[i] for i in cut] for cut in cuts], lambda h: equation_1(h[back]))
        self.tuned.encoder.batches.tokens = before
        return loss


class Published:
    def __init__(self, folder: Path, lora: Lora, like: dict[str, torch.nn.Parameter]) -> None:
        whole = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=TARGETS)
        self.model = get_peft_model(whole, config)
        own = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.parameters = {name: own.pop(f"base_model.model.model.{name}") for name in like}
        assert not own
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(like[name])
        self.model.train()

    def step(self, rows: Sequence[Row]) -> float:
        ids = [row.ids for row in rows]
        longest = max(map(len, ids))
        loss = equation_1(
            self.model(
                input_ids=torch.tensor([[0] * (longest - len(row)) + row for row in ids]),
                attention_mask=torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids]),
                output_hidden_states=True,
                return_dict=True,
                use_cache=False,
            ).hidden_states[-1][:, -1]
        )
        loss.backward()
        return float(loss.detach())

    def checkpointed(self, rows: Sequence[Row]) -> float:
        self.model.activation_checkpointing_enable({"use_reentrant": False})
        try:
            return self.step(rows)
        finally:
            self.model.activation_checkpointing_disable()


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (the most since `forget_peak`) in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def compared(ways: dict[str, tuple[Step, dict[str, torch.nn.Parameter]]], rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Of each way without dropout: its loss, how far its gradient is from the first way's, and its operations."""
    found: dict[str, dict[str, float]] = {}
    first: Tensor | None = None
    for name, (step, parameters) in ways.items():
        with FlopCounterMode(display=False) as counter:
            loss = step(rows)
        gradient = torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None])
        first = gradient if first is None else first
        found[name] = {
            "loss": loss,
            "gradient_off_by": float((gradient - first).norm() / first.norm()),
            "tera_operations": counter.get_total_flops() / 1e12,
        }
        for p in parameters.values():
            p.grad = None
        print(name, found[name], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("triplets_file", type=Path, metavar="NLI.csv")
    parser.add_argument("--triplets", type=int, default=24, help="in a step; the paper's GPUs had 24 each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--piece", type=int, default=512, help="tokens, padding included")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    triplets = read_triplets(args.triplets_file)
    lora = Lora(max(1, 64 * args.width // 4096), 16.0, 0.05)
    with tempfile.TemporaryDirectory() as scratch:
        build(Path(scratch) / "model", args.width, args.layers)
        ours = Ours(Path(scratch) / "model", lora, args.piece)
        published = Published(Path(scratch) / "model", lora, ours.parameters)
    ways: dict[str, tuple[Step, dict[str, torch.nn.Parameter]]] = {
        "published, checkpointing": (published.checkpointed, published.parameters),
        "published, not checkpointing": (published.step, published.parameters),
        "ours, at once": (ours.at_once, ours.parameters),
        "ours, in pieces": (ours.in_pieces, ours.parameters),
    }
    rng = random.Random(0)

    def draw() -> list[Row]:
        batch = rng.sample(triplets, args.triplets)
        return ours.tuned.text_rows([triplet[j] for j in range(3) for triplet in batch])

    rows = draw()
    lengths = [row.length for row in rows]
    dropouts = [m for side in (ours.tuned.model, published.model) for m in side.modules() if isinstance(m, torch.nn.Dropout)]
    # not by leaving training mode, outside of which transformers does not checkpoint
    for dropout in dropouts:
        dropout.p = 0.0
    same = compared(ways, rows)
    for dropout in dropouts:
        dropout.p = lora.dropout
    optimisers = {id(p): torch.optim.AdamW(p.values(), lr=RATE) for p in (ours.parameters, published.parameters)}
    rounds: list[dict[str, dict[str, float]]] = []
    for i in range(args.rounds):
        rows = draw()
        rounds.append({})
        for name, (step, parameters) in ways.items():
            forget_peak()
            before, cpu, wall = resident("VmRSS"), time.process_time(), time.perf_counter()
            loss = step(rows)
            optimisers[id(parameters)].step()
            optimisers[id(parameters)].zero_grad()
            rounds[-1][name] = {
                "cpu_seconds": time.process_time() - cpu,
                "wall_seconds": time.perf_counter() - wall,
                "peak_megabytes": resident("VmHWM") - before,
                "loss": loss,
            }
            print(f"round {i + 1}: {name}", rounds[-1][name], flush=True)

    def median(name: str, key: str) -> float:
        return statistics.median(r[name][key] for r in rounds)

    def times_faster(name: str, than: str) -> float:
        return round(statistics.median(r[than]["cpu_seconds"] / r[name]["cpu_seconds"] for r in rounds), 2)

    result: dict[str, Any] = {
        "command": f"python benchmarks/train.py NLI.csv --triplets {args.triplets} --rounds {args.rounds} --width {args.width} "
        f"--layers {args.layers} --piece {args.piece}",
        "transformers": version("transformers"),
        "peft": version("peft"),
        "parameters": sum(p.numel() for p in published.model.parameters()),
        "learned": sum(p.numel() for p in ours.parameters.values()),
        "tokens_a_text": {"mean": round(statistics.mean(lengths), 1), "longest": max(lengths)},
        "ways": {
            name: same[name]
            | {
                "triplets_a_cpu_second": round(args.triplets / median(name, "cpu_seconds"), 3),
                "peak_megabytes": round(median(name, "peak_megabytes")),
            }
            for name in ways
        },
        "times_faster": {f"{a} than {b}": times_faster(a, b) for a in list(ways)[2:] for b in list(ways)[:2]},
        "rounds": rounds,
    }
    print({k: v for k, v in result.items() if k != "rounds"})
    print(save("train", result))


if __name__ == "__main__":
    main()
