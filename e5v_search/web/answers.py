"""How answers look over HTTP: JSON in ASCII, errors of ours as statuses, and each request counted."""

import json
import logging
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from e5v_search import errors
from e5v_search.web.metrics import Metrics
from e5v_search.web.safety import error_body
from e5v_search.web.schemas import Error

_log = logging.getLogger(__name__)

# the first that fits
STATUSES: tuple[tuple[type[errors.E5VError], int], ...] = (
    (errors.ServiceBusy, 429),
    (errors.UsageError, 400),
    (errors.PictureTooLarge, 413),
    (errors.NotAPicture, 415),
    (errors.UnreadableFile, 404),
    (errors.MediaError, 415),
    (errors.FingerprintMismatch, 409),
    (errors.CollectionBusy, 409),
    (errors.E5VError, 503),
)
_SAID = {
    400: "The request makes no sense as it stands.",
    401: "The token is missing or wrong.",
    403: "Refused to this host or origin.",
    404: "There is no such item.",
    408: "The request took too long.",
    409: "The collection is of another model, or busy.",
    413: "Too many bytes or pixels.",
    415: "Not a picture.",
    422: "A parameter is missing or out of its range.",
    429: "Too many requests are waiting; Retry-After says when to ask again.",
    503: "The collection or its model cannot be used; the error says why.",
}
RESPONSES: dict[int | str, dict[str, Any]] = {status: {"model": Error, "description": said} for status, said in _SAID.items()}


def ascii_json(value: Any, status: int = 200) -> Response:
    return Response(json.dumps(value).encode(), status, media_type="application/json")


def refusal(status: int, message: str, kind: str) -> Response:
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return Response(error_body(message, kind), status, headers, media_type="application/json")


def not_found(item_id: int) -> HTTPException:
    return HTTPException(404, f"there is no item {item_id}")


def add_handlers(app: FastAPI) -> None:
    @app.exception_handler(errors.E5VError)
    async def ours(request: Request, error: errors.E5VError) -> Response:
        status = next(status for kind, status in STATUSES if isinstance(error, kind))
        return refusal(status, str(error), type(error).__name__)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        lines = [f"{'.'.join(map(str, each['loc'][1:])) or 'request'}: {each['msg']}" for each in error.errors()]
        return refusal(422, "; ".join(lines)[:2000], "UsageError")

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        answer = refusal(error.status_code, str(error.detail), "Refused")
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return refusal(500, f"unexpected: {type(error).__name__}", "Unexpected")


class Counted:
    """ASGI middleware that counts requests by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(route, status, time.perf_counter() - start)
