"""A collection of a Milvus server: made, filled, searched. Everything raises StoreError."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from e5v_search.index.milvus import fields
from e5v_search.index.milvus.client import CONNECTING, LOADING, PATIENCE, Client
from e5v_search.index.milvus.place import Place
from e5v_search.index.recipe import Recipe

MOST = 16_384  # rows that Milvus gives for a query
MESSAGE = 8 << 20  # bytes; a server takes 64 MB
_IN_FLIGHT = 4  # messages
_IDS = 10_000  # of one expression
_VECTOR = "vector"


@dataclass(frozen=True)
class Description:
    d: int | None  # None for a collection whose rows are not like ours
    properties: dict[str, str]


class Server:
    def __init__(self, place: Place, collection: str) -> None:
        self.name = collection
        self._client = Client(place, collection)
        self.lite = "lite" in self._client.call(lambda client: client.get_server_version(timeout=CONNECTING))
        self._dtype: type[np.floating[Any]] = np.float32

    def describe(self) -> Description | None:
        """None where there is no such collection."""
        if not self._client.call(lambda client: client.has_collection(self.name, timeout=CONNECTING)):
            return None
        said = self._described()
        dims = [field["params"]["dim"] for field in said["fields"] if "dim" in field["params"]]
        return Description(int(dims[0]) if dims else None, dict(said.get("properties", {})))

    def _described(self) -> dict[str, Any]:
        said: dict[str, Any] = self._client.call(lambda client: client.describe_collection(self.name, timeout=CONNECTING))
        return said

    def create(self, d: int, recipe: Recipe, properties: Mapping[str, str]) -> None:
        types = self._client.milvus.DataType
        schema = self._client.milvus.MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", types.INT64, is_primary=True)
        schema.add_field(_VECTOR, types.FLOAT16_VECTOR if recipe.vectors == "float16" else types.FLOAT_VECTOR, dim=d)
        for name in fields.TEXTS:
            schema.add_field(name, types.VARCHAR, max_length=fields.TEXT_BYTES, nullable=name != "kind")
        for name in fields.WHOLE:
            schema.add_field(name, types.INT64, nullable=True)
        for name in fields.NUMBERS:
            schema.add_field(name, types.DOUBLE, nullable=True)
        schema.add_field("facts", types.JSON, nullable=True)
        # Strong: what one process has written, the next one finds
        keywords = {"schema": schema, "properties": dict(properties), "consistency_level": "Strong", "timeout": PATIENCE}
        self._client.call(lambda client: client.create_collection(self.name, **keywords))

    def drop(self) -> None:
        self._client.call(lambda client: client.drop_collection(self.name, timeout=PATIENCE))

    def load(self, recipe: Recipe) -> None:
        """Make the collection ready to be searched, with the index that the recipe names if it has none yet."""
        auto = "FLAT" if self.lite else "AUTOINDEX"  # that of milvus-lite is not exact
        kind = auto if recipe.index == "auto" else recipe.index

        def load(client: Any) -> None:
            if not client.list_indexes(self.name, timeout=CONNECTING):
                index = client.prepare_index_params()
                index.add_index(_VECTOR, index_type=kind, metric_type="IP", params=dict(recipe.build))
                client.create_index(self.name, index, timeout=LOADING)
            client.load_collection(self.name, timeout=LOADING)

        self._client.call(load)
        types = {field["name"]: field["type"] for field in self._described()["fields"]}
        if types[_VECTOR] == self._client.milvus.DataType.FLOAT16_VECTOR:
            self._dtype = np.float16

    def note(self, properties: Mapping[str, str]) -> None:
        """Write something down beside the collection."""
        self._client.call(
            lambda client: client.alter_collection_properties(self.name, dict(properties), timeout=PATIENCE), PATIENCE
        )

    # rows

    def upsert(self, ids: np.ndarray, x: np.ndarray, facts: Sequence[Mapping[str, Any]]) -> None:
        """Rows x (n, d) and what is said of them, in place of those of the same ids: sent again, they change nothing.

        In messages of at most MESSAGE bytes, a few of them at once; all have been acknowledged when it returns.
        """
        batches = [
            [{"id": int(ids[n]), _VECTOR: x[n].astype(self._dtype)} | dict(facts[n]) for n in batch]
            for batch in _batches(x.shape[1] * np.dtype(self._dtype).itemsize, facts)
        ]

        def send(batch: list[dict[str, Any]]) -> None:
            self._client.call(lambda client: client.upsert(self.name, batch, timeout=PATIENCE), PATIENCE)

        # milvus-lite takes one writer at a time
        with ThreadPoolExecutor(1 if self.lite else _IN_FLIGHT) as pool:
            for _ in pool.map(send, batches):
                pass

    def settle(self) -> None:
        """After rows were sent, for now. A server sees to what it holds by itself."""
        if self.lite:  # which is many times slower in searching what does not lie in files yet
            self._client.call(lambda client: client.flush(self.name, timeout=LOADING))

    def delete(self, ids: np.ndarray) -> None:
        """Ids that are not there are passed over."""
        for chunk in chunks(ids):
            self._client.call(partial(self._delete, chunk.tolist()), PATIENCE)

    def _delete(self, ids: list[int], client: Any) -> None:
        client.delete(self.name, ids=ids, timeout=PATIENCE)

    def search(self, xq: np.ndarray, k: int, where: str, parameters: Mapping[str, Any]) -> list[np.ndarray]:
        """Ids of the k nearest rows that pass, for each of xq (nq, d): int64 (m,), m <= k."""
        keywords = {
            "data": list(xq.astype(self._dtype)),
            "filter": where,
            "limit": k,
            "output_fields": ["id"],  # else milvus-lite sends the vectors too
            "search_params": {"metric_type": "IP", "params": dict(parameters)},
            "timeout": PATIENCE,
        }
        found = self._client.call(lambda client: client.search(self.name, **keywords))
        return [np.array([hit["id"] for hit in hits], dtype=np.int64) for hits in found]

    def count(self, but: np.ndarray) -> int:
        """Number of rows, those of the ids `but` not counted."""
        n = int(self._query("", "count(*)")[0]["count(*)"])
        return n - sum(len(self._query(among(chunk), "id")) for chunk in chunks(but))

    def ids(self) -> np.ndarray:
        """All of them, (n,) int64, ascending."""

        def pages(client: Any) -> list[int]:
            found: list[int] = []
            iterator = client.query_iterator(self.name, batch_size=MOST, output_fields=["id"], timeout=PATIENCE)
            while page := iterator.next():
                found += [row["id"] for row in page]
            iterator.close()
            return found

        return np.array(sorted(self._client.call(pages)), dtype=np.int64)

    def vectors(self, ids: np.ndarray, d: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Blocks (ids (n,), x (n, d) float32) of those that are there."""
        for chunk in chunks(ids, max(1, min(_IDS, MESSAGE // (4 * d)))):
            if rows := self._query(among(chunk), _VECTOR):
                x = np.stack([_numbers(row[_VECTOR]) for row in rows])
                yield np.array([row["id"] for row in rows], dtype=np.int64), x.astype(np.float32)

    def _query(self, where: str, field: str) -> Any:
        return self._client.call(lambda client: client.query(self.name, filter=where, output_fields=[field], timeout=PATIENCE))


def among(ids: np.ndarray) -> str:
    return f"id in {ids.tolist()}"


def chunks(ids: np.ndarray, size: int = _IDS) -> list[np.ndarray]:
    """At most so many ids at once, as one expression may hold."""
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def _batches(row_bytes: int, facts: Sequence[Mapping[str, Any]]) -> Iterator[list[int]]:
    """Numbers of rows that fit a message together."""
    batch: list[int] = []
    size = 0
    for n, fact in enumerate(facts):
        needed = row_bytes + sum(len(str(value)) for value in fact.values()) * 2 + 200
        if batch and size + needed > MESSAGE:
            yield batch
            batch, size = [], 0
        batch.append(n)
        size += needed
    if batch:
        yield batch


def _numbers(value: Any) -> np.ndarray:
    """A vector as the client gives it: a list of numbers, or half ones as bytes, in a list or not."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], bytes):
        value = value[0]
    return np.frombuffer(value, "<f2") if isinstance(value, bytes) else np.asarray(value, np.float32)
