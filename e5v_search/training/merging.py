"""Full model folders from what was trained: an adapter merged into its base, or all weights."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from e5v_search.backbones import checkpoint, registry
from e5v_search.backbones.adapters import read_adapter
from e5v_search.backbones.config import LlavaNextConfig
from e5v_search.errors import ModelError, UsageError
from e5v_search.training import shards
from e5v_search.training.export import image_processor, write_processor
from e5v_search.training.tuned import Tuned
from e5v_search.training.whole import new_folder, replacing, write_json

_TABLES = ("language_model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Change:
    """`shapes` of the weights that change, by their name in our modules; `new(name, old)` is what takes a weight's place."""

    shapes: Mapping[str, tuple[int, ...]]
    new: Callable[[str, Tensor], Tensor]


def merge(base: str, adapter: Path, out: Path) -> None:
    """The model `base` with the adapter added to its weights, as a checkpoint folder of its own.

    Weights keep their type and their files; one tensor is in memory at a time. What was trained on 4 bit weights is added to
    the full ones, so vectors change a little (cosine 0.995 in e5v-tiny). Tokenizer and preprocessing come along,
    with files that the base lacks and transformers needs. `out` is there whole or not at all; it must be new or empty.
    Raises what `registry.resolve` and `read_adapter` do, ModelError when the two do not fit, UsageError, DiskFull.
    """
    source, found = registry.resolve(base), read_adapter(adapter)

    def new(name: str, old: Tensor) -> Tensor:
        return found.merged(name, old).to(old.dtype)

    shapes = {f"{layer}.weight": (len(b), a.shape[1]) for layer, (a, b) in found.factors.items()}
    _write_tuned(source, out, Change(shapes, new), f"the adapter `{adapter.name}` merged into it")


def save_weights(tuned: Tuned, out: Path) -> None:
    """The model whose weights were all trained, as a checkpoint folder in its base's types and files. See `merge`.

    What the model was loaded without is the base's. Raises UsageError for a model with an adapter.
    """
    if tuned.lora is not None:
        raise UsageError("an adapter was trained: write it with save_adapter, then merge it into its base")
    weights = tuned.trainable()
    change = Change({name: tuple(w.shape) for name, w in weights.items()}, lambda name, old: weights[name].to("cpu", old.dtype))
    what = "weights" if tuned.parts == "all" else "language model"
    _write_tuned(tuned.source, out, change, f"its {what} tuned")


def _write_tuned(source: registry.Source, out: Path, change: Change, how: str) -> None:
    with new_folder(out) as folder:
        write_model(source, folder, change)
        with replacing(folder / "README.md") as card:
            card.write(card_text(source, out.name, how).encode())


def write_model(source: registry.Source, folder: Path, change: Change) -> None:
    """The model of `source` with `change` into `folder`, and what transformers needs that is not there."""
    files = checkpoint.shards(source.folder)
    _check(files, change)
    raw = checkpoint.read_json(source.folder / "config.json")
    config = LlavaNextConfig.from_json(raw)
    weight_map: dict[str, str] = {}
    total = 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            entries = _entries(file, config.image_token_id)
            shards.write(folder / path.name, entries, partial(_tensor, file, entries, change))
        for key, entry in entries.items():
            weight_map[key], total = path.name, total + entry.size
            if checkpoint.canonical(key) == _TABLES[0]:
                raw.setdefault("text_config", {})["vocab_size"] = entry.shape[0]
    for path in _companions(source.folder):
        shutil.copyfile(path, folder / path.name)
    first_card = folder / "README-base.md"  # of the model that all others were made from: its licence goes on
    if (source.folder / "README.md").exists() and not first_card.exists():
        shutil.copyfile(source.folder / "README.md", first_card)
    if len(files) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", raw)
    if not (folder / "processor_config.json").exists():
        write_processor(folder, config, checkpoint.image_settings(folder) or image_processor(config))


def _entries(file: Any, image_id: int) -> dict[str, shards.Entry]:
    """What is to be written of a weight file: all that it holds, of tables perhaps more."""
    slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - no mapping, it cannot be iterated
    entries = {key: shards.Entry(s.get_dtype(), s.get_shape()) for key, s in slices.items()}
    for key, entry in entries.items():
        # transformers looks the image token up in the table, which in one published revision ends just before it
        if checkpoint.canonical(key) in _TABLES and entry.shape[0] <= image_id:
            entries[key] = shards.Entry(entry.kind, (-(-(image_id + 1) // 64) * 64, *entry.shape[1:]))
    return entries


def _tensor(file: Any, entries: Mapping[str, shards.Entry], change: Change, key: str) -> Tensor:
    old, name = file.get_tensor(key), checkpoint.canonical(key)
    new: Tensor = change.new(name, old) if name in change.shapes else old
    missing = entries[key].shape[0] - len(new) if name in _TABLES else 0
    return torch.cat((new, new.new_zeros(missing, *new.shape[1:]))) if missing else new


def _check(files: list[Path], change: Change) -> None:
    """That all that is to change is there and of the same shape, before anything is written."""
    left = dict(change.shapes)
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping, it cannot be iterated
                wanted, there = left.pop(checkpoint.canonical(key), None), file.get_slice(key)
                if wanted is not None and (tuple(there.get_shape()) != wanted or not there.get_dtype().startswith(("F", "BF"))):
                    raise ModelError(f"{key} is {there.get_dtype()} {tuple(there.get_shape())} in the base model, not {wanted}")
    if left:
        raise ModelError(f"the base model has no {min(left)} ({len(left)} such): what was trained belongs to another model")


def _companions(folder: Path) -> list[Path]:
    """All files beside the weights but the base's card, which would speak of another model."""
    weights = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pth", ".pt", ".gguf")
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.endswith(weights)]
    return [path for path in files if path.name != "README.md" and not path.name.startswith(".")]


def card_text(source: registry.Source, name: str, how: str) -> str:
    """A model card: what the weights are, and whose licence holds."""
    base = source.folder.name if source.name == "local" else source.name
    licence = f" ({source.known.licence})" if source.known else ""
    return (
        f"# {name}\n\n`{base}` at revision `{source.revision}` with {how}, by e5v-search.\n\n"
        f"The weights are derived from those of `{base}`: its licence{licence} holds for them too, and that of the data "
        "they were tuned on. What the base says of itself, where it does, is in README-base.md.\n"
    )
