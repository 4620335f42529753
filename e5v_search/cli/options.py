"""Options that several commands share, worded once."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import click

from e5v_search.config import ModelChoice

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
where_option = click.option(
    "--where",
    multiple=True,
    metavar="EXPR",
    help="Only items that pass, as 'taken>=2023-05 and near=48.85,2.35,10km'; repeatable.",
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
        type=click.Choice(["4bit", "8bit", "int8"]),
        help="Hold the weights in 4 or 8 bit (bitsandbytes), or compute in 8 (int8, on a processor).",
    ),
    click.option(
        "--tiles",
        default="auto",
        show_default=True,
        metavar="auto|full|base|N",
        help="How much is read of a picture: all tiles (full), none but the small whole (base), or at most N besides it.",
    ),
)


def model_options(command: Callable[..., R]) -> Callable[..., R]:
    """--model, --device, --dtype, --quantize and --tiles, as one keyword: `choice`, a `ModelChoice`."""

    @wraps(command)
    def with_choice(*args: Any, model: str, device: str, dtype: str, quantize: str | None, tiles: str, **keywords: Any) -> R:
        return command(*args, choice=ModelChoice(model, device, dtype, quantize, tiles), **keywords)

    for option in reversed(_MODEL_OPTIONS):
        with_choice = option(with_choice)
    return with_choice
