"""Where a store is: what stands behind `--store`."""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from e5v_search.errors import UsageError

FORMS = "milvus://HOST:PORT/COLLECTION, milvus+tls://… for TLS, or milvus:FILE.db/COLLECTION for milvus-lite in a file"
_PORT = 19530
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")  # what Milvus takes, with room for the name of a view


@dataclass(frozen=True)
class Place:
    """A collection of a Milvus server, or in a file of milvus-lite."""

    text: str  # as it is written down, the file's path absolute
    uri: str  # for the client
    database: str  # empty: the default one
    collection: str

    @classmethod
    def parse(cls, text: str) -> "Place":
        """Raises UsageError for what is no place."""
        try:
            parts = urlsplit(text)
            port = parts.port or _PORT
        except ValueError as error:
            raise _wrong(text, str(error)) from error
        if parts.username or parts.password:
            raise UsageError("--store holds a user or password, which would be written down: set MILVUS_TOKEN=USER:PASSWORD")
        if parts.scheme == "milvus" and not parts.netloc:
            return cls._file(text)
        if parts.scheme not in ("milvus", "milvus+tls") or not parts.hostname or parts.query or parts.fragment:
            raise _wrong(text, "it is none of these forms")
        *database, collection = parts.path.strip("/").split("/")
        if len(database) > 1:
            raise _wrong(text, "there is a database and a collection at most behind the port")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        where = f"{parts.scheme}://{host}:{port}/{parts.path.strip('/')}"
        http = "https" if parts.scheme == "milvus+tls" else "http"
        return cls(where, f"{http}://{host}:{port}", "".join(database), _checked(text, collection))

    @classmethod
    def _file(cls, text: str) -> "Place":
        name, _, collection = text.removeprefix("milvus:").rpartition("/")
        if not name.endswith(".db"):
            raise _wrong(text, "the name of a file of milvus-lite ends in .db, and a collection follows")
        file = Path(name).expanduser().absolute()
        return cls(f"milvus:{file}/{collection}", str(file), "", _checked(text, collection))

    def beside(self, suffix: str) -> str:
        """The name of the collection for another view, whose files have this suffix."""
        return f"{self.collection}{re.sub('[^A-Za-z0-9_]', '_', suffix)}"


def _checked(text: str, collection: str) -> str:
    if not _NAME.fullmatch(collection):
        what = f"{collection!r} is no name" if collection else "the name is missing"
        raise _wrong(text, f"{what} of a collection: letters, digits and underscores, not a digit first")
    return collection


def _wrong(text: str, why: str) -> UsageError:
    return UsageError(f"--store {text}: {why}; write {FORMS}")
