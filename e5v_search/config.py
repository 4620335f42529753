"""TOML recipes become frozen dataclasses; whatever is wrong with one is reported at once, with its place in the file.

A dataclass is the schema: its fields are the keys, their annotations the types, its defaults the defaults. Fields may be
bool, int, float, str, `X | None`, `tuple[X, ...]`, `tuple[X, Y]`, `dict[str, X]`, an enumeration by `Literal`, or a
dataclass of their own. A dataclass that has a method `problems() -> list[str]` is asked for what types cannot say.

Where collections live when nobody says where; and which model is meant, before anything of it is loaded.
"""

import dataclasses
import os
import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from e5v_search.errors import UsageError

T = TypeVar("T")

TILES = ("auto", "full", "base")
QUANTIZE = ("4bit", "8bit", "int8", "fp8")


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """A model, and how it is to run: what `Embedder.load` takes, as one value. Raises UsageError for a bad `quantize`,
    `tiles` or `dim`."""

    name: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None
    tiles: str = "auto"
    adapter: str | None = None
    dim: int | None = None

    def __post_init__(self) -> None:
        if self.dim is not None and self.dim < 1:
            raise UsageError(f"dim must be 1 or more, not {self.dim}")
        if self.quantize is not None and self.quantize not in QUANTIZE:
            raise UsageError(f"quantize must be one of {', '.join(QUANTIZE)}, not {self.quantize!r}")
        if self.tiles not in TILES and not re.fullmatch("[1-9][0-9]{0,3}", self.tiles):
            raise UsageError(f"tiles must be one of {', '.join(TILES)}, or the most tiles of a picture, not {self.tiles!r}")


def load_recipe(kind: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """The recipe at `path` as a `kind`, after `overrides` of the form `table.key=value` (value in TOML's notation).

    Raises UsageError: one line with every problem found, each with the key that it is about.
    """
    return parse(kind, read_table(path, overrides), f"recipe {path}")


def read_table(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe's keys, with those that `overrides` replace, before anything is asked of them."""
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"recipe {path}: {error}") from error
    for override in overrides:
        _override(data, override)
    return data


def parse(kind: type[T], data: Mapping[str, Any], where: str) -> T:
    """`data` as a `kind`; UsageError, beginning with `where`, names all problems."""
    problems: list[str] = []
    value = _dataclass(kind, data, "", problems)
    if problems:
        raise UsageError(f"{where}: {'; '.join(problems)}")
    return value  # type: ignore[no-any-return]


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"override {override!r} is not of the form table.key=value")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string, as shells make quotes a nuisance
    *tables, name = key.strip().split(".")
    for table in tables:
        data = data.setdefault(table, {})
        if not isinstance(data, dict):
            raise UsageError(f"override {override!r}: {table!r} is not a table")
    data[name] = value


def _dataclass(kind: Any, data: Any, place: str, problems: list[str]) -> Any:
    if not isinstance(data, Mapping):
        problems.append(f"{place or 'top level'}: a table is needed, not {data!r}")
        return None
    before = len(problems)
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    problems += [f"{place}{key}: unknown key (known: {', '.join(fields)})" for key in data if key not in fields]
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], f"{place}{name}", problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{place}{name}: missing")
    if len(problems) > before:
        return None
    value = kind(**values)
    check = getattr(value, "problems", None)
    if check is not None:
        problems += [f"{place}{problem}" for problem in check()]
    return value


def _value(hint: Any, value: Any, place: str, problems: list[str]) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, f"{place}.", problems)
    if origin in (Union, types.UnionType):  # only `X | None`: TOML has no null, so a value that is there is an X
        (inner,) = (a for a in args if a is not type(None))
        return _value(inner, value, place, problems)
    if origin is Literal:
        if value not in args:
            problems.append(f"{place}: {value!r} is not one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        return _tuple(args, value, place, problems)
    if origin is dict:
        if not isinstance(value, Mapping):
            problems.append(f"{place}: a table is needed, not {value!r}")
            return {}
        return {k: _value(args[1], v, f"{place}.{k}", problems) for k, v in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:  # not isinstance: a bool is no int here
        problems.append(f"{place}: {_NAMES.get(hint, hint)} is needed, not {value!r}")
    return value


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def _tuple(args: tuple[Any, ...], value: Any, place: str, problems: list[str]) -> Any:
    if not isinstance(value, list):
        problems.append(f"{place}: a list is needed, not {value!r}")
        return ()
    if args[-1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(args) != len(value):
        problems.append(f"{place}: {len(args)} values are needed, not {len(value)}")
        return ()
    return tuple(_value(a, v, f"{place}[{i}]", problems) for i, (a, v) in enumerate(zip(args, value, strict=True)))


def data_home() -> Path:
    """Where named collections live: `$E5V_HOME`, else the platform's data folder."""
    home = os.environ.get("E5V_HOME")
    if home:
        return Path(home).expanduser()
    from platformdirs import user_data_path  # only for those who set nothing

    return user_data_path("e5v-search", appauthor=False)


def collection_path(name: str | os.PathLike[str]) -> Path:
    """A collection's folder: a name (no separator) lies in the data home, anything else is a path."""
    text = os.fspath(name)
    if not text.strip() or text in (".", ".."):
        raise UsageError(f"{text!r} is no name for a collection; give a name, or a path with a separator such as ./photos")
    if os.sep in text or (os.altsep and os.altsep in text):
        return Path(text).expanduser().absolute()
    return data_home() / text
