"""Fixtures that several test modules share."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from serving import Served

settings.register_profile("project", deadline=None)  # a busy machine is no failure: tests assert no times
settings.load_profile("project")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # as in a background job: what tests start would inherit it, and Ctrl-C could not be tried
    signal.signal(signal.SIGINT, signal.default_int_handler)

_DAC_OVERRIDE, _DAC_READ_SEARCH = 1 << 1, 1 << 2  # capabilities(7): what lets root pass over file permissions


@pytest.fixture
def permissions_apply() -> Iterator[None]:
    """File permissions hold in this test even when root runs it: its thread lays the power to override them down."""
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root passes over file permissions on this system")
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: bits 0-31, then 32-63
    if libc.capget(header, sets) != 0:
        pytest.skip("the capabilities of this process cannot be read")
    effective = sets[0]
    sets[0] = effective & ~(_DAC_OVERRIDE | _DAC_READ_SEARCH)
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = effective
        assert libc.capset(header, sets) == 0


@pytest.fixture(scope="session")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection of photos and texts (serving.make_collection), not to be changed."""
    from serving import make_collection

    return make_collection(tmp_path_factory.mktemp("gallery"))


@pytest.fixture(scope="session")
def served(gallery: Path) -> "Iterator[Served]":
    """The service of `gallery`."""
    from serving import serving

    with serving(gallery) as found:
        yield found
