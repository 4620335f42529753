"""`models`: which models are known, which are on this machine, and what `auto` means here."""

from typing import TYPE_CHECKING

import click

from e5v_search.cli.options import debug_option, examples, json_option
from e5v_search.cli.printing import print_json

if TYPE_CHECKING:
    from e5v_search.backbones.registry import Known


@click.command(epilog=examples("e5v-search models", "e5v-search models --json"))
@json_option
@debug_option
def models(as_json: bool) -> None:
    """List the known models, and what auto means here."""
    from e5v_search.backbones.checkpoint import free_cuda_bytes
    from e5v_search.backbones.registry import KNOWN, choose

    chosen, quantize, line = choose(free_cuda_bytes())
    listed = [
        {
            "name": known.name,
            "summary": known.summary,
            "dim": known.dim,
            "memory_gib": {"16bit": known.memory_16bit, "4bit": known.memory_4bit or None},
            "licence": known.licence,
            "revision": known.revision,
            "here": _is_here(known),
        }
        for known in KNOWN.values()
    ]
    if as_json:
        print_json({"auto": {"model": chosen, "quantize": quantize}, "models": listed})
        return
    for known, entry in zip(KNOWN.values(), listed, strict=True):
        absent = "" if entry["here"] else click.style("  not on this machine yet", dim=True)
        click.echo(click.style(known.name, bold=True) + absent)
        click.echo(f"  {known.summary}")
        memory = f"{known.memory_16bit:g} GiB" + (f", {known.memory_4bit:g} GiB in 4 bit" if known.memory_4bit else "")
        for name, value in (("vectors", f"{known.dim} numbers"), ("memory", memory), ("licence", known.licence)):
            click.echo(f"  {click.style(f'{name:<8}', dim=True)} {value}")
        click.echo()
    click.echo(
        "Any other LLaVA-NeXT, CLIP or SigLIP model: --model owner/name from the model hub, or the path of a checkpoint folder."
    )
    click.echo(line)


def _is_here(known: "Known") -> bool:
    from pathlib import Path

    from e5v_search.backbones.checkpoint import shards
    from e5v_search.backbones.registry import BUNDLED
    from e5v_search.errors import IncompleteCheckpoint

    folder = BUNDLED / known.name
    if known.revision is not None or "/" in known.name:
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(known.name, "config.json", revision=known.revision)
        if not isinstance(config, str):
            return False
        folder = Path(config).parent
    try:
        return bool(shards(folder))
    except IncompleteCheckpoint:
        return False
