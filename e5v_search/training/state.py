"""A run on disk: one safetensors file with weights, optimiser state and the step, replaced whole or not at all."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from e5v_search.errors import IncompleteCheckpoint
from e5v_search.training.whole import replacing

Weights = Mapping[str, nn.Parameter]  # what is trained, by name


def save_state(path: Path, weights: Weights, optimiser: torch.optim.Optimizer, step: int, identity: str) -> None:
    """`identity` names the recipe: a run goes on only with the recipe that began it.

    Raises DiskFull, or ModelError with the system's reason; what was saved before is then still there.
    """
    tensors: dict[str, Tensor] = {f"weights/{name}": value for name, value in weights.items()}
    for name, parameter in weights.items():
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser/{key}/{name}"] = value
    data = save({k: v.detach().contiguous() for k, v in tensors.items()}, metadata={"step": str(step), "identity": identity})
    with replacing(path) as file:
        file.write(data)


def load_state(path: Path, weights: Weights, optimiser: torch.optim.Optimizer, identity: str) -> int:
    """Restore in place; the step to go on with. What the run did not have yet, as another stage may need it, stays as it is.

    Raises IncompleteCheckpoint when the file is damaged or of another recipe.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict: iterating it fails)
    except (SafetensorError, OSError) as error:
        raise IncompleteCheckpoint(f"{path} cannot be read ({error}); delete it to begin anew") from error
    if metadata.get("identity") != identity:
        raise IncompleteCheckpoint(f"{path} is of another recipe or other data; choose another --out, or delete it")
    saved = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    if not saved.keys() <= weights.keys():
        raise IncompleteCheckpoint(f"{path} holds other weights than this model has; choose another --out, or delete it")
    with torch.no_grad():
        for name, value in saved.items():
            weights[name].copy_(value)
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimiser":
            slot, _, name = rest.partition("/")
            optimiser.state[weights[name]][slot] = value.to(weights[name].device) if value.dim() else value
    return int(metadata["step"])
