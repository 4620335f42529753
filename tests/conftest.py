"""Fixtures that several test modules share."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

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
