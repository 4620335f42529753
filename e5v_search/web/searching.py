"""`/api/search`: the queries of the command line."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from e5v_search import query
from e5v_search.collection.asking import Ask
from e5v_search.web import uploads
from e5v_search.web.answers import RESPONSES
from e5v_search.web.schemas import Found, Id
from e5v_search.web.service import Service

MAX_K = 1000
_LISTS = ("plus", "minus", "where")
_Text = Annotated[str, Field(max_length=8000)]
_Texts = Annotated[list[_Text], Field(max_length=32)]


class Asked(BaseModel):
    """What may be asked; each name means what the option of `e5v-search search` does."""

    model_config = ConfigDict(extra="forbid")

    q: _Text | None = Field(None, description="A text; with an image, both are looked for at once.")
    image: Id | None = Field(None, description="The id of an item to search by.")
    modify: _Text | None = Field(None, description="With an image: search for it changed like this.")
    plus: _Texts = Field([], description="Towards this: TEXT[:WEIGHT] or image:ID[:WEIGHT].")
    minus: _Texts = Field([], description="Away from this: TEXT[:WEIGHT] or image:ID[:WEIGHT].")
    where: _Texts = Field([], description="Filters, all of which must pass (docs/filters.md).")
    k: int = Field(10, ge=1, le=MAX_K, description="How many results.")
    threshold: float | None = Field(None, allow_inf_nan=False, description="No results below this score.")
    prompts: str | None = Field(None, pattern="^[a-z0-9][a-z0-9-]{0,40}$", description="The name of a prompt set.")
    keep_reference: bool = Field(False, description="With modify: the picture itself may be among the results.")
    explain: bool = Field(False, description="Give each hit the words that it shares with the query.")

    def to_ask(self, picture: bytes | None = None) -> Ask:
        """Raises QueryError. Pictures are named by id, or sent: nothing here reads a path."""
        terms = {
            name: tuple(query.parse_term(each, query.parse_item) for each in getattr(self, name)) for name in ("plus", "minus")
        }
        image = picture if picture is not None else self.image
        asked = query.Query(
            self.q or None, image, self.modify or None, terms["plus"], terms["minus"], tuple(self.where), self.prompts
        )
        return Ask(asked, self.k, self.threshold, self.keep_reference, self.explain)


def _form_schema() -> dict[str, Any]:
    fields = Asked.model_json_schema()["properties"]
    picture = {"type": "string", "format": "binary", "description": "A picture, or the id of an item."}
    schema = {"type": "object", "properties": {**fields, "image": picture}}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["search"], responses=RESPONSES)

    @routes.get(
        "/api/search", response_model=Found, summary="Search by a text, an item, an item and a change, or sums of these"
    )
    async def search(request: Request, asked: Annotated[Asked, Query()]) -> Response:
        return await _answer(request, asked.to_ask())

    @routes.post(
        "/api/search", response_model=Found, openapi_extra=_form_schema(), summary="The same with a picture that is sent along"
    )
    async def search_by_upload(request: Request) -> Response:
        with service.uploads.enter(who(request)):
            form = await uploads.read_form(request)
            values: dict[str, Any] = {n: found if n in _LISTS else found[-1] for n, found in form.fields.items()}
            if form.picture is not None:
                values.pop("image", None)
                picture = form.picture
                await service.pictures.run(lambda _: uploads.check_picture(picture), who(request))
            try:
                asked = Asked.model_validate(values)
            except ValidationError as error:
                raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in error.errors()]) from error
            return await _answer(request, asked.to_ask(form.picture))

    async def _answer(request: Request, ask: Ask) -> Response:
        return Response(await service.search(ask, who(request)), media_type="application/json")

    return routes


def who(request: Request) -> str:
    """The address that a request comes from."""
    return request.client.host if request.client is not None else ""
