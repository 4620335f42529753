"""The loss of one step of tuning, from the embeddings of its inputs. In a run of several processes each of them computes a
loss of the gathered rows (see `gather`)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from e5v_search.training import losses
from e5v_search.training.draws import Draw
from e5v_search.training.examples import Example
from e5v_search.training.gather import gather, rank
from e5v_search.training.log import Say
from e5v_search.training.teacher import teacher_vectors
from e5v_search.training.tuning import Tuning


class Goal:
    """`loss(x, draw)`: x (n, d) are the embeddings of `draw.inputs`, in their order -> a scalar."""

    def __init__(self, recipe: Tuning, examples: list[Example], folder: Path, say: Say) -> None:
        """A distillation's teacher embeds the examples once, into `folder`."""
        self.recipe = recipe
        self._teacher: np.ndarray | None = None
        if recipe.loss.teacher is not None:
            self._texts = {str(example.query.text): i for i, example in enumerate(examples)}
            self._teacher = teacher_vectors(list(self._texts), recipe.loss.teacher, folder, say)

    def loss(self, x: Tensor, draw: Draw) -> Tensor:
        loss = self.recipe.loss
        own, right, wrong = (x[torch.tensor(p, dtype=torch.long)] for p in (draw.queries, draw.positives, draw.negatives))
        if self._teacher is not None:
            return losses.distillation(self._all(own), gather(self._taught(draw).to(x.device)), loss.temperature)
        right, wrong, offset = self._all(right), self._all(wrong), rank() * len(own)
        if loss.kind == "symmetric":
            return losses.symmetric_info_nce(self._all(own), right, 1 / loss.temperature)
        if loss.kind == "instruction":
            return losses.instruction(own, right, wrong, loss.temperature, loss.margin, loss.hardest, offset)
        return losses.hard_negative_info_nce(own, right, wrong, 1 / loss.temperature, offset)

    def _all(self, rows: Tensor) -> Tensor:
        return gather(rows, local_only=self.recipe.local_gradients)

    def _taught(self, draw: Draw) -> Tensor:
        assert self._teacher is not None
        rows = [self._texts[str(draw.inputs[i].text)] for i in draw.queries]
        return torch.from_numpy(np.asarray(self._teacher[rows], dtype=np.float32))
