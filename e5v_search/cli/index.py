"""`index`: photos into a collection."""

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
    )
)
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@collection_option
@model_options
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
    as_json: bool,
    quiet: bool,
) -> None:
    """Bring photos and folders of photos into a collection.

    Only what is new or has changed is read; what was deleted leaves the results. Without PATHS, everything that was
    indexed before is looked through again. It can be stopped at any time and goes on where it was.
    """
    from e5v_search.collection import Collection, ModelChoice

    with Collection.open(collection, ModelChoice(model, device, dtype, quantize), create=bool(paths)) as target:
        roots = [str(path) for path in paths] or [path for path, _ in target.catalog.roots()]
        if not roots:
            raise click.UsageError(f"nothing was indexed into {target.path} before: say which folder to index")
        with Progress("Indexing", "photo", quiet) as progress:

            def show(report: "Report", total: int) -> None:
                progress.update(report.done, total, len(report.failed))

            try:
                report = target.ingest(roots, on_progress=show)
            except KeyboardInterrupt:
                kept = count(target.catalog.count()["image"], "photo")
                raise KeyboardInterrupt(f"{kept} kept in {target.path}, and the same command goes on from there") from None
        place = target.path
    if not quiet:
        for line in report.warnings:
            warn(line)
        if not report.done and not report.warnings:
            warn(_nothing_found(roots))
    print_failures(report.failed)
    if as_json:
        print_json({name: value for name, value in report.to_json().items() if name != "warnings"})
    elif not quiet:
        click.echo(f"{_summary(report)} ({printable(str(place))})")
    if report.failed:
        ctx.exit(1)


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
