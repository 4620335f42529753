"""The processes of one run, as `accelerate launch` or `torchrun` start them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def together(device: str) -> Iterator[str]:
    """Joins the other processes, if there are any -> the device of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield device
        return
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    try:
        yield str(state.device)
    finally:
        state.destroy_process_group()
