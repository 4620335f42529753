"""`search`: find items by a text, a picture, or a picture and a change to it."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from e5v_search.cli.options import collection_option, debug_option, examples, json_option, model_options
from e5v_search.cli.printing import print_csv, print_hits, print_json, print_paths, printable, save_sheet

if TYPE_CHECKING:
    from e5v_search.query import Query


def _threshold(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None and math.isnan(value):  # which passes every comparison of a range
        raise click.BadParameter("nan is not a number between -1 and 1")
    return value


@click.command(
    epilog=examples(
        "e5v-search search a dog in the snow",
        "e5v-search search --image dog.jpg -k 5 --threshold 0.5",
        "e5v-search search --image dog.jpg --modify 'make it a cat' --sheet found.jpg",
        "e5v-search search --image 1 --json",
        "e5v-search search a red car --paths -0 | xargs -0 ls -l",
        "e5v-search search a red car --csv -c holidays --prompts retrieval > found.csv",
        "e5v-search search a red car --model e5v-tiny --device cpu --dtype float32 --allow-mismatch",
    )
)
@click.argument("text", nargs=-1)
@click.option("--image", metavar="FILE|ITEM_ID", help="Search by this picture, or by an item of the collection.")
@click.option("--modify", metavar="TEXT", help="With --image: search for that picture changed like this.")
@click.option("-k", type=click.IntRange(min=1), default=10, show_default=True, help="How many results.")
@click.option(
    "--threshold",
    type=click.FloatRange(-1, 1),
    callback=_threshold,
    metavar="SCORE",
    help="No results below this score, the cosine of query and item (-1 to 1).",
)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV with a header.")
@click.option("--paths", "as_paths", is_flag=True, help="Print the bare paths, one a line.")
@click.option("-0", "--null", "null", is_flag=True, help="With --paths: end each with a NUL, as xargs -0 wants it.")
@json_option
@click.option("--sheet", type=click.Path(dir_okay=False, path_type=Path), help="Draw the results into this picture file.")
@click.option("--prompts", metavar="SET|FILE.toml", help="Another prompt set for the query.")
@collection_option
@model_options
@click.option("--allow-mismatch", is_flag=True, help="Search even if another model made the collection.")
@debug_option
def search(
    text: tuple[str, ...],
    image: str | None,
    modify: str | None,
    k: int,
    threshold: float | None,
    as_csv: bool,
    as_paths: bool,
    null: bool,
    as_json: bool,
    sheet: Path | None,
    prompts: str | None,
    collection: str,
    model: str,
    device: str,
    dtype: str,
    quantize: str | None,
    allow_mismatch: bool,
) -> None:
    """Find photos by a TEXT, a picture, or a picture and a change.

    The model that made the collection is used. Scores are cosines: a photo scores 1 with itself. A text and --image
    together search for both at once; --image with --modify leaves the picture itself out.
    """
    if as_json + as_csv + as_paths > 1:
        raise click.UsageError("--json, --csv and --paths exclude each other")
    if null and not as_paths:
        raise click.UsageError("-0 goes with --paths")
    from e5v_search.collection import Collection, ModelChoice
    from e5v_search.query import Query

    query = Query(" ".join(text) if text else None, _picture(image), modify, prompts)
    choice = ModelChoice(model, device, dtype, quantize)
    with Collection.open(collection, choice, create=False, allow_mismatch=allow_mismatch) as source:
        hits = source.search(query.text, image=query.image, modify=modify, k=k, threshold=threshold, prompts=prompts)
        if sheet is not None:
            save_sheet(source, hits, sheet, title=_title(query))
    if as_json:
        print_json(hits.to_json())
    elif as_csv:
        print_csv(hits)
    elif as_paths:
        print_paths(hits, b"\0" if null else b"\n")
    elif hits:
        print_hits(hits)
    else:
        click.echo("nothing found" + ("" if threshold is None else f" with a score of {threshold:g} or more"), err=True)
    if sheet is not None:
        click.echo(f"drawn: {printable(str(sheet))}", err=True)


def _title(query: "Query") -> str:
    picture = f"item {query.image}" if isinstance(query.image, int) else os.path.basename(str(query.image or ""))
    return printable(" + ".join(part for part in (query.text, picture, query.modify) if part))


def _picture(image: str | None) -> str | int | None:
    """A whole number is an item's id, unless there is a file of that name."""
    if image is not None and image.isdecimal() and not Path(image).exists():
        return int(image)
    return image
