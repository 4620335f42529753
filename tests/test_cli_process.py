"""The command line as a process: signals, pipes, terminals, and two of them on one collection."""

import json
import os
import pty
import re
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import refused, run, start, write_photos

PHOTOS = 400  # more than any machine embeds before the signal comes


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("E5V_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def indexing(home: Path, tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """An `index` of PHOTOS photos that has committed some of them and goes on."""
    write_photos(tmp_path / "photos", PHOTOS)
    process = start("index", tmp_path / "photos")
    try:
        deadline = time.monotonic() + 120
        while not kept(home):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.communicate()


def kept(home: Path) -> int:
    catalog = home / "default/catalog.sqlite"
    if not catalog.exists():
        return 0
    db = sqlite3.connect(f"file:{catalog}?mode=ro", uri=True)
    try:
        return int(db.execute("SELECT count(*) FROM vectors").fetchone()[0])
    finally:
        db.close()


def stopped(process: "subprocess.Popen[bytes]", signum: int) -> int:
    """Send a signal -> how many photos the process says are kept, in its one line."""
    process.send_signal(signum)
    stdout, stderr = (data.decode() for data in process.communicate(timeout=60))
    lines = [line for line in stderr.splitlines() if not re.match(r"model auto:|\d+ of \d+ photos", line)]
    assert process.returncode == 130
    assert stdout == ""
    assert len(lines) == 1, lines
    said = re.fullmatch(r"stopped; (\d+) photos? kept in .*, and the same command goes on from there", lines[0])
    assert said, lines
    return int(said[1])


def test_a_stopped_index_keeps_what_is_done(indexing: "subprocess.Popen[bytes]", home: Path, tmp_path: Path) -> None:
    committed = kept(home)
    assert committed <= stopped(indexing, signal.SIGINT) == kept(home) < PHOTOS
    assert run("verify").stdout == "no errors\n"

    # of the photos that were not reached two remain: the next run embeds these and nothing else
    db = sqlite3.connect(home / "default/catalog.sqlite")
    done = {path for (path,) in db.execute("SELECT path FROM files")}
    db.close()
    others = [path for path in sorted((tmp_path / "photos").iterdir()) if str(path) not in done]
    for path in others[2:]:
        path.unlink()
    report = json.loads(run("index", tmp_path / "photos", "--json").stdout)
    assert (report["added"], report["unchanged"], report["failed"]) == (min(2, len(others)), len(done), [])


def test_an_impatient_user_is_obeyed(indexing: "subprocess.Popen[bytes]", home: Path) -> None:
    for _ in range(3):
        indexing.send_signal(signal.SIGINT)
        time.sleep(0.02)
    indexing.communicate(timeout=60)
    assert indexing.returncode == 130
    assert run("verify").stdout == "no errors\n"


def test_a_second_index_is_refused_and_a_search_works(indexing: "subprocess.Popen[bytes]", home: Path, tmp_path: Path) -> None:
    said = refused(3, "index", tmp_path / "photos")
    assert f"process {indexing.pid} is writing to" in said
    hits = json.loads(run("search", "--image", tmp_path / "photos/0000.jpg", "-k", "1", "--json").stdout)["hits"]
    assert [(hit["path"], hit["score"] > 0.999) for hit in hits] == [(str(tmp_path / "photos/0000.jpg"), True)]
    assert indexing.poll() is None
    assert stopped(indexing, signal.SIGTERM) == kept(home)


def test_a_reader_that_leaves_is_no_error(home: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 1)
    run("index", tmp_path / "photos")
    for command in (["status"], ["search", "--image", "1", "--paths"], ["search", "--image", "1"], ["verify", "--json"]):
        process = start(*command)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0
        process.stderr.close()


def on_terminal(*args: str | Path) -> tuple[str, str]:
    """(stdout, what a terminal on stderr receives) of a command."""
    ours, theirs = pty.openpty()
    process = start(*args, stderr=theirs, env=os.environ | {"TERM": "xterm", "COLUMNS": "100"})
    os.close(theirs)
    received = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not data:
            break
        received += data
    os.close(ours)
    assert process.stdout is not None
    with process:
        return process.stdout.read().decode(), received.decode()


def test_a_terminal_sees_a_bar_and_a_pipe_does_not(home: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 3)
    stdout, seen = on_terminal("index", tmp_path / "photos")
    assert stdout.startswith("added 3 in ")
    assert "━" in seen
    assert "3 of 3 photos" in seen
    assert "model auto: the small bundled e5v-tiny" in seen
    stdout, seen = on_terminal("index", tmp_path / "photos", "--quiet")
    assert (stdout, seen) == ("", "")
    piped, stderr = start("index", tmp_path / "photos").communicate()
    assert piped.startswith(b"added 0, unchanged 3 in ")
    assert stderr == b""
