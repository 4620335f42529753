"""`tune`: the smallest parameters of an index that meet a target."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from e5v_search.cli.options import collection_option, debug_option, examples, json_option
from e5v_search.cli.printing import print_json, printable, size, warn

if TYPE_CHECKING:
    from e5v_search.collection.tuning import Point

_UNITS = {
    "time": {"us": 1e-6, "ms": 1e-3, "s": 1.0},
    "memory": {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12},
}


class _Quantity(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """A number and its unit."""

    def __init__(self, name: str) -> None:
        self.name = name

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        units = _UNITS[self.name]
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*?)b?\s*", str(value).lower())
        if match is None or match[2] not in units or not float(match[1]):
            known = " ".join(filter(None, units))
            self.fail(f"{value!r} is no {self.name}; give a number above 0 and one of: {known}", param, ctx)
        return float(match[1]) * units[match[2]]


@click.command(
    epilog=examples(
        "e5v-search tune --recall 0.99",
        "e5v-search tune --latency 1s --memory 4G -c holidays --json",
        "e5v-search tune --recall 0.95 -k 3 --dry-run",
        "e5v-search tune --recall 0.9 -k 2 --queries sentences.npy",
    )
)
@click.option(
    "--recall", type=float, metavar="SHARE", help="Share of the K nearest items to be found, on average; 0.99 if not given."
)
@click.option("--latency", type=_Quantity("time"), metavar="TIME", help="Most time for one query, as 5ms.")
@click.option("--memory", type=_Quantity("memory"), metavar="SIZE", help="Most memory that a search works in, as 4G.")
@click.option("-k", type=click.IntRange(min=1), default=10, show_default=True, help="How many results are asked for.")
@click.option(
    "--queries",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.npy",
    help="Measure with these vectors; else with some of the collection's own.",
)
@click.option("--dry-run", is_flag=True, help="Only measure; leave the index as it is.")
@collection_option
@json_option
@debug_option
def tune(
    recall: float | None,
    latency: float | None,
    memory: float | None,
    k: int,
    queries: Path | None,
    dry_run: bool,
    collection: str,
    as_json: bool,
) -> None:
    """Find the smallest index parameters that meet a target.

    The target is at least one of --recall, --latency and --memory. Measured on the collection itself, against an exact
    scan of its vectors. The kind of index in use is tried first; if it cannot meet the target, others are built beside
    it. What is found is used from then on, and `status` says so.
    """
    from e5v_search.collection import Collection
    from e5v_search.collection.importing import open_vectors
    from e5v_search.collection.tuning import RECALL, Target, tune
    from e5v_search.errors import CollectionError

    target = Target(recall, latency, None if memory is None else int(memory))
    target.check()
    xq = None if queries is None else open_vectors(queries)
    with Collection.open(collection, create=False) as source:
        tuned = tune(source, target, k, xq, dry_run, None if as_json else _show)
    if as_json:
        print_json(tuned.to_json())
    if tuned.chosen is None:
        best = max(tuned.points, key=lambda p: p.recall, default=None)
        found = f"the best recall was {best.recall:.4f}, in {best.milliseconds:.2f} ms" if best else "no kind of index fits"
        raise CollectionError(f"no index meets that, with a recall of {RECALL if recall is None else recall:g}: {found}")
    if not as_json:
        click.echo(f"chosen: {_named(tuned.chosen)}")
        if dry_run:
            warn("--dry-run: the index is as it was")


def _show(point: "Point") -> None:
    click.echo(f"recall {point.recall:.4f}  {point.milliseconds:8.2f} ms  {size(point.bytes):>8}  {_named(point)}", err=True)


def _named(point: "Point") -> str:
    own = point.recipe.to_json()
    keys = [key for key in ("probes", "ef", "candidates") if key in own]
    return printable(" ".join([point.recipe.kind, *(f"{key} {own[key]}" for key in keys)]))
