"""How far the work is, on stderr: a bar on a terminal, elsewhere a plain line now and then."""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

import click

from e5v_search.cli.printing import count, printable

_LINE_SECONDS = 10.0


class Progress:
    """A context manager; `update` may be called as often as one likes."""

    def __init__(self, title: str, noun: str, quiet: bool = False) -> None:
        self._title, self._noun, self._quiet = title, noun, quiet
        self._stack = ExitStack()
        self._bar: Any = None
        self._last = (time.monotonic(), 0)

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty():
            self._bar = self._stack.enter_context(_bar())
            self._task = self._bar.add_task(self._title, total=None, told="")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(printable(text), markup=False, highlight=False)
        elif not self._quiet:
            click.echo(printable(text), err=True)

    @property
    def show(self) -> Callable[[int, int, str], None] | None:
        """Where there is a bar: a function of what is done, of how much, and what the bar is to tell."""
        return None if self._bar is None else self._show

    def _show(self, done: int, total: int, told: str) -> None:
        self._bar.update(self._task, completed=done, total=total, told=told)

    def update(self, done: int, total: int, failed: int = 0) -> None:
        done = min(done, total)  # files that appear while one looks
        if self._bar is not None:
            self._show(done, total, self._told(done, total, self._bar.tasks[self._task].speed or 0.0, failed))
        elif not self._quiet:
            self._line(done, total, failed)

    def _line(self, done: int, total: int, failed: int) -> None:
        now, (before, done_before) = time.monotonic(), self._last
        if now - before >= _LINE_SECONDS:
            self._last = now, done
            click.echo(self._told(done, total, (done - done_before) / (now - before), failed), err=True)

    def _told(self, done: int, total: int, rate: float, failed: int) -> str:
        parts = [f"{done:,} of {count(total, self._noun)}"]
        if rate > 0:
            parts += [f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s", f"{_duration((total - done) / rate)} left"]
        if failed:
            parts.append(f"{failed:,} failed")
        return ", ".join(parts)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24, style="dim", complete_style="cyan", finished_style="cyan", pulse_style="cyan"),
        TextColumn("{task.fields[told]}"),
        console=Console(stderr=True),
        transient=True,
    )
