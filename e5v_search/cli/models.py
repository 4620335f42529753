"""`models`: which models are known, which are on this machine, what `auto` means here; `models show` tells all of one."""

from typing import Any

import click

from e5v_search.cli.options import debug_option, examples, json_option
from e5v_search.cli.printing import print_json, printable


@click.group(
    invoke_without_command=True,
    epilog=examples("e5v-search models", "e5v-search models --json", "e5v-search models show e5v-tiny"),
)
@json_option
@debug_option
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """List the known models, and what auto means here; `models show NAME` tells all of one.

    A file models.toml in the data folder ($E5V_HOME), or the file that $E5V_MODELS names, adds models of your own
    (docs/models.md).
    """
    if ctx.invoked_subcommand is not None:
        return
    from e5v_search.backbones.checkpoint import free_cuda_bytes
    from e5v_search.backbones.known import FAMILIES, known_models
    from e5v_search.backbones.registry import choose, describe

    chosen, quantize, line = choose(free_cuda_bytes())
    listed = [describe(name) for name in known_models()]
    if as_json:
        print_json({"auto": {"model": chosen, "quantize": quantize}, "models": listed})
        return
    for told in listed:
        absent = "" if told["here"] else click.style("  not on this machine yet", dim=True)
        click.echo(click.style(printable(told["name"]), bold=True) + absent)
        click.echo(f"  {printable(told['summary'])}")
        shown = {"vectors": f"{told['dim']} numbers", "memory": _memory(told["memory_gib"]), "licence": told["licence"]}
        _lines({name: value for name, value in shown.items() if value})
        click.echo()
    families = ", ".join(family.what for family in FAMILIES.values())
    click.echo(f"Any other model of a known family ({families}): --model owner/name from the model hub, or a folder.")
    click.echo(line)


@models.command(epilog=examples("e5v-search models show royokong/e5-v", "e5v-search models show e5v-tiny --json"))
@click.argument("model", metavar="NAME|DIR")
@json_option
@debug_option
def show(model: str, as_json: bool) -> None:
    """Tell all about one model, a known one or a checkpoint folder; nothing of it is loaded."""
    from e5v_search.backbones.registry import describe

    told = describe(model)
    if as_json:
        print_json(told)
        return
    click.echo(click.style(printable(told.pop("name")), bold=True))
    _lines({key.replace("_", " "): _shown(value) for key, value in told.items() if value not in (None, [], {})})


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items() if inner is not None)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return repr(value) if isinstance(value, str) and ("\n" in value or value != value.strip()) else str(value)


def _lines(told: dict[str, str]) -> None:
    width = max(map(len, told))
    for name, value in told.items():
        click.echo(f"  {click.style(name.ljust(width), dim=True)} {printable(value)}")


def _memory(memory: dict[str, float | None]) -> str:
    whole, quarter = memory["16bit"], memory["4bit"]
    return ", ".join([*([f"{whole:g} GiB"] if whole else []), *([f"{quarter:g} GiB in 4 bit"] if quarter else [])])
