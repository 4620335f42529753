"""The service's socket in the collection's folder, for this user's own commands; `client` is the other end."""

import asyncio
import json
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from e5v_search import __version__
from e5v_search.collection.asking import Ask
from e5v_search.errors import E5VError
from e5v_search.web import client
from e5v_search.web.service import Service

_LINE = 2**20  # bytes of a question
_log = logging.getLogger(__name__)


@asynccontextmanager
async def listening(service: Service) -> AsyncIterator[Path | None]:
    """Answers on the collection's socket meanwhile. Gives its path, or None where another service has it, or nothing can."""
    path = service.folder / client.NAME
    bound = _bind(path)
    if bound is None:
        yield None
        return
    mine = path.lstat().st_ino
    server = await asyncio.start_unix_server(lambda r, w: _serve(service, r, w), sock=bound, limit=_LINE)
    try:
        yield path
    finally:
        server.close()
        with suppress(OSError):
            if path.lstat().st_ino == mine:
                path.unlink()


def _bind(path: Path) -> socket.socket | None:
    if not hasattr(socket, "AF_UNIX"):
        return None
    if _is_alive(path):
        _log.warning("another service answers for %s: commands will ask that one", path.parent)
        return None
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        bound.bind(str(temporary))
        os.chmod(temporary, 0o600)
        bound.listen()
        temporary.rename(path)  # only now can it be found, and whoever finds it is heard
    except OSError as error:
        bound.close()
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        _log.warning("%s: %s; commands will load the model themselves", path, error.strerror or error)
        return None
    return bound


def _is_alive(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        with suppress(OSError):
            probe.connect(str(path))
            return True
    return False


async def _serve(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One question, one answer."""
    with suppress(ConnectionError):
        try:
            if client.peer_is_ours(writer.get_extra_info("socket")):
                writer.write(await _answer(service, json.loads(await reader.readline())))
                await writer.drain()
        except (ValueError, TypeError, LookupError, OSError) as error:  # the asker then does without
            writer.write(json.dumps({"refused": str(error)}).encode() + b"\n")
        finally:
            writer.close()
            await writer.wait_closed()


async def _answer(service: Service, question: dict[str, Any]) -> bytes:
    if question["version"] != __version__:
        return _refused(f"this is version {__version__}")
    if question["catalog"] != client.identity(service.folder / client.CATALOG):
        return _refused("this service is of another collection")
    try:
        wanted = {name: question[name] for name in ("k", "threshold", "keep_reference", "explain")}
        found = await service.search(Ask(client.decoded(question["query"]), **wanted), "this machine")
    except E5VError as error:
        return _refused(str(error))
    service.metrics.count("local_questions")
    return found + b"\n"


def _refused(why: str) -> bytes:
    return json.dumps({"refused": why}).encode() + b"\n"
