"""What an evaluation found, as JSON, which keeps enough of every query to compare two runs, and as Markdown."""

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from e5v_search.errors import DataError, UsageError
from e5v_search.evaluation.bootstrap import Difference, paired
from e5v_search.evaluation.gap import Gap
from e5v_search.evaluation.metrics import Outcome, Part, Ranked, Rated
from e5v_search.evaluation.paper import OURS, baselines, summary

TIES = "an item that is right ranks behind every wrong one of the same score, up to 2**-19"


@dataclass(frozen=True)
class Report:
    """One model on one data set with one prompt set. Metrics are in percent, apart from median ranks."""

    dataset: str
    model: str
    fingerprint: str
    protocol: str
    outcome: Outcome
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]  # 95 %, bootstrap over queries
    queries: int
    gallery: int | None  # None where nothing is searched: STS
    seconds: float
    prompts: str
    source: str
    revision: str
    questions: str  # hash of what was asked: runs with the same can be compared
    versions: Mapping[str, str]
    embedded: int  # inputs that were not in the cache
    notes: tuple[str, ...] = ()
    missing: Mapping[str, str] | None = None  # pictures left out with --allow-missing, with the reasons
    limit: int | None = None
    submissions: tuple[str, ...] = ()  # files for CIRR's server

    @property
    def paper(self) -> dict[str, float]:
        return baselines(self.dataset).get(OURS, {})

    @property
    def cautions(self) -> list[str]:
        """Why these numbers must not be put beside others without a word."""
        found = []
        if self.limit is not None:
            found.append(f"only the first {self.limit:,} of the data (--limit): not to be compared with the whole")
        if self.missing:
            found.append(f"{len(self.missing):,} pictures could not be used and were left out, with what needs them")
        return found

    def to_json(self) -> dict[str, Any]:
        others = {method: row for method, row in baselines(self.dataset).items() if method != OURS}
        return {
            "dataset": self.dataset,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "protocol": self.protocol,
            "metrics": {name: round(value, 4) for name, value in self.metrics.items()},
            "paper": self.paper,
            "queries": self.queries,
            "gallery": self.gallery,
            "seconds": round(self.seconds, 3),
            "prompts": self.prompts,
            "intervals": {name: [round(low, 4), round(high, 4)] for name, (low, high) in self.intervals.items()},
            "gap": None if self.outcome.gap is None else asdict(self.outcome.gap),
            "baselines": others,
            "ties": TIES,
            "cautions": self.cautions,
            "notes": list(self.notes),
            "missing": dict(self.missing or {}),
            "limit": self.limit,
            "submissions": list(self.submissions),
            "source": self.source,
            "revision": self.revision,
            "questions": self.questions,
            "versions": dict(self.versions),
            "embedded": self.embedded,
            "averages": {name: list(of) for name, of in self.outcome.averages.items()},
            "per_query": {name: _packed(part) for name, part in self.outcome.parts.items()},
        }

    def footer(self) -> list[str]:
        """What the table is about, a line each."""
        asked = f"{self.queries:,} queries" + (f", {self.gallery:,} in the gallery" if self.gallery is not None else "")
        return [
            *(f"Caution: {caution}." for caution in self.cautions),
            f"{self.protocol}: {asked}; {self.fingerprint}; {self.seconds:.1f} s, {self.embedded:,} inputs embedded.",
            f"Data: {self.source}, {self.revision}." + "".join(f" {note[0].upper()}{note[1:]}." for note in self.notes),
            *(f"Wrote {path}." for path in self.submissions),
        ]


def details(reports: Sequence[Report]) -> list[list[str]]:
    """A table with a header: metrics down, then the gap; across, each run's values with their intervals."""
    several = len(reports) > 1
    header = ["", *(report.prompts if several else report.model for report in reports)]
    rows = [
        [metric, *(_value(metric, report.metrics[metric], report.intervals[metric]) for report in reports)]
        for metric in reports[0].metrics
    ]
    gaps = [report.outcome.gap for report in reports if report.outcome.gap is not None]
    return [header, *rows, *([["gap", *map(_gap, gaps)]] if gaps else [])]


