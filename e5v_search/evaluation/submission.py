"""The two files for CIRR's test server, checked against its rules before anyone uploads them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from e5v_search.errors import DataError
from e5v_search.evaluation.protocols import SUBMITTED, SUBMITTED_OF_SUBSET

QUERIES = 4_148  # pairs of the test split
MAX_BYTES = 5_000_000

_LENGTHS = {"recall": SUBMITTED, "recall_subset": SUBMITTED_OF_SUBSET}


def problems(file: Mapping[str, Any], size: int, pairs: Sequence[str]) -> list[str]:
    """What the server would refuse in a file of `size` bytes, given the ids of all pairs."""
    found = []
    metric = file.get("metric")
    if file.get("version") != "rc2" or metric not in _LENGTHS:
        return [f"version {file.get('version')!r} and metric {metric!r} are not rc2 and one of {', '.join(_LENGTHS)}"]
    answers = {key: value for key, value in file.items() if key not in ("version", "metric")}
    if len(pairs) != QUERIES:
        found.append(f"the split has {len(pairs):,} pairs and not {QUERIES:,}")
    if absent := set(pairs) - answers.keys():
        found.append(f"{len(absent):,} pairs have no answer, such as {min(absent)}")
    if unknown := answers.keys() - set(pairs):
        found.append(f"{len(unknown):,} answers are for no pair, such as {min(unknown)}")
    length = _LENGTHS[metric]
    for key, names in answers.items():
        if len(names) != length or len(set(names)) != length:
            found.append(f"pair {key} needs {length} different names and has {len(set(names))}")
            break
    if size > MAX_BYTES:
        found.append(f"{size:,} bytes are more than {MAX_BYTES:,}")
    return found


def write_submissions(files: Mapping[str, dict[str, Any]], out: Path, pairs: Sequence[str] | None) -> tuple[str, ...]:
    """Write the files by metric beside `out` -> their paths. `pairs` are the ids of the whole split, None when only a part of
    it was answered, which the server does not take. Raises DataError when the server would refuse one."""
    written = []
    for metric, file in files.items():
        text = json.dumps(file, separators=(",", ":"))
        if pairs is not None and (found := problems(file, len(text), pairs)):
            raise DataError(f"the file for {metric} would be refused: {'; '.join(found)}")
        path = out.with_name(f"{out.stem}-{metric}.json")
        path.write_text(text, encoding="utf-8")
        written.append(str(path))
    return tuple(written)
