"""The application: routes, errors, the files of the page, and what stands before them all."""

import os
from collections.abc import Callable
from importlib import resources

from fastapi import FastAPI
from fastapi.responses import Response

from e5v_search import __version__
from e5v_search.web import collections, items, searching
from e5v_search.web.answers import Counted, add_handlers
from e5v_search.web.safety import Access, Safety
from e5v_search.web.service import Service

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def create_app(service: Service, access: Access, stopping: Callable[[], bool] = lambda: False) -> FastAPI:
    """The ASGI application; `service` is to be started and stopped by the caller."""
    # the documentation pages of FastAPI fetch their scripts from another host
    app = FastAPI(title="e5v-search", version=__version__, docs_url=None, redoc_url=None)
    add_handlers(app)
    app.include_router(searching.router(service))
    app.include_router(items.router(service))
    app.include_router(collections.router(service, stopping))
    # the canvas is that of `e5v-search map`
    for file in (
        *resources.files("e5v_search.web").joinpath("page").iterdir(),
        resources.files("e5v_search.map").joinpath("canvas.js"),
    ):
        if media_type := _TYPES.get(os.path.splitext(file.name)[1]):
            path = "/" if file.name == "index.html" else f"/{file.name}"
            _add_file(app, path, file.read_bytes(), media_type)
    app.add_middleware(Safety, access=access)
    app.add_middleware(Counted, metrics=service.metrics)
    return app


def _add_file(app: FastAPI, path: str, body: bytes, media_type: str) -> None:
    async def file() -> Response:
        return Response(body, media_type=media_type, headers={"Cache-Control": "no-cache"})

    app.add_api_route(path, file, methods=["GET", "HEAD"], include_in_schema=False)
