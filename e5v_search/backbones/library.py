"""Models of transformers: loaded whole or refused, from safetensors, without a line of a model author's code."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from e5v_search.backbones import checkpoint
from e5v_search.backbones.adapters import Adapter
from e5v_search.errors import IncompleteCheckpoint, MissingPackage, UsageError


def load(
    folder: Path,
    kind: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    quantize: str | None = None,
    adapter: Adapter | None = None,
    expendable: Collection[str] = (),
    config: Any = None,
) -> Any:
    """transformers' class `kind` in evaluation mode. `expendable` are tensors that no embedding depends on; `config` is
    the model's, where the class cannot read it from the folder.

    Raises IncompleteCheckpoint for missing, damaged or misshapen tensors, ModelError for an adapter of another model,
    UsageError for a `quantize` that cannot be had.
    """
    checkpoint.shards(folder)
    more: dict[str, Any] = {} if config is None else {"config": config}
    if quantize is not None:
        more |= {"quantization_config": _bitsandbytes(quantize, device, dtype, adapter), "device_map": {"": device}}
    try:
        with quiet():
            model, found = getattr(transformers, kind).from_pretrained(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, **more
            )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise IncompleteCheckpoint(f"{folder} cannot be loaded ({reason}); download the model again") from error
    if missing := sorted(set(found["missing_keys"]) - set(expendable)):
        raise IncompleteCheckpoint(
            f"{folder} lacks {len(missing)} tensors, the first is {missing[0]}; download the model again"
        )
    model.requires_grad_(False)
    if adapter is not None:
        _merge(model, adapter)
    return model.eval() if quantize is not None else model.eval().to(device)


@torch.no_grad()
def _merge(model: torch.nn.Module, adapter: Adapter) -> None:
    weights = dict(model.named_parameters())
    weights |= {f"language_model.{name}": weight for name, weight in weights.items()}  # of a decoder by itself
    adapter.check_fits(weights)
    for layer in adapter.factors:
        weight = weights[f"{layer}.weight"]
        weight.copy_(adapter.merged(f"{layer}.weight", weight))


def _bitsandbytes(quantize: str, device: torch.device, dtype: torch.dtype, adapter: Adapter | None) -> Any:
    if adapter is not None:
        raise UsageError("an adapter is not merged into quantised weights of this family: leave --quantize out")
    if device.type != "cuda":
        raise UsageError(f"this family of models is quantised on a CUDA device, not on {device}: leave --quantize out")
    if not transformers.utils.is_bitsandbytes_available():
        raise MissingPackage("4 and 8 bit weights need bitsandbytes: pip install bitsandbytes")
    if quantize == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bar and its report of tensors: what is amiss is raised."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()
