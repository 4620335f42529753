"""python -m e5v_search.training RECIPE.toml --data DIR --out DIR"""

import argparse
import sys
from functools import partial
from pathlib import Path

from e5v_search.config import load_recipe
from e5v_search.errors import E5VError
from e5v_search.training.loop import load_data, train
from e5v_search.training.recipe import Recipe


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m e5v_search.training", description="Train a model by a recipe; a run that was stopped goes on."
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder with flickr8k/ and nli/")
    parser.add_argument("--out", type=Path, required=True, help="folder for the run: state, log, and model/ in the end")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override the recipe, e.g. optimiser.rate=5e-4"
    )
    arguments = parser.parse_args()
    try:
        recipe = load_recipe(Recipe, arguments.recipe, arguments.set)
        print(train(recipe, load_data(arguments.data), arguments.out, say=partial(print, file=sys.stderr, flush=True)))
    except E5VError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
