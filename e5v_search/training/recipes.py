"""Recipes of both kinds: for a model made from nothing, and for one that is there and learns more."""

from collections.abc import Sequence
from pathlib import Path

from e5v_search.config import parse, read_table
from e5v_search.training.recipe import Recipe
from e5v_search.training.tuning import Tuning


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe | Tuning:
    """A recipe with `stages` makes a model, any other tunes one. Raises UsageError as `load_recipe` does."""
    table = read_table(path, overrides)
    where = f"recipe {path}"
    return parse(Recipe, table, where) if "stages" in table else parse(Tuning, table, where)
