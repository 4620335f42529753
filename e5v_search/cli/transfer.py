"""`export` and `import`: a collection as files for other programs, and such files as a collection."""

from pathlib import Path

import click

from e5v_search.cli.options import collection_option, debug_option, examples, json_option
from e5v_search.cli.printing import count, print_json, printable, warn


@click.command(
    epilog=examples(
        "e5v-search export --out photos-export",
        "e5v-search export --out photos-export --overwrite",
        "e5v-search export --out holidays-export -c holidays --items jsonl --json",
    )
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A folder that does not exist yet, or is empty.")
@click.option(
    "--items",
    type=click.Choice(["parquet", "jsonl"]),
    default="parquet",
    show_default=True,
    help="Format of the rows beside the vectors: items.parquet or items.jsonl.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier export in that folder.")
@collection_option
@json_option
@debug_option
def export(out: Path, items: str, overwrite: bool, collection: str, as_json: bool) -> None:
    """Write vectors and facts of a collection into a folder.

    vectors.npy has a row of half-precision numbers for each item, items.parquet a row with its id, path, text and facts in
    the same order, export.json the model that made them. A second view of the photos is a vectors-NAME.npy of its own.
    """
    from e5v_search.collection import Collection
    from e5v_search.collection.exporting import export as run

    with Collection.open(collection, create=False) as source:
        description = run(source, out, items, overwrite)
    if as_json:
        print_json({name: description[name] for name in ("fingerprint", "items", "dim", "files")} | {"out": str(out)})
    else:
        click.echo(
            f"{count(description['items'], 'item')} with vectors of {description['dim']} numbers in {printable(str(out))}"
        )


@click.command(
    "import",
    epilog=examples(
        "e5v-search import old-export -c copy",
        "e5v-search import my-vectors -c mine --model e5v-tiny --json",
    ),
)
@click.argument("folder", type=click.Path(path_type=Path))
@collection_option
@click.option(
    "--model",
    metavar="NAME|ID|DIR",
    help="What made vectors that do not say so themselves; without it they are searched only by each other.",
)
@json_option
@debug_option
def import_(folder: Path, collection: str, model: str | None, as_json: bool) -> None:
    """Make a collection of the vectors in a folder, with nothing embedded.

    FOLDER holds vectors.npy and, if there is more to say of its rows, items.parquet or items.jsonl: an export, or what
    another program wrote. The collection must be new or empty.
    """
    from e5v_search.backbones import Embedder
    from e5v_search.collection.importing import import_folder

    done = import_folder(folder, collection, None if model is None else Embedder.load(model))
    if as_json:
        print_json(done.to_json())
        return
    if done.normalised:
        warn(f"{count(done.normalised, 'vector')} brought to length 1")
    click.echo(f"{count(done.items, 'item')} imported into {printable(done.path)}, vectors of {printable(done.fingerprint)}")
