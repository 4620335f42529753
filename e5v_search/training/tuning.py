"""A tuning recipe as a value: a pretrained model, what it learns from, and how. Defaults are those of the paper's run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from e5v_search.prompts import load_prompts
from e5v_search.training.tuned import Lora, Quirks

Kind = Literal["triplets", "captions", "instructions"]

INPUTS: dict[str, tuple[str, ...]] = {
    "triplets": ("text",),
    "captions": ("text", "image"),
    "instructions": ("text", "image", "composed"),
}

# the distillation has no pairs, the symmetric loss no negatives
_GO_TOGETHER = {(loss, kind) for loss in ("contrastive", "instruction") for kind in get_args(Kind)} | {
    ("symmetric", "captions"),
    ("distillation", "triplets"),
}


@dataclass(frozen=True)
class Examples:
    """Where the examples lie, below the folder of the data.

    triplets: a CSV file with the columns sent0, sent1, hard_neg. captions: pictures below `pictures` with captions in
    `file`, all of them or those that `split` names (a file of names, or a split of Karpathy's). instructions: JSON lines
    with query, positive, negatives, of which each row gives `negatives` at random; pictures lie below `pictures`.
    """

    kind: Kind
    file: str
    pictures: str = "."
    split: str | None = None
    negatives: int = 1
    limit: int | None = None  # the first so many rows

    def problems(self) -> list[str]:
        found = ["negatives: must not be below 0"] if self.negatives < 0 else []
        if self.limit is not None and self.limit < 1:
            found.append("limit: must be positive")
        if self.negatives > 1 and self.kind == "triplets":
            found.append("negatives: a triplet has one")
        if self.split is not None and self.kind != "captions":
            found.append(f"split: {self.kind} have none")
        return found


@dataclass(frozen=True)
class Loss:
    """contrastive: equation 1 of the paper. symmetric: both directions, as CLIP does. distillation: UniME's first stage,
    from `teacher`. instruction: UniME's second, which drops negatives nearer than the positive plus `margin` and keeps the
    `hardest` of the others."""

    kind: Literal["contrastive", "symmetric", "distillation", "instruction"] = "contrastive"
    temperature: float = 0.05
    teacher: str | None = None
    margin: float = 0.1
    hardest: int = 8

    def problems(self) -> list[str]:
        found = ["temperature: must be positive"] if self.temperature <= 0 else []
        if self.hardest < 1:
            found.append("hardest: must be positive")
        if (self.kind == "distillation") != (self.teacher is not None):
            found.append("teacher: the distillation needs one" if self.teacher is None else f"teacher: {self.kind} has none")
        return found


@dataclass(frozen=True)
class Prompts:
    """Names of prompt sets, or paths of prompt files."""

    text: str = "sts"
    image: str = "retrieval"
    composed: str = "cirr"

    def check(self, kinds: Sequence[str]) -> None:
        """UsageError when a set has no prompt for one of `kinds`, or cannot be read."""
        for kind in kinds:
            load_prompts(getattr(self, kind)).get(kind)


@dataclass(frozen=True)
class Tuning:
    """`batch` counts the examples of a step on all processes together; `pieces` bounds the tokens, padding included, that
    go through the model at once and never changes a gradient. `rate` is reached after `warmup` steps and falls to zero."""

    name: str
    model: str
    examples: Examples
    loss: Loss = field(default_factory=Loss)
    prompts: Prompts = field(default_factory=Prompts)
    batch: int = 768
    pieces: int = 4096
    epochs: float = 2.0
    steps: int | None = None  # in place of epochs
    rate: float = 4e-4
    warmup: int = 100
    decay: float = 0.0
    clip: float = 1.0
    max_text: int = 32  # tokens of a sentence, before its prompt
    lora: Lora | None = None  # None: all weights
    quantize: Literal["nf4"] | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    checkpointing: bool = False
    quirks: Quirks = field(default_factory=Quirks)
    local_gradients: bool = False  # the published code's: gathered rows of other processes carry no gradient
    zero2: bool = False  # DeepSpeed's: processes split gradients and the optimiser's state among them
    seed: int = 0
    save_every: int = 50  # steps
    evaluate: tuple[Literal["flickr8k-dev", "sts-dev"], ...] = ()
    evaluate_every: int = 100
    evaluate_limit: int | None = None  # photos of Flickr8k's dev split
    evaluate_prompts: str | None = None  # None: those of each measurement's protocol

    def problems(self) -> list[str]:
        counts = ("batch", "pieces", "epochs", "rate", "clip", "max_text", "save_every", "evaluate_every")
        found = [f"{k}: must be positive" for k in counts if getattr(self, k) <= 0]
        found += [f"{k}: must not be below 0" for k in ("warmup", "decay") if getattr(self, k) < 0]
        if self.steps is not None and self.steps < 1:
            found.append("steps: must be positive")
        if self.quantize is not None and self.lora is None:
            found.append("quantize: weights of 4 bit do not learn; give a [lora] table")
        kind, loss = self.examples.kind, self.loss.kind
        if (loss, kind) not in _GO_TOGETHER:
            found.append(f"loss.kind: {loss} does not go with {kind}")
        return found

    @property
    def negatives(self) -> int:
        """Of each example."""
        return 0 if self.examples.kind == "captions" or self.loss.kind == "distillation" else self.examples.negatives

    @property
    def parts(self) -> Literal["language", "all"]:
        """What of the model has to be read."""
        return "language" if self.examples.kind == "triplets" and "flickr8k-dev" not in self.evaluate else "all"

    def steps_for(self, examples: int) -> int:
        return self.steps or max(1, round(self.epochs * examples / self.batch))

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0, of a run of `steps`."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        return self.rate * (steps - step) / max(1, steps - self.warmup)
