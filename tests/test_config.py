from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from e5v_search.config import load_recipe, parse
from e5v_search.errors import UsageError


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)
    window: tuple[float, float] = (0.0, 1.0)

    def problems(self) -> list[str]:
        return ["sizes: must not be empty"] if not self.sizes else []


@dataclass(frozen=True)
class Outer:
    name: str
    rate: float = 1.0
    on: bool = False
    kind: Literal["a", "b"] = "a"
    limit: int | None = None
    weights: dict[str, float] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)
    many: tuple[Inner, ...] = ()


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_whole_recipe(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'name = "x"\nrate = 2\non = true\nkind = "b"\nlimit = 7\nweights = { a = 1 }\n'
        "[inner]\nsizes = [3]\n[[many]]\nwindow = [1, 2]\n",
    )
    expected = Outer("x", 2.0, True, "b", 7, {"a": 1.0}, Inner((3,)), (Inner(window=(1.0, 2.0)),))
    assert load_recipe(Outer, path) == expected
    assert type(load_recipe(Outer, path).rate) is float


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'rate = "fast"\non = 1\nkind = "c"\nlimit = 1.5\nextra = 0\nweights = { a = "x" }\n'
        "[inner]\nsizes = []\n[[many]]\nwindow = [1]\n[[many]]\nsizes = [true]\n",
    )
    with pytest.raises(UsageError) as raised:
        load_recipe(Outer, path)
    text = str(raised.value)
    assert "\n" not in text
    for problem in (
        "extra: unknown key (known: name, rate,",
        "name: missing",
        "rate: a number is needed, not 'fast'",
        "on: true or false is needed, not 1",
        "kind: 'c' is not one of 'a', 'b'",
        "limit: a whole number is needed, not 1.5",
        "weights.a: a number is needed",
        "inner.sizes: must not be empty",
        "many[0].window: 2 values are needed, not 1",
        "many[1].sizes[0]: a whole number is needed, not True",
    ):
        assert problem in text


def test_overrides_come_last_and_are_checked_too(tmp_path: Path) -> None:
    path = write(tmp_path, 'name = "x"\n')
    recipe = load_recipe(Outer, path, ["name=bare words", "inner.sizes=[5, 6]", "on = true", "rate=3e-4"])
    assert recipe == Outer("bare words", 3e-4, True, inner=Inner((5, 6)))
    with pytest.raises(UsageError, match=r"table\.key=value"):
        load_recipe(Outer, path, ["nonsense"])
    with pytest.raises(UsageError, match="'name' is not a table"):
        load_recipe(Outer, path, ["name.x=1"])
    with pytest.raises(UsageError, match="rate: a number is needed"):
        load_recipe(Outer, path, ["rate=fast"])


@pytest.mark.parametrize("text", ["name = ", b"\xff\xfe"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UsageError, match=r"recipe\.toml: "):
        load_recipe(Outer, path)


def test_tables_must_be_tables() -> None:
    with pytest.raises(UsageError, match=r"inner\.: a table is needed|inner: a table is needed"):
        parse(Outer, {"name": "x", "inner": 3}, "here")
