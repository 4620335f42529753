"""LoRA adapters on disk, in the layout of peft, in any of the ways such files name their tensors."""

import hashlib
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from e5v_search.backbones.checkpoint import canonical, read_json
from e5v_search.errors import IncompleteCheckpoint, ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_FACTOR = re.compile(r"(.*)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class Adapter:
    """Of each linear layer's weight (out, in), by the layer's name in our modules, the factors a (r, in) and b (out, r)."""

    factors: dict[str, tuple[Tensor, Tensor]]
    rank: int
    scaling: float

    def change(self, layer: str) -> Tensor:
        """What is to be added to the layer's weight; (out, in), float32."""
        a, b = self.factors[layer]
        return self.scaling * (b.float() @ a.float())

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """What takes the place of a tensor of the model, by its name in our modules. ModelError when they do not fit."""
        layer = name.removesuffix(".weight")
        if layer not in self.factors:
            return weight
        change = self.change(layer)
        ours, theirs = tuple(weight.shape), tuple(change.shape)
        if ours != theirs:
            raise ModelError(f"the adapter belongs to another model: {layer} is {ours} here, not {theirs}")
        return weight.float() + change.to(weight.device)

    def check_fits(self, names: Collection[str]) -> None:
        """ModelError unless a model whose tensors have these names has all that the adapter changes."""
        if strange := [layer for layer in self.factors if f"{layer}.weight" not in names]:
            raise ModelError(f"the adapter belongs to another model: this one has no {min(strange)} ({len(strange)} such)")


def check(folder: Path) -> None:
    """IncompleteCheckpoint when the folder holds no whole adapter."""
    if not (folder / CONFIG).exists():
        raise IncompleteCheckpoint(f"{folder} has no {CONFIG}: not an adapter")
    if not (folder / WEIGHTS).exists():
        raise IncompleteCheckpoint(f"{folder} has no {WEIGHTS}: not a whole adapter (pickled weights are not read)")


def digest(folder: Path) -> str:
    """A name for an adapter's content."""
    check(folder)
    h = hashlib.sha256((folder / CONFIG).read_bytes())
    with (folder / WEIGHTS).open("rb") as file:
        h.update(hashlib.file_digest(file, "sha256").digest())
    return h.hexdigest()


def read_adapter(folder: Path) -> Adapter:
    """A LoRA adapter made by this program, by peft on today's or older transformers, or by peft on the language model alone.

    Raises IncompleteCheckpoint for a file that is missing or damaged, ModelError for what is no plain LoRA.
    """
    check(folder)
    config = read_json(folder / CONFIG)
    _plain(config, folder)
    rank = int(config["r"])
    factors: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping, it cannot be iterated
                match = _FACTOR.fullmatch(key)
                if match is None:
                    raise ModelError(f"{folder}: {key} is no part of a plain LoRA adapter")
                factors.setdefault(_layer(match[1]), {})[match[2]] = file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise IncompleteCheckpoint(f"{folder / WEIGHTS} is truncated or damaged ({error})") from error
    for layer, pair in factors.items():
        if pair.keys() != {"A", "B"} or len(pair["A"]) != rank or pair["B"].shape[1:] != (rank,):
            raise IncompleteCheckpoint(f"{folder}: the adapter of {layer} is not whole, or not of rank {rank}")
    return Adapter({layer: (pair["A"], pair["B"]) for layer, pair in factors.items()}, rank, _scaling(config))


def _layer(key: str) -> str:
    """A layer's name in our modules, from its name in any adapter.

    Adapters trained on the language model alone name its parts as if it were the whole: "model.layers.…".
    """
    name = canonical(key.removeprefix("base_model.model."))
    return f"language_model.{name}" if name.startswith("layers.") else name


def _scaling(config: dict[str, Any]) -> float:
    rank = int(config["r"])
    return float(config.get("lora_alpha", 8)) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _plain(config: dict[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA" or not isinstance(config.get("r"), int) or config["r"] < 1:
        raise ModelError(f"{folder} holds a {config.get('peft_type') or 'nameless'!r} adapter; only LoRA is supported")
    more = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias", "layer_replication")
    odd = [name for name in more if config.get(name)]
    if config.get("bias", "none") != "none":
        odd.append("bias")
    if odd:
        raise ModelError(f"{folder} is no plain LoRA adapter ({', '.join(odd)}); only plain ones are supported")
