"""`search` asks the service that runs beside a collection, and does the work itself whenever that is not as it should be."""

import json
import os
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from serving import Served, nearly, serving
from test_cli_help import modules_after

from e5v_search.collection import Collection
from e5v_search.query import Query
from e5v_search.web import client

WANTED: Any = {"k": 5, "threshold": None, "keep_reference": False, "explain": False}


def asked_of_the_service(served: Served) -> int:
    for line in served.get("/metrics").body.decode().splitlines():
        if line.startswith("e5v_search_local_questions_total"):
            return int(line.split()[1])
    return 0


QUESTIONS = [
    ["a cat"],
    ["a dog", "--plus", "snow:0.5", "--minus", "image:1", "--where", "kind=image", "-k", "3"],
    ["--image", "{cat}"],
    ["--image", "{cat}", "--modify", "at night"],
    ["--image", "1", "--modify", "at night", "--keep-reference", "--threshold", "0.1"],
    ["a cat", "--explain", "-k", "2", "--prompts", "sts"],
]


@pytest.mark.parametrize("arguments", QUESTIONS, ids=str)
def test_the_answer_is_the_same(served: Served, arguments: list[str]) -> None:
    cat = str(served.folder.parent / "Pictures/2021/cat.jpg")
    arguments = [*(each.format(cat=cat) for each in arguments), "-c", str(served.folder)]
    before = asked_of_the_service(served)
    warm = run("search", *arguments, "--json")
    assert asked_of_the_service(served) == before + 1
    cold = run("search", *arguments, "--json", "--no-service")
    assert asked_of_the_service(served) == before + 1
    answers = [json.loads(each.stdout) for each in (warm, cold)]
    for answer in answers:
        del answer["took_ms"]
    assert answers[0] == nearly(answers[1])
    for shape in (["--csv"], ["--paths"], ["--thumbnails", "never"]):
        assert run("search", *arguments, *shape).exit_code == 0


def test_a_warm_search_loads_nothing_heavy(served: Served) -> None:
    command = ["search", "a cat", "-c", str(served.folder)]
    loaded = modules_after(f"from e5v_search.cli import cli\ntry: cli({command!r})\nexcept SystemExit: pass")
    assert "click" in loaded
    assert not loaded & {"numpy", "torch", "faiss", "PIL", "sqlite3", "sqlite_utils", "fastapi", "uvicorn", "transformers"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "e5v-tiny"],
        ["--dtype", "float32"],
        ["--allow-mismatch"],
        ["--no-service"],
        ["--where", "folder=./Pictures or kind=image"],
        ["--where", 'folder="~/Pictures"|2021'],
    ],
    ids=str,
)
def test_what_it_might_answer_otherwise_is_not_asked(served: Served, arguments: list[str]) -> None:
    before = asked_of_the_service(served)
    assert run("search", "a cat", "-c", served.folder, *arguments).exit_code == 0
    assert asked_of_the_service(served) == before


def test_errors_are_those_of_a_search_without_it(served: Served) -> None:
    for arguments in (["a cat", "--where", "kinds=image"], ["--image", "98765"], ["word " * 20_000]):
        warm, cold = (run("search", *arguments, "-c", served.folder, *more) for more in ([], ["--no-service"]))
        assert (warm.exit_code, warm.output) == (cold.exit_code, cold.output)
        assert warm.exit_code == 2


@pytest.fixture
def folder(gallery: Path, tmp_path: Path) -> Path:
    shutil.copytree(gallery, tmp_path / "c", ignore=shutil.ignore_patterns("*.sock*"))
    return tmp_path / "c"


def test_the_socket_is_ours_alone_and_goes_with_the_service(folder: Path) -> None:
    with serving(folder) as served:
        status = (folder / client.NAME).stat()
        assert status.st_mode & 0o777 == 0o600
        with serving(folder) as second:  # leaves the socket to the first
            assert run("search", "a cat", "-c", folder).exit_code == 0
            assert (asked_of_the_service(served), asked_of_the_service(second)) == (1, 0)
        assert (folder / client.NAME).exists()
    assert not (folder / client.NAME).exists()


