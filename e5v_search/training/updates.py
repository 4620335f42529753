"""From gradients to an update, and the state to go on from: in each process whole, or split among them."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from e5v_search.backbones.llava_next import Row
from e5v_search.errors import IncompleteCheckpoint, MissingPackage
from e5v_search.training.gather import average_gradients, processes, rank
from e5v_search.training.state import load_state, save_state
from e5v_search.training.tuned import Tuned
from e5v_search.training.whole import replacing


class Update(Protocol):
    """`encode` rows with gradients, go backwards, `step`. States are of a run that `identity` names."""

    def encode(self, rows: Sequence[Row]) -> Tensor: ...
    def step(self, rate: float) -> float:
        """Average the gradients over processes, clip them, update, clear them -> their norm before clipping."""
        ...

    def save(self, done: int, identity: str) -> None: ...
    def load(self, identity: str) -> int:
        """The step to go on with, 0 without a state. Raises IncompleteCheckpoint."""
        ...


class Whole(Update):
    """Every process holds the optimiser's whole state; the first one writes it, to one file."""

    def __init__(self, tuned: Tuned, optimiser: torch.optim.Optimizer, clip: float, out: Path) -> None:
        self.tuned, self.learned, self.optimiser, self.clip = tuned, tuned.trainable(), optimiser, clip
        self.path = out / "state.safetensors"

    def encode(self, rows: Sequence[Row]) -> Tensor:
        return self.tuned.embed(rows)

    def step(self, rate: float) -> float:
        average_gradients(self.learned.values())
        norm = float(nn.utils.clip_grad_norm_(self.learned.values(), self.clip))
        if math.isfinite(norm):
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return norm

    def save(self, done: int, identity: str) -> None:
        if rank() == 0:
            save_state(self.path, self.learned, self.optimiser, done, identity)

    def load(self, identity: str) -> int:
        return load_state(self.path, self.learned, self.optimiser, identity) if self.path.exists() else 0


class Sharded(Update):
    """ZeRO-2 by DeepSpeed: each process keeps its part of the gradients and of the optimiser's state, and writes it.

    A state is a folder of its own under `zero/`; the file `zero/current` names the last whole one, so a kill in the middle
    of a save loses nothing. As many processes must go on as there were.
    """

    def __init__(self, tuned: Tuned, optimiser: torch.optim.Optimizer, clip: float, out: Path) -> None:
        try:
            import deepspeed
        except ImportError:
            raise MissingPackage("zero2 needs a package: pip install 'e5v-search[zero2]'") from None
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # asked for, and without meaning: batches come from elsewhere
            "zero_optimization": {"stage": 2},
            # the pieces of a batch go backwards one by one, and are one step
            "managed_gradient_accumulation": False,
            "gradient_clipping": clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        learned = list(tuned.trainable().values())
        model = _Embed(tuned)
        self.engine, self.optimiser, *_ = deepspeed.initialize(
            model=model, optimizer=optimiser, model_parameters=learned, config=settings
        )
        self.folder = out / "zero"

    def encode(self, rows: Sequence[Row]) -> Tensor:
        out: Tensor = self.engine(rows)
        return out

    def step(self, rate: float) -> float:
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def save(self, done: int, identity: str) -> None:
        tag, told = f"step-{done}", {"done": done, "identity": identity, "processes": processes()}
        self.engine.save_checkpoint(
            str(self.folder), tag=tag, client_state=told, save_latest=False, exclude_frozen_parameters=True
        )
        if rank() == 0:
            with replacing(self.folder / "current") as file:
                file.write(tag.encode())
            for old in self.folder.iterdir():
                if old.is_dir() and old.name != tag:
                    shutil.rmtree(old)

    def load(self, identity: str) -> int:
        current = self.folder / "current"
        if not current.exists():
            return 0
        path, told = self.engine.load_checkpoint(str(self.folder), tag=current.read_text(), load_module_strict=False)
        same = path is not None and (told["identity"], told["processes"]) == (identity, processes())
        if not same:
            raise IncompleteCheckpoint(
                f"{self.folder} is of another recipe, other data or another number of processes; "
                "choose another --out, or delete it"
            )
        return int(told["done"])


class _Embed(nn.Module):
    """`Tuned.embed` as the forward pass of a module, which DeepSpeed wraps."""

    def __init__(self, tuned: Tuned) -> None:
        super().__init__()
        self.model = tuned.model
        self._embed: Any = tuned.embed

    def forward(self, rows: Sequence[Row]) -> Tensor:
        out: Tensor = self._embed(rows)
        return out
