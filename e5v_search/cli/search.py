"""`search`: find items by a text, a picture, a picture and a change to it, and by sums of these."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from e5v_search.cli.inline import MODES, thumbnails
from e5v_search.cli.options import (
    collection_option,
    debug_option,
    examples,
    instruction_option,
    json_option,
    model_options,
    prompts_option,
    where_option,
)
from e5v_search.cli.printing import draw_hits, open_best, print_csv, print_hits, print_json, print_paths, printable, save_sheet
from e5v_search.config import ModelChoice

if TYPE_CHECKING:
    from e5v_search.query import Query


@click.command(
    epilog=examples(
        "e5v-search search a dog in the snow",
        "e5v-search search --image dog.jpg -k 5 --threshold 0.5",
        "e5v-search search --image dog.jpg --modify 'make it a cat' --sheet found.jpg",
        "e5v-search search --image dog.jpg --modify 'at night' --keep-reference",
        "e5v-search search --image 1 --json --no-service",
        "e5v-search search a dog --plus snow:0.5 --minus grass --minus image:cat.jpg:0.3",
        "e5v-search search a dog --where 'orientation=landscape and taken>=2019' --where kind=image",
        "e5v-search search a dog --explain",
        "e5v-search search a dog in the snow --thumbnails never --open",
        "e5v-search search a red car --paths -0 | xargs -0 ls -l",
        "e5v-search search a red car --csv -c holidays --prompts retrieval > found.csv",
        "e5v-search search --vectors sentences.npy -k 3 --json > found.jsonl",
        "e5v-search search at night --instruction 'What time of day is it, in one word:'",
        "e5v-search search a red car --model e5v-tiny --device cpu --dtype float32 --tiles full --allow-mismatch",
    )
)
@click.argument("text", nargs=-1)
@click.option("--image", metavar="FILE|ITEM_ID", help="Search by this picture, or by an item of the collection.")
@click.option("--modify", metavar="TEXT", help="With --image: search for that picture changed like this.")
@click.option(
    "--keep-reference", is_flag=True, help="With --modify: the picture itself and its copies may be among the results."
)
@click.option(
    "--plus",
    multiple=True,
    metavar="TEXT[:W]",
    help="Towards this text, or image:FILE|ITEM_ID, with weight W (1 if not given); repeatable.",
)
@click.option(
    "--minus",
    multiple=True,
    metavar="TEXT[:W]",
    help="Away from this text, or image:FILE|ITEM_ID, with weight W (1 if not given); repeatable.",
)
@click.option(
    "--vectors",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.npy",
    help="Search by each row of this file; needs --json, which then prints one object a row.",
)
@where_option
@click.option("-k", type=click.IntRange(min=1), default=10, show_default=True, help="How many results.")
@click.option("--threshold", type=float, metavar="SCORE", help="No results below this score.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV with a header.")
@click.option("--paths", "as_paths", is_flag=True, help="Print the bare paths, one a line.")
@click.option("-0", "--null", "null", is_flag=True, help="With --paths: end each with a NUL, as xargs -0 wants it.")
@json_option
@click.option("--sheet", type=click.Path(dir_okay=False, path_type=Path), help="Draw the results into this picture file.")
@click.option(
    "--thumbnails",
    "mode",
    type=click.Choice(MODES),
    default="auto",
    show_default=True,
    help="Small pictures below the results: if the terminal shows pictures, never, or always in one protocol.",
)
@click.option("--open", "open_it", is_flag=True, help="Open the best result with the program that the system has for it.")
@click.option("--explain", is_flag=True, help="Say the words of the model's vocabulary that query and result share.")
@prompts_option
@instruction_option
@collection_option
@model_options
@click.option("--no-service", is_flag=True, help="Do not ask the `serve` that may run for this collection.")
@click.option("--allow-mismatch", is_flag=True, help="Search even if another model made the collection.")
@debug_option
def search(
    text: tuple[str, ...],
    image: str | None,
    modify: str | None,
    keep_reference: bool,
    plus: tuple[str, ...],
    minus: tuple[str, ...],
    vectors: Path | None,
    where: tuple[str, ...],
    k: int,
    threshold: float | None,
    as_csv: bool,
    as_paths: bool,
    null: bool,
    as_json: bool,
    sheet: Path | None,
    mode: str,
    open_it: bool,
    explain: bool,
    prompts: str | None,
    collection: str,
    choice: ModelChoice,
    no_service: bool,
    allow_mismatch: bool,
) -> None:
    """Find items by a TEXT, a picture, or a picture and a change.

    The model that made the collection is used. A score is the cosine of query and item, or with --plus and --minus the
    weighted sum of cosines. A text and --image together search for both at once; --image with --modify leaves the picture
    itself out. A weight follows the last colon; --plus 'at 10:30:1' is the text "at 10:30".

    With --vectors nothing is embedded: the rows of FILE.npy, made by `embed` or another program with the model of the
    collection, are the queries.
    """
    if vectors is not None:
        others = (text, image, modify, plus, minus, as_csv, as_paths, sheet, open_it, explain, prompts)
        if any(others) or not as_json:
            raise click.UsageError("--vectors goes with --json, and beside that with -k, --where, --threshold and -c alone")
        _search_file(vectors, collection, k, where, threshold)
        return
    if as_json + as_csv + as_paths > 1:
        raise click.UsageError("--json, --csv and --paths exclude each other")
    if null and not as_paths:
        raise click.UsageError("-0 goes with --paths")
    from e5v_search import query
    from e5v_search.config import collection_path
    from e5v_search.hits import Wanted
    from e5v_search.web import client

    asked = query.Query(
        " ".join(text) if text else None,
        query.parse_image(image) if image is not None else None,
        modify,
        tuple(map(query.parse_term, plus)),
        tuple(map(query.parse_term, minus)),
        where,
        prompts,
    )
    wanted: Wanted = {"k": k, "threshold": threshold, "keep_reference": keep_reference, "explain": explain}
    draw = None if as_json or as_csv or as_paths else thumbnails(mode, sys.stdout)
    hits, drawn = None, []
    if not (no_service or allow_mismatch) and choice == ModelChoice():
        hits = client.ask(collection_path(collection), asked, **wanted)
    if hits is None or sheet is not None or draw:
        from e5v_search.collection import Collection

        with Collection.open(collection, choice, create=False, allow_mismatch=allow_mismatch) as source:
            hits = source.answer(asked, **wanted) if hits is None else hits
            if sheet is not None:
                save_sheet(source, hits, sheet, title=_title(asked))
            drawn = draw_hits(source, hits, draw) if draw else []
    if as_json:
        print_json(hits.to_json())
    elif as_csv:
        print_csv(hits)
    elif as_paths:
        print_paths(hits, b"\0" if null else b"\n")
    elif hits:
        print_hits(hits, drawn)
    else:
        click.echo(_nothing(threshold, where), err=True)
    if sheet is not None:
        click.echo(f"drawn: {printable(str(sheet))}", err=True)
    if open_it:
        open_best(hits)


def _search_file(vectors: Path, collection: str, k: int, where: tuple[str, ...], threshold: float | None) -> None:
    from e5v_search.collection import Collection
    from e5v_search.collection.vectors import search_file

    with Collection.open(collection, create=False) as source:
        for hits in search_file(source, vectors, k=k, where=where, threshold=threshold):
            print_json(hits.to_json())


def _nothing(threshold: float | None, where: tuple[str, ...]) -> str:
    reasons = [f"with a score of {threshold:g} or more"] if threshold is not None else []
    if where:
        reasons.append(f"where {' and '.join(map(printable, where))}")
    return " ".join(["nothing found", *reasons])


def _title(asked: "Query") -> str:
    picture = f"item {asked.image}" if isinstance(asked.image, int) else os.path.basename(str(asked.image or ""))
    signed = [f"{'+' if weight > 0 else '-'} {given.text or 'a picture'}" for given, weight in asked.signed]
    parts = [part for part in (asked.text, picture, asked.modify) if part]
    return printable(" ".join([" + ".join(parts), *signed]))
