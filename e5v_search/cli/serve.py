"""`serve`: a collection as a page and an API."""

import os
import sys

import click

from e5v_search.cli.options import collection_option, debug_option, examples, model_options
from e5v_search.config import ModelChoice


@click.command(
    epilog=examples(
        "e5v-search serve",
        "e5v-search serve -c holidays --port 0 --open",
        "e5v-search serve --allow-index --model e5v-tiny --device cpu --dtype float32 --tiles full",
        "e5v-search serve --host 0.0.0.0 --token a-token-that-nobody-guesses --allow-host photos.example",
    )
)
@collection_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; beyond this machine it needs a token.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="0 is any free one. [default: 8765, or the next that is free]",
)
@click.option(
    "--token", envvar="E5V_TOKEN", show_envvar=True, help="A secret that whoever asks must know, 16 characters or more."
)
@click.option(
    "--allow-host",
    "names",
    multiple=True,
    metavar="NAME",
    help="A further host name by which it is reached, as a proxy's; repeatable.",
)
@click.option("--allow-index", is_flag=True, help="Index runs may be started from the page.")
@click.option("--open", "open_it", is_flag=True, help="Open the page in the browser.")
@model_options
@debug_option
def serve(
    collection: str,
    host: str,
    port: int | None,
    token: str | None,
    names: tuple[str, ...],
    allow_index: bool,
    open_it: bool,
    choice: ModelChoice,
) -> None:
    """Serve a collection as a page and an HTTP API.

    Prints the address once it answers and goes on until Ctrl-C or SIGTERM. Meanwhile `search` asks it instead of loading
    the model itself. What is indexed meanwhile is in the results.
    """
    from e5v_search.web.server import Server

    server = Server(collection, choice, host=host, port=port, token=token, names=names, allow_index=allow_index)

    def up() -> None:
        click.echo(server.address)
        if open_it:
            click.launch(f"{server.address}?token={token}" if token else server.address)

    if not server.run(up):
        sys.stdout.flush()
        os._exit(0)  # the end of the interpreter would abort in the middle of what the model's library does
