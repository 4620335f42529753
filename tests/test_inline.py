"""Thumbnails in a terminal: the program runs in a pseudo-terminal, and what it draws is decoded back into pictures."""

import base64
import fcntl
import io
import os
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pictures
import pytest
from command_line import run, write_opener
from PIL import Image

from e5v_search.cli import inline
from e5v_search.cli.inline import thumbnails

ROOT = Path(__file__).parent.parent
CELL = (10, 20)
HEIGHT = inline.ROWS * CELL[1]
WITH_SIXEL, WITHOUT_SIXEL = b"\x1b[?62;4;22c", b"\x1b[?62;22c"
SEARCH = ("search", "--image", "1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    base = tmp_path_factory.mktemp("inline")
    (base / "photos").mkdir()
    shutil.copy(ROOT / "e5v_search/samples/cat.jpg", base / "photos/0.jpg")
    shutil.copy(ROOT / "e5v_search/samples/astronaut.jpg", base / "photos/1.jpg")
    pictures.photo(2000, 40).save(base / "photos/2.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("E5V_HOME", str(base / "home"))
        patch.chdir(base)
        assert run("index", "photos").exit_code == 0
        yield base


class Terminal:
    """A terminal of 80×24 characters around one process; it answers the question for its device attributes."""

    def __init__(self, answer: bytes | None = None, pixels: tuple[int, int] = (80 * CELL[0], 24 * CELL[1]), **env: str) -> None:
        self.answer, self.pixels, self.env = answer, pixels, env

    def output(self, *args: str, program: str = "from e5v_search.cli import main; main()") -> bytes:
        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, *self.pixels))
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "E5V_HOME", "OMP_NUM_THREADS") if name in os.environ}
        code = f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); {program}"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *args],
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            env={**inherited, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **self.env},
            start_new_session=True,
        )
        os.close(theirs)
        got, end = b"", time.monotonic() + 60
        while time.monotonic() < end and select.select([ours], [], [], 60)[0]:
            try:
                data = os.read(ours, 1 << 16)
            except OSError:  # how Linux says that the other side has closed
                break
            if not data:
                break
            got += data
            if b"\x1b[c" in data and self.answer:
                os.write(ours, self.answer)
        os.close(ours)
        errors = process.communicate(timeout=10)[1]
        assert process.returncode == 0, errors
        return got.replace(b"\r\n", b"\n")


KITTY = re.compile(rb"\x1b_G([^;]*);([^\x1b]*)\x1b\\")
ITERM = re.compile(rb"\x1b\]1337;File=([^:]*):([^\x07]*)\x07")
SIXEL = re.compile(rb"\x1bP[\d;]*q(.*?)\x1b\\", re.DOTALL)


def from_kitty(output: bytes) -> list[Image.Image]:
    found, data = [], b""
    for keys, chunk in KITTY.findall(output):
        assert len(chunk) <= 4096
        assert data or keys.startswith(b"a=T,f=100,q=2,")
        data += chunk
        if keys.endswith(b"m=0"):
            found.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))
            data = b""
    assert data == b""
    return found


def from_iterm(output: bytes) -> list[Image.Image]:
    found = []
    for arguments, data in ITERM.findall(output):
        png = base64.b64decode(data, validate=True)
        values = dict(pair.split(b"=") for pair in arguments.split(b";"))
        assert (values[b"inline"], int(values[b"size"])) == (b"1", len(png))
        found.append(Image.open(io.BytesIO(png)))
        assert found[-1].height == int(values[b"height"]) * CELL[1]
    return found


def from_sixel(output: bytes) -> list[Image.Image]:
    return [sixel_picture(body) for body in SIXEL.findall(output)]


def sixel_picture(body: bytes) -> Image.Image:
    """A decoder of what DEC describes: colour registers, repeats, carriage returns and new lines."""
    width, height = map(int, re.match(rb'"1;1;(\d+);(\d+)', body).groups())
    canvas = np.zeros((height + 6, width, 4), np.uint8)
    registers: dict[int, tuple[int, ...]] = {}
    x = y = colour = 0
    tokens = re.compile(rb"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|!(\d+)([?-~])|([?-~])|([$-])")
    body = body[body.index(b"#") :]
    at = 0
    while at < len(body):
        match = tokens.match(body, at)
        assert match, body[at : at + 20]
        at = match.end()
        register, r, g, b, chosen, times, repeated, single, move = match.groups()
        if register:
            registers[int(register)] = tuple(round(int(value) * 255 / 100) for value in (r, g, b))
        elif chosen:
            colour = int(chosen)
        elif move:
            x, y = 0, y + (6 if move == b"-" else 0)
        else:
            bits, n = (repeated or single)[0] - 63, int(times or 1)
            for row in range(6):
                if bits >> row & 1:
                    canvas[y + row, x : x + n] = (*registers[colour], 255)
            x += n
            assert x <= width
    assert (canvas[:height, :, 3] == 255).all()
    assert not canvas[height:].any()
    return Image.fromarray(canvas[:height, :, :3])


