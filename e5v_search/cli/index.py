"""`index`: photos and texts into a collection."""

import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from e5v_search.cli.options import (
    collection_option,
    debug_option,
    examples,
    instructed,
    json_option,
    model_options,
    quiet_option,
    store_option,
)
from e5v_search.cli.printing import count, print_failures, print_json, printable, warn
from e5v_search.cli.progress import Progress
from e5v_search.config import ModelChoice

if TYPE_CHECKING:
    from e5v_search.collection import Collection, Report


@click.command(
    epilog=examples(
        "e5v-search index photos",
        "e5v-search index",
        "e5v-search index photos -c holidays --model e5v-tiny --device cpu --dtype float32 --tiles full",
        "e5v-search index photos dog.jpg --json --quiet",
        "e5v-search index captions.txt --kind text",
        "e5v-search index captions.txt --kind rendered -c holidays",
        "e5v-search index photos --views retrieval,cirr",
        "e5v-search index photos -c holidays --instruction 'What colour is it, in one word:'",
        "e5v-search index photos --devices auto",
        "e5v-search index photos --ray 127.0.0.1:6379 --shards shared-folder",
        "e5v-search index photos --watch",
        "e5v-search index photos -c shared --store milvus:photos.db/shared",
    )
)
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--kind",
    type=click.Choice(["image", "text", "rendered"]),
    help="What PATHS are: photos (image, the default); files of texts, .txt .jsonl .csv .md (text); or such texts, each"
    " drawn as a picture (rendered).",
)
@click.option(
    "--views",
    metavar="SET,...",
    help="Prompt sets under which every item is to have a vector, from now on; composed search uses cirr.",
)
@click.option(
    "--instruction",
    metavar="TEXT",
    help="A view too: what to ask of every item, from now on; `search --instruction` with the same words uses it.",
)
@collection_option
@model_options
@store_option
@click.option(
    "--devices",
    metavar="auto|DEVICE,...",
    help="A worker process on each of these devices, as cuda:0,cuda:1; auto is all there are. In place of --device.",
)
@click.option(
    "--ray",
    "address",
    metavar="HOST:PORT|auto|local",
    help="Embed on a Ray cluster: a worker on each of its GPUs, or each core where it has none. In place of --device.",
)
@click.option(
    "--shards",
    type=click.Path(path_type=Path),
    help="With --ray: a folder that all machines share, in which vectors wait for the catalog; it is kept.",
)
@click.option("--watch", is_flag=True, help="Go on: bring in whatever happens in the folders, until stopped.")
@json_option
@quiet_option
@debug_option
@click.pass_context
def index(
    ctx: click.Context,
    paths: tuple[Path, ...],
    kind: str | None,
    views: str | None,
    instruction: str | None,
    collection: str,
    choice: ModelChoice,
    store: str | None,
    devices: str | None,
    address: str | None,
    shards: Path | None,
    watch: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Bring photos, or files of texts, into a collection.

    Only what is new or has changed is read; what was deleted leaves the results. Without PATHS, everything that was
    indexed before is looked through again, each as what it was indexed as. It can be stopped at any time and goes on
    where it was.

    With --watch it does not end: what is added, changed, renamed or deleted in the folders is in the results seconds
    later, until Ctrl-C or SIGTERM. With --json each change is a line of its own.
    """
    if kind is not None and not paths:
        raise click.UsageError("--kind says what PATHS are: give some")
    if sum((devices is not None, address is not None, choice.device != "auto")) > 1:
        raise click.UsageError("--devices and --ray take the place of --device: give one of them")
    if shards is not None and address is None:
        raise click.UsageError("--shards is for --ray")
    if address is not None and watch:
        raise click.UsageError("--ray brings in what is there now: leave --watch out")
    workers = []
    if devices is not None:
        from e5v_search.scale import processes

        workers = processes.parse(devices)
    if len(workers) == 1:  # this process will do
        choice = replace(choice, device=workers[0])
    if address is not None:
        from e5v_search.scale import cluster

        cluster.reach(address)
    from e5v_search.collection import Collection, Follower, canonical, check_first_run
    from e5v_search.errors import StoreError

    wanted = [view.strip() for view in views.split(",")] if views else []
    if instruction is not None:
        wanted.append(instructed(instruction))
    named = [(path, kind or "image") for path in canonical(paths)]
    if named:
        check_first_run(collection, named, wanted, choice, store)
    with ExitStack() as stack:
        target = stack.enter_context(Collection.open(collection, choice, create=bool(named)))
        if store is not None:
            target.store_in(store)
        sources = named or target.catalog.roots()
        if not sources:
            raise click.UsageError(f"nothing was indexed into {target.path} before: say which folder to index")
        noun = _noun({kind for _, kind in sources})
        follower = Follower(target, sources, lambda line: None if quiet else click.echo(printable(line), err=True), wanted)
        with Progress("Indexing", noun, quiet) as progress:
            if len(workers) > 1:
                _employ(target, workers, progress.say, stack)
            if address is not None:
                _employ_cluster(target, address, shards, progress.say, stack)

            def show(report: "Report", total: int) -> None:
                progress.update(report.done, total, len(report.failed))

            try:
                reports = follower.run(show)
                report = next(reports) if watch else target.ingest_sources(sources, wanted, show)
            except KeyboardInterrupt:
                kept = count(sum(target.catalog.count().values()), noun)
                raise KeyboardInterrupt(f"{kept} kept in {target.path}, and the same command goes on from there") from None
        with closing(reports), suppress(*((KeyboardInterrupt,) if watch else ())):  # the way in which a watch ends
            _tell(report, as_json, quiet)
            if not quiet:
                if not report.done and not report.warnings:
                    warn(_nothing_found(sources))
                if not as_json:
                    click.echo(f"{_summary(report)} ({printable(str(target.path))})")
            for change in reports if watch else ():
                _tell(change, as_json, quiet)
                if not quiet and not as_json and (change.added or change.updated or change.removed):
                    counts = f"+{change.added:,} ~{change.updated:,} -{change.removed:,}"
                    click.echo(f"{time.strftime('%H:%M:%S')}  {counts}", err=True)
    if report.behind and not watch:
        raise StoreError(report.behind)
    if report.failed and not watch:
        ctx.exit(1)


def _employ(target: "Collection", devices: list[str], say: Callable[[str], None], stack: ExitStack) -> None:
    """Have worker processes embed what comes into the collection, as long as the stack lasts."""
    from e5v_search.scale import processes

    assert target.choice is not None
    target.embed_with(stack.enter_context(processes.team(target.choice, devices, say)))


def _employ_cluster(
    target: "Collection", address: str, folder: Path | None, say: Callable[[str], None], stack: ExitStack
) -> None:
    """Have a Ray cluster do it. Without a folder for shards they are kept in the collection until they are in the catalog."""
    from e5v_search.scale import cluster
    from e5v_search.scale.shards import Shards

    shards = Shards((folder or target.path / "shards").resolve(), say)
    if folder is None:
        stack.push(lambda kind, *_: None if kind else shards.remove())
    assert target.choice is not None
    target.embed_with(stack.enter_context(cluster.team(target.choice, address, shards, say)))


def _tell(report: "Report", as_json: bool, quiet: bool) -> None:
    for line in () if quiet else report.warnings:
        warn(line)
    print_failures(report.failed)
    if as_json:
        print_json(report.to_json())


def _summary(report: "Report") -> str:
    parts = [
        f"{name} {n:,}"
        for name, n in (
            ("added", report.added),
            ("unchanged", report.unchanged),
            ("updated", report.updated),
            ("removed", report.removed),
            ("failed", len(report.failed)),
            ("given views", report.completed),
        )
        if n or name == "added"
    ]
    return f"{', '.join(parts)} in {report.seconds:.1f} s"


def _noun(kinds: set[str]) -> str:
    if kinds == {"image"}:
        return "photo"
    return "item" if "image" in kinds else "text"


def _nothing_found(sources: list[tuple[str, str]]) -> str:
    from e5v_search import corpora, media

    suffixes = {suffix for _, kind in sources for suffix in (media.SUFFIXES if kind == "image" else corpora.SUFFIXES)}
    endings = " ".join(sorted(suffix.lstrip(".") for suffix in suffixes))
    what = "pictures" if all(kind == "image" for _, kind in sources) else "texts"
    return f"no {what} found in {', '.join(path for path, _ in sources)}; names must end in one of: {endings}"
