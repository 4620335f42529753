"""Thumbnails between the lines of a listing, in terminals that show pictures.

Three protocols are in use: kitty's (kitty, ghostty, Konsole, Warp), iTerm2's (also WezTerm, mintty, Rio) and sixel (foot,
xterm, mlterm, tmux and others). A terminal is known by its environment variables, one with sixel by its answer to the
question for its device attributes. Within tmux and the like only that answer counts: the variables there are those of a
terminal that does not get to see what is printed.
"""

import base64
import io
import os
import re
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

if TYPE_CHECKING:
    from PIL import Image

PROTOCOLS = ("kitty", "iterm", "sixel")
MODES = ("auto", "never", *PROTOCOLS)
ROWS = 6  # of text, as high as a thumbnail is
_INDENT = b"   "
_PATIENCE = 0.5  # seconds that a terminal has for its answer
_COLOURS = 256  # registers that terminals with sixel have

_BY_TERM = {"xterm-kitty": "kitty", "xterm-ghostty": "kitty"}
_BY_PROGRAM = {
    "ghostty": "kitty",
    "WarpTerminal": "kitty",
    "iTerm.app": "iterm",
    "iTerm2": "iterm",
    "WezTerm": "iterm",
    "mintty": "iterm",
    "rio": "iterm",
}


class _Screen(NamedTuple):
    columns: int
    cell: tuple[int, int]  # width and height of a character in pixels


def thumbnails(mode: str, stream: TextIO) -> Callable[[Path], bytes] | None:
    """-> what makes of a picture file the bytes that draw it in `stream`, in lines of its own; None if none are to be drawn.

    `mode` is one of MODES; `auto` draws only in a terminal that can, the name of a protocol draws in it whatever `stream` is.
    A file that cannot be read gives no bytes.
    """
    protocol = _spoken(stream) if mode == "auto" else mode
    if protocol not in PROTOCOLS:
        return None
    screen = _screen(stream)

    def draw(path: Path) -> bytes:
        from PIL import Image

        try:
            with Image.open(path) as image:
                rows, small = _fitted(image.convert("RGB"), screen)
        except Exception:  # missing, or anything that damaged bytes make a decoder raise
            return b""
        if protocol == "sixel":
            drawn = _sixel(small)
        else:
            png = io.BytesIO()
            small.save(png, "PNG")
            drawn = _kitty(png.getvalue()) if protocol == "kitty" else _iterm(png.getvalue(), rows)
        return _INDENT + drawn + b"\n"

    return draw


def _spoken(stream: TextIO) -> str | None:
    """The protocol of the terminal that `stream` writes to, or None."""
    env = os.environ
    term = env.get("TERM", "")
    if not stream.isatty() or term in ("", "dumb"):
        return None
    if not ({"TMUX", "STY", "ZELLIJ"} & env.keys() or term.startswith(("screen", "tmux"))):
        program = env.get("TERM_PROGRAM") or env.get("LC_TERMINAL")  # the latter is what ssh passes on
        if known := _BY_TERM.get(term) or _BY_PROGRAM.get(program or ""):
            return known
        # what is started from kitty or Konsole has their variables too, another terminal as well
        if not program and ("KITTY_WINDOW_ID" in env or _number(env.get("KONSOLE_VERSION")) >= 220400):
            return "kitty"
    return "sixel" if 4 in _device_attributes() else None


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


def _device_attributes() -> set[int]:
    """What the terminal of this process says it can (DA1); empty if it says nothing."""
    if sys.platform == "win32":
        return set()
    import termios
    import tty

    try:
        fd = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    except OSError:
        return set()
    try:
        # a job in the background must not touch the terminal, and what was typed ahead is not ours to read
        if os.tcgetpgrp(fd) != os.getpgrp() or select.select([fd], [], [], 0)[0]:
            return set()
        before = termios.tcgetattr(fd)
        try:
            tty.setcbreak(fd, termios.TCSADRAIN)
            os.write(fd, b"\x1b[c")
            return _answer(fd)
        finally:
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
    except (OSError, termios.error):
        return set()
    finally:
        os.close(fd)


