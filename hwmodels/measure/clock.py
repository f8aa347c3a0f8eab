"""The clock frequency a core runs at, from a chain of additions of which each waits for the one before."""

from __future__ import annotations

import ctypes
import math
import mmap
import platform
import time
from collections.abc import Callable
from functools import lru_cache

ADDITIONS = 100
ROUNDS = 2000
REPEATS = 5


def clock_hz() -> float:
    """Estimates the clock of the core this runs on, in less than a millisecond.

    A register is added to another over and over, one cycle each on every x86-64 core; the fastest of a few chains is
    the one that nothing interrupted. NaN on other processors, and where the system forbids running code it was handed.
    """
    found = _chain()
    if found is None:
        return math.nan
    chain, _ = found
    shortest = math.inf
    for _ in range(REPEATS):
        started = time.perf_counter()
        chain()
        shortest = min(shortest, time.perf_counter() - started)
    return ADDITIONS * ROUNDS / shortest


@lru_cache(maxsize=1)
def _chain() -> tuple[Callable[[], None], mmap.mmap] | None:
    """The chain as a function, and the memory that must last as long as it; None where it cannot be had."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not hasattr(mmap, "PROT_EXEC"):
        return None
    code = chain_code()
    try:
        page = mmap.mmap(-1, len(code), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:  # pages that can be written and run are forbidden: the clock is then not known
        return None
    page.write(code)
    return ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page))), page


def chain_code() -> bytes:
    """Machine code of `ROUNDS` rounds of `ADDITIONS` dependent additions, for x86-64.

    Registers are added, not constants: some cores fold additions of constants into one.
    """
    body = b"\x48\x01\xc8" * ADDITIONS  # add rax, rcx
    body += b"\x48\xff\xca"  # dec rdx
    back = -(len(body) + 6)  # from behind the jump to the first addition
    start = b"\x48\xc7\xc2" + ROUNDS.to_bytes(4, "little")  # mov rdx, ROUNDS
    return start + body + b"\x0f\x85" + back.to_bytes(4, "little", signed=True) + b"\xc3"  # jnz; ret
