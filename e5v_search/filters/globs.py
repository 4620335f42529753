"""Globs as regular expressions that take linear time: what a star has once skipped is never tried again.

In a path `*`, `?` and `[…]` stay within one name and `**` is any number of folders; in other texts there are no such
bounds. A backslash makes the next sign an ordinary one.
"""

import os
import re

_SEP = re.escape(os.sep)
_IN_NAME = f"[^{_SEP}]"
_END_OF_NAME = rf"(?={_SEP}|\Z)"
_TOKEN = re.compile(r"\\([\\*?\[\]\"'()|~\s])|(\*+)|(\?)|\[([!^]?)(\][^\]]*|[^\]]+)\]|(.)", re.DOTALL)


def plain(value: str) -> str:
    """A value without its backslashes, for what knows no globs."""
    return re.sub(r"\\([\\*?\[\]\"'()|~\s])", r"\1", value)


def quoted(value: str) -> str:
    """How this very value is written in a filter, whatever signs it has."""
    return '"' + re.sub(r'([\\*?\[\]"])', r"\\\1", value) + '"'


def text_glob(value: str) -> str:
    return _pieces(value, ".") + r"\Z"


def inside(value: str) -> str:
    """The glob of all that lies in a folder, or anywhere below it."""
    return value.rstrip("/") + "/**"


def path_glob(value: str) -> str:
    return _path(value) + r"\Z"


def contains(value: str) -> str:
    return f".*?{re.escape(value)}"


def literal(value: str) -> str:
    """The longest run of ordinary signs in a glob, but for what it begins with."""
    return max(_runs(value)[1:], key=len, default="")


def start(value: str) -> str:
    """The ordinary signs that a glob begins with."""
    return _runs(value)[0]


def _runs(value: str) -> list[str]:
    runs = [""]
    for escaped, _, _, _, _, other in _TOKEN.findall(value):
        if escaped or other:
            runs[-1] += escaped or other
        else:
            runs.append("")
    return runs


def _path(value: str) -> str:
    groups: list[list[str]] = [[]]
    for name in value.split("/"):
        if name == "**":
            groups.append([])
        else:
            groups[-1].append(_pieces(name, _IN_NAME) + _END_OF_NAME)
    first, *rest = [_SEP.join(group) for group in groups]
    if not rest:
        return first
    folders = f"(?:{_SEP}{_IN_NAME}*)"
    # the first place where the names between two ** fit is as good as any later one, but for the last
    middle = "".join(f"(?>{folders}*?{_SEP}{group})" for group in rest[:-1] if group)
    last = f"{folders}*?{_SEP}{rest[-1]}" if rest[-1] else f"{folders}+?"
    return (first or f"{_IN_NAME}*") + middle + last


def anchored(value: str) -> str:
    """An absolute glob: `~` and `.` become folders, links before the first glob sign are followed, a bare name may lie
    anywhere."""
    if value == "~" or value.startswith("~/"):
        value = _escaped(os.path.expanduser("~")) + value[1:]
    elif value.split("/")[0] in (".", ".."):
        value = f"{_escaped(os.getcwd())}/{value}"
    elif not os.path.isabs(value):
        return f"**/{value}"
    names = value.split("/")
    fixed = next((i for i, name in enumerate(names) if len(_runs(name)) > 1), len(names))
    start = os.path.realpath(plain("/".join(names[:fixed])) or "/")
    return "/".join([_escaped(start).rstrip("/"), *names[fixed:]])


def _escaped(path: str) -> str:
    """The glob of this one path."""
    return re.sub(r"([\\*?\[\]])", r"\\\1", path.replace(os.sep, "/"))


def _pieces(value: str, any_sign: str) -> str:
    """Without an anchor behind: what follows the last star may lie anywhere after it."""
    runs = [""]
    for escaped, stars, question, negated, signs, other in _TOKEN.findall(value):
        if stars:
            runs.append("")
        elif question:
            runs[-1] += any_sign
        elif signs:
            runs[-1] += _set(signs, bool(negated), any_sign)
        else:
            runs[-1] += re.escape(escaped or other)
    first, *rest = runs
    if not rest:
        return first
    return first + "".join(f"(?>{any_sign}*?{run})" for run in rest[:-1] if run) + f"{any_sign}*{rest[-1]}"


def _set(signs: str, negated: bool, any_sign: str) -> str:
    ranges = "".join(f"{re.escape(a)}-{re.escape(b)}" for a, b in re.findall(r"(.)-(.)", signs, re.DOTALL) if a <= b)
    singles = re.escape(re.sub(r"(.)-(.)", "", signs, flags=re.DOTALL))
    inside = f"[{'^' if negated else ''}{singles}{ranges}]" if singles or ranges else ("." if negated else "(?!)")
    return inside if any_sign == "." else f"(?!{_SEP}){inside}"
