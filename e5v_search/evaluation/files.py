"""Reading a data set's files: what is not as it should be is named by file and line."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from e5v_search.errors import DataError
from e5v_search.evaluation.records import PhotoFile


def text_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file without their ends; only line feeds end a line, since sentences hold all else."""
    text = _read(path).removeprefix("\ufeff").removesuffix("\n")
    return [line.removesuffix("\r") for line in text.split("\n")] if text else []


def json_file(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def json_object(path: Path, number: int, line: str) -> dict[str, Any]:
    """One line of a file of JSON lines."""
    try:
        found = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}:{number}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}:{number}: an object is needed, not {line[:80]!r}")
    return found


def first_of(data: Path, places: Sequence[str], what: str) -> Path:
    """The first of `places` below `data` that exists."""
    if not data.is_dir():
        raise DataError(f"{data} is not a folder; give the folder of the data set with --data")
    for place in places:
        if (data / place).exists():
            return data / place
    raise DataError(f"{data} has no {what}: looked for {', '.join(places)}")


def digest(paths: Iterable[Path]) -> str:
    """A name for the contents of files."""
    total = hashlib.sha256()
    for path in paths:
        total.update(_bytes(path))
    return f"sha256:{total.hexdigest()[:16]}"


class PhotoFolders:
    """Where the pictures of a data set lie: in the first of some folders that has one of a picture's names."""

    def __init__(self, data: Path, folders: Sequence[str]) -> None:
        self._folders = [folder for name in folders if (folder := data / name).is_dir()]

    def source(self, name: str, *other_names: str) -> PhotoFile:
        for file in (name, *other_names):
            for folder in self._folders:
                if (folder / file).is_file():
                    return PhotoFile(name, folder / file)
        return PhotoFile(name, None, "no such file")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _read(path: Path) -> str:
    try:
        return _bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start + 1})") from error
