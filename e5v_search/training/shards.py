"""Write safetensors files one tensor at a time, so that what is written need never stand in memory whole."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from e5v_search.errors import ModelError
from e5v_search.training.whole import replacing

_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Entry:
    """A tensor's place in a file: its kind by the format's own name ("F16", …), and its shape."""

    kind: str
    shape: Sequence[int]

    @classmethod
    def of(cls, tensor: Tensor) -> "Entry":
        return cls(_NAMES[tensor.dtype], tuple(tensor.shape))

    @property
    def size(self) -> int:
        """In bytes. ModelError for a kind that is not known."""
        if self.kind not in _BYTES:
            raise ModelError(f"weights of kind {self.kind} cannot be written; known: {', '.join(_BYTES)}")
        return math.prod(self.shape) * _BYTES[self.kind]


def write(path: Path, entries: Mapping[str, Entry], tensor: Callable[[str], Tensor]) -> None:
    """`tensor(name)` of every entry, one after the other, into `path`, which is whole or as it was."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries.items():
        header[name] = {"dtype": entry.kind, "shape": list(entry.shape), "data_offsets": [end, end + entry.size]}
        end += entry.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in entries.items():
            value = tensor(name).detach().cpu().contiguous()
            assert value.nbytes == entry.size, name
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)
