"""What a process finds, and its forked child with it: in a child the parent's threads do not exist."""

import os
import subprocess
import sys

_ENDING = """
import os, signal, sys
ours = found()
child = os.fork()
if not child:
    signal.alarm(20)  # to wait for threads of the parent would take for ever
    os._exit(0 if found() == ours else 1)
signal.alarm(40)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or found() != ours)
"""


def assert_child_finds_the_same(beginning: str, *arguments: str, threads: int) -> None:
    """`beginning` defines `found()`, whose answers are compared."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", beginning + _ENDING, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
