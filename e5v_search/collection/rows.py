"""Items as rows of a file, one a vector: Parquet or JSON lines, written and read in blocks."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import date, datetime
from pathlib import Path
from typing import IO, Any

from e5v_search.catalog import KINDS, Put
from e5v_search.errors import CollectionError, MissingPackage

PARQUET, JSONL = "items.parquet", "items.jsonl"
METADATA = b"e5v_search"  # key of the export's description among Parquet's own metadata
COLUMNS: dict[str, type] = {
    "id": int,
    "kind": str,
    "path": str,
    "part": str,
    "text": str,
    "content_hash": str,
    "width": int,
    "height": int,
    "taken_at": str,
    "lat": float,
    "lon": float,
    "camera": str,
    "format": str,
    "size": int,
    "mtime_ns": int,
    "on_mount": bool,
}
_OF_FILE = ("part", "size", "mtime_ns", "on_mount")
# JSON of the texts in a row that hold bytes which are no UTF-8, as file names may: Parquet has no place for these
_EXACT = "exact"
_BLOCK = 4096

Write = Callable[[Iterable[dict[str, Any]]], object]


def row(put: Put) -> dict[str, Any]:
    """What COLUMNS and `facts` say of an item. What is said of a file is None without one."""
    values = {name: getattr(put, name) for name in COLUMNS if name != "id"}
    if put.path is None:
        values |= dict.fromkeys(_OF_FILE)
    return {"id": put.item_id} | values | {"facts": put.facts}


@contextmanager
def json_lines(file: IO[bytes], description: Mapping[str, Any]) -> Iterator[Write]:
    # in ASCII, where bytes that are no UTF-8 survive as escapes
    yield lambda rows: file.write("".join(json.dumps(row) + "\n" for row in rows).encode("ascii"))


@contextmanager
def parquet(file: IO[bytes], description: Mapping[str, Any]) -> Iterator[Write]:
    """`description` goes into the file too, see `read_metadata`."""
    pa, pq = _pyarrow()
    types = {int: pa.int64(), float: pa.float64(), bool: pa.bool_(), str: pa.string()}
    fields = [pa.field(name, types[type_], nullable=name not in ("id", "kind")) for name, type_ in COLUMNS.items()]
    fields += [pa.field("facts", pa.string(), nullable=False), pa.field(_EXACT, pa.string())]
    schema = pa.schema(fields, metadata={METADATA: json.dumps(description).encode()})
    writer = pq.ParquetWriter(file, schema, compression="zstd")
    try:
        yield lambda rows: writer.write_table(pa.Table.from_pylist([_in_utf8(row) for row in rows], schema=schema))
    except BaseException:
        with suppress(Exception):  # it would try later, when nobody can catch what a full disk answers
            writer.close()
        raise
    writer.close()


def _in_utf8(row: dict[str, Any]) -> dict[str, Any]:
    exact = {name: value for name, value in row.items() if isinstance(value, str) and not _is_utf8(value)}
    shown = {name: value.encode("utf-8", "backslashreplace").decode() for name, value in exact.items()}
    return row | shown | {"facts": json.dumps(row["facts"]), _EXACT: json.dumps(exact) if exact else None}


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingPackage("Parquet needs one more package: pip install pyarrow; or use JSON lines (items.jsonl)") from error
    return pyarrow, parquet


# reading


def read_metadata(path: Path) -> dict[str, Any] | None:
    """The description that `Parquet` wrote; None where another program did. Raises CollectionError."""
    with _opened(path) as file:
        value = (file.schema_arrow.metadata or {}).get(METADATA)
    if value is None:
        return None
    return _json(value, f"{path}, metadata")


def count_rows(path: Path) -> int:
    """Number of rows of an items file, without reading what is in them where the format allows that."""
    if path.name == PARQUET:
        with _opened(path) as file:
            return int(file.metadata.num_rows)
    with open(path, "rb") as lines:
        return sum(1 for line in lines if line.strip())


def read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of an items file; the place names file and row for the user. Raises CollectionError.

    Values are as the file has them, but for what one of ours says of texts that are no UTF-8.
    """
    return _read_parquet(path) if path.name == PARQUET else _read_json_lines(path)


