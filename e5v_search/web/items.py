"""`/api/items`: the collection itself, newest first, and one item with all that is known of it. Always by id, never by path."""

import os
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Header, Path, Query, Request
from fastapi.responses import FileResponse, Response

from e5v_search.catalog import Catalog, Item
from e5v_search.collection import Collection
from e5v_search.collection.copies import copies, neighbours
from e5v_search.query import Input
from e5v_search.web import pictures
from e5v_search.web.answers import RESPONSES, ascii_json, not_found
from e5v_search.web.schemas import Copies, Details, Id, Words
from e5v_search.web.schemas import Page as Listed
from e5v_search.web.searching import who
from e5v_search.web.service import Service

MAX_PAGE = 500
_THING = ("id", "kind", "path", "text", "width", "height", "taken_at", "part")
_DETAILS = (*_THING, "lat", "lon", "camera", "format", "facts", "content_hash")
_CACHED = "private, max-age=60"  # then it is asked whether the tag is still the same
T = TypeVar("T")

ItemId = Annotated[Id, Path(description="The id of an item, as results have it.")]
Tag = Annotated[str | None, Header(alias="If-None-Match", max_length=200)]


def shown(item: Item, names: tuple[str, ...] = _THING) -> dict[str, Any]:
    return {name: getattr(item, name) for name in names}


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/api/items", tags=["items"], responses=RESPONSES)

    def of_item(item_id: int, work: Callable[[Catalog, Item], T]) -> Callable[[Catalog], T]:
        def found(catalog: Catalog) -> T:
            item = catalog.items([item_id]).get(item_id)
            if item is None:
                raise not_found(item_id)
            return work(catalog, item)

        return found

    @routes.get("", response_model=Listed, summary="The collection, newest first")
    async def page(
        request: Request,
        where: Annotated[list[str], Query(max_length=32, description="Filters.")] = [],  # noqa: B006
        start: Annotated[int, Query(ge=0, le=10**9)] = 0,
        n: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    ) -> Response:
        total, items = await service.quick.run(lambda catalog: service.page(catalog, where, start, n), who(request))
        return ascii_json({"total": total, "start": start, "items": [shown(item) for item in items]})

    @routes.get("/{id}", response_model=Details, summary="What is known of an item")
    async def item(request: Request, id: ItemId) -> Response:
        def details(catalog: Catalog, item: Item) -> dict[str, Any]:
            file = catalog.known([item.path]).get(item.path) if item.path is not None and item.kind == "image" else None
            there = item.path is not None and os.path.exists(item.path)
            return {**shown(item, _DETAILS), "bytes": file.size if file is not None else None, "available": there}

        return ascii_json(await service.quick.run(of_item(id, details), who(request)))

    @routes.get(
        "/{id}/thumbnail", response_class=Response, summary="A small picture of it (JPEG)", responses=_picture("image/jpeg")
    )
    async def thumbnail(
        request: Request,
        id: ItemId,
        size: Annotated[int, Query(description=f"Pixels: one of {', '.join(map(str, pictures.SIZES))}.")] = 512,
        tag: Tag = None,
    ) -> Response:
        fitting = next((each for each in pictures.SIZES if each >= size), pictures.SIZES[-1])
        work = of_item(id, lambda catalog, item: pictures.thumbnail(catalog, item, fitting))
        return _shown(await service.pictures.run(work, who(request)), tag)

    @routes.get("/{id}/image", response_class=Response, summary="The photo's file as it is", responses=_picture("image/*"))
    async def image(request: Request, id: ItemId, tag: Tag = None) -> Response:
        work = of_item(id, lambda _, item: pictures.original(item))
        return _shown(await service.pictures.run(work, who(request)), tag)

    @routes.get("/{id}/words", response_model=Words, summary="What the model sees in it, in words of its own")
    async def words(request: Request, id: ItemId, k: Annotated[int, Query(ge=1, le=50)] = 10) -> Response:
        await service.quick.run(of_item(id, lambda _, item: None), who(request))

        def nearest(collection: Collection) -> list[dict[str, Any]]:
            x = collection.space.vectors([Input(image=id)])
            return [{"text": word.text, "score": word.score} for word in collection.embedder().nearest_words(x, k)[0]]

        return ascii_json({"words": await service.engine.run(nearest, who(request))})

    @routes.get("/{id}/copies", response_model=Copies, summary="Photos that show the same: copies, or saved again")
    async def same(request: Request, id: ItemId) -> Response:
        await service.quick.run(of_item(id, lambda _, item: None), who(request))
        near = await service.engine.run(lambda collection: neighbours(collection, id), who(request))
        found = await service.pictures.run(lambda catalog: copies(catalog, id, near), who(request))
        return ascii_json({"items": [{**shown(each.item), "score": each.score, "exact": each.exact} for each in found]})

    return routes


def _picture(media_type: str) -> dict[int | str, dict[str, Any]]:
    content = {media_type: {"schema": {"type": "string", "format": "binary"}}}
    return {200: {"content": content, "description": "The picture."}, 304: {"description": "It is still the same."}}


def _shown(picture: pictures.Picture, known: str | None) -> Response:
    headers = {"ETag": f'"{picture.tag}"', "Cache-Control": _CACHED}
    if known == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    if picture.path is not None:
        return FileResponse(picture.path, headers=headers, media_type=picture.media_type)
    return Response(picture.body, headers=headers, media_type=picture.media_type)
