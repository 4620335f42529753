"""Workers as processes of this machine, one for each device: started here, and talked to by their standard streams."""

import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from e5v_search.config import ModelChoice
from e5v_search.errors import UsageError
from e5v_search.parallel import DECODERS, cores
from e5v_search.scale.team import Gone, Task, Team, Tell

_DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")
# as multiprocessing does it, but without running the caller's main module again
_PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from e5v_search.scale.worker import main; main()"


@dataclass(frozen=True)
class Order:
    """What a worker is told first: the model, and how many threads prepare inputs for it."""

    choice: ModelChoice
    decoders: int


def parse(devices: str) -> list[str]:
    """The devices in a list as cuda:0,cuda:1; auto are all of this machine. Raises UsageError."""
    if devices == "auto":
        from e5v_search.backbones.checkpoint import all_devices  # which knows torch

        return all_devices()
    named = [device.strip() for device in devices.split(",")]
    if wrong := [device for device in named if not _DEVICE.fullmatch(device)]:
        raise UsageError(f"devices must be auto, or cpu, mps, cuda or cuda:N, with commas between them, not {wrong[0]!r}")
    return named


def team(choice: ModelChoice, devices: Sequence[str], note: Callable[[str], None]) -> Team:
    """A process for each of `devices`, such as cuda:0; processes on the processor share its cores."""
    decoders = min(DECODERS, max(1, cores() // len(devices)))
    threads = max(1, cores() // max(1, devices.count("cpu")))
    return Team(choice, devices, lambda device, model, tell: Process(device, model, decoders, threads, tell), note)


class Process:
    """A `Worker`. One that this process leaves behind, even killed, ends by itself: nothing comes to it any more."""

    def __init__(self, device: str, choice: ModelChoice, decoders: int, threads: int, tell: Tell) -> None:
        env, device = _seen_alone(device)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"OMP_NUM_THREADS": str(threads)} | env,
            process_group=0,  # Ctrl-C is for this process, which ends its workers
        )
        self._tell = tell
        threading.Thread(target=self._listen, name="worker", daemon=True).start()
        self._write(Order(replace(choice, device=device), decoders))

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, task: Task) -> None:
        self._write(task)

    def _write(self, what: Order | Task) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it is dead, which is heard at the other end
            pickle.dump(what, self._process.stdin)
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        last = None
        with self._process.stdout as answers, suppress(EOFError, pickle.UnpicklingError):
            while not isinstance(last, Gone):
                last = pickle.load(answers)
                self._tell(self, last)
        if not isinstance(last, Gone):
            code = self._process.wait()
            self._tell(self, Gone(f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        with suppress(OSError):  # what could not be sent any more
            assert self._process.stdin is not None
            self._process.stdin.close()


def _seen_alone(device: str) -> tuple[dict[str, str], str]:
    """The environment of a process that sees no other GPU, so that nothing can end up on it, and what it calls its own."""
    env = dict(os.environ)
    kind, _, number = device.partition(":")
    visible = [one for one in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    if not number or (visible and int(number) >= len(visible)):
        return env, device
    return env | {"CUDA_VISIBLE_DEVICES": visible[int(number)] if visible else number}, kind
