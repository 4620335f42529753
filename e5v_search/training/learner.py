"""A model with its optimiser: the gradient of a step, the update, and what is kept on disk."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import torch

from e5v_search.backbones.llava_next import Row
from e5v_search.errors import ModelError
from e5v_search.training.adapters import save_adapter
from e5v_search.training.cached import cached_backward
from e5v_search.training.draws import Draw
from e5v_search.training.gather import gather, processes, rank
from e5v_search.training.goals import Goal
from e5v_search.training.merging import merge, save_weights
from e5v_search.training.tuned import Tuned
from e5v_search.training.tuning import Tuning
from e5v_search.training.updates import Sharded, Whole

_NAMED = 8  # rows in the line of an error; the log has all


class Diverged(ModelError):
    """The loss or its gradient is no number. `rows` are the lines of the step's examples (of this process)."""

    def __init__(self, step: int, what: str, value: float, rows: Sequence[int], recipe: Tuning) -> None:
        self.rows = list(rows)
        named = ", ".join(map(str, self.rows[:_NAMED]))
        more = f" and {len(rows) - _NAMED} more, all in log.jsonl" if len(rows) > _NAMED else ""
        super().__init__(
            f"training diverged at step {step}: {what} is {value}; its examples are lines {named}{more} of "
            f"{recipe.examples.file}. Look at them, or lower `rate` ({recipe.rate:g})"
        )


class Learner:
    def __init__(self, recipe: Tuning, tuned: Tuned, goal: Goal, out: Path, steps: int, examples: int) -> None:
        self.recipe, self.tuned, self.goal, self.out, self.steps = recipe, tuned, goal, out, steps
        optimiser = torch.optim.AdamW(tuned.trainable().values(), lr=recipe.rate, weight_decay=recipe.decay)
        kind: type[Whole | Sharded] = Sharded if recipe.zero2 else Whole
        self.updates = kind(tuned, optimiser, recipe.clip, out)
        # not what leaves the losses as they are
        same = replace(recipe, pieces=1, checkpointing=False, save_every=1, evaluate=(), evaluate_every=1, evaluate_limit=None)
        told = f"{same!r} {steps} {examples} {tuned.source.revision}"
        self._identity = hashlib.sha256(told.encode()).hexdigest()

    def resume(self) -> int:
        """The step to go on with. IncompleteCheckpoint when what lies there is of another recipe."""
        return self.updates.load(self._identity)

    def gradient(self, step: int, draw: Draw) -> float:
        """Adds the gradient of a step to the parameters' -> its loss, the mean over processes. Raises Diverged."""
        # chance depends on the step alone: a resumed run draws what an uninterrupted one would
        torch.manual_seed((self.recipe.seed * 1_000_003 + step) * processes() + rank())
        rows = self._rows(draw)
        pieces = list(self.tuned.encoder.batches.cut(range(len(rows)), lambda i: rows[i].length))
        back = torch.tensor([i for piece in pieces for i in piece], device=self.tuned.device).argsort()
        value = cached_backward(
            lambda piece: self.updates.encode([rows[i] for i in piece]), pieces, lambda x: self.goal.loss(x[back], draw)
        )
        loss = float(gather(torch.tensor([value], device=self.tuned.device)).mean())
        self._finite("the loss", loss, step, draw)
        return loss

    def update(self, step: int, draw: Draw) -> dict[str, float]:
        """-> the gradient's norm before clipping, and the learning rate. Raises Diverged."""
        rate = self.recipe.rate_at(step, self.steps)
        norm = self.updates.step(rate)
        self._finite("the gradient's norm", norm, step, draw)
        return {"norm": norm, "rate": rate}

    def save(self, done: int) -> None:
        """Whole or not at all; the adapter by the first process. Raises DiskFull or ModelError."""
        self.updates.save(done, self._identity)
        if rank() == 0 and self.tuned.lora is not None:
            save_adapter(self.tuned, self.out / "adapter")

    def _finite(self, what: str, value: float, step: int, draw: Draw) -> None:
        if not math.isfinite(value):
            raise Diverged(step, what, value, draw.rows, self.recipe)

    def finish(self, merged: bool, learned_more: bool) -> tuple[Path | None, Path | None]:
        """The folders of the adapter, if there is one, and of the whole model, if one was trained or is to be `merged`.

        A model that is there already is kept when nothing was learned since.
        """
        adapter = None if self.tuned.lora is None else self.out / "adapter"
        if adapter is not None and not merged:
            return adapter, None
        model = self.out / "model"
        if rank() == 0 and (learned_more or not model.exists()):
            if adapter is None:
                save_weights(self.tuned, model)
            else:
                merge(self.recipe.model, adapter, model)
        return adapter, model

    def _rows(self, draw: Draw) -> list[Row]:
        prompts, tuned, kept = self.recipe.prompts, self.tuned, self.recipe.max_text
        of_kind: dict[str, list[int]] = {}
        for i, one in enumerate(draw.inputs):
            of_kind.setdefault(one.kind, []).append(i)
        made: list[tuple[int, Row]] = []
        for kind, places in of_kind.items():
            texts = [draw.inputs[i].text or "" for i in places]
            tiles = [draw.tiles[image] for i in places if (image := draw.inputs[i].image) is not None]
            if kind == "text":
                rows = tuned.text_rows(texts, prompts.text, kept)
            elif kind == "image":
                rows = tuned.picture_rows(tiles, prompts.image)
            else:
                rows = tuned.composed_rows(tiles, texts, prompts.composed, kept)
            made += zip(places, rows, strict=True)
        return [row for _, row in sorted(made, key=itemgetter(0))]