def difference(a: Image.Image, b: Image.Image) -> float:
    """Mean over what an eye sees from afar."""
    assert a.size == b.size
    small = (a.width // 4 + 1, a.height // 4 + 1)
    near = [np.asarray(each.convert("RGB").resize(small, Image.Resampling.BOX), float) for each in (a, b)]
    return float(np.abs(near[0] - near[1]).mean())


def without_pictures(output: bytes) -> bytes:
    for pattern in (KITTY, ITERM, SIXEL):
        output = pattern.sub(b"", output)
    return output.replace(b"   \n", b"")


TERMINALS = {
    "kitty": (from_kitty, Terminal(TERM="xterm-kitty")),
    "kitty under another name": (from_kitty, Terminal(KITTY_WINDOW_ID="1")),
    "ghostty": (from_kitty, Terminal(TERM="xterm-ghostty", TERM_PROGRAM="ghostty")),
    "konsole": (from_kitty, Terminal(KONSOLE_VERSION="230804")),
    "iterm": (from_iterm, Terminal(TERM_PROGRAM="iTerm.app")),
    "iterm over ssh": (from_iterm, Terminal(LC_TERMINAL="iTerm2")),
    "wezterm started from kitty": (from_iterm, Terminal(TERM_PROGRAM="WezTerm", KITTY_WINDOW_ID="1")),
    "foot": (from_sixel, Terminal(WITH_SIXEL, TERM="foot")),
    "tmux with sixel, in kitty": (from_sixel, Terminal(WITH_SIXEL, TERM="tmux-256color", TMUX="1", KITTY_WINDOW_ID="1")),
}


@pytest.mark.parametrize("name", TERMINALS)
def test_a_terminal_gets_the_pictures_in_its_protocol(place: Path, name: str) -> None:
    decode, terminal = TERMINALS[name]
    output = terminal.output(*SEARCH)
    found = decode(output)
    listed = [int(n) for n in re.findall(rb"photos/(\d)\.jpg", output)]
    assert sorted(listed) == [0, 1, 2]
    assert len(found) == 3
    for n, drawn in zip(listed, found, strict=True):
        with Image.open(place / f"photos/{n}.jpg") as photo:
            if n == 2:  # too wide for six rows of text
                assert drawn.size == (77 * CELL[0], CELL[1])
            else:
                assert abs(drawn.width - HEIGHT * photo.width / photo.height) <= 1
                assert drawn.height == HEIGHT
                assert difference(photo.convert("RGB").resize(drawn.size, Image.Resampling.LANCZOS), drawn) < 4
    plain = run(*SEARCH).stdout.encode()
    assert re.sub(rb"\x1b(\[[\d;?]*[A-Za-z])", b"", without_pictures(output)) == plain
    assert len(re.findall(rb"\.jpg(?:\x1b\[0m)?\n   (?=\x1b[_\]P])", output)) == 3  # each below its line


PLAIN = {
    "xterm without sixel": Terminal(WITHOUT_SIXEL),
    "a terminal that does not answer": Terminal(None),
    "an old konsole": Terminal(WITHOUT_SIXEL, KONSOLE_VERSION="191203"),
    "tmux in kitty": Terminal(WITHOUT_SIXEL, TERM="tmux-256color", TMUX="1", KITTY_WINDOW_ID="1"),
    "screen in iTerm": Terminal(WITHOUT_SIXEL, TERM="screen.xterm-256color", STY="1", TERM_PROGRAM="iTerm.app"),
    "an editor's shell": Terminal(None, TERM="dumb", KITTY_WINDOW_ID="1"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_other_terminals_get_none(place: Path, name: str) -> None:
    output = PLAIN[name].output(*SEARCH)
    assert b"photos/0.jpg" in output
    assert not any(sign in output for sign in (b"\x1b_", b"\x1b]", b"\x1bP"))
    assert (b"\x1b[c" in output) is (name != "an editor's shell")


@pytest.mark.parametrize("flags", [["--json"], ["--csv"], ["--paths"], ["--thumbnails", "never"]])
def test_what_programs_read_has_no_pictures(place: Path, flags: list[str]) -> None:
    output = Terminal(WITH_SIXEL, TERM="xterm-kitty").output(*SEARCH, *flags)
    assert b"photos/0.jpg" in output
    assert b"\x1b_" not in output
    assert b"\x1b[c" not in output
    if flags[0].startswith(("--json", "--csv", "--paths")):
        assert output == run(*SEARCH, *flags, "--thumbnails", "kitty").stdout_bytes or flags == ["--json"]


def test_no_terminal_no_pictures_unless_asked_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-kitty")
    assert b"\x1b" not in run(*SEARCH).stdout_bytes
    for mode, decode in {"kitty": from_kitty, "iterm": from_iterm, "sixel": from_sixel}.items():
        assert len(decode(run(*SEARCH, "--thumbnails", mode).stdout_bytes)) == 3


def test_typed_ahead_keys_and_the_terminals_mode_survive_the_question(place: Path) -> None:
    program = (
        "import sys, termios, os; from e5v_search.cli.inline import thumbnails; before = termios.tcgetattr(0); "
        "draw = thumbnails('auto', sys.stdout); print(draw, termios.tcgetattr(0) == before, flush=True)"
    )
    assert b" True\n" in Terminal(WITH_SIXEL).output(program=program)
    typed = program.replace("draw =", "os.write(1, b'\\x1b[c'); print(input('? ')); draw =")  # the terminal types first
    assert b"None True\n" in Terminal(b"ab\ncd\n").output(program=typed)


def test_a_terminal_that_does_not_know_its_pixels_is_taken_for_an_ordinary_one(place: Path) -> None:
    [first, *_] = from_kitty(Terminal(pixels=(0, 0), TERM="xterm-kitty").output(*SEARCH))
    assert first.height == HEIGHT


def test_a_file_that_cannot_be_read_is_not_drawn(tmp_path: Path) -> None:
    draw = thumbnails("sixel", io.StringIO())
    assert draw is not None
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    assert draw(tmp_path / "bad.jpg") == draw(tmp_path / "none.jpg") == b""


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (96, 64)])
@pytest.mark.parametrize("mode", inline.PROTOCOLS)
def test_any_shape_is_drawn_inside_the_terminal(tmp_path: Path, size: tuple[int, int], mode: str) -> None:
    draw = thumbnails(mode, io.StringIO())
    assert draw is not None
    pictures.quarters(*size).save(tmp_path / "p.png")
    [drawn] = {"kitty": from_kitty, "iterm": from_iterm, "sixel": from_sixel}[mode](draw(tmp_path / "p.png"))
    assert drawn.width <= 77 * CELL[0]
    assert drawn.height <= HEIGHT
    assert drawn.height % CELL[1] == 0


@pytest.fixture
def opener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that opens files by writing their names down."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return write_opener(tmp_path / "bin")


def opened(opener: Path) -> list[str]:
    end = time.monotonic() + 10
    while not opener.exists() and time.monotonic() < end:
        time.sleep(0.01)
    return opener.read_text().splitlines()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the system itself opens files")
class TestOpen:
    def test_the_best_result_is_opened(self, place: Path, opener: Path) -> None:
        assert run(*SEARCH, "--open", "--json").exit_code == 0
        assert opened(opener) == [str(place / "photos/0.jpg")]

    def test_nothing_found_nothing_opened(self, place: Path, opener: Path) -> None:
        result = run(*SEARCH, "--modify", "a car", "--threshold", "1", "--open")
        assert (result.exit_code, result.stdout) == (0, "")
        assert not opener.exists()

    def test_without_a_program_the_results_come_all_the_same(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(place / "empty"))
        result = run(*SEARCH, "--open")
        assert result.exit_code == 3
        assert "photos/1.jpg" in result.stdout
        assert "photos/0.jpg cannot be opened: no program here does it" in result.stderr

    def test_a_file_that_is_gone_is_named(self, place: Path, opener: Path) -> None:
        (place / "photos/0.jpg").rename(place / "away.jpg")
        try:
            result = run(*SEARCH, "--open")
        finally:
            (place / "away.jpg").rename(place / "photos/0.jpg")
        assert result.exit_code == 3
        assert "photos/0.jpg cannot be opened: it is not there" in result.stderr
        assert not opener.exists()


def test_an_unknown_protocol_is_refused() -> None:
    assert "'auto', 'never', 'kitty', 'iterm', 'sixel'" in run("search", "x", "--thumbnails", "gif").stderr
