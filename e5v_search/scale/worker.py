"""The other end of `processes`: a model in a process of its own, which is given tasks and tells what came of them.

One thread reads tasks, some prepare the inputs of the next, as many run the model as keep it busy, and the first tells.
"""

import os
import pickle
import queue
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

from e5v_search.backbones import Embedder
from e5v_search.collection.engine import Clock
from e5v_search.collection.inputs import Prepared, embed, prepare
from e5v_search.errors import E5VError
from e5v_search.scale.processes import Order
from e5v_search.scale.team import Done, Event, Gone, Loaded, Task

Work = queue.SimpleQueue[Future[Done]]


def main() -> None:
    # whatever a library prints must not come between the answers
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def tell(event: Event) -> None:
        pickle.dump(event, answers)
        answers.flush()

    tasks = sys.stdin.buffer
    try:
        order: Order = pickle.load(tasks)
        embedder = Embedder.of(order.choice)
        tell(Loaded(embedder.fingerprint, embedder.dim, embedder.recalled_by))
        work: Work = queue.SimpleQueue()
        threading.Thread(target=_read, args=(tasks, embedder, order.decoders, work), daemon=True).start()
        while True:
            tell(work.get().result())
    except (EOFError, BrokenPipeError):
        os._exit(1)  # nobody is there any more
    except E5VError as error:
        tell(Gone(error))
    except Exception as error:
        # a device may be in no state to go on: a new process begins anew
        tell(Gone(f"stopped at an unexpected error ({type(error).__name__}: {' '.join(str(error).split())[:300]})"))
    os._exit(1)  # without waiting for threads


def _read(tasks: BinaryIO, embedder: Embedder, decoders: int, work: Work) -> None:
    preparing = ThreadPoolExecutor(decoders, thread_name_prefix="prepare")
    running = ThreadPoolExecutor(embedder.abreast, thread_name_prefix="model")
    clock = Clock()

    def run(task: Task, inputs: list[Future[Prepared]]) -> Done:
        prepared = [one.result() for one in inputs]
        return Done(*clock(lambda: embed(embedder, task.kind, prepared, task.of)))

    try:
        while True:
            task: Task = pickle.load(tasks)
            work.put(running.submit(run, task, [preparing.submit(prepare, embedder, given) for given in task.inputs]))
    except (EOFError, OSError, pickle.UnpicklingError):
        os._exit(1)  # nobody is there any more
