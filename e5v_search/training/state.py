"""A run on disk: one safetensors file with weights, optimiser state and the step, replaced whole or not at all."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from e5v_search.errors import IncompleteCheckpoint


def save_state(path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, step: int, identity: str) -> None:
    """`identity` names the recipe: a run goes on only with the recipe that began it."""
    tensors = {f"weights/{name}": value for name, value in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser/{key}/{name}"] = value
    data = save({k: v.detach().contiguous() for k, v in tensors.items()}, metadata={"step": str(step), "identity": identity})
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_state(path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, identity: str) -> int:
    """Restore in place; the step to go on with. IncompleteCheckpoint when the file is damaged or of another recipe."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict: iterating it fails)
    except (SafetensorError, OSError) as error:
        raise IncompleteCheckpoint(f"{path} cannot be read ({error}); delete it to begin anew") from error
    if metadata.get("identity") != identity:
        raise IncompleteCheckpoint(f"{path} is of another recipe or other data; choose another --out, or delete it")
    module.load_state_dict({k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")})
    parameters = dict(module.named_parameters())
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimiser":
            slot, _, name = rest.partition("/")
            optimiser.state[parameters[name]][slot] = value.to(parameters[name].device) if value.dim() else value
    return int(metadata["step"])
