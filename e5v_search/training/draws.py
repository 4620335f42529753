"""What one step of tuning sees. It depends on the seed, the step and the data alone, so that a resumed run goes on as an
uninterrupted one, and several processes share a step's examples without overlap."""

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from e5v_search import media
from e5v_search.backbones.tiles import Tiles, TileSpec, cut
from e5v_search.errors import DataError, MediaError
from e5v_search.training.data import shuffled
from e5v_search.training.examples import Example, Input

_TRIES = 50  # examples looked at in place of one whose pictures cannot be used


@dataclass(frozen=True)
class Draw:
    """n examples as rows of `inputs`, which are all different: what occurs twice is embedded once.

    `queries` and `positives` have n entries, `negatives` n times as many as the recipe asks for; `rows` names the
    examples by their lines in the file, `tiles` holds the pictures.
    """

    inputs: list[Input]
    queries: list[int]
    positives: list[int]
    negatives: list[int]
    rows: list[int]
    tiles: dict[Path, Tiles]

    def __len__(self) -> int:
        return len(self.queries)


class Draws:
    """`make(step)` for any step, in any order, from any thread. `skipped` collects pictures that could not be used, with
    the reason: another example, the same in every run, stands in for theirs."""

    def __init__(
        self,
        examples: Sequence[Example],
        batch: int,
        negatives: int,
        seed: int,
        spec: TileSpec | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """`batch` examples a step, of which this process, `share[0]` of `share[1]`, makes its part."""
        self.examples, self.batch, self.negatives, self.seed, self.spec = examples, batch, negatives, seed, spec
        rank, processes = share
        self._own = range(rank * batch // processes, (rank + 1) * batch // processes)
        self.skipped: dict[Path, str] = {}
        self._lock = threading.Lock()

    def make(self, step: int) -> Draw:
        first = step * self.batch
        rows = shuffled(f"{self.seed}/examples", len(self.examples), first + self._own.start, first + self._own.stop)
        places: dict[Input, int] = {}
        draw = Draw([], [], [], [], [], {})
        for at, row in zip(self._own, rows, strict=True):
            rng = random.Random(f"{self.seed}/{step}/{at}")
            example, query, positive, negatives = self._usable(row, rng, draw.tiles)
            draw.rows.append(example.row)
            wanted = [(draw.queries, query), *((draw.negatives, one) for one in negatives)]
            if positive is not None:
                wanted.append((draw.positives, positive))
            for where, one in wanted:
                where.append(places.setdefault(one, len(places)))
        draw.inputs.extend(places)
        return draw

    def _usable(
        self, row: int, rng: random.Random, tiles: dict[Path, Tiles]
    ) -> tuple[Example, Input, Input | None, list[Input]]:
        """The example of a row with its pictures opened into `tiles`, or the next one by lot whose pictures can be."""
        for _ in range(_TRIES):
            example = self.examples[row]
            query, positive, negatives = example.draw(self.negatives, rng)
            try:
                for one in (query, positive, *negatives):
                    if one is not None and one.image is not None and one.image not in tiles:
                        tiles[one.image] = self._open(one.image)
                return example, query, positive, negatives
            except MediaError:
                row = rng.randrange(len(self.examples))
        with self._lock:
            path, reason = next(reversed(self.skipped.items()))
        raise DataError(f"{_TRIES} examples in a row have pictures that cannot be used, one of them {path}: {reason}")

    def _open(self, path: Path) -> Tiles:
        assert self.spec is not None
        try:
            return cut(media.open_picture(path), self.spec)
        except MediaError as error:
            with self._lock:
                self.skipped[path] = str(error)
            raise
