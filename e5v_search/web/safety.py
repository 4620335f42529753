"""Who may ask, and how much: everything that is refused before a request is looked at.

- A page of another site must not use this service through its visitor's browser. The browser says where a request comes
  from (`Origin`, `Sec-Fetch-Site`), and by which name it knows the service (`Host`): a name that is not ours is one that
  its owner has pointed here (DNS rebinding).
- Beyond this machine everyone needs the token.
- A body has a size and a time.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlencode

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 32 * 2**20  # bytes: a photo and what is asked about it
BODY_SECONDS = 30.0
COOKIE = "e5v-search"
LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
_OPEN = frozenset({"/healthz"})  # to be asked without the token

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
)


def is_local(host: str) -> bool:
    return host in LOCAL or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


@dataclass(frozen=True)
class Access:
    """By which names the service is known, and the token that it demands."""

    names: frozenset[str] = LOCAL
    token: str | None = None

    def knows(self, host: str) -> bool:
        """Whether a Host header names this service. An address cannot be pointed elsewhere; with a token any will do."""
        name = _name(host)
        return name in self.names or (self.token is not None and _is_address(name))

    def is_token(self, given: str) -> bool:
        expected = self.token or ""
        return hmac.compare_digest(_digest(given), _digest(expected))


def _digest(text: str) -> bytes:
    """Of the same length whatever is given, so that comparing takes the same time."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _name(host: str) -> str:
    """Of `name:port` or `[address]:port` the part before the port, in lower case."""
    if host.startswith("["):
        name, closed, _ = host[1:].partition("]")
        return name.lower() if closed else ""
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@dataclass
class _Refused(Exception):
    status: int
    message: str
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)


class Safety:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, access: Access, max_body: int = MAX_BODY, body_seconds: float = BODY_SECONDS) -> None:
        self._app, self._access, self._max_body, self._seconds = app, access, max_body, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        started = False

        async def guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                present = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(each for each in _HEADERS if each[0] not in present)]
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, self._bounded(receive, headers), guarded)
        except _Refused as refused:
            if not started:
                await _answer(guarded, refused)

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        host = headers.get("host", "")
        if len(hosts) != 1 or not self._access.knows(host):
            raise _Refused(403, f"this service is not known as {host[:100]!r}; --allow-host NAME makes it so")
        origin = headers.get("origin")
        if origin is not None and origin.lower() != f"{scope['scheme']}://{host.lower()}":
            raise _Refused(403, "pages of other sites may not use this service")
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not (
            scope["method"] == "GET" and scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"
        ):
            raise _Refused(403, "other sites may lead to the page of this service, and to nothing else")
        if self._access.token is not None and scope["path"] not in _OPEN:
            self._check_token(scope, headers)
        if headers.get("content-length", "0").isdecimal() and int(headers.get("content-length", "0")) > self._max_body:
            raise self._too_large()

    def _check_token(self, scope: Scope, headers: dict[str, str]) -> None:
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self._access.is_token(given.strip()):
            return
        if self._access.is_token(_cookie(headers.get("cookie", ""))):
            return
        asked = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if scope["path"] == "/" and scope["method"] == "GET" and self._access.is_token(asked.pop("token", [""])[0]):
            # kept where no script can read it, and out of the address that is shown, kept and shared
            place = "/" + (f"?{urlencode(asked, doseq=True)}" if asked else "")
            cookie = f"{COOKIE}={self._access.token}; HttpOnly; SameSite=Strict; Path=/"
            raise _Refused(303, "see /", [(b"location", place.encode()), (b"set-cookie", cookie.encode())])
        hint = "open /?token=… once" if scope["path"] == "/" else "send it as Authorization: Bearer …"
        raise _Refused(401, f"this service asks for its token: {hint}", [(b"www-authenticate", b"Bearer")])

    def _too_large(self) -> _Refused:
        return _Refused(413, f"a request has at most {self._max_body // 2**20} MB", [(b"connection", b"close")])

    def _bounded(self, receive: Receive, headers: dict[str, str]) -> Receive:
        """`receive`, which gives up on a body that is too large or takes too long."""
        size, whole, end = 0, False, asyncio.get_running_loop().time() + self._seconds
        has_body = "content-length" in headers or "transfer-encoding" in headers

        async def bounded() -> Message:
            nonlocal size, whole
            if whole or not has_body:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), end - asyncio.get_running_loop().time())
            except TimeoutError:
                raise _Refused(
                    408, f"the request was not whole after {self._seconds:g} s", [(b"connection", b"close")]
                ) from None
            size += len(message.get("body", b""))
            if size > self._max_body:
                raise self._too_large()
            whole = not message.get("more_body", False)
            return message

        return bounded


def _cookie(header: str) -> str:
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found is not None else ""


async def _answer(send: Send, refused: _Refused) -> None:
    body = error_body(refused.message, "Refused")
    headers: Iterable[tuple[bytes, bytes]] = (
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *refused.headers,
    )
    await send({"type": "http.response.start", "status": refused.status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})


def error_body(message: str, kind: str, **more: Any) -> bytes:
    """How every refusal looks. In ASCII, as all JSON here: names that are no UTF-8 survive as escapes."""
    return json.dumps({"error": message, "kind": kind, **more}).encode()
