"""Which paths under some roots may have changed: the system's notices, and the roots themselves that come and go."""

import io
import os
import select
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, suppress
from typing import Any

from e5v_search.media.scan import hidden_below, roots_above

TICK = 0.2  # seconds that a call of `wait` takes when nothing happens
_ROOTS_EVERY = 1.0  # seconds
_PROBE_AFTER = 1.0  # seconds in which the library has come to watch a new folder
_REOPEN_AFTER = 10.0  # seconds without notices after a name that they cannot tell
_TABLE = "/proc/self/mountinfo"

Signature = tuple[int, ...] | None


class Changes:
    """Notices of what happens under `roots` (absolute paths without links), from the moment of creation.

    A root may be missing, and vanish and come back at any time. `unwatched` are the roots for which there are no notices
    at present, which `note` is told of in a line: these have to be looked through now and then. A notice may be lost, and
    one may come for nothing.
    """

    def __init__(self, roots: Sequence[str], note: Callable[[str], None]) -> None:
        self.roots = list(roots)
        self.unwatched: set[str] = set()
        self._root_set = set(roots)
        self._note = note
        self._noted: set[str] = set()
        self._stream: Generator[set[Any], None, None] | None = None
        self._reopen_at = self._probe_at = float("inf")
        self._signatures = {root: signature(root) for root in self.roots}
        self._mounts = _Mounts(self.roots)
        self._look_at_roots_at = 0.0
        self._open()

    def close(self) -> None:
        self._end()
        self._mounts.close()

    def wait(self) -> set[str]:
        """Paths that may have changed since the last call, after at most about TICK seconds.

        A root among them stands for everything under it. Raises KeyboardInterrupt when one is pending.
        """
        if (now := time.monotonic()) >= self._look_at_roots_at:
            self._look_at_roots_at = now + _ROOTS_EVERY
            if changed := self._changed_roots():
                return changed
        if now >= self._reopen_at:
            self._open()
            return set(self.roots)
        if self._stream is None:
            time.sleep(TICK)
            return set()
        try:
            if now >= self._probe_at:
                self._probe_at = float("inf")
                self._probe()
            paths = {path for _, path in next(self._stream)}
            folders = [path for path in paths if os.path.isdir(path)]
            if any(os.path.islink(path) for path in folders):
                self._open()  # links to folders are followed only by a watch that begins
            elif folders:
                self._probe_at = min(self._probe_at, now + _PROBE_AFTER)  # a new folder is watched as well, or silently not
        except (RuntimeError, OSError) as error:
            self._stumble(error)
            return set(self.roots)
        return {path for path in paths if any(not hidden_below(root, path) for root in roots_above(path, self._root_set))}

    def _open(self) -> None:
        """Begin anew: notices end silently with the folder that they were asked for."""
        self._end()
        self._reopen_at = float("inf")
        outermost = [root for root in self.roots if not roots_above(os.path.dirname(root), self._root_set)]
        self._told = [root for root in outermost if os.path.isdir(root) and _is_text(root)]
        self.unwatched = {root for root in outermost if not _is_text(root)}
        if not self._told:
            return
        self._stream = _notices(*self._told)
        try:
            next(self._stream)  # nothing is watched before this
            self._probe()
        except (RuntimeError, OSError) as error:
            self._stumble(error)

    def _end(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _probe(self) -> None:
        """Raise where the system watches no more folders; of a folder below another the library does not tell that."""
        with closing(_notices(self._told[0], recursive=False)) as one_more:
            next(one_more)

    def _stumble(self, error: Exception) -> None:
        self._end()
        self.unwatched = {root for root in self.roots if os.path.isdir(root)}
        reason = str(error)
        if "limit" in reason or "os error 24" in reason:
            name = "max_user_watches" if "limit" in reason else "max_user_instances"
            self._note_once(
                f"the system watches no more folders (fs.inotify.{name} is reached): the folders are looked through now and "
                f"then instead, which takes longer; raise the limit with: sudo sysctl fs.inotify.{name}=1048576"
            )
            return
        self._reopen_at = time.monotonic() + _REOPEN_AFTER
        if "decode path" not in reason and not isinstance(error, FileNotFoundError):
            self._note_once(f"the system's notices of changes failed ({reason}): the folders are looked through instead")

    def _note_once(self, line: str) -> None:
        if line not in self._noted:
            self._noted.add(line)
            self._note(line)

    def _changed_roots(self) -> set[str]:
        signatures = {root: signature(root) for root in self.roots}
        changed = {root for root in self.roots if signatures[root] != self._signatures[root]}
        if self._mounts.changed() or any(os.path.isdir(root) or _was_folder(self._signatures[root]) for root in changed):
            self._open()
            changed = set(self.roots)
        self._signatures = signatures
        return changed


def _notices(*folders: str, recursive: bool = True) -> Generator[set[Any], None, None]:
    """Sets of (kind of change, path), an empty one after TICK seconds without any."""
    from watchfiles import watch

    milliseconds = int(TICK * 1000)
    return watch(
        *folders,
        watch_filter=None,
        debounce=milliseconds,
        rust_timeout=milliseconds,
        yield_on_timeout=True,
        poll_delay_ms=2000,
        recursive=recursive,
        # of a folder that may not be read the scan tells
        ignore_permission_denied=recursive,
    )


def signature(path: str) -> Signature:
    """What changes when another folder takes this one's place, or when a file is written; None where nothing can be seen."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    identity = (status.st_dev, status.st_ino)
    return identity if os.path.isdir(path) else (*identity, status.st_size, status.st_mtime_ns)


def _was_folder(before: Signature) -> bool:
    return before is not None and len(before) == 2


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8, which the library cannot be given
        return False
    return True


class _Mounts:
    """What is mounted at or below the roots, of which there are no notices; Linux only."""

    def __init__(self, roots: Iterable[str]) -> None:
        self._roots = set(roots)
        self._table: io.FileIO | None = None
        with suppress(OSError):
            self._table = io.FileIO(_TABLE)
            self._events = select.poll()
            self._events.register(self._table, select.POLLPRI)
            self._points = self._read(self._table)

    def close(self) -> None:
        if self._table is not None:
            self._table.close()
            self._table = None

    def changed(self) -> bool:
        """Whether anything came or went there since the last call, or may have: a disk that was away for a moment can have
        all that the table tells of it as before.
        """
        if self._table is None or not self._events.poll(0):
            return False
        before, self._points = self._points, self._read(self._table)
        return bool(before or self._points)

    def _read(self, table: io.FileIO) -> list[str]:
        table.seek(0)
        fields = [line.split() for line in table.read().splitlines()]
        # \040 and the like stand for white space and the backslash
        points = (os.fsdecode(f[4].decode("unicode_escape").encode("latin-1")) for f in fields if len(f) > 4)
        return [point for point in points if roots_above(point, self._roots)]
