"""`embed`: vectors of texts, pictures or pictures with changes into a file, without a collection."""

import time
from dataclasses import asdict
from pathlib import Path

import click

from e5v_search.cli.options import debug_option, examples, instruction_option, json_option, model_options, quiet_option
from e5v_search.cli.output import reserved
from e5v_search.cli.printing import print_json, printable, shown_path
from e5v_search.cli.progress import Progress
from e5v_search.cli.rows import composed_job, embed_rows, image_job, text_job
from e5v_search.config import ModelChoice


@click.command(
    epilog=examples(
        "e5v-search embed --texts captions.txt --out texts.npy",
        "e5v-search embed --images photos dog.jpg --out images.npy --json --quiet",
        "e5v-search embed --composed changes.jsonl --out changed.npy --prompts cirr",
        "e5v-search embed --images photos --out colours.npy --instruction 'What colour is it, in one word:'",
        "e5v-search embed --texts captions.txt --out texts.npy --model e5v-tiny --device cpu --dtype float32 --tiles full",
    )
)
@click.option("--texts", type=click.Path(path_type=Path), metavar="FILE", help="A text a line, in UTF-8.")
@click.option("--images", multiple=True, type=click.Path(path_type=Path), metavar="PATH...", help="Photos and folders.")
@click.option(
    "--composed",
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl",
    help='A line each: {"image": path, "text": change}; paths are relative to the working folder.',
)
@click.argument("more", nargs=-1, type=click.Path(path_type=Path), metavar="")
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.npy", help="Where to write."
)
@click.option("--prompts", metavar="SET|FILE.toml", help="The prompt set; else retrieval, for --composed cirr.")
@instruction_option
@model_options
@json_option
@quiet_option
@debug_option
@click.pass_context
def embed(
    ctx: click.Context,
    texts: Path | None,
    images: tuple[Path, ...],
    composed: Path | None,
    more: tuple[Path, ...],
    out: Path,
    prompts: str | None,
    choice: ModelChoice,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write embeddings to a .npy file.

    A float32 row of length 1 for each input, in the order of the inputs. An input that cannot be used leaves a row of
    zeros, is listed, and makes the exit code 1.
    """
    if bool(texts) + bool(images) + bool(composed) != 1:
        raise click.UsageError("give one of --texts FILE, --images PATH..., --composed FILE.jsonl")
    if more and not images:
        raise click.UsageError(f"{more[0]}: only --images takes more than one path")
    start = time.monotonic()
    job = text_job(texts) if texts else composed_job(composed) if composed else image_job([*images, *more])
    prompts = prompts or ("cirr" if job.kind == "composed" else "retrieval")
    from e5v_search.prompts import load_prompts

    load_prompts(prompts).get(job.kind)  # a mistake there need not wait for the model
    with reserved(out) as save:
        import numpy as np

        from e5v_search.backbones import Embedder

        embedder = Embedder.of(choice)
        with Progress("Embedding", "text" if job.kind == "text" else "photo", quiet) as progress:
            x = embed_rows(job, embedder, prompts, lambda done: progress.update(done, len(job.rows), len(job.failed)))
        save(lambda file: np.save(file, x))
    made_by = str(embedder.made_by.with_prompts(prompts))
    seconds = time.monotonic() - start
    for failure in job.failed:
        click.echo(f"{printable(failure.input)}: {printable(failure.reason)}", err=True)
    if as_json:
        print_json(
            {
                "out": str(out),
                "rows": len(x),
                "dim": embedder.dim,
                "fingerprint": made_by,
                "prompts": prompts,
                "inputs": [row.input for row in job.rows],
                "failed": [asdict(failure) for failure in job.failed],
                "seconds": round(seconds, 3),
            }
        )
    else:
        click.echo(f"{len(x):,} × {embedder.dim} float32 in {shown_path(str(out))} ({seconds:.1f} s)")
        click.echo(f"made by {made_by}")
    if job.failed:
        ctx.exit(1)
