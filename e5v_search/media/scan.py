"""Finding photos (or other files) under folders, each once, and saying why one that was not found may still be there."""

import errno
import os
import stat
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

# lower case
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".hif", ".avif"}
)

_LEADS_NOWHERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
_Id = tuple[int, int]  # (st_dev, st_ino)


@dataclass(frozen=True, slots=True)
class Found:
    """A file to look into. `path` is absolute; bytes that are no UTF-8 are surrogates in it (os.fsdecode)."""

    path: str
    size: int
    mtime_ns: int
    on_mount: bool  # lies on another file system than its root does


@dataclass(frozen=True, slots=True)
class Problem:
    path: str
    reason: str


class Scan:
    """The photos under `roots` (files and folders), in an order that depends on names alone.

    - In folders a photo is what has one of `suffixes` (in lower case, with the dot); a file that is itself a root is taken
      whatever its name is.
    - Names with a leading dot are passed over, unless they are roots.
    - A folder is entered once, however many links or roots lead to it, and by its own name rather than by a link's.
    - A link to a file is taken when the scan does not come across the file itself; of several such links, the first.

    With `below` only what is, or lies below, one of these paths (absolute, under the roots, there or not) is looked at, and
    judged as a scan of the whole would judge it. Where links come in, that takes a scan of the whole.

    Iterating fills `problems` (what could not be looked at) and `warnings`; `missing` are roots that are not there, and
    `tops` the paths whose content the scan has seen: what was known below them and was not found may be gone.
    """

    def __init__(
        self,
        roots: Sequence[str | os.PathLike[str]],
        below: Sequence[str] | None = None,
        suffixes: Set[str] = SUFFIXES,
    ) -> None:
        self._suffixes = suffixes
        self.roots = list(dict.fromkeys(os.path.realpath(os.fsdecode(root)) for root in roots))
        self._root_set = set(self.roots)
        self._below = below
        self.tops = self.roots
        self.missing = [root for root in self.roots if not _exists(root)]
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self._reset()

    def _reset(self) -> None:
        self.problems.clear()
        self.warnings.clear()
        self._entered: set[_Id] = set()
        self._unreadable: set[str] = set()
        self._empty: set[str] = set()  # roots and linked folders without any entry
        self._explicit: set[str] = set()  # roots that are files
        self._linked: list[tuple[str, int]] = []  # links met on the way, with the device of their root
        self._link_targets: set[str] = set()  # files that are taken by the name of a link
        self._states: dict[str, tuple[str | None, int]] = {}

    def __iter__(self) -> Iterator[Found]:
        self._reset()
        self.missing = []
        self.tops = self.roots if self._below is None else list(self._below)
        tops = set(self.tops)
        started: dict[str, _Id] = {}
        folders: dict[str, int] = {}  # roots, with their devices
        for root in self.roots:
            try:
                status = os.stat(root)
            except (FileNotFoundError, NotADirectoryError):
                self._lose(root)
                continue
            except OSError as error:
                self._cannot_enter(root, error)
                continue
            started[root] = (status.st_dev, status.st_ino)
            if stat.S_ISDIR(status.st_mode):
                folders[root] = status.st_dev
            elif found := self._file(root, status, on_mount=False):
                self._explicit.add(root)
                if roots_above(root, tops):
                    yield found
        if self._below is not None:
            yield from self._look_at_tops(folders, tops)
        if self.tops is self.roots:
            for root, device in folders.items():
                yield from self._walk(root, device)
            yield from self._follow_links()
        for root, identity in started.items():
            # a disk that goes away during the scan looks like a folder with fewer files
            if _identity(root) != identity:
                self._lose(root)

    def _look_at_tops(self, folders: Mapping[str, int], tops: Set[str]) -> Iterator[Found]:
        """What `below` asks for. Where a link is met, `tops` become the roots, which are to be walked for what is left."""
        files: list[Found] = []
        for top in sorted(tops):
            root = next((root for root in self._roots_of(top) if root in folders), None)
            if root is None or hidden_below(root, top) or roots_above(os.path.dirname(top), tops):
                continue
            if os.path.realpath(top) != top:
                self.tops = self.roots
                return
            try:
                if top != root and not os.listdir(root):
                    self._empty.add(root)
                status = os.stat(top)
                if stat.S_ISDIR(status.st_mode):
                    yield from self._walk(top, folders[root])
                elif self._is_wanted(top) and top not in self._explicit:
                    on_mount = os.stat(os.path.dirname(top)).st_dev != folders[root]
                    files += filter(None, [self._file(top, status, on_mount)])
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                self._cannot_enter(top, error)
        if self._linked:
            self.tops = self.roots
            return
        yield from files

    def _lose(self, root: str) -> None:
        self.missing.append(root)
        self._warn(f"{shown(root)} is not there (an unmounted disk?): nothing under it is forgotten")

    def _walk(self, top: str, root_device: int) -> Iterator[Found]:
        pending = [top]
        while pending:
            path = pending.pop()
            try:
                status = os.stat(path)
                identity = (status.st_dev, status.st_ino)
                if identity in self._entered:
                    continue
                with os.scandir(path) as listing:
                    entries = sorted(listing, key=lambda entry: entry.name)
            except FileNotFoundError:
                continue  # deleted while we look
            except OSError as error:
                self._cannot_enter(path, error)
                continue
            self._entered.add(identity)
            if not entries and path == top and (path in self._root_set or os.path.islink(path)):
                self._empty.add(path)
            folders: list[str] = []
            # the device of the folder, not of its files: an overlay file system gives files other devices
            on_mount = status.st_dev != root_device
            own_name = os.path.realpath(path) if self._explicit else path
            for entry in entries:
                if entry.name.startswith(".") or os.path.join(own_name, entry.name) in self._explicit:
                    continue
                try:
                    found = self._entry(entry, on_mount, root_device, folders)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    self.problems.append(Problem(entry.path, _words(error)))
                    continue
                if found:
                    yield found
            pending += reversed(folders)

    def _entry(self, entry: os.DirEntry[str], on_mount: bool, root_device: int, folders: list[str]) -> Found | None:
        if entry.is_symlink():
            self._linked.append((entry.path, root_device))
        elif entry.is_dir(follow_symlinks=False):
            folders.append(entry.path)
        elif self._is_wanted(entry.name):
            return self._file(entry.path, entry.stat(follow_symlinks=False), on_mount)
        return None

    def _is_wanted(self, name: str) -> bool:
        return os.path.splitext(name)[1].lower() in self._suffixes

    def _file(self, path: str, status: os.stat_result, on_mount: bool) -> Found | None:
        if stat.S_ISREG(status.st_mode):
            return Found(path, status.st_size, status.st_mtime_ns, on_mount)
        self.problems.append(Problem(path, f"{_kind(status.st_mode)}, not a file"))
        return None

    def _follow_links(self) -> Iterator[Found]:
        """Links, after all that goes by its own name; linked folders before linked files."""
        to_files: list[tuple[str, int]] = []
        while self._linked:
            links, self._linked = self._linked, []
            # in the same order whether met on a walk of the whole or of some parts before it
            for path, root_device in sorted(links, key=lambda link: (link[0].count(os.sep), link[0])):
                try:
                    is_folder = stat.S_ISDIR(os.stat(path).st_mode)
                except OSError as error:
                    if error.errno not in _LEADS_NOWHERE:
                        self._cannot_enter(path, error)
                    elif self._is_wanted(path):
                        self.problems.append(Problem(path, "a link to a file that is not there"))
                    continue
                if is_folder:
                    yield from self._walk(path, root_device)
                elif self._is_wanted(path):
                    to_files.append((path, root_device))
        for path, root_device in to_files:
            target = os.path.realpath(path)
            if self._comes_across(target):
                continue
            self._link_targets.add(target)
            try:
                device = os.stat(os.path.dirname(target)).st_dev
                found = self._file(path, os.stat(path), on_mount=device != root_device)
            except OSError as error:
                self.problems.append(Problem(path, _words(error)))
                continue
            if found:
                yield found

    def _comes_across(self, target: str) -> bool:
        """Whether the scan takes the file `target` (a path without links) by another name than that of the link in hand."""
        if target in self._explicit or target in self._link_targets:
            return True
        folder, name = os.path.split(target)
        return not name.startswith(".") and self._is_wanted(name) and _identity(folder) in self._entered

    def _cannot_enter(self, path: str, error: OSError) -> None:
        self._unreadable.add(path)
        self.problems.append(Problem(path, _words(error)))

    # what was known and is not seen any more

    def covers(self, path: str) -> bool:
        """Whether `path` is one of the roots or lies under one."""
        return bool(self._roots_of(path))

    def keep_reason(self, path: str, on_mount: bool) -> str | None:
        """Why a file that an earlier scan found and this one did not must not be forgotten; None: it is really gone.

        `on_mount` is what the earlier Found said. To be asked after the iteration; may add to `warnings`.
        """
        roots = self._roots_of(path)
        if not roots:
            return "it lies under none of the folders that were looked at"
        for root in roots:
            if root in self.missing:
                return f"{shown(root)} is not there"
        try:
            if stat.S_ISREG(os.stat(path).st_mode):
                target = os.path.realpath(path)
                # a file that once was a root stays, though no folder's rules take it; a second name of a photo does not
                return None if target != path and self._comes_across(target) else "it is still there"
        except (FileNotFoundError, NotADirectoryError):
            if os.path.islink(path):
                return "it is a link to a file that is not there"
        except OSError as error:
            return _words(error)
        reason, device = self._state(os.path.dirname(path))
        if reason is None and on_mount and any(_device(root) == device for root in roots):
            reason = "the disk it was on is not mounted"
            self._warn(f"a disk under {shown(roots[-1])} is not mounted: its files are not forgotten")
        return reason

    def _roots_of(self, path: str) -> list[str]:
        """The roots that are `path` or above it, innermost first."""
        return roots_above(path, self._root_set)

    def _state(self, folder: str) -> tuple[str | None, int]:
        """Why the content of `folder` cannot be known now (None: it can), and the device of its nearest existing ancestor."""
        chain = []
        while folder not in self._states:
            chain.append(folder)
            if folder in self._root_set or os.path.dirname(folder) == folder:
                break
            folder = os.path.dirname(folder)
        reason, device = self._states.get(folder, (None, 0))
        for each in reversed(chain):
            if reason is None:
                reason, device = self._look_at(each, device)
            self._states[each] = reason, device
        return reason, device

    def _look_at(self, folder: str, device_above: int) -> tuple[str | None, int]:
        reason = None
        device = device_above
        if folder in self._unreadable:
            return f"{shown(folder)} cannot be read", device
        try:
            device = os.stat(folder).st_dev
            if folder in self._empty:
                reason = f"{shown(folder)} is empty (an unmounted disk?)"
        except (FileNotFoundError, NotADirectoryError):
            if os.path.islink(folder):
                reason = f"{shown(folder)} is a link to a folder that is not there"
        except OSError as error:
            return f"{shown(folder)}: {_words(error)}", device
        if reason is not None:
            self._warn(f"{reason}: nothing under it is forgotten")
        return reason, device

    def _warn(self, line: str) -> None:
        if line not in self.warnings:
            self.warnings.append(line)


def shown(path: str | os.PathLike[str]) -> str:
    """`path` as one line of printable text, whatever bytes its name is made of."""
    return "".join(c if c.isprintable() else _escaped(c) for c in os.fsdecode(path))


def _escaped(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # a byte that is no UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")


def roots_above(path: str, roots: Set[str]) -> list[str]:
    """Those of `roots` that are `path` or above it, innermost first."""
    found = []
    while True:
        if path in roots:
            found.append(path)
        above = os.path.dirname(path)
        if above == path:
            return found
        path = above


def hidden_below(root: str, path: str) -> bool:
    """Whether a name on the way from `root` down to `path` begins with a dot."""
    return f"{os.sep}." in path[len(root.rstrip(os.sep)) :]


def _exists(path: str) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass  # there, as far as one can tell: the iteration will say what is wrong with it
    return True


def _identity(path: str) -> _Id | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _device(path: str) -> int | None:
    identity = _identity(path)
    return identity and identity[0]


def _words(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a pipe"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a device"
