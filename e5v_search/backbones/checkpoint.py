"""Checkpoint folders: what is there, what is missing, and the weights on a device.

Both layouts of the published checkpoints are read: that of transformers 4.41 (`language_model.model.*`,
`vision_tower.vision_model.*`) and that of transformers 5 (`model.language_model.*`). Safetensors only.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from e5v_search.backbones.config import LlavaNextConfig
from e5v_search.backbones.fp8 import Fp8Linear
from e5v_search.backbones.int8 import Int8Linear
from e5v_search.backbones.modules import LlavaNext
from e5v_search.backbones.packed import PackedLinear, swap_linears
from e5v_search.config import QUANTIZE
from e5v_search.errors import IncompleteCheckpoint, MissingPackage, ModelError, UsageError

if TYPE_CHECKING:
    from e5v_search.backbones.adapters import Adapter

PACKED: dict[str, type[PackedLinear]] = {"int8": Int8Linear, "fp8": Fp8Linear}
MODULES = "modules.json"
_SETTINGS = (".json", ".jinja", ".model", ".txt")  # files that say how a model of sentence-transformers makes a vector


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IncompleteCheckpoint(f"{path.parent} has no {path.name}: not a whole model folder") from None
    except (OSError, ValueError) as error:
        raise IncompleteCheckpoint(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise IncompleteCheckpoint(f"{path} does not hold a JSON object")
    return data


def image_settings(folder: Path) -> dict[str, Any]:
    """How a checkpoint's pictures are prepared, from either file that transformers keeps it in; empty without both."""
    if (folder / "preprocessor_config.json").exists():
        return read_json(folder / "preprocessor_config.json")
    path = folder / "processor_config.json"
    settings: dict[str, Any] = (read_json(path).get("image_processor") or {}) if path.exists() else {}
    return settings


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, all present. IncompleteCheckpoint names what is not."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing or not names:
            raise IncompleteCheckpoint(
                f"{folder} lacks {len(missing)} of {len(names)} weight files: {', '.join(missing[:3])}"
                f"{', …' if len(missing) > 3 else ''}; download the model again"
            )
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        raise IncompleteCheckpoint(f"{folder} holds pickled weights only; e5v-search reads safetensors, which run no code")
    raise IncompleteCheckpoint(f"{folder} holds no weights (model.safetensors or model.safetensors.index.json)")


def modules(folder: Path) -> list[dict[str, Any]]:
    """What a folder of sentence-transformers consists of; nothing for any other folder. IncompleteCheckpoint for a bad list."""
    path = folder / MODULES
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IncompleteCheckpoint(f"{path} cannot be read: {error}") from error
    if not isinstance(found, list) or not found or not all(isinstance(each, dict) for each in found):
        raise IncompleteCheckpoint(f"{path} does not hold a list of modules")
    return found


def weights(folder: Path) -> list[Path]:
    """As `shards`, of a folder of sentence-transformers those of all its modules."""
    if not modules(folder):
        return shards(folder)
    names = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin")
    homes = sorted({path.parent for name in names for path in folder.rglob(name)})
    if not homes:
        raise IncompleteCheckpoint(f"{folder} holds no weights in safetensors")
    return [path for home in homes for path in shards(home)]


