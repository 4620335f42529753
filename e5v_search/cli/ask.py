"""Questions to the model itself: which picture is more one thing than another, what is near to what, in which words."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import click

from e5v_search.cli.options import (
    DEFAULT_COLLECTION,
    collection_option,
    debug_option,
    examples,
    instruction_option,
    json_option,
    model_options,
    prompts_option,
    where_option,
)
from e5v_search.cli.printing import print_failures, print_hits, print_json, printable
from e5v_search.config import ModelChoice

if TYPE_CHECKING:
    from e5v_search.collection import Collection, Space

_MAX_LABEL = 60


@contextmanager
def _space(collection: str, choice: "ModelChoice") -> "Iterator[tuple[Space, Collection | None]]":
    """A collection's model and vectors. Where none was named and there is none, or it has another model: the model alone."""
    from e5v_search.backbones import Embedder
    from e5v_search.collection import Collection, Space
    from e5v_search.errors import CollectionNotFound

    unnamed = collection == DEFAULT_COLLECTION
    source = None
    if not unnamed or choice.name == "auto":
        try:
            source = Collection.open(collection, choice, create=False)
        except CollectionNotFound:
            if not unnamed:
                raise
    if source is None:
        yield Space(cache(lambda: Embedder.of(choice))), None
    else:
        with source:
            if (choice.name, choice.quantize, choice.tiles) != ("auto", None, "auto"):
                source.embedder()  # a wrong one is refused even when stored vectors would do
            yield source.space, source


@click.command(
    epilog=examples(
        "e5v-search ask --positive 'an image of a dog' --negative 'an image of a cat' dog.jpg cat.jpg",
        "e5v-search ask --positive 'a wild animal' --negative 'a domestic animal' -c holidays -k 3",
        "e5v-search ask --positive snow --negative sand --where orientation=landscape --json",
        "e5v-search ask --positive snow --negative sand cat.jpg --prompts retrieval",
        "e5v-search ask --positive night --negative day --instruction 'What time of day is it, in one word:'",
        "e5v-search ask --positive snow --negative sand cat.jpg --model e5v-tiny --device cpu --dtype float32 --tiles full",
    )
)
@click.option("--positive", required=True, metavar="TEXT", help="What the picture should be.")
@click.option("--negative", required=True, metavar="TEXT", help="What it should rather not be.")
@click.argument("images", nargs=-1, type=click.Path(path_type=Path))
@click.option("-k", type=click.IntRange(min=1), default=10, show_default=True, help="How many results.")
@where_option
@prompts_option
@instruction_option
@collection_option
@model_options
@json_option
@debug_option
@click.pass_context
def ask(
    ctx: click.Context,
    positive: str,
    negative: str,
    images: tuple[Path, ...],
    k: int,
    where: tuple[str, ...],
    prompts: str | None,
    collection: str,
    choice: ModelChoice,
    as_json: bool,
) -> None:
    """Ask which picture is more one thing than another.

    Ranks IMAGES, or without them all pictures of the collection, by cos(positive, picture) - cos(negative, picture).
    """
    if images and where:
        raise click.UsageError("--where chooses among the items of the collection: give it or images, not both")
    from e5v_search.collection import Failure

    failed: list[Failure] = []
    with _space(collection, choice) as (space, source):
        if images:
            hits, failed = space.ask(positive, negative, images, prompts)
        elif source is not None:
            pictures = ("kind=image|rendered", *where)
            hits = source.search(positive, minus=[negative], where=pictures, k=k, prompts=prompts)
        else:
            raise click.UsageError("there is no collection to ask: name the images, or index some")
    print_failures(failed)
    del hits[k:]
    if as_json:
        print_json(hits.to_json())
    elif hits:
        print_hits(hits)
    elif not failed:
        click.echo("nothing found", err=True)
    if failed:
        ctx.exit(1)