def beside_the_paper(reports: Sequence[Report]) -> list[list[str]]:
    """A table with a header: our runs and the paper's rows down, the paper's metrics across; empty where it has none.

    Several reports are of one data set with different prompt sets, and stand beside the ablations of tables 6 to 8.
    """
    first = reports[0]
    theirs = baselines(first.dataset) if len(reports) == 1 else summary(first.dataset)
    if not theirs or not first.metrics:
        return []
    columns = list(theirs[OURS])
    rows = [[f"{r.model}, {r.prompts}", *(f"{r.metrics[c]:.2f}" if c in r.metrics else "" for c in columns)] for r in reports]
    for method in sorted(theirs, key=lambda method: method != OURS):
        rows.append([f"{method} (paper)", *(f"{theirs[method][c]:.2f}" if c in theirs[method] else "" for c in columns)])
    return [["", *columns], *rows]


def markdown(reports: Sequence[Report]) -> str:
    blocks = [f"### {reports[0].dataset}"]
    blocks += ["\n".join(_markdown_lines(table)) for make in (details, beside_the_paper) if len(table := make(reports)) > 1]
    blocks += [line for report in reports for line in report.footer()]
    return "\n\n".join(blocks)


def _markdown_lines(table: Sequence[Sequence[str]]) -> list[str]:
    header, *rows = table
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]


def load(path: Path) -> dict[str, Any]:
    """A report that `Report.to_json` wrote. Raises DataError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict) or not {"questions", "per_query", "averages", "dataset"} <= found.keys():
        raise DataError(f"{path} is not a report of one run; make one with `e5v-search eval DATASET --out {path.name}`")
    return found


def compared(path_a: Path, path_b: Path) -> dict[str, Difference]:
    """Two saved runs by a paired bootstrap, per metric b minus a. UsageError when they did not answer the same queries."""
    a, b = load(path_a), load(path_b)
    if a["questions"] != b["questions"]:
        raise UsageError(
            f"{path_a} ({a['dataset']}, {a['queries']:,} queries) and {path_b} ({b['dataset']}, {b['queries']:,} queries) did "
            "not answer the same queries in the same gallery: evaluate both with the same data, --limit and --allow-missing"
        )
    return paired(_unpacked(a, path_a), _unpacked(b, path_b))


def _packed(part: Part) -> dict[str, Any]:
    if isinstance(part, Ranked):
        return {"kind": "ranks", "ks": list(part.ks), "recalls_only": part.recalls_only} | _array(part.ranks.astype("<i4"))
    assert isinstance(part, Rated)
    return {"kind": "ratings"} | _array(np.stack([part.similarities, part.gold], axis=1).astype("<f8"))


def _array(x: np.ndarray) -> dict[str, Any]:
    return {"dtype": x.dtype.str, "shape": list(x.shape), "data": base64.b64encode(zlib.compress(x.tobytes(), 9)).decode()}


def _unpacked(found: dict[str, Any], path: Path) -> Outcome:
    parts: dict[str, Part] = {}
    try:
        for name, saved in found["per_query"].items():
            data = zlib.decompress(base64.b64decode(saved["data"]))
            x = np.frombuffer(data, saved["dtype"]).reshape(saved["shape"])
            if saved["kind"] == "ranks":
                parts[name] = Ranked(x, tuple(saved["ks"]), saved["recalls_only"])
            else:
                parts[name] = Rated(x[:, 0], x[:, 1])
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {type(error).__name__} {error}") from error
    return Outcome(parts, {name: tuple(of) for name, of in found["averages"].items()})


def _gap(gap: Gap) -> str:
    return f"{gap.distance:.2f} [spread {gap.spread:.2f}, told apart {100 * gap.accuracy:.1f} %]"


def _value(metric: str, value: float, interval: tuple[float, float]) -> str:
    digits = 1 if metric.endswith("median_rank") else 2
    low, high = interval
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
