"""Asking the service that may run beside a collection, instead of loading the model once more.

A service listens on the socket `service.sock` in the collection's folder. It is asked one line of JSON and answers one.
Whatever is not as it should be (nobody listens, another user's socket, another version, another catalog in the meantime, a
question that it cannot take) means that it is not used: the caller then does the work itself, with the same result.
"""

import json
import os
import re
import socket
import stat
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any, Unpack

from e5v_search import __version__
from e5v_search.hits import Hit, Hits, Wanted
from e5v_search.query import Input, Query, Term

NAME = "service.sock"
CATALOG = "catalog.sqlite"
_CONNECT_SECONDS, _ANSWER_SECONDS = 1.0, 120.0
_MOST = 256 * 2**20  # bytes of an answer
# what such a value in a filter means depends on the folder and the home of the process that reads it
_RELATIVE = re.compile(r"[=|]\s*[\"']?[.~]")


def ask(folder: Path, query: Query, **wanted: Unpack[Wanted]) -> Hits | None:
    """The hits that the service of the collection in `folder` gives; None where the caller has to find them itself."""
    if not hasattr(socket, "AF_UNIX") or any(_RELATIVE.search(each) for each in query.where) or _is_file(query.prompts):
        return None
    question: dict[str, Any] = {"version": __version__, **wanted}
    with suppress(OSError, ValueError, KeyError, TypeError):
        path = folder / NAME
        status = path.lstat()
        if status.st_uid != os.geteuid() or not stat.S_ISSOCK(status.st_mode) or status.st_mode & 0o077:
            return None
        question |= {"catalog": identity(folder / CATALOG), "query": _encoded(query)}
        answer = _asked(path, json.dumps(question).encode() + b"\n")
        if answer is not None and "hits" in answer:
            hits = [Hit(**each) for each in answer["hits"]]
            return Hits(hits, answer["query"], answer["fingerprint"], answer["took_ms"])
    return None


def identity(path: str | os.PathLike[str]) -> list[int]:
    """Tells a file from any other, and from itself before a change. Raises OSError."""
    status = os.stat(path)
    return [status.st_dev, status.st_ino]


def signature(path: str | os.PathLike[str]) -> list[int]:
    """As `identity`, of what the file holds now."""
    status = os.stat(path)
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]


def peer_is_ours(connection: socket.socket) -> bool:
    """Whether the process at the other end belongs to this user. Where the system does not tell, the file's mode has to do."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))  # pid, uid, gid
    return bool(uid == os.geteuid())


def _asked(path: Path, line: bytes) -> dict[str, Any] | None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_CONNECT_SECONDS)
        try:
            connection.connect(str(path))
        except ConnectionRefusedError:  # its service was killed
            path.unlink(missing_ok=True)
            return None
        if not peer_is_ours(connection):
            return None
        connection.settimeout(_ANSWER_SECONDS)
        connection.sendall(line)
        with connection.makefile("rb") as file:
            answer = file.readline(_MOST)
    found: dict[str, Any] = json.loads(answer)
    return found


def _is_file(prompts: str | None) -> bool:
    return prompts is not None and prompts.endswith(".toml")


# a query as JSON; pictures are named, with what tells them from another file of that name in another place


def _encoded(query: Query) -> dict[str, Any]:
    terms = {name: [[_encoded_input(term.input), term.weight] for term in getattr(query, name)] for name in ("plus", "minus")}
    main = _encoded_input(Input(image=query.image, modify=query.modify)) if query.image is not None else {}
    return {**main, **terms, "text": query.text, "where": list(query.where), "prompts": query.prompts}


def _encoded_input(given: Input) -> dict[str, Any]:
    image: Any = given.image
    if isinstance(image, str):
        image = {"path": os.path.abspath(image), "signature": signature(image)}
    return {"text": given.text, "image": image, "modify": given.modify}


def decoded(query: dict[str, Any]) -> Query:
    """The query that `ask` has sent. Raises LookupError where a picture is not the one that was meant, QueryError."""
    parts: dict[str, Any] = {
        name: tuple(Term(Input(**{**each, "image": _image(each["image"])}), weight) for each, weight in query[name])
        for name in ("plus", "minus")
    }
    parts |= {"text": query["text"], "image": _image(query.get("image")), "modify": query.get("modify")}
    return Query(**parts, where=tuple(query["where"]), prompts=query["prompts"])


def _image(image: Any) -> Any:
    if not isinstance(image, dict):
        return image
    if signature(image["path"]) != image["signature"]:
        raise LookupError(f"{image['path']} is another file here")
    return image["path"]
