"""The paper's numbers, beside which ours are put."""

import math
import tomllib
from functools import cache
from pathlib import Path

OURS = "E5-V"  # the row of the paper's own model

Row = dict[str, float]


def baselines(dataset: str) -> dict[str, Row]:
    """What the paper has for a data set: metrics in percent by method; empty for one that it does not have."""
    return _tables().get(dataset, {})


def summary(dataset: str) -> dict[str, Row]:
    """Tables 6 to 8, as far as they speak of `dataset`: metrics by variant ("last, not tuned", "prompt", "E5-V", ...)."""
    found = {}
    for variant, row in _tables()["summary"].items():
        own = {metric.removeprefix(f"{dataset} "): v for metric, v in row.items() if metric.startswith(f"{dataset} ")}
        if own:
            found[variant] = own
    return found


@cache
def _tables() -> dict[str, dict[str, Row]]:
    data = tomllib.loads((Path(__file__).parent / "paper.toml").read_text(encoding="utf-8"))
    return {name: _rows(table) for name, table in data.items()}


def _rows(table: dict[str, list[float]]) -> dict[str, Row]:
    columns: list[str] = [str(column) for column in table["columns"]]
    return {
        method: {column: v for column, v in zip(columns, values, strict=True) if not math.isnan(v)}
        for method, values in table.items()
        if method != "columns"
    }
