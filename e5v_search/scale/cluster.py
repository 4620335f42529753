"""Workers as actors of a Ray cluster: one for each GPU, or for each core where there is none.

    inputs ──> prepared on any core of the cluster ──> model (an actor) ──> shard on a shared disk ──> catalog, here

Pixels go from cores to actors and vectors to the disk; of neither passes anything through this process but what it reads
from finished shards, to write it into the catalog.
"""

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from e5v_search.backbones import Embedder
from e5v_search.collection.engine import Pace
from e5v_search.collection.inputs import Input, Prepared, embed, prepare
from e5v_search.config import ModelChoice
from e5v_search.errors import ClusterError, CollectionError, E5VError, MissingPackage
from e5v_search.parallel import DECODERS, cores, windows
from e5v_search.scale.shards import Shards, is_wanted, write
from e5v_search.scale.team import Done, Event, Gone, Loaded, Task, Team, Tell

LOCAL = "local"
_TOGETHER = 16  # inputs prepared by one call
_SHARD_SECONDS, _FIRST_SHARD = 20.0, 16  # a shard takes about so long to embed; inputs of the first, as nothing is known yet
_REACH_SECONDS = 5.0
_END_SECONDS = 5.0
_START = "start a cluster with `ray start --head`, or say --ray local"


@dataclass(frozen=True)
class Written:
    """What an actor says of a task: the shard of what has worked, and what was wrong with which input."""

    shard: str | None
    problems: list[str | None]
    seconds: float


class Embedding:
    """An actor. What it raises ends it; what a user should know is returned."""

    def __init__(self, choice: ModelChoice, folder: Path) -> None:
        self._choice, self._folder = choice, folder
        self._pool = ThreadPoolExecutor(DECODERS)

    def load(self) -> Event:
        try:
            self._embedder = Embedder.of(self._choice)
        except E5VError as error:
            return Gone(error)
        if not self._folder.is_dir():
            reason = (
                f"{self._folder} is not there on {socket.gethostname()}; name a folder that all machines share with --shards"
            )
            return Gone(ClusterError(reason))
        self._model = Loaded(self._embedder.fingerprint, self._embedder.dim, self._embedder.recalled_by)
        return self._model

    def embed(self, task: Task, elsewhere: list[Any]) -> Written | Done:
        """`elsewhere`: the inputs, prepared on other cores, as references to lists; without any they are prepared here."""
        import ray

        if elsewhere:
            prepared = [one for some in ray.get(elsewhere) for one in some]
        else:
            prepared = list(self._pool.map(lambda given: prepare(self._embedder, given), task.inputs))
        start = time.monotonic()
        outcomes = embed(self._embedder, task.kind, prepared, task.of)
        seconds = time.monotonic() - start
        if not is_wanted(task):
            return Done(outcomes, seconds)
        problems = [outcome.problem if outcome.vectors is None else None for outcome in outcomes]
        return Written(write(self._folder, self._model, task, outcomes), problems, seconds)


@lru_cache(maxsize=1)
def _preparer(choice: ModelChoice) -> Embedder:
    # its weights are mapped and never touched
    return Embedder.of(replace(choice, device="cpu", quantize=None, adapter=None, dim=None))


def _prepare(choice: ModelChoice, inputs: Sequence[Input]) -> list[Prepared]:
    embedder = _preparer(choice)
    return [prepare(embedder, given) for given in inputs]


