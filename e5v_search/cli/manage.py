"""What a collection holds, whether it is sound, and what to take out of it: status, verify, rebuild, forget."""

import time
from pathlib import Path

import click

from e5v_search.cli.options import collection_option, debug_option, examples, json_option, store_option
from e5v_search.cli.printing import count, print_json, printable, size, warn

_SHOWN_FAILURES = 5


@click.command(epilog=examples("e5v-search status", "e5v-search status -c holidays --json"))
@collection_option
@json_option
@debug_option
def status(collection: str, as_json: bool) -> None:
    """Say what a collection holds."""
    from e5v_search.collection import Collection

    with Collection.open(collection, create=False) as source:
        state = source.status()
        failures = source.catalog.failures()
        roots = source.catalog.roots()
        views = source.catalog.views
        why = source.indexes.recipe()[1]
        lacking = {view: len(source.catalog.pending(view)) for view in views}
    if as_json:
        print_json(state)
        return
    items, index = state["items"], state["index"]
    stale = " (the next search renews it)" if index["stale"] and index["vectors"] else ""
    nouns = (("image", "photo"), ("text", "text"), ("rendered", "rendered text"))
    lines = [
        ("collection", state["collection"]),
        ("model", state["fingerprint"] or "none yet"),
        ("items", ", ".join(count(items[kind], noun) for kind, noun in nouns if items[kind] or kind == "image")),
        ("index", f"{index['kind']}, {count(index['vectors'], 'vector')}{stale}"),
        *([("", why)] if index["vectors"] else []),
        *([("views", ", ".join(_view(view, lacking[view]) for view in views))] if len(views) > 1 else []),
        ("on disk", size(state["bytes"])),
        *(("from" if n == 0 else "", path if kind == "image" else f"{path} ({kind})") for n, (path, kind) in enumerate(roots)),
        *([("failed", count(state["failed"], "input"))] if failures else []),
    ]
    for name, value in lines:
        click.echo(f"{click.style(f'{name:<10}', dim=True)}  {printable(value)}")
    for failure in failures[:_SHOWN_FAILURES]:
        click.echo(f"            {printable(failure.where)}: {printable(failure.reason)}")
    if len(failures) > _SHOWN_FAILURES:
        click.echo(f"            … and {len(failures) - _SHOWN_FAILURES:,} more")


def _view(view: str, lacking: int) -> str:
    return f"{view} (the next index run gives it to {count(lacking, 'item')})" if lacking else view


@click.command(epilog=examples("e5v-search verify", "e5v-search verify -c holidays --json"))
@collection_option
@json_option
@debug_option
@click.pass_context
def verify(ctx: click.Context, collection: str, as_json: bool) -> None:
    """Check that catalog and index are sound and agree. Exit code 3 if they are not."""
    from e5v_search.collection import Collection

    with Collection.open(collection, create=False) as source:
        errors = source.verify()
    if as_json:
        print_json({"errors": errors})
    else:
        click.echo("\n".join(map(printable, errors)) or "no errors")
    if errors:
        ctx.exit(3)


@click.command(
    epilog=examples(
        "e5v-search rebuild",
        "e5v-search rebuild -c holidays --json",
        "e5v-search rebuild --recipe one-bit",
        "e5v-search rebuild --store milvus:photos.db/photos",
        "e5v-search rebuild --recipe auto",
    )
)
@click.option(
    "--recipe",
    metavar="NAME|FILE.toml",
    help="The index to make, from now on: exact, one-bit, ivf, hnsw, gpu, gpu-ivf, gpu-cagra, a recipe of your own, or auto.",
)
@store_option
@collection_option
@json_option
@debug_option
def rebuild(recipe: str | None, store: str | None, collection: str, as_json: bool) -> None:
    """Make the index anew from the catalog. Nothing is read or embedded.

    With --store alone, what is in Milvus already stays, and what it lacks is sent.
    """
    from e5v_search.collection import Collection
    from e5v_search.index import read_recipe

    start = time.monotonic()
    chosen = None if recipe in (None, "auto") else read_recipe(recipe)
    if store is not None and recipe == "auto":
        raise click.UsageError("--recipe auto is an index in files: leave --store away")
    with Collection.open(collection, create=False) as target:
        left = target.indexes.store
        if store is not None and chosen is None:
            vectors = target.store_in(store)
        else:
            vectors = target.rebuild("auto" if recipe == "auto" else chosen, store)
        kind = target.indexes.kind
        if left not in ("", target.indexes.store):
            warn(f"the vectors in {left} stay there; drop them in Milvus if nobody needs them")
    seconds = time.monotonic() - start
    if as_json:
        print_json({"vectors": vectors, "seconds": round(seconds, 3), "kind": kind})
    else:
        click.echo(f"index of {count(vectors, 'vector')} built in {seconds:.1f} s ({kind})")


@click.command(epilog=examples("e5v-search forget photos/old", "e5v-search forget dog.jpg -c holidays --json"))
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@collection_option
@json_option
@debug_option
def forget(paths: tuple[Path, ...], collection: str, as_json: bool) -> None:
    """Take photos, files of texts and folders out of a collection. The files stay where they are."""
    from e5v_search.collection import Collection

    with Collection.open(collection, create=False) as target:
        removed = target.forget(paths)
    if as_json:
        print_json({"removed": removed})
        return
    if not removed:
        warn(f"the collection holds nothing of {', '.join(map(str, paths))}")
    click.echo(f"forgot {count(removed, 'item')}; the files are untouched")
