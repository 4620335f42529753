"""`map`: a collection as a page to look at, and how far its kinds lie apart."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from e5v_search.cli.options import (
    collection_option,
    debug_option,
    examples,
    instruction_option,
    json_option,
    model_options,
    quiet_option,
    where_option,
)
from e5v_search.cli.output import reserved
from e5v_search.cli.printing import count, print_failures, print_json, shown_path, size
from e5v_search.cli.progress import Progress
from e5v_search.config import ModelChoice

if TYPE_CHECKING:
    from e5v_search.map import Map

_NOUNS = {"image": "photo", "text": "text", "rendered": "rendered text"}


@click.command(
    "map",
    epilog=examples(
        "e5v-search map --out map.html",
        "e5v-search map --out map.html -c holidays --limit 500 --thumbnails 100 --json",
        "e5v-search map --out map.html --where 'orientation=landscape' --where kind=image",
        "e5v-search map --out map.html --method umap --quiet",
        "e5v-search map --out colours.html --instruction 'What colour is it, in one word:'",
        "e5v-search map --out last.html --prompts last --model e5v-tiny --device cpu --dtype float32 --tiles full",
    ),
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The page to write, HTML.")
@collection_option
@click.option(
    "--method",
    type=click.Choice(["pca", "umap"]),
    default="pca",
    show_default=True,
    help="How places are found: by the axes of most variance, or by neighbourhoods (needs the package umap-learn).",
)
@click.option("--prompts", metavar="SET|FILE.toml", help="Place the items by their vectors under another prompt set.")
@instruction_option
@where_option
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="At most N items, of each kind an even share (default 100,000, or 1,000 where they must be embedded first).",
)
@click.option(
    "--thumbnails",
    type=click.IntRange(min=0),
    default=5_000,
    show_default=True,
    metavar="N",
    help="Put the pictures of at most N photos into the page.",
)
@model_options
@json_option
@quiet_option
@debug_option
@click.pass_context
def map_command(
    ctx: click.Context,
    out: Path,
    collection: str,
    method: str,
    prompts: str | None,
    where: tuple[str, ...],
    limit: int | None,
    thumbnails: int,
    choice: ModelChoice,
    as_json: bool,
    quiet: bool,
) -> None:
    """Draw a collection as a page: a map of what is like what.

    One HTML file with all that it shows inside it. Also tells how far photos, texts and rendered texts lie apart (the
    modality gap): the distance of their means, and how well a straight cut tells them apart.
    """
    from e5v_search.collection import Collection
    from e5v_search.map import draw_map

    start = time.monotonic()
    with (
        ExitStack() as stack,
        reserved(out) as save,
        Collection.open(collection, choice, create=False) as source,
    ):
        bars: dict[str, Progress] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in bars:
                stack.close()
                bars[what] = stack.enter_context(Progress(what, "item", quiet))
            bars[what].update(done, total)

        drawn = draw_map(
            source,
            method=method,
            prompts=prompts,
            limit=limit,
            most_thumbnails=thumbnails,
            on_progress=show,
            where=where,
        )
        page = drawn.page.encode()
        save(lambda file: file.write(page))
    print_failures(drawn.failed)
    seconds = round(time.monotonic() - start, 3)
    if as_json:
        print_json({"out": str(out), "bytes": len(page), **drawn.to_json(), "seconds": seconds})
    elif not quiet:
        for line in _lines(drawn):
            click.echo(line)
        click.echo(f"{size(len(page))} in {shown_path(str(out))} ({seconds:.1f} s); open it in a browser")
    if drawn.failed:
        ctx.exit(1)


def _lines(drawn: "Map") -> list[str]:
    kinds = ", ".join(count(n, _NOUNS[kind]) for kind, n in drawn.items.items() if n)
    drawn_from = "" if drawn.items == drawn.of else f" of {sum(drawn.of.values()):,} items"
    lines = [f"{kinds}{drawn_from}; prompt set {drawn.prompts}"]
    if drawn.thumbnails < drawn.items["image"]:
        lines.append(f"pictures of {drawn.thumbnails:,} of {count(drawn.items['image'], 'photo')} are in the page")
    for a, b, gap in drawn.gaps:
        lines.append(
            f"{_NOUNS[a]} and {_NOUNS[b]}: means {gap.distance:.3f} apart (items {gap.spread:.3f} from their own), "
            f"told apart by a straight cut {gap.accuracy:.1%} of the time ({gap.chance:.0%} is chance)"
        )
    return lines