def digest(folder: Path) -> str:
    """A name for a model's content that costs no full read: config, tokenizer, tensor tables, sampled weights."""
    h = hashlib.sha256()
    if modules(folder):
        read = sorted(path for path in folder.rglob("*") if path.suffix in _SETTINGS and path.is_file())
    else:
        read = [path for name in ("config.json", "tokenizer.json") if (path := folder / name).exists()]
    for path in read:
        h.update(path.read_bytes())
    for path in weights(folder):
        size = path.stat().st_size
        with path.open("rb") as f:
            header = f.read(8)
            h.update(header + f.read(int.from_bytes(header, "little") if size > 8 else 0))
            start = f.tell()
            for i in range(16):
                f.seek(start + (size - start) * i // 16)
                h.update(f.read(65536))
    return h.hexdigest()


def canonical(key: str) -> str:
    """A tensor's name in our modules, from its name in any published layout."""
    key = re.sub(r"^(base_)?model\.", "", key)
    key = re.sub(r"^language_model\.model\.", "language_model.", key)
    key = re.sub(r"^language_model\.lm_head\.", "lm_head.", key)
    return key.replace("vision_tower.vision_model.", "vision_tower.", 1)


def tensors(folder: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Those of a checkpoint whose names, as `canonical` gives them, are wanted. IncompleteCheckpoint for a damaged file."""
    for path in shards(folder):
        try:
            with safe_open(path, framework="pt") as f:
                for key in f.keys():  # noqa: SIM118 - no mapping, it cannot be iterated
                    if wanted(name := canonical(key)):
                        yield name, f.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise IncompleteCheckpoint(f"{path} is truncated or damaged ({error}); download the model again") from error


def read_tensor(folder: Path, *names: str) -> Tensor:
    """The first of `names` (as `canonical` gives them) that the checkpoint holds; nothing else is read."""
    for name in names:
        for _, tensor in tensors(folder, name.__eq__):
            return tensor
    raise IncompleteCheckpoint(f"{folder} holds no {' and no '.join(names)}; download the model again")


def load_model(
    folder: Path,
    config: LlavaNextConfig,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str | None = None,
    *,
    sees: bool = True,
    adapter: "Adapter | None" = None,
) -> LlavaNext:
    """The model in evaluation mode, tensor by tensor onto `device`: the whole never stands in main memory twice.

    Without `sees` the model is its language model alone: nothing of the vision tower, the projector and the newline is read.
    An adapter is added to the weights before they are quantised.
    Raises IncompleteCheckpoint for missing or misshapen tensors, ModelError for an adapter of another model, MissingPackage
    without bitsandbytes.
    """
    with torch.device("meta"):
        model = LlavaNext(config)
    if not sees:
        del model.vision_tower, model.multi_modal_projector, model.image_newline
    if quantize is not None:
        _quantize_linears(model, quantize, device, dtype)
    wanted = dict(model.named_parameters())
    if adapter is not None:
        adapter.check_fits(wanted)
    # not wanted: lm_head, vision layers above the one that is read, rotary buffers of old checkpoints
    for key, tensor in tensors(folder, lambda key: key in wanted):
        parameter = wanted.pop(key)
        # the embedding table may have more or fewer rows than config.json says (both published revisions differ)
        rows_free = key == "language_model.embed_tokens.weight"
        if tensor.shape[rows_free:] != parameter.shape[rows_free:]:
            raise IncompleteCheckpoint(
                f"{folder}: {key} has shape {tuple(tensor.shape)}, config.json asks for {tuple(parameter.shape)}"
            )
        tensor = tensor if adapter is None else adapter.merged(key, tensor)
        _place(model, key, tensor.to(dtype), device)
    if wanted:
        names = sorted(wanted)
        raise IncompleteCheckpoint(f"{folder} lacks {len(names)} tensors, the first is {names[0]}; download the model again")
    return model.requires_grad_(False).eval()


def _place(model: nn.Module, key: str, tensor: Tensor, device: torch.device) -> None:
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, PackedLinear) and name == "weight":
        module.pack(tensor.to(device))
        return
    old = getattr(module, name)
    if type(old) is nn.Parameter:
        new = nn.Parameter(tensor.to(device), requires_grad=False)
    else:  # a bitsandbytes parameter: the move to the device quantises it
        new = type(old)(tensor, requires_grad=False, **vars(module)["quantize_options"]).to(device)
    setattr(module, name, new)
    if isinstance(module, nn.Embedding):
        module.num_embeddings = len(tensor)


def _quantize_linears(model: LlavaNext, quantize: str, device: torch.device, dtype: torch.dtype) -> None:
    """Swap linear layers for packed ones, or the decoder's for bitsandbytes' (NF4 with double quantisation, LLM.int8)."""
    if quantize not in QUANTIZE:
        raise UsageError(f"quantize must be one of {', '.join(QUANTIZE)}, not {quantize!r}")
    if quantize in PACKED:
        swap_linears(model, PACKED[quantize], device)
        return
    decoder = model.language_model
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise MissingPackage("4 and 8 bit weights need bitsandbytes: pip install bitsandbytes") from None
    for path, linear in [(p, m) for p, m in decoder.named_modules() if isinstance(m, nn.Linear)]:
        shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
        if quantize == "4bit":
            new = bnb.nn.Linear4bit(
                *shape, bias=bias, compute_dtype=dtype, compress_statistics=True, quant_type="nf4", device="meta"
            )
            new.quantize_options = {"quant_type": "nf4", "compress_statistics": True}
        else:
            new = bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False, threshold=6.0, device="meta")
            new.quantize_options = {"has_fp16_weights": False}
        parent, _, name = path.rpartition(".")
        setattr(decoder.get_submodule(parent), name, new)


def free_cuda_bytes() -> int | None:
    """Free memory of the CUDA device in use; None without one."""
    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None


def all_devices() -> list[str]:
    """What a machine has to run models on: its CUDA devices, one by one, else what "auto" is."""
    return [f"cuda:{n}" for n in range(torch.cuda.device_count())] or [str(pick_device("auto"))]


def pick_device(device: str) -> torch.device:
    """ "auto": CUDA, else Apple's MPS, else the processor. ModelError for a device that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device, parameters: float = 0) -> torch.dtype:
    """ "auto": bfloat16 on CUDA, float16 on MPS; on a processor float32, or bfloat16 from two billion parameters on."""
    named = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype in named:
        return named[dtype]
    if dtype != "auto":
        raise UsageError(f"dtype must be auto, {', '.join(named)}, not {dtype!r}")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "mps":
        return torch.float16
    return torch.bfloat16 if parameters > 2e9 else torch.float32
