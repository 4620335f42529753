"""A query as a value: a text, a picture, a picture and a change to it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e5v_search.embedder import Picture
from e5v_search.errors import QueryError


@dataclass(frozen=True)
class Query:
    """What is asked. `image` is a picture (path, bytes or PIL image) or the id of an item of the collection.

    - text alone, or image alone;
    - image and modify: a composed query, embedded as one by the `cirr` prompt (or `prompts`);
    - image and text: both at once, their embeddings added.
    """

    text: str | None = None
    image: Picture | int | None = None
    modify: str | None = None
    prompts: str | None = None

    def __post_init__(self) -> None:
        for name in ("text", "modify"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise QueryError(f"the {name if name == 'modify' else 'query'} text is empty; say what to look for")
        if self.modify is not None and self.image is None:
            raise QueryError("--modify changes a picture: give one with --image")
        if self.modify is not None and self.text is not None:
            raise QueryError("give either a text or --modify with a picture, not both")
        if self.text is None and self.image is None:
            raise QueryError("nothing to search for: give a text, --image FILE, or --image FILE with --modify TEXT")

    @property
    def composed(self) -> bool:
        return self.modify is not None

    def to_json(self) -> dict[str, Any]:
        image: str | int | None = "<picture>"  # bytes and PIL images have no name
        if self.image is None or isinstance(self.image, str | int):
            image = self.image
        elif isinstance(self.image, Path):
            image = str(self.image)
        parts = {"text": self.text, "image": image, "modify": self.modify}
        return {name: value for name, value in parts.items() if value is not None}