def _opened(path: Path) -> Any:
    pyarrow, parquet = _pyarrow()
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise CollectionError(f"{path} cannot be read as Parquet: {_line(error)}") from error


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    pyarrow, _ = _pyarrow()
    number = 0
    with _opened(path) as file:
        batches = file.iter_batches(batch_size=_BLOCK)
        while True:
            try:
                rows = next(batches).to_pylist()
            except StopIteration:
                return
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                raise CollectionError(f"{path}, behind row {number}: it cannot be read: {_line(error)}") from error
            for row in rows:
                place = f"{path}, row {number}"
                exact = row.pop(_EXACT, None)
                yield place, row | (_json(exact, place) if exact else {})
                number += 1


def _read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    place = f"{path}, line {number}"
                    yield place, _json(line.decode("utf-8-sig" if number == 1 else "utf-8", "replace"), place)
    except OSError as error:
        raise CollectionError(f"{path} cannot be read: {error.strerror or error}") from error


def _json(text: str | bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CollectionError(f"{place}: no JSON: {error}") from error
    if not isinstance(value, dict):
        raise CollectionError(f'{place}: a JSON object is needed, such as {{"id": 1, "text": "…"}}')
    return value


def to_put(row: dict[str, Any], place: str, number: int, folder: Path) -> Put:
    """Row `number` (from 0) of an items file as an item without vectors; what other programs leave out is filled in.

    Columns that are not ours become facts. Relative paths are taken from `folder`. Raises CollectionError.
    """
    values = {name: _value(row.pop(name, None), type_, f"{place}: {name}") for name, type_ in COLUMNS.items()}
    facts = row.pop("facts", None)
    if isinstance(facts, str):
        facts = _json(facts, f"{place}: facts")
    if not isinstance(facts, dict | None):
        raise CollectionError(f"{place}: facts: a JSON object is needed, not {facts!r}")
    item_id = values.pop("id")
    if item_id is None:
        item_id = number
    if item_id < 0:
        raise CollectionError(f"{place}: id: {item_id} is below 0")
    if values["path"] is not None:
        values["path"] = os.path.join(folder, values["path"])
    if values["kind"] is None:
        values["kind"] = "image" if values["path"] is not None and values["text"] is None else "text"
    if values["kind"] not in KINDS:
        raise CollectionError(f"{place}: kind: {values['kind']!r} is none of {', '.join(KINDS)}")
    if values["kind"] == "image" and values["path"] is None:
        raise CollectionError(f"{place}: path: a photo needs one")
    content_hash = f"unknown-{item_id}"
    if values["kind"] != "image":
        if values["text"] is None:
            values["text"] = f"row {number}"
        else:
            content_hash = hashlib.sha256(values["text"].encode("utf-8", "surrogatepass")).hexdigest()
    # -1 is the size and time of no file: the next `index` compares contents
    missing = {"content_hash": content_hash, "part": "", "size": -1, "mtime_ns": -1, "on_mount": False}
    values |= {name: value for name, value in missing.items() if values[name] is None}
    others = {name: _fact(value, f"{place}: {name}") for name, value in row.items() if value is not None}
    return Put(item_id=item_id, facts=others | (facts or {}), **values)


def _value(value: Any, type_: type, place: str) -> Any:
    if value is None or value != value:  # pandas writes what is missing among numbers as NaN
        return None
    if isinstance(value, type_) and (not isinstance(value, int) or type_ is bool or _is_int64(value)):
        return value
    if type_ is float and type(value) is int:
        return float(value)
    if type_ is int and type(value) is float and value.is_integer():  # so does it with whole numbers beside missing ones
        return int(value)
    if type_ is str and isinstance(value, date | datetime):
        return value.isoformat()
    raise CollectionError(f"{place}: {_NAMES[type_]} is needed, not {value!r:.80}")


def _is_int64(value: int) -> bool:
    return not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _fact(value: Any, place: str) -> Any:
    if isinstance(value, date | datetime):
        return value.isoformat()
    try:
        json.dumps(value)
    except TypeError as error:
        raise CollectionError(f"{place}: {value!r:.80} can be no fact; leave the column out") from error
    return value