def _answer(fd: int) -> set[int]:
    got, end = b"", time.monotonic() + _PATIENCE
    while select.select([fd], [], [], max(0, end - time.monotonic()))[0]:
        got += os.read(fd, 64)
        if answer := re.search(rb"\x1b\[\?([\d;]*)c", got):
            return {int(number) for number in answer[1].split(b";") if number}
    return set()


def _screen(stream: TextIO) -> _Screen:
    """What the terminal says of its size, or the size of an ordinary one."""
    rows = columns = width = height = 0
    if sys.platform != "win32":
        import fcntl
        import struct
        import termios

        try:
            size = fcntl.ioctl(stream.fileno(), termios.TIOCGWINSZ, bytes(8))
            rows, columns, width, height = struct.unpack("HHHH", size)
        except OSError:  # no terminal, or a stream without a file
            pass
    cell = (width // columns, height // rows) if rows and columns else (0, 0)
    return _Screen(columns or 80, cell if min(cell) >= 4 else (10, 20))


def _fitted(image: "Image.Image", screen: _Screen) -> tuple[int, "Image.Image"]:
    """The picture as high as some whole rows of text, ROWS unless that is too wide; and how many."""
    from PIL import Image

    width, height = screen.cell
    room = max(1, screen.columns - len(_INDENT)) * width
    aspect = image.width / image.height
    rows = max(1, min(ROWS, int(room / (height * aspect))))
    size = (min(room, max(1, round(rows * height * aspect))), rows * height)
    return rows, image.resize(size, Image.Resampling.LANCZOS)


def _kitty(png: bytes) -> bytes:
    """https://sw.kovidgoyal.net/kitty/graphics-protocol: transmit and show (a=T) a PNG (f=100), without an answer (q=2)."""
    data = base64.b64encode(png)
    chunks = [data[at : at + 4096] for at in range(0, len(data), 4096)]
    keys = [b"a=T,f=100,q=2,", *[b""] * (len(chunks) - 1)]
    return b"".join(
        b"\x1b_G%sm=%d;%s\x1b\\" % (key, n < len(chunks), chunk)
        for n, (key, chunk) in enumerate(zip(keys, chunks, strict=True), start=1)
    )


def _iterm(png: bytes, rows: int) -> bytes:
    """https://iterm2.com/documentation-images.html"""
    return b"\x1b]1337;File=inline=1;size=%d;height=%d:%s\x07" % (len(png), rows, base64.b64encode(png))


def _sixel(image: "Image.Image") -> bytes:
    """Bands of six pixels' height; in each, colour by colour, a character says which of the six have it."""
    import numpy as np
    from PIL import Image

    reduced = image.quantize(_COLOURS, Image.Quantize.MAXCOVERAGE)  # of the methods the one that keeps small bright things
    palette = np.asarray(reduced.getpalette(), np.uint8).reshape(-1, 3)
    pixels = np.asarray(reduced)
    out = [b'\x1bP0;1q"1;1;%d;%d' % image.size]
    out += [b"#%d;2;%d;%d;%d" % (n, *(round(100 * int(value) / 255) for value in rgb)) for n, rgb in enumerate(palette)]
    for top in range(0, image.height, 6):
        band = pixels[top : top + 6]
        weights = 1 << np.arange(len(band), dtype=np.uint8)
        for colour in np.unique(band):
            row = (63 + weights @ (band == colour)).astype(np.uint8).tobytes()
            out.append(b"#%d%s$" % (colour, re.sub(rb"(.)\1{3,}", lambda run: b"!%d%c" % (len(run[0]), run[1]), row)))
        out.append(b"-")
    return b"".join([*out[:-1], b"\x1b\\"])
