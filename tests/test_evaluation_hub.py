"""Revisions of the hub's data sets: the real library against a small hub of our own on this machine."""

import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from command_line import refused
from PIL import Image

from e5v_search.evaluation.read_hub import CIRR

REPOSITORY, FILE = "royokong/coco_test", "data/test-00000.parquet"
OLD, NEW = "b" * 40, "a" * 40
COMMITS = {"main": NEW, "v1": OLD, OLD: OLD, NEW: NEW}


def parquet(caption: str) -> bytes:
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    picture, out = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(picture, "PNG")
    columns = {"text": [[caption]], "image": [{"bytes": picture.getvalue(), "path": None}]}
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).to_parquet(out)
    return out.getvalue()


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """The address of a hub with one data set, whose captions are "old" at v1 and "new" since."""
    files = {OLD: parquet("old"), NEW: parquet("new")}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(*self.found(self.path.partition("?")[0]))

        def found(self, path: str) -> tuple[Any, int, dict[str, str]]:
            match = re.fullmatch(rf"/(?:api/)?datasets/{REPOSITORY}(?:/(resolve|revision|tree)/(\w+)(?:/(.*))?)?", path)
            what, name, file = match.groups() if match else (None, "none", None)
            commit = COMMITS.get(name or "main")
            if commit is None:
                return b"", 404, {"X-Error-Code": "RevisionNotFound"}
            headers = {"X-Repo-Commit": commit, "ETag": f'"{commit}"'}
            if what == "resolve":
                return (
                    (files[commit], 200, headers) if file == FILE else (b"", 404, headers | {"X-Error-Code": "EntryNotFound"})
                )
            if what == "tree" and file == "data":
                return [{"type": "file", "path": FILE, "size": len(files[commit]), "oid": "0" * 40}], 200, {}
            if what == "tree":
                return [{"type": "directory", "path": "data", "oid": "1" * 40}], 200, {}
            return {"id": REPOSITORY, "sha": commit, "siblings": [{"rfilename": FILE}]}, 200, {}

        do_HEAD = do_GET

        def reply(self, content: Any, status: int, headers: dict[str, str]) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


PROGRAM = """
import sys
from e5v_search.errors import DataError
from e5v_search.evaluation.read_hub import COCO
for revision in sys.argv[1:]:
    try:
        loaded = COCO({"royokong/coco_test": revision} if revision else {})
        print(loaded.revision, loaded.data.captions[0].text)
    except DataError as error:
        print(error)
"""


def read(hub: str, home: Path, *revisions: str, offline: str = "0") -> list[str]:
    """A line for each revision, read in a process of its own: its name and its caption, or why it cannot be had."""
    place = {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_OFFLINE": offline, "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", PROGRAM, *revisions]
    done = subprocess.run(
        command, env=os.environ | place, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    return done.stdout.splitlines()


def test_revision_is_read_and_named_by_its_commit(hub: str, tmp_path: Path) -> None:
    tagged, now, by_commit, unknown = read(hub, tmp_path, "v1", "", OLD, "v2")
    assert tagged == by_commit == f"{REPOSITORY}@{OLD} old"
    assert now == f"{REPOSITORY}@{NEW} new"
    assert unknown.startswith(f"{REPOSITORY}@v2 could not be had from the hub (Revision 'v2' doesn't exist")
    # without a network the library takes a copy that it has, which must not pass for another
    copy, other = read(hub, tmp_path, "", "v2", offline="1")
    assert copy in (now, tagged)
    assert other.startswith(f"{REPOSITORY}@v2 could not be had from the hub (only {copy.split()[0]} is on this machine)")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["coco", "--revision", "main"], "--revision main: a repository, @, and a commit, tag or branch are needed"),
        (["coco", "--revision", "royokong/coco_test@"], "a repository, @, and a commit"),
        (["coco", "--data", ".", "--revision", "royokong/coco_test@main"], "coco is not read from there"),
        (["scenes", "--revision", "royokong/coco_test@main"], "scenes is not read from there"),
        (["cirr", "--revision", "royokong/cirr@x"], "repositories here are royokong/cirr_val and royokong/cirr_imgs"),
    ],
)
def test_revisions_that_are_refused(words: list[str], line: str) -> None:
    assert line in refused(2, "eval", *words, "--model", "no/such")


def test_each_repository_has_its_own_revision() -> None:
    asked = []

    def open_(repository: str, split: str, revision: str | None) -> tuple[Any, str]:
        asked.append((repository, split, revision))
        columns = {"caption": ["bluer"], "candidate_id": ["p"], "target_id": ["p"], "id": ["p"]}
        return datasets.Dataset.from_dict(columns), f"commit of {repository}"

    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    loaded = CIRR({"royokong/cirr_imgs": "v1"}, open_)
    assert asked == [("royokong/cirr_val", "val", None), ("royokong/cirr_imgs", "val", "v1")]
    assert loaded.revision == "royokong/cirr_val@commit of royokong/cirr_val, royokong/cirr_imgs@commit of royokong/cirr_imgs"
