"""`index`: photos into a collection."""

import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from e5v_search.cli.options import collection_option, debug_option, examples, json_option, model_options, quiet_option
from e5v_search.cli.printing import count, print_failures, print_json, printable, warn
from e5v_search.cli.progress import Progress

if TYPE_CHECKING:
    from e5v_search.collection import Report


@click.command(
    epilog=examples(
        "e5v-search index photos",
        "e5v-search index",
        "e5v-search index photos -c holidays --model e5v-tiny --device cpu --dtype float32",
        "e5v-search index photos dog.jpg --json --quiet",
        "e5v-search index photos --watch",
    )
)
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@collection_option
@model_options
@click.option("--watch", is_flag=True, help="Go on: bring in whatever happens in the folders, until stopped.")
@json_option
@quiet_option
@debug_option
@click.pass_context
def index(
    ctx: click.Context,
    paths: tuple[Path, ...],
    collection: str,
    model: str,
    device: str,
    dtype: str,
    quantize: str | None,
    watch: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Bring photos and folders of photos into a collection.

    Only what is new or has changed is read; what was deleted leaves the results. Without PATHS, everything that was
    indexed before is looked through again. It can be stopped at any time and goes on where it was.

    With --watch it does not end: what is added, changed, renamed or deleted in the folders is in the results seconds
    later, until Ctrl-C or SIGTERM. With --json each change is a line of its own.
    """
    from e5v_search.collection import Collection, Follower, ModelChoice

    with Collection.open(collection, ModelChoice(model, device, dtype, quantize), create=bool(paths)) as target:
        roots = [str(path) for path in paths] or [path for path, _ in target.catalog.roots()]
        if not roots:
            raise click.UsageError(f"nothing was indexed into {target.path} before: say which folder to index")
        follower = Follower(target, roots, lambda line: None if quiet else click.echo(printable(line), err=True))
        with Progress("Indexing", "photo", quiet) as progress:

            def show(report: "Report", total: int) -> None:
                progress.update(report.done, total, len(report.failed))

            try:
                reports = follower.run(show)
                report = next(reports) if watch else target.ingest(roots, on_progress=show)
            except KeyboardInterrupt:
                kept = count(target.catalog.count()["image"], "photo")
                raise KeyboardInterrupt(f"{kept} kept in {target.path}, and the same command goes on from there") from None
        with closing(reports), suppress(*((KeyboardInterrupt,) if watch else ())):  # the way in which a watch ends
            _tell(report, as_json, quiet)
            if not quiet:
                if not report.done and not report.warnings:
                    warn(_nothing_found(roots))
                if not as_json:
                    click.echo(f"{_summary(report)} ({printable(str(target.path))})")
            for change in reports if watch else ():
                _tell(change, as_json, quiet)
                if not quiet and not as_json and (change.added or change.updated or change.removed):
                    counts = f"+{change.added:,} ~{change.updated:,} -{change.removed:,}"
                    click.echo(f"{time.strftime('%H:%M:%S')}  {counts}", err=True)
    if report.failed and not watch:
        ctx.exit(1)


def _tell(report: "Report", as_json: bool, quiet: bool) -> None:
    for line in () if quiet else report.warnings:
        warn(line)
    print_failures(report.failed)
    if as_json:
        print_json({name: value for name, value in report.to_json().items() if name != "warnings"})


def _summary(report: "Report") -> str:
    parts = [
        f"{name} {n:,}"
        for name, n in (
            ("added", report.added),
            ("unchanged", report.unchanged),
            ("updated", report.updated),
            ("removed", report.removed),
            ("failed", len(report.failed)),
        )
        if n or name == "added"
    ]
    return f"{', '.join(parts)} in {report.seconds:.1f} s"


def _nothing_found(roots: list[str]) -> str:
    from e5v_search.media import SUFFIXES

    suffixes = " ".join(sorted(suffix.lstrip(".") for suffix in SUFFIXES))
    return f"no pictures found in {', '.join(roots)}; names must end in one of: {suffixes}"
