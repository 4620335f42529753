"""A real service over a real collection, and a plain client for it."""

import http.client
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

import pytest
from command_line import run
from pictures import photo
from PIL import ExifTags, Image

from e5v_search.config import ModelChoice
from e5v_search.web.server import Server

SAMPLES = Path(__file__).parent.parent / "e5v_search/samples"
NAMES = ("cat", "astronaut", "coffee", "grass", "rocket-launch", "photographer", "raccoon", "staircase")
SLOW = 60_000  # ms that a busy machine may take for anything in a browser
EVIL = "<img src=x onerror=window.hacked=1>.jpg"
TEXT = "<script>window.hacked=2</script> two dogs play in the snow"


def nearly(answer: dict[str, Any]) -> dict[str, Any]:
    """What the same answer equals with scores within 1e-5 of these: a batch may round another way."""
    hits = [{**hit, "score": pytest.approx(hit["score"], abs=1e-5)} for hit in answer["hits"]]
    return {**answer, "hits": hits}


def make_collection(base: Path) -> Path:
    """`base/collection`: eight photos with dates, cameras, places and folders, copies of the cat, and two texts."""
    for n, name in enumerate(NAMES):
        folder = base / "Pictures" / ("2019/Paris (spring)" if n % 2 else "2021")
        folder.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[ExifTags.Base.Make], exif[ExifTags.Base.Model] = ("Canon", "EOS 80D") if n % 2 else ("Apple", "iPhone 12")
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = f"{2019 if n % 2 else 2021}:0{n + 1}:11 10:00:00"
        place = exif.get_ifd(ExifTags.IFD.GPSInfo)
        place[1], place[2], place[3], place[4] = (
            ("N", (48, 51, 0), "E", (2, 21, 0)) if n % 2 else ("S", (33, 52, 0), "E", (151, 12, 0))
        )
        with Image.open(SAMPLES / f"{name}.jpg") as image:
            image.convert("RGB").save(folder / f"{name}.jpg", quality=92, exif=exif)
    cat = base / "Pictures/2021/cat.jpg"
    shutil.copy(cat, base / "Pictures" / EVIL)
    with Image.open(cat) as image:
        image.save(base / "Pictures/cat again.jpg", quality=50)
    (base / "Pictures/broken.jpg").write_bytes(cat.read_bytes()[:900])
    (base / "texts.txt").write_text(f"{TEXT}\na photo of the moon\n")
    for arguments in (("Pictures",), ("texts.txt", "--kind", "text"), ("texts.txt", "--kind", "rendered")):
        run("index", base / arguments[0], *arguments[1:], "-c", base / "collection", "--quiet")
    return base / "collection"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Served:
    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.address = server.address.rstrip("/")
        self.host = urlsplit(self.address).netloc

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection(self.host, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, headers: dict[str, str] | None = None, **parameters: Any) -> Answer:
        return self.ask("GET", f"{path}?{urlencode(parameters, doseq=True)}" if parameters else path, headers=headers)

    def post(self, path: str, picture: bytes | None = None, **fields: Any) -> Answer:
        body, kind = form(picture, **fields)
        return self.ask("POST", path, body, {"Content-Type": kind})


def form(picture: bytes | None = None, part: str = "image", **fields: Any) -> tuple[bytes, str]:
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, values in fields.items()
        for value in (values if isinstance(values, list) else [values])
    ]
    if picture is not None:
        head = f'--x\r\nContent-Disposition: form-data; name="{part}"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
        parts.append(head.encode() + picture + b"\r\n")
    return b"".join(parts) + b"--x--\r\n", "multipart/form-data; boundary=x"


@contextmanager
def serving(folder: Path, **options: Any) -> Iterator[Served]:
    """The service of the collection in `folder`, in a thread of this process."""
    server = Server(folder, ModelChoice(), port=0, **options)
    up = threading.Event()
    thread = threading.Thread(target=server.run, args=(up.set,))
    thread.start()
    try:
        assert up.wait(60)
        yield Served(server, folder)
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()


def wait_for(truth: Any, seconds: float = 60) -> Any:
    """What `truth()` gives as soon as that is something."""
    end = time.monotonic() + seconds
    while not (found := truth()):
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)
    return found


def jpeg(width: int = 64, height: int = 48, seed: int = 0) -> bytes:
    from pictures import encoded

    return encoded(photo(width, height, seed), "JPEG")
