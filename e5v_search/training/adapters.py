"""What was trained as an adapter, on disk in the layout of peft, and back to train on."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from e5v_search.backbones import registry
from e5v_search.backbones.adapters import CONFIG, WEIGHTS, read_adapter
from e5v_search.backbones.checkpoint import read_json
from e5v_search.errors import IncompleteCheckpoint, ModelError, UsageError
from e5v_search.training import shards
from e5v_search.training.tuned import TARGETS, Tuned
from e5v_search.training.whole import write_json

# of our modules, in transformers' LlavaNextForConditionalGeneration inside peft's model
_PREFIX = "base_model.model.model."


def save_adapter(tuned: Tuned, folder: Path) -> None:
    """The adapter into `folder`, where the same run's last save is replaced whole or not at all.

    peft puts it on transformers' model, and `merge` into a new checkpoint. Raises UsageError for a model without an
    adapter, or when `folder` holds another kind of adapter; DiskFull.
    """
    if tuned.lora is None:
        raise UsageError("the model has no adapter: all its weights were trained; write them with save_weights")
    local = registry.HUB_ID.fullmatch(tuned.source.name) is None
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


@torch.no_grad()
def _fill(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.copy_(value)