def test_a_dead_socket_is_taken_away(folder: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(folder / client.NAME))
    (folder / client.NAME).chmod(0o600)
    left.close()
    assert client.ask(folder, Query("a cat"), **WANTED) is None
    assert not (folder / client.NAME).exists()
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(folder / client.NAME))
    left.close()
    with serving(folder):  # as after a kill
        assert client.ask(folder, Query("a cat"), **WANTED)


def test_another_users_or_an_open_socket_is_not_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(folder) as served:
        assert client.ask(folder, Query("a cat"), **WANTED)
        with monkeypatch.context() as patch:
            patch.setattr(os, "geteuid", lambda: 4242)
            assert client.ask(folder, Query("a cat"), **WANTED) is None
        (folder / client.NAME).chmod(0o666)
        assert client.ask(folder, Query("a cat"), **WANTED) is None
        (folder / client.NAME).chmod(0o600)
        monkeypatch.setattr(client, "peer_is_ours", lambda connection: False)  # what either end is told of the other
        assert client.ask(folder, Query("a cat"), **WANTED) is None
        assert asked_of_the_service(served) == 1


def test_another_version_catalog_or_picture_is_refused(
    folder: Path, gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "a.jpg"
    shutil.copy(gallery.parent / "Pictures/2021/cat.jpg", picture)
    with serving(folder) as served:
        assert client.ask(folder, Query(image=str(picture)), **WANTED)
        with monkeypatch.context() as patch:
            patch.setattr(client, "__version__", "0.0.0")
            assert client.ask(folder, Query("a cat"), **WANTED) is None
        with monkeypatch.context() as patch:
            patch.setattr(client, "_encoded_input", lambda given: {"image": {"path": str(picture), "signature": [1, 2, 3, 4]}})
            assert client.ask(folder, Query(image=str(picture)), **WANTED) is None
        with monkeypatch.context() as patch:
            real = client.identity
            asking = threading.get_ident()
            patch.setattr(client, "identity", lambda path: [0, 0] if threading.get_ident() == asking else real(path))
            assert client.ask(folder, Query("a cat"), **WANTED) is None
        assert client.ask(folder, Query(image=str(tmp_path / "none.jpg")), **WANTED) is None
        assert asked_of_the_service(served) == 1


@pytest.mark.parametrize(
    "answer", [b"", b"\n", b"nonsense\n", b"[]\n", b'{"hits": 1}\n', b'{"hits": [{"rank": 1}]}\n', b'{"hits": []', b"\xff\n"]
)
def test_nonsense_from_the_other_end_is_no_answer(folder: Path, answer: bytes) -> None:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(folder / client.NAME))
    (folder / client.NAME).chmod(0o600)
    listening.listen()

    def reply() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.makefile("rb").readline()
            connection.sendall(answer)

    thread = threading.Thread(target=reply)
    thread.start()
    try:
        assert client.ask(folder, Query("a cat"), **WANTED) is None
    finally:
        thread.join()
        listening.close()


@pytest.mark.parametrize("question", [b"\n", b"nonsense\n", b"[]\n", b"{}\n", b'{"version": 1}\n', b"x" * 2_000_000 + b"\n"])
def test_nonsense_to_the_service_harms_nobody(served: Served, question: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(served.folder / client.NAME))
        try:
            connection.sendall(question)
            answer = connection.makefile("rb").readline()
        except ConnectionError:
            answer = b""
    assert answer == b"" or "refused" in json.loads(answer)
    assert client.ask(served.folder, Query("a cat"), **WANTED)


def test_hits_are_whole(served: Served) -> None:
    found = client.ask(served.folder, Query("a cat"), **WANTED)
    with Collection.open(served.folder) as source:
        expected = source.search("a cat", k=5)
    assert found is not None
    assert [hit.id for hit in found] == [hit.id for hit in expected]
    assert [type(hit) for hit in found] == [type(hit) for hit in expected]
    assert (found.query, found.fingerprint) == (expected.query, expected.fingerprint)


def test_a_path_too_long_for_a_socket_is_no_harm(gallery: Path, tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 60) / ("y" * 60)
    shutil.copytree(gallery, deep, ignore=shutil.ignore_patterns("*.sock*"))
    with serving(deep) as served:
        assert served.get("/api/search", q="a cat").status == 200
        assert client.ask(deep, Query("a cat"), **WANTED) is None
        assert run("search", "a cat", "-c", deep).exit_code == 0
