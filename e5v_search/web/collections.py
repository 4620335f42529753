"""The collection as a whole: its state, what it consists of, its map, index runs, and how the service fares."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse

from e5v_search.web.answers import RESPONSES, ascii_json
from e5v_search.web.schemas import Facets, Failures, Health, Points, Run, Status
from e5v_search.web.searching import who
from e5v_search.web.service import Service

_LOOK_SECONDS = 1.0
_HEARTBEAT_SECONDS = 15.0
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def router(service: Service, stopping: Callable[[], bool]) -> APIRouter:
    routes = APIRouter(tags=["collection"], responses=RESPONSES)

    @routes.get("/api/status", response_model=Status, summary="What the collection holds")
    async def status(request: Request) -> Response:
        return ascii_json(await service.slow.run(lambda _: service.status(), who(request)))

    @routes.get("/api/failures", response_model=Failures, summary="What could not be used, and why")
    async def failures(request: Request) -> Response:
        found = await service.quick.run(lambda catalog: catalog.failures(), who(request))
        return ascii_json({"failed": [{"path": each.where, "reason": each.reason} for each in found]})

    @routes.get("/api/facets", response_model=Facets, summary="How many items of each kind, date, folder, camera, place")
    async def facets(
        request: Request,
        where: Annotated[list[str], Query(max_length=32, description="Filters.")] = [],  # noqa: B006
    ) -> Response:
        return ascii_json(await service.quick.run(lambda catalog: service.facets(catalog, where), who(request)))

    @routes.get("/api/map", response_model=Points, summary="The items in two dimensions")
    async def points(request: Request) -> Response:
        return ascii_json(await service.slow.run(lambda _: service.points(), who(request)))

    @routes.get("/api/index", response_model=Run, summary="The index run of this service")
    async def run() -> Response:
        return ascii_json(asdict(service.runs.state()))

    @routes.post(
        "/api/index", response_model=Run, status_code=202, summary="Look through all that was indexed again (--allow-index)"
    )
    async def start_run() -> Response:
        service.runs.start()
        return ascii_json(asdict(service.runs.state()), 202)

    @routes.get("/api/events", summary="A line whenever the collection changes or a run goes on (server-sent events)")
    async def events(request: Request) -> StreamingResponse:
        with service.listeners.enter(who(request)):  # refused here, before the stream begins
            pass
        return StreamingResponse(_news(who(request)), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _news(who: str) -> AsyncIterator[str]:
        with service.listeners.enter(who):
            last: dict[str, Any] = {}
            spoke = time.monotonic()
            while not stopping():
                now = service.news()
                if now != last:
                    yield f"data: {json.dumps(now)}\n\n"
                elif time.monotonic() - spoke > _HEARTBEAT_SECONDS:
                    yield ": still here\n\n"
                else:
                    await asyncio.sleep(_LOOK_SECONDS)
                    continue
                last, spoke = now, time.monotonic()

    @routes.get("/healthz", response_model=Health, tags=["service"], summary="Whether the service answers")
    async def health() -> Response:
        return ascii_json({"status": "ok"})

    @routes.get("/metrics", response_class=PlainTextResponse, tags=["service"], summary="Counts for Prometheus")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(service.gauges()), media_type=_PROMETHEUS)

    return routes
