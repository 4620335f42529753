"""`train`: a recipe, run to its end; one that was stopped goes on."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from e5v_search.cli.options import debug_option, examples, json_option, quiet_option
from e5v_search.cli.printing import count, print_json, printable
from e5v_search.cli.progress import Progress
from e5v_search.errors import UsageError

if TYPE_CHECKING:
    from e5v_search.training.recipe import Recipe
    from e5v_search.training.tuning import Tuning

_LISTED = 20  # pictures left out, on stderr


@click.command(
    epilog=examples(
        "e5v-search train recipe.toml",
        "e5v-search train recipe.toml --data . --out runs/longer --set steps=3 --set lora.rank=8 --merge",
        "e5v-search train recipe.toml --out runs/watched --tensorboard --device cpu --json -q",
        "e5v-search train recipe.toml --out runs/exported --sentence-transformers sentences",
    ),
)
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="RECIPE.toml")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Another value for a key of the recipe; repeatable."
)
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    metavar="DIR",
    help="The folder below which the recipe's files lie.  [default: this one]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="The run's folder: saves, log, and what was learned.  [default: runs/NAME, after the recipe]",
)
@click.option("--merge", is_flag=True, help="In the end, write the model with its adapter as one model folder, OUT/model.")
@click.option(
    "--sentence-transformers",
    "sentences",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="In the end, write a folder that sentence-transformers opens.",
)
@click.option("--tensorboard", is_flag=True, help="Write OUT/board for TensorBoard, too.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps.")
@json_option
@quiet_option
@debug_option
@click.pass_context
def train(
    ctx: click.Context,
    recipe: Path,
    overrides: tuple[str, ...],
    data: Path,
    out: Path | None,
    merge: bool,
    sentences: Path | None,
    tensorboard: bool,
    device: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train by a recipe: tune a model, or make a small one.

    A run that was stopped, by Ctrl-C or a crash, goes on from its last save when the same command is given again.
    """
    from e5v_search.training.gather import rank
    from e5v_search.training.recipes import read_recipe
    from e5v_search.training.team import together
    from e5v_search.training.tuning import Tuning

    read = read_recipe(recipe, overrides)
    out = out or Path("runs") / read.name
    if sentences is not None and sentences.exists() and any(sentences.iterdir()):
        raise UsageError(f"{sentences} holds something already; give --sentence-transformers a new folder")
    with together(device) as here, Progress("Training", "step", quiet or rank() > 0) as progress:
        if isinstance(read, Tuning):
            found = _tune(read, data, out, here, tensorboard, merge or sentences is not None, progress)
        else:
            found = _pretrain(read, data, out, tensorboard, progress)
        if rank() > 0:
            return
    if sentences is not None:
        from e5v_search.training.sentence_folder import export_sentence_transformers

        export_sentence_transformers(found["model"], sentences)
    exported = None if sentences is None else str(sentences)
    found = {"recipe": read.name, "out": str(out), **found, "sentence_transformers": exported}
    _print(found, as_json)
    if found["skipped"]:
        ctx.exit(1)


def _tune(recipe: "Tuning", data: Path, out: Path, device: str, board: bool, whole: bool, progress: Progress) -> dict[str, Any]:
    from e5v_search.training.run import tune

    outcome = tune(recipe, data, out, progress.say, device=device, on_step=progress.show, board=board, merge=whole)
    return {
        "steps": outcome.steps,
        "loss": outcome.loss,
        "seconds": round(outcome.seconds, 1),
        "measured": outcome.measured,
        "skipped": [{"path": path, "reason": reason} for path, reason in outcome.skipped.items()],
        "adapter": outcome.adapter and str(outcome.adapter),
        "model": outcome.model and str(outcome.model),
    }


def _pretrain(recipe: "Recipe", data: Path, out: Path, board: bool, progress: Progress) -> dict[str, Any]:
    from e5v_search.training.loop import load_data, train

    started = time.monotonic()
    model = train(recipe, load_data(data), out, progress.say, on_step=progress.show, board=board)
    return {
        "steps": recipe.steps,
        "loss": None,
        "seconds": round(time.monotonic() - started, 1),
        "measured": {},
        "skipped": [],
        "adapter": None,
        "model": str(model),
    }


def _print(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        loss = "" if found["loss"] is None else f", loss {found['loss']:.4f}"
        click.echo(f"{printable(found['recipe'])}: {count(found['steps'], 'step')}{loss}")
        for name, value in found["measured"].items():
            click.echo(f"{name}  {value:.4f}")
        for what in ("adapter", "model", "sentence_transformers"):
            if found[what] is not None:
                click.echo(f"{what.replace('_', '-')}: {printable(found[what])}")
    for picture in found["skipped"][:_LISTED]:
        click.echo(f"{printable(picture['path'])}: {printable(picture['reason'])}", err=True)
    if len(found["skipped"]) > _LISTED:
        more = count(len(found["skipped"]) - _LISTED, "more picture")
        click.echo(f"and {more} could not be used: --json lists them all", err=True)