@click.command(
    epilog=examples(
        "e5v-search compare dog.jpg cat.jpg 'text:a dog' 'text:a cat'",
        "e5v-search compare 1 2 -c holidays --json",
        "e5v-search compare dog.jpg cat.jpg --instruction 'What colour is it, in one word:'",
        "e5v-search compare dog.jpg cat.jpg --prompts cirr --model e5v-tiny --device cpu --dtype float32 --tiles full",
    )
)
@click.argument("inputs", nargs=-1, required=True, metavar="FILE|ITEM_ID|text:TEXT...")
@prompts_option
@instruction_option
@collection_option
@model_options
@json_option
@debug_option
def compare(
    inputs: tuple[str, ...],
    prompts: str | None,
    collection: str,
    choice: ModelChoice,
    as_json: bool,
) -> None:
    """Print the cosine of every two pictures and texts.

    A picture is a file or the id of an item of the collection; a text is written text:TEXT.
    """
    from e5v_search.query import parse_input

    parsed = [parse_input(each) for each in inputs]
    with _space(collection, choice) as (space, _):
        x = space.vectors(parsed, prompts)
        fingerprint = space.fingerprint
    cosines = (x @ x.T).clip(-1, 1)  # stored rows are of length 1 but for the rounding of half precision
    if as_json:
        print_json({"inputs": [each.to_json() for each in parsed], "fingerprint": fingerprint, "cosines": cosines.tolist()})
        return
    width = len(str(len(parsed)))
    click.echo(click.style(" ".join([" " * width, *(f"{n:>7}" for n in range(1, len(parsed) + 1))]), dim=True))
    for n, (label, row) in enumerate(zip(inputs, cosines.tolist(), strict=True), start=1):
        cells = [click.style(f"{n:>{width}}", dim=True), *(f"{cosine:7.4f}" for cosine in row)]
        click.echo(f"{' '.join(cells)}  {_label(label)}")


def _label(argument: str) -> str:
    shown = printable(argument)
    return shown if len(shown) <= _MAX_LABEL else f"{shown[: _MAX_LABEL - 1]}…"


@click.command(
    epilog=examples(
        "e5v-search explain dog.jpg",
        "e5v-search explain 'text:two dogs play in the snow' -k 5 --json",
        "e5v-search explain dog.jpg --modify 'make it a cat' --prompts cirr",
        "e5v-search explain dog.jpg --instruction 'What colour is it, in one word:'",
        "e5v-search explain 1 'text:a dog' -c holidays",
        "e5v-search explain dog.jpg --model e5v-tiny --device cpu --dtype float32 --tiles full",
    )
)
@click.argument("given", metavar="FILE|ITEM_ID|text:TEXT")
@click.argument("other", required=False, metavar="[OTHER]")
@click.option("--modify", metavar="TEXT", help="With a picture: read it changed like this.")
@click.option("-k", type=click.IntRange(min=1), default=10, show_default=True, help="How many words.")
@prompts_option
@instruction_option
@collection_option
@model_options
@json_option
@debug_option
def explain(
    given: str,
    other: str | None,
    modify: str | None,
    k: int,
    prompts: str | None,
    collection: str,
    choice: ModelChoice,
    as_json: bool,
) -> None:
    """Say an input in the model's own words.

    The words of the model's vocabulary that lie nearest to the embedding of a picture, a text, or a picture changed. With
    OTHER, the words that the two share.
    """
    from dataclasses import asdict

    from e5v_search.query import Input, parse_input

    parsed = [parse_input(each) for each in (given, other) if each is not None]
    if modify is not None:
        parsed[0] = Input(parsed[0].text, parsed[0].image, modify)
    with _space(collection, choice) as (space, _):
        x = space.vectors(parsed, prompts)
        embedder = space.embedder()
        words = (embedder.nearest_words(x, k) if other is None else embedder.shared_words(x[0], x[1:], k))[0]
        fingerprint = space.fingerprint
    if as_json:
        shown = {"input": parsed[0].to_json(), "other": parsed[1].to_json() if other is not None else None}
        print_json(shown | {"fingerprint": fingerprint, "words": [asdict(word) for word in words]})
        return
    for word in words:
        click.echo(f"{word.score:.4f}  {printable(word.text)}")
