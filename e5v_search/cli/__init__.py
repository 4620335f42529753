"""The command line: parse, call one function, print.

Nothing but click and the standard library is imported before a command runs, so that `--help` and mistyped commands
answer at once.
"""

import io
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Any, NoReturn

import click

from e5v_search import __version__
from e5v_search.cli.ask import ask, compare, explain
from e5v_search.cli.doctor import doctor
from e5v_search.cli.duplicates import duplicates
from e5v_search.cli.embed import embed
from e5v_search.cli.eval import evaluate
from e5v_search.cli.index import index
from e5v_search.cli.manage import forget, rebuild, status, verify
from e5v_search.cli.map import map_command
from e5v_search.cli.models import models
from e5v_search.cli.options import DEBUG, debug_option, examples
from e5v_search.cli.printing import printable
from e5v_search.cli.search import search
from e5v_search.cli.serve import serve
from e5v_search.cli.train import train
from e5v_search.cli.transfer import export, import_
from e5v_search.cli.tune import tune
from e5v_search.errors import E5VError

FAILED = 3
STOPPED = 130


class Program(click.Group):
    """The group of all commands, and the one place where exceptions become exit codes and lines on stderr."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order in which people meet them, not the alphabet's

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[:2] == ["index", "tune"] and not os.path.lexists("tune"):  # else it is the photos in there that are meant
            args = args[1:]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except BrokenPipeError:
            _discard_output()
            ctx.exit(0)
        except KeyboardInterrupt as stop:
            # no map() here: the name is that of the module beside this one
            self._leave(ctx, "; ".join(["stopped", *(str(arg) for arg in stop.args)]), STOPPED)
        except E5VError as error:
            self._leave(ctx, f"Error: {error}", error.exit_code)
        except OSError as error:
            self._leave(ctx, f"Error: {error.filename or 'system'}: {error.strerror or error}", FAILED)
        except Exception as error:
            line = f"Unexpected error: {type(error).__name__}: {error}"
            self._leave(ctx, line if ctx.meta.get(DEBUG) else f"{line} (run it again with --debug to see where)", FAILED)

    def _leave(self, ctx: click.Context, line: str, code: int) -> NoReturn:
        if ctx.meta.get(DEBUG):
            traceback.print_exc()
        click.echo(printable(line), err=True)
        ctx.exit(code)


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=examples(
        "e5v-search index photos",
        "e5v-search search a dog in the snow",
        "e5v-search search --image dog.jpg --modify 'make it a cat'",
    ),
)
@click.version_option(__version__, prog_name="e5v-search")
@debug_option
def cli() -> None:
    """Find photos by a sentence, by another photo, or by a photo and a change to it."""


for _command in (
    index,
    search,
    serve,
    ask,
    compare,
    explain,
    duplicates,
    map_command,
    status,
    verify,
    rebuild,
    tune,
    forget,
    export,
    import_,
    embed,
    evaluate,
    train,
    models,
    doctor,
):
    cli.add_command(_command)


def _discard_output() -> None:
    """The reader (head, less) has seen enough. Without this the interpreter would complain once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class _Stop:
    """What Ctrl-C and SIGTERM do: end cleanly; for the impatient, at the third time at once (which loses seconds, not data)."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.times += 1
        if self.times == 1:
            raise KeyboardInterrupt
        if self.times == 2:
            os.write(2, b"stopping: what is done is being put away; once more stops at once\n")
        else:
            os._exit(STOPPED)


def main() -> None:
    """Run the command line on sys.argv; ends the process."""
    stop = _Stop()
    heeded = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN]
    for signum in heeded:
        signal.signal(signum, stop)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # rather than fail over a name in a terminal without Unicode
    try:
        cli.main(prog_name="e5v-search")
    finally:
        for signum in heeded:  # all is done: a late signal must not turn the exit code into its own
            signal.signal(signum, signal.SIG_IGN)
