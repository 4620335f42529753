"""`duplicates`: photos that are there more than once. Nothing is ever removed."""

from typing import TYPE_CHECKING

import click

from e5v_search.cli.options import collection_option, debug_option, examples, json_option, quiet_option, where_option
from e5v_search.cli.printing import count, print_failures, print_json, print_paths, shown_path, size, warn
from e5v_search.cli.progress import Progress

if TYPE_CHECKING:
    from e5v_search.collection.duplicates import Duplicates, Group, Photo


@click.command(
    epilog=examples(
        "e5v-search duplicates",
        "e5v-search duplicates -c holidays --threshold 0.98 --keep oldest",
        "e5v-search duplicates --by-vectors --threshold 0.97",
        "e5v-search duplicates --exact --where 'size>1kB' --json",
        "e5v-search duplicates --quiet --paths -0 | xargs -0 ls -l",
    )
)
@collection_option
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SCORE",
    help="How similar photos of a group are to the one to keep, as a cosine (default 0.9).",
)
@click.option("--by-vectors", is_flag=True, help="Let the cosine alone decide: other shots of the same scene too.")
@click.option("--exact", is_flag=True, help="Only files that are the same byte for byte.")
@click.option(
    "--keep",
    type=click.Choice(["largest", "oldest"]),
    default="largest",
    show_default=True,
    help="Which one to keep: most pixels, then most bytes; or taken first, then written first.",
)
@where_option
@click.option("--paths", "as_paths", is_flag=True, help="Print the bare paths of the photos that could go, one a line.")
@click.option("-0", "--null", "null", is_flag=True, help="With --paths: end each with a NUL, as xargs -0 wants it.")
@json_option
@quiet_option
@debug_option
@click.pass_context
def duplicates(
    ctx: click.Context,
    collection: str,
    threshold: float | None,
    by_vectors: bool,
    exact: bool,
    keep: str,
    where: tuple[str, ...],
    as_paths: bool,
    null: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Find photos that are there more than once, and say which to keep.

    Groups hold copies of a file, and the same picture saved again: smaller, brighter, cut a little. Nothing is removed;
    --paths prints what could go, for a command of yours.
    """
    if as_json and as_paths:
        raise click.UsageError("--json and --paths exclude each other")
    if null and not as_paths:
        raise click.UsageError("-0 goes with --paths")
    if exact and (by_vectors or threshold is not None):
        raise click.UsageError("--exact excludes --threshold and --by-vectors")
    from e5v_search.collection import Collection
    from e5v_search.collection.duplicates import THRESHOLD, find_duplicates

    with (
        Collection.open(collection, create=False) as source,
        Progress("Comparing", "photo", quiet) as progress,
    ):
        wanted = None if exact else threshold or THRESHOLD
        found = find_duplicates(source.catalog, wanted, keep, by_vectors, progress.update, where)
    print_failures(found.failed)
    if as_json:
        print_json(found.to_json())
    elif as_paths:
        _print_removable(found, b"\0" if null else b"\n", quiet)
    else:
        for group in found.groups:
            _print_group(group)
        click.echo(_summary(found))
    if found.failed:
        ctx.exit(1)


def _print_removable(found: "Duplicates", end: bytes, quiet: bool) -> None:
    safe, other = found.removable()
    print_paths(safe, end)
    if other and not quiet:
        warn(
            f"{count(len(other), 'photo')} left out: the file, or the one to keep, is missing, has changed or is a link to the "
            "other; run `e5v-search index` and then this again"
        )


def _print_group(group: "Group") -> None:
    click.echo(click.style(f"{group.kind}: {count(len(group.items), 'photo')}, {size(group.bytes)} could go", dim=True))
    rows = [_cells(photo) for photo in group.items]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row, photo in zip(rows, group.items, strict=True):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True) if width]
        line = "  ".join(["", *cells, shown_path(photo.path)])
        click.echo(click.style(line, bold=photo.keep))
    click.echo()


def _cells(photo: "Photo") -> tuple[str, ...]:
    score = "keep" if photo.keep else f"{photo.score:.4f}"
    return score, f"{photo.width}×{photo.height}", size(photo.bytes), (photo.taken_at or "")[:10]


def _summary(found: "Duplicates") -> str:
    if not found.groups:
        return f"no duplicates among {count(found.photos, 'photo')}"
    return (
        f"{count(len(found.groups), 'group')}: {found.redundant:,} of {count(found.photos, 'photo')} could go "
        f"({size(found.bytes)}); nothing was removed"
    )
