"""Options that several commands share, worded once."""

import dataclasses
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import click

from e5v_search.config import QUANTIZE, ModelChoice

DEBUG = "e5v_search.debug"
DEFAULT_COLLECTION = "default"

R = TypeVar("R")


def examples(*lines: str) -> str:
    """The end of a help text; \\b keeps click from filling the lines into a paragraph."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def _set_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[DEBUG] = True


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_set_debug, help="Show where an error comes from."
)

collection_option = click.option(
    "-c",
    "--collection",
    default=DEFAULT_COLLECTION,
    show_default=True,
    metavar="NAME|PATH",
    help="The collection: a name in $E5V_HOME or the platform's data folder, or a path with a separator in it.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
prompts_option = click.option(
    "--prompts", metavar="SET|FILE.toml", help="Another prompt set for what is asked: a known one, or a file of your own."
)


def instructed(instruction: str) -> str:
    """The prompt set that asks what the user wrote. Raises UsageError."""
    from e5v_search.prompts import INSTRUCTED, load_prompts

    return load_prompts(f"{INSTRUCTED}{instruction}").name


def instruction_option(command: Callable[..., R]) -> Callable[..., R]:
    """--instruction, for a command that has --prompts: it reaches the command as a prompt set."""

    @wraps(command)
    def with_prompts(*args: Any, instruction: str | None, prompts: str | None, **keywords: Any) -> R:
        if instruction is not None:
            if prompts is not None:
                raise click.UsageError("--instruction takes the place of --prompts: give one of them")
            prompts = instructed(instruction)
        return command(*args, prompts=prompts, **keywords)

    return click.option(
        "--instruction",
        metavar="TEXT",
        help="What to ask of every input in place of --prompts, as 'What colour is it:'.",
    )(with_prompts)


where_option = click.option(
    "--where",
    multiple=True,
    metavar="EXPR",
    help="Only items that pass, as 'taken>=2023-05 and near=48.85,2.35,10km'; repeatable.",
)
store_option = click.option(
    "--store",
    metavar="URL",
    help="Keep the index in Milvus, from now on: milvus://HOST:PORT/COLLECTION, or milvus:FILE.db/COLLECTION.",
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress, no warnings, no summary.")


_MODEL_OPTIONS = (
    click.option(
        "--model",
        default="auto",
        show_default=True,
        metavar="auto|NAME|ID|DIR",
        help="The model: auto, a name from `e5v-search models`, a hub id owner/name, or a checkpoint folder.",
    ),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
        default="auto",
        show_default=True,
        help="Number format of the weights.",
    ),
    click.option(
        "--quantize",
        type=click.Choice(QUANTIZE),
        help="Hold the weights in 4 or 8 bit (bitsandbytes), or compute in 8: int8 on a processor, fp8 on an H100 or later.",
    ),
    click.option(
        "--tiles",
        default="auto",
        show_default=True,
        metavar="auto|full|base|N",
        help="How much is read of a picture: all tiles (full), none but the small whole (base), or at most N besides it.",
    ),
    click.option("--adapter", metavar="DIR|ID", help="A LoRA adapter to merge into the model: a folder, or a hub id."),
    click.option("--dim", type=click.IntRange(min=1), help="Cut vectors to so many numbers (models trained for it)."),
)


def model_options(command: Callable[..., R]) -> Callable[..., R]:
    """Which model, and how it runs, as one keyword: `choice`, a `ModelChoice`."""
    names = [option.name for option in dataclasses.fields(ModelChoice)]

    @wraps(command)
    def with_choice(*args: Any, model: str, **keywords: Any) -> R:
        how = {name: keywords.pop(name) for name in names if name in keywords}
        return command(*args, choice=ModelChoice(model, **how), **keywords)

    for option in reversed(_MODEL_OPTIONS):
        with_choice = option(with_choice)
    return with_choice
