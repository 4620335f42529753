"""Adapters on disk, in the layout of peft: read in any of the ways such files name their tensors, written in today's."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from e5v_search.backbones.checkpoint import canonical, read_json
from e5v_search.errors import IncompleteCheckpoint, ModelError, UsageError
from e5v_search.training import shards
from e5v_search.training.tuned import TARGETS, Tuned
from e5v_search.training.whole import write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# of our modules, in transformers' LlavaNextForConditionalGeneration inside peft's model
_PREFIX = "base_model.model.model."
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


def save_adapter(tuned: Tuned, folder: Path) -> None:
    """The adapter into `folder`, where the same run's last save is replaced whole or not at all.

    peft puts it on transformers' model, and `merge` into a new checkpoint. Raises UsageError for a model without an
    adapter, or when `folder` holds another kind of adapter; DiskFull.
    """
    if tuned.lora is None:
        raise UsageError("the model has no adapter: all its weights were trained; write them with save_weights")
    local = tuned.source.name == "local"
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": str(tuned.source.folder.absolute()) if local else tuned.source.name,
        "revision": None if local else tuned.source.revision,
        "r": tuned.lora.rank,
        "lora_alpha": tuned.lora.alpha,
        "lora_dropout": tuned.lora.dropout,
        "target_modules": TARGETS,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    # two files cannot be replaced as one: the first must fit the weights that are there already
    if not (folder / WEIGHTS).exists():
        write_json(folder / CONFIG, config)
    elif read_json(folder / CONFIG) != config:
        raise UsageError(f"{folder} holds an adapter of another kind: choose another folder, or delete it")
    tensors = {_PREFIX + name.replace(".default.", "."): value for name, value in tuned.trainable().items()}
    shards.write(folder / WEIGHTS, {name: shards.Entry.of(value) for name, value in tensors.items()}, tensors.__getitem__)


def load_adapter(tuned: Tuned, folder: Path) -> None:
    """Put the saved adapter in place of the model's own, to train on. UsageError when it is of another rank or scale."""
    adapter = read_adapter(folder)
    lora = tuned.lora
    if lora is None or lora.rank != adapter.rank or not math.isclose(lora.alpha / lora.rank, adapter.scaling):
        ours = "none" if lora is None else f"rank {lora.rank}, scale {lora.alpha / lora.rank:g}"
        theirs = f"rank {adapter.rank}, scale {adapter.scaling:g}"
        raise UsageError(f"{folder} holds an adapter of {theirs}, the model's is {ours}; load the model with the same")
    left = tuned.trainable()
    for layer, factors in adapter.factors.items():
        for letter, factor in zip("AB", factors, strict=True):
            parameter = left.pop(f"{layer}.lora_{letter}.default.weight", None)
            if parameter is None or parameter.shape != factor.shape:
                raise ModelError(f"{folder} holds an adapter for another model: {layer} does not fit")
            _fill(parameter, factor)
    if left:
        raise IncompleteCheckpoint(f"{folder} lacks {len(left)} tensors of the adapter, the first is {min(left)}")


def read_adapter(folder: Path) -> Adapter:
    """A LoRA adapter made by this program, by peft on today's or older transformers, or by peft on the language model alone.

    Raises IncompleteCheckpoint for a file that is missing or damaged, ModelError for what is no plain LoRA.
    """
    config = read_json(folder / CONFIG)
    _plain(config, folder)
    rank = int(config["r"])
    factors: dict[str, dict[str, Tensor]] = {}
    if not (folder / WEIGHTS).exists():
        raise IncompleteCheckpoint(f"{folder} has no {WEIGHTS}: not a whole adapter (pickled weights are not read)")
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


@torch.no_grad()
def _fill(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.copy_(value)
