"""`eval`: the paper's tables, one command each, for any model; and two runs compared."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from e5v_search.cli.options import debug_option, examples, instruction_option, json_option, model_options, quiet_option
from e5v_search.cli.printing import count, print_json, printable
from e5v_search.cli.progress import Progress
from e5v_search.config import ModelChoice
from e5v_search.errors import E5VError, UsageError

if TYPE_CHECKING:
    from e5v_search.evaluation.bootstrap import Difference
    from e5v_search.evaluation.report import Report

# as in evaluation.suite, which is too heavy to be imported for --help
NAMES = (
    "flickr30k",
    "coco",
    "i2i-flickr30k",
    "i2i-coco",
    "cirr",
    "cirr-test",
    "fashioniq",
    "sts",
    "flickr8k",
    "coco-mini",
    "scenes",
    "folder",
)


_LISTED = 20  # pictures left out, on stderr


@click.command(
    name="eval",
    epilog=examples(
        "e5v-search eval folder --data photos",
        "e5v-search eval folder --data photos --limit 2 --out first.json --json",
        "e5v-search eval folder --data photos --prompts last,prompt,retrieval --out prompts.json",
        "e5v-search eval folder --data photos --limit 2 --prompts prompt --out second.json --markdown",
        "e5v-search eval scenes --limit 2 --prompts last,prompt,retrieval --model e5v-tiny --tiles base",
        "e5v-search eval folder --data photos --limit 2 --instruction 'What colour is it, in one word:'",
        "e5v-search eval --compare first.json second.json",
        "e5v-search eval folder --data photos --allow-missing --cache vectors --model e5v-tiny --device cpu --dtype float32 -q",
    ),
)
@click.argument("dataset", required=False, type=click.Choice(NAMES), metavar="DATASET")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The data set's folder; else it is fetched from the hub, where that has it.",
)
@click.option(
    "--revision",
    "revisions",
    multiple=True,
    metavar="REPOSITORY@REVISION",
    help="Which commit, tag or branch of a repository of the hub, e.g. one that an earlier report names; may be repeated.",
)
@model_options
@click.option(
    "--prompts",
    metavar="SET[,SET]",
    help="Prompt sets in place of the protocol's own, of which last, prompt and retrieval are its forms in the paper's table "
    "6; several are compared in one table.",
)
@instruction_option
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The first N pictures, queries, or pairs of each task.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.json", help="Where to keep the report.")
@click.option("--allow-missing", is_flag=True, help="Leave out pictures that cannot be used; the report will say so.")
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where vectors are kept, for the next metric or after a kill; else in the data folder ($E5V_HOME).",
)
@click.option(
    "--compare",
    nargs=2,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="A.json B.json",
    help="Compare two reports made with --out by a paired bootstrap.",
)
@json_option
@click.option("--markdown", "as_markdown", is_flag=True, help="Print Markdown.")
@quiet_option
@debug_option
@click.pass_context
def evaluate(
    ctx: click.Context,
    dataset: str | None,
    data: Path | None,
    revisions: tuple[str, ...],
    choice: ModelChoice,
    prompts: str | None,
    limit: int | None,
    out: Path | None,
    allow_missing: bool,
    cache: Path | None,
    compare: tuple[Path, Path] | None,
    as_json: bool,
    as_markdown: bool,
    quiet: bool,
) -> None:
    """Measure a model by the protocols of the paper.

    DATASET is flickr30k, coco, i2i-flickr30k, i2i-coco (captions drawn as pictures), cirr, cirr-test (files for CIRR's
    server), fashioniq, sts, flickr8k, coco-mini, scenes (drawn shapes, all types of task), or folder: your photos with
    captions.csv or .jsonl (file, caption), or .tsv or .txt (file, tab, caption) beside them.
    """
    if as_json and as_markdown:
        raise click.UsageError("--json and --markdown exclude each other")
    if (dataset is None) == (compare is None):
        raise click.UsageError("give a DATASET, or --compare A.json B.json")
    if compare is not None:
        _print_comparison(*compare, as_json)
        return
    assert dataset is not None
    from e5v_search.config import data_home
    from e5v_search.evaluation import suite
    from e5v_search.prompts import INSTRUCTED

    pinned = dict(map(_pin, revisions))
    sets = [prompts] if prompts is None or prompts.startswith(INSTRUCTED) else prompts.split(",")
    for name in sets:
        suite.check(dataset, data, name, pinned)
    if suite.DATASETS[dataset].measure is None and out is None:
        raise UsageError(f"{dataset} writes files for CIRR's server beside the report: say where with --out FILE.json")
    loaded = suite.read(dataset, data, limit, allow_missing, pinned)
    from e5v_search.backbones import Embedder

    embedder = Embedder.of(choice)
    with Progress("Embedding", "input", quiet) as progress:
        reports = [
            suite.evaluate(
                dataset,
                loaded,
                embedder,
                cache or data_home() / "vectors",
                prompts=name,
                allow_missing=allow_missing,
                limit=limit,
                out=out,
                on_progress=progress.update,
            )
            for name in sets
        ]
    if out is not None:
        _save(out, reports)
    _print(reports, as_json, as_markdown)
    missing = reports[0].missing or {}
    for picture, reason in list(missing.items())[:_LISTED]:
        click.echo(f"{printable(picture)}: {printable(reason)}", err=True)
    if len(missing) > _LISTED:
        click.echo(f"and {count(len(missing) - _LISTED, 'more picture')}: --json and --out list them all", err=True)
    if missing:
        ctx.exit(1)


def _pin(text: str) -> tuple[str, str]:
    repository, _, revision = text.partition("@")
    if not repository or not revision:
        raise UsageError(f"--revision {text}: a repository, @, and a commit, tag or branch are needed")
    return repository, revision


def _print(reports: "Sequence[Report]", as_json: bool, as_markdown: bool) -> None:
    from e5v_search.evaluation.report import beside_the_paper, details, markdown

    if as_json:
        print_json(_json(reports, whole=False))
    elif as_markdown:
        click.echo(markdown(reports))
    else:
        for table in (details(reports), beside_the_paper(reports)):
            if len(table) > 1:
                _print_table(table)
                click.echo()
        for report in reports:
            for line in report.footer():
                click.echo(printable(line))


def _json(reports: "Sequence[Report]", whole: bool) -> dict[str, object]:
    """One report, or several as {"dataset", "runs"}; what --compare needs of every query only when `whole`."""
    found = [report.to_json() for report in reports]
    if not whole:
        for run in found:
            del run["per_query"]
    return found[0] if len(found) == 1 else {"dataset": reports[0].dataset, "runs": found}


def _save(out: Path, reports: "Sequence[Report]") -> None:
    try:
        out.write_text(json.dumps(_json(reports, whole=True), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise E5VError(f"{out} cannot be written: {error.strerror or error}; choose another place with --out") from error


def _print_comparison(a: Path, b: Path, as_json: bool) -> None:
    from e5v_search.evaluation.report import compared

    found = compared(a, b)
    if as_json:
        metrics = {name: asdict(d) | {"difference": d.difference} for name, d in found.items()}
        print_json({"a": str(a), "b": str(b), "metrics": metrics})
        return
    _print_table([["", a.name, b.name, "difference", "95 % interval", "p"], *(_row(name, d) for name, d in found.items())])
    click.echo("\nThe second minus the first, on the same queries; paired bootstrap over queries, two-sided p.")


def _row(name: str, d: "Difference") -> list[str]:
    numbers = f"{d.a:.2f}", f"{d.b:.2f}", f"{d.difference:+.2f}", f"[{d.low:+.2f}, {d.high:+.2f}]"
    return [name, *numbers, f"{d.p:.3f}"]


def _print_table(table: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        click.echo(click.style(printable("  ".join(cells).rstrip()), dim=row is table[0]))