class Actor:
    """A `Worker`. `apart`: its pictures are prepared on other cores, from the moment on in which it is given a task."""

    def __init__(
        self,
        choice: ModelChoice,
        shards: Shards,
        resources: dict[str, float],
        apart: bool,
        tell: Tell,
        note: Callable[[str], None],
    ) -> None:
        import ray

        self._ray, self._choice, self._shards, self._tell, self._note = ray, choice, shards, tell, note
        self._prepare = ray.remote(num_cpus=1)(_prepare) if apart else None
        # without restarts of Ray's: the team sees to it that work is done again, and says so
        options = {"max_restarts": 0, "max_task_retries": 0} | resources
        self._actor = ray.remote(**options)(Embedding).remote(choice, shards.folder)
        self._asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._asked.put(self._actor.load.remote())
        self._listener = threading.Thread(target=self._listen, name="actor", daemon=True)
        self._listener.start()

    def send(self, task: Task) -> None:
        elsewhere = []
        if self._prepare is not None and task.kind != "text":
            elsewhere = [self._prepare.remote(self._choice, some) for some in windows(task.inputs, _TOGETHER)]
        self._asked.put(self._actor.embed.remote(task, elsewhere))

    def _listen(self) -> None:
        event: Event | None = None
        while not isinstance(event, Gone) and (asked := self._asked.get()) is not None:
            try:
                event = self._heard(self._ray.get(asked))
            except self._ray.exceptions.RayActorError:
                event = Gone("died")
            except self._ray.exceptions.RayError as error:
                reason = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
                event = Gone(f"stopped at an unexpected error ({type(error).__name__}: {reason[:300]})")
            self._tell(self, event)

    def _heard(self, answer: Event | Written) -> Event:
        if isinstance(answer, Loaded):
            if self._choice.name == "auto":
                self._note(f"model auto: {answer.recalled_by['name']}, by what the first of the workers has")
            self._choice = replace(self._choice, **answer.recalled_by)
        if not isinstance(answer, Written):
            return answer
        try:
            return Done(self._shards.outcomes(answer.shard, answer.problems), answer.seconds)
        except CollectionError as error:
            reason = (
                f"what a worker has written cannot be read here ({error}); --shards must name a folder that all machines share"
            )
            return Gone(ClusterError(reason))

    def close(self) -> None:
        self._asked.put(None)
        with suppress(Exception):  # whatever Ray says of a connection that is lost
            self._ray.kill(self._actor)
        if threading.current_thread() is not self._listener:
            self._listener.join(_END_SECONDS)


@contextmanager
def team(choice: ModelChoice, address: str, shards: Shards, note: Callable[[str], None]) -> Iterator[Team]:
    """Actors on the cluster at `address` (host:port, auto, or local for one of this machine alone), which write to `shards`.

    What shards hold already is not embedded. Raises MissingPackage, ClusterError.
    """
    with _connected(address) as ray:
        found = ray.cluster_resources()
        gpus, cpus = int(found.get("GPU", 0)), int(found.get("CPU", 0))
        resources: dict[str, float] = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": 1}
        here = replace(choice, device="cuda" if gpus else "cpu")
        if not gpus and not cpus:
            raise ClusterError(f"the Ray cluster at {address} has neither a GPU nor a CPU to give")
        with Team(
            here,
            [f"the cluster ({n + 1} of {gpus or cpus})" for n in range(gpus or cpus)],
            lambda _, model, tell: Actor(replace(model, device=here.device), shards, resources, bool(gpus), tell, note),
            note,
            lambda: Pace(_SHARD_SECONDS, _FIRST_SHARD),
            shards.find,
        ) as members:
            yield members


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    ray = _ray()
    if ray.is_initialized():  # by who calls this
        yield ray
        return
    more = {"include_dashboard": False, "num_cpus": cores()} if address == LOCAL else {}
    # what it has to say of an actor that died would come on stdout, between lines of JSON, and there is no option
    ray._private.worker._worker_logs_enabled = False
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **more)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        token = "one that was started with a token wants RAY_AUTH_MODE=token here too"
        raise ClusterError(f"no Ray cluster at {address} ({reason}); {token}; {_START}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _ray() -> Any:
    # Ray tells its makers who uses it, unless told not to; this is read when it is imported
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # from then on it leaves the devices of actors that take none as they are
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise MissingPackage("a cluster needs Ray: pip install 'e5v-search[ray]'") from None
    return ray


def reach(address: str) -> None:
    """Look whether a cluster answers: Ray itself would try for a minute, and then not say why. ClusterError, MissingPackage."""
    _ray()
    if address in (LOCAL, "auto"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ClusterError(f"--ray {address}: give HOST:PORT, auto or local")
    try:
        socket.create_connection((host, int(port)), _REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ClusterError(f"nothing answers at {address} ({reason}); {_START}") from error
