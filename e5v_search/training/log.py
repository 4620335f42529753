"""What a run tells: a file of JSON lines, a line for people, TensorBoard for those who want it."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from e5v_search.errors import MissingPackage

_SPEAK_SECONDS = 15.0

Say = Callable[[str], None]
OnStep = Callable[[int, int, str], None]  # steps done, of so many, and what there is to say


class Log:
    """One JSON object per step and per measurement, appended. Lines of steps from `first` on, done after the last save
    and now repeated, are dropped.

    Every step goes to `on_step` where there is one, for a bar; else a line goes to `say` now and then. Of several
    processes one `writes`.
    """

    def __init__(
        self,
        path: Path,
        first: int,
        steps: int,
        say: Say,
        *,
        on_step: OnStep | None = None,
        board: Path | None = None,
        unit: str = "pairs",
        writes: bool = True,
    ) -> None:
        self.writes = writes
        if writes and path.exists():
            old = path.read_text(encoding="utf-8").splitlines()
            path.write_text("".join(f"{line}\n" for line in old if _before(line, first)), encoding="utf-8")
        self.path, self.steps, self.say, self.on_step, self.unit = path, steps, say, on_step, unit
        self.board = None if board is None or not writes else _board(board, first)
        self.started = self.last = time.monotonic()
        self.done = 0
        self.spoke = 0.0

    def step(self, step: int, stage: str, parts: dict[str, float], rate: float, n: int) -> None:
        """`parts` of the loss, and what else was measured of a step with n examples."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        self.done += 1
        where = {"stage": stage} if stage else {}
        self._write({"step": step, **where, **parts, "rate": rate, "seconds": round(seconds, 3)})
        self._scalars(step, parts | {"rate": rate, f"{self.unit} per second": n / seconds})
        left = (now - self.started) / self.done * (self.steps - step - 1)
        numbers = " ".join(f"{k} {v:.3f}" for k, v in parts.items())
        speed = f"{n / seconds:.0f} {self.unit}/s  {left / 60:.0f} min left"
        text = f"{stage} step {step + 1}/{self.steps}  {numbers}  {speed}".lstrip()
        if self.on_step is not None:
            self.on_step(step + 1, self.steps, text)
        elif now - self.spoke > _SPEAK_SECONDS:
            self.spoke = now
            self.say(text)

    def measured(self, step: int, values: dict[str, float]) -> None:
        self._write({"step": step, "measured": values})
        self._scalars(step, values)
        self.say(f"step {step}  " + " ".join(f"{k} {v:.4f}" for k, v in values.items()))
        self.last = time.monotonic()

    def note(self, step: int, what: str, value: Any) -> None:
        """Something else that happened at a step."""
        self._write({"step": step, what: value})

    def close(self) -> None:
        if self.board is not None:
            self.board.close()

    def _write(self, line: dict[str, Any]) -> None:
        if not self.writes:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)


def _board(folder: Path, first: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingPackage("--tensorboard needs a package: pip install 'e5v-search[train]'") from None
    return SummaryWriter(str(folder), purge_step=first)


def _before(line: str, first: int) -> bool:
    """Whether a line of the log tells of what was done before step `first`; a line that a kill cut short does not."""
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return bool(entry["step"] < first + ("measured" in entry))
