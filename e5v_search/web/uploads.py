"""A form with at most one picture in it, read into memory and nowhere else."""

from collections.abc import AsyncGenerator
from typing import NamedTuple

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from e5v_search import media
from e5v_search.errors import MediaError, QueryError
from e5v_search.web.safety import MAX_BODY

MAX_PIXELS = 64_000_000
_FIELDS, _FIELD_BYTES = 64, 64 * 1024


class _InMemory(MultiPartParser):
    spool_max_size = MAX_BODY + 1  # never a file on the disk: no body is as large


class Form(NamedTuple):
    fields: dict[str, list[str]]
    picture: bytes | None


async def read_form(request: Request) -> Form:
    """The fields of a multipart form, and the bytes of the picture in its part `image`. Raises QueryError."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise QueryError("send a form (multipart/form-data) with a picture as its part `image`")

    async def stream() -> AsyncGenerator[bytes, None]:
        async for chunk in request.stream():
            yield chunk

    try:
        parser = _InMemory(request.headers, stream(), max_files=1, max_fields=_FIELDS, max_part_size=_FIELD_BYTES)
        form = await parser.parse()
    except ClientDisconnect:
        raise
    except (MultiPartException, KeyError, ValueError, LookupError) as error:
        raise QueryError(f"the form cannot be read: {error}") from error
    fields: dict[str, list[str]] = {}
    picture = None
    try:
        for name, value in form.multi_items():
            if isinstance(value, str):
                fields.setdefault(name, []).append(value)
            elif isinstance(value, UploadFile):
                if name != "image":
                    raise QueryError(f"a file is expected as the part `image`, not as {name[:80]!r}")
                picture = await value.read()
    finally:
        await form.close()
    return Form(fields, picture)


def check_picture(data: bytes) -> None:
    """Raises MediaError for what is no picture, is damaged, or has more than MAX_PIXELS; says the reason alone."""
    try:
        media.open_photo(data, MAX_PIXELS)
    except MediaError as error:
        raise type(error)(f"the picture that was sent: {error}") from error
