"""Views: the prompt sets under which a collection keeps a vector of each item, and what embeds for all of them at once.

A view is one of our sets, or what the user asks of every item, `INSTRUCTED` and a text.
"""

import hashlib
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from e5v_search.catalog import VIEW
from e5v_search.embedder import Embedder
from e5v_search.errors import UsageError
from e5v_search.prompts import INSTRUCTED, PROMPT_SETS, load_prompts

Vectors = dict[str, np.ndarray]  # view -> (dim,)


def check_views(views: Iterable[str]) -> list[str]:
    """The views, VIEW first. UsageError for one that is no named prompt set with a text and an image prompt."""
    chosen = list(dict.fromkeys([VIEW, *views]))
    for view in chosen:
        if not is_view(view):
            raise UsageError(f"there is no view {view!r}; choose from: {', '.join(_KNOWN)}")
        load_prompts(view)
    return chosen


_KNOWN = [name for name, prompts in PROMPT_SETS.items() if prompts.text and prompts.image]


def is_view(name: str) -> bool:
    return name in _KNOWN or is_instructed(name)


def is_instructed(name: str) -> bool:
    return name.startswith(INSTRUCTED)


def check_taken(embedder: Embedder, kinds: Collection[str], views: Iterable[str]) -> None:
    """UsageError for a view that the model cannot give items of these kinds, as what it is asked in it."""
    for view in views:
        for kind in kinds:
            embed(embedder, kind, [], [view])


def file_name(stem: str, view: str, suffix: str) -> str:
    """What a view's file of a kind is called: the stem alone for VIEW, which is always there."""
    if view == VIEW:
        return f"{stem}{suffix}"
    if is_instructed(view):  # any text
        view = f"instruction-{hashlib.sha256(view.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"
    return f"{stem}-{view}{suffix}"


def same_prompt(views: Sequence[str], kind: str) -> dict[str, str]:
    """Each view with the first one whose prompt for this kind of item is the same: the same prompt, the same vector."""
    first: dict[str, str] = {}
    return {view: first.setdefault(load_prompts(view).get(input_of(kind)), view) for view in views}


def input_of(kind: str) -> str:
    """Which prompt an item takes: a rendered text is a picture."""
    return "text" if kind == "text" else "image"


def embed(embedder: Embedder, kind: str, inputs: Sequence[Any], views: Sequence[str]) -> list[Vectors]:
    """The vectors of texts (kind "text"), or of prepared pictures, in every view; a prompt is read once."""
    alike = same_prompt(views, kind)
    distinct = list(dict.fromkeys(alike.values()))
    if kind == "text":
        x = np.stack([embedder.embed_texts(inputs, view) for view in distinct])
    elif len(distinct) == 1:
        x = embedder.embed_prepared(inputs, distinct[0])[None]
    else:
        x = embedder.embed_views(inputs, distinct)
    return [{view: x[distinct.index(alike[view]), n] for view in views} for n in range(len(inputs))]
