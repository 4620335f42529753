"""Answers that were given last, for those who ask again before anything has changed."""

import json
import time
from collections import OrderedDict
from collections.abc import Hashable

from e5v_search.collection import Hits

LIMIT = 64 * 2**20  # bytes


class Answers:
    """The JSON of hits by what was asked and the version of the collection, at most `limit` bytes of it."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit, self._size = limit, 0
        self._kept: OrderedDict[Hashable, tuple[str, str]] = OrderedDict()

    def get(self, key: Hashable, asked_at: float) -> bytes | None:
        """The answer, with the time that it took since `asked_at` (of time.perf_counter)."""
        found = self._kept.get(key)
        if found is None:
            return None
        self._kept.move_to_end(key)
        took = {"load": 0.0, "embed": 0.0, "search": 0.0, "total": round((time.perf_counter() - asked_at) * 1e3, 3)}
        return f'{found[0]}, "took_ms": {json.dumps(took)}, {found[1]}'.encode()

    def put(self, key: Hashable, hits: Hits) -> None:
        found = hits.to_json()
        head = json.dumps({"query": found["query"], "fingerprint": found["fingerprint"]})[:-1]
        tail = json.dumps({"hits": found["hits"]})[1:]
        self._kept[key] = head, tail
        self._size += len(head) + len(tail)
        while self._size > self._limit:
            _, (head, tail) = self._kept.popitem(last=False)
            self._size -= len(head) + len(tail)
