"""How the C library treats freed memory while a command runs.

glibc gives every large block back to the system as soon as it is freed, and the kernel clears the pages of
the next one again: a training step on a CPU frees and asks for the same few hundred megabytes each time.
"""

from __future__ import annotations

import ctypes
import os
import sys

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for its next allocation, on Linux with glibc.

    Nothing is done where the environment already says otherwise (``MALLOC_...``, ``GLIBC_TUNABLES``, another
    allocator by ``LD_PRELOAD``). The process then holds on to the most memory it has used until it ends.

    Returns:
        Whether it was set.
    """
    told = any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or told or {"GLIBC_TUNABLES", "LD_PRELOAD"} & os.environ.keys():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl and others have none
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _MOST), (_M_TOP_PAD, 256 << 20))
    done = [mallopt(ctypes.c_int(name), ctypes.c_int(value)) for name, value in settings]
    return all(done)
