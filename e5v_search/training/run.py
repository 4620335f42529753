"""The tuning run, in the order in which it happens: examples, model, steps, measurements, saves, the adapter."""

import time
from collections import deque
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from e5v_search.errors import UsageError
from e5v_search.parallel import ahead
from e5v_search.training.draws import Draws
from e5v_search.training.examples import read_examples, sentences
from e5v_search.training.gather import processes, rank
from e5v_search.training.goals import Goal
from e5v_search.training.learner import Diverged, Learner
from e5v_search.training.log import Log, OnStep, Say
from e5v_search.training.midway import Midway, measurement
from e5v_search.training.tuned import Tuned
from e5v_search.training.tuning import INPUTS, Tuning

_LAST = 20  # steps that the reported loss is the mean of


@dataclass(frozen=True)
class Outcome:
    """`loss` is the mean of the last steps done, None when all had been done before; `skipped` says for each picture that
    could not be used why. `adapter` is a folder when one was trained, `model` when a whole model was written."""

    steps: int
    loss: float | None
    seconds: float
    measured: dict[str, float]
    skipped: dict[str, str]
    adapter: Path | None
    model: Path | None


def tune(
    recipe: Tuning,
    data: Path,
    out: Path,
    say: Say,
    *,
    device: str = "auto",
    on_step: OnStep | None = None,
    board: bool = False,
    merge: bool = False,
) -> Outcome:
    """Run `recipe` to its end, going on from what `out` holds.

    Writes into `out`: state.safetensors (all that a resumed run needs) and adapter/ at every save; log.jsonl; teacher/ for a
    distillation; board/ with `board`; in the end, with `merge` or when all weights were trained, model/. Of several
    processes the first one writes.

    Raises DataError for examples that are not as they should be, ModelError naming step and rows when the loss is no
    number, KeyboardInterrupt, after a save, when it is stopped.
    """
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    recipe.prompts.check(INPUTS[recipe.examples.kind])
    examples = read_examples(recipe.examples, data)
    if recipe.loss.kind == "distillation":
        examples = sentences(examples)
    if recipe.batch > len(examples) or recipe.batch % processes():
        raise UsageError(
            f"batch = {recipe.batch} does not fit {len(examples)} examples and {processes()} processes: "
            "it must be a multiple of the processes, and no larger than the examples"
        )
    steps = recipe.steps_for(len(examples))
    goal = Goal(recipe, examples, out / "teacher", say)
    tuned = _load(recipe, device)
    measure = measurement(recipe.evaluate, data, recipe.evaluate_limit, Midway(tuned, recipe.evaluate_prompts))
    draws = Draws(examples, recipe.batch, recipe.negatives, recipe.seed, tuned.spec, (rank(), processes()))
    learner = Learner(recipe, tuned, goal, out, steps, len(examples))
    first = learner.resume()
    learns = sum(p.numel() for p in tuned.trainable().values())
    say(f"{recipe.name}: {learns:,} weights learn from {len(examples):,} examples, steps {first} to {steps}")
    log = Log(
        out / "log.jsonl",
        first,
        steps,
        say,
        on_step=on_step,
        board=out / "board" if board else None,
        unit="examples",
        writes=rank() == 0,
    )
    last: deque[float] = deque(maxlen=_LAST)
    measured: dict[str, float] = {}
    done, whole = first, True
    with closing(log), closing(ahead(draws.make, range(first, steps), workers=2, depth=4)) as coming:
        try:
            for step, draw in enumerate(coming, first):
                loss = learner.gradient(step, draw)
                whole = False  # half an update is not to be saved
                made = learner.update(step, draw)
                done, whole = step + 1, True
                last.append(loss)
                log.step(step, "", {"loss": loss, "norm": made["norm"]}, made["rate"], recipe.batch)
                if recipe.evaluate and (done % recipe.evaluate_every == 0 or done == steps):
                    measured = measure()
                    log.measured(done, measured)
                if done % recipe.save_every == 0 or done == steps:
                    learner.save(done)
        except Diverged as error:
            log.note(done, "diverged", error.rows)
            raise
        except KeyboardInterrupt:
            saves = whole and not recipe.zero2  # a state in parts needs all processes at one step
            if saves:
                learner.save(done)
            told = f"step {done} of {steps} is saved; " if saves else ""
            raise KeyboardInterrupt(f"{told}the same command goes on from the last save") from None
    mean = sum(last) / len(last) if last else None
    skipped = {str(path): reason for path, reason in draws.skipped.items()}
    adapter, model = learner.finish(merge, done > first)
    return Outcome(steps, mean, time.monotonic() - started, measured, skipped, adapter, model)


def _load(recipe: Tuning, device: str) -> Tuned:
    tuned = Tuned.load(
        recipe.model,
        parts=recipe.parts,
        device=device,
        dtype=recipe.dtype,
        quantize=recipe.quantize,
        lora=recipe.lora,
        checkpointing=recipe.checkpointing,
        quirks=recipe.quirks,
        seed=recipe.seed,
    )
    tuned.encoder.batches.tokens = recipe.pieces
    return tuned
