"""Loads the compiled CPU kernel of cpu.cpp as a library of C functions."""

import ctypes
import logging
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

VERSION = 4  # of the interface; a library left from an older installation has another
VARIANTS = ("amx", "avx512bf16", "avx512", "avx2", "portable")  # best first


@cache
def library() -> ctypes.CDLL | None:
    """The library, built during installation if there is a compiler.

    None if it was not built, or by an older installation.
    """
    names = (Path(__file__).with_name("_cpu" + suffix) for suffix in EXTENSION_SUFFIXES)
    found = next((path for path in names if path.exists()), None)
    if found is None:
        return None
    loaded = ctypes.CDLL(os.fspath(found))
    if getattr(loaded, "fiddler_version", lambda: 1)() != VERSION:
        return None
    pointer = ctypes.c_void_p
    integer = ctypes.c_int
    long = ctypes.c_int64
    size = ctypes.c_uint64
    arguments = {
        "fiddler_supports": [ctypes.c_char_p],
        "fiddler_pool_create": [ctypes.c_char_p, integer, integer, pointer],
        "fiddler_pool_destroy": [pointer],
        "fiddler_submit": [
            *(pointer, pointer, pointer, integer),
            *(pointer, integer, pointer, pointer, long),
        ],
        "fiddler_submit_routed": [
            *(pointer, pointer, pointer, integer),
            *(pointer, pointer, pointer, long),
        ],
        "fiddler_wait": [pointer, integer, long],
        "fiddler_abandon": [pointer, pointer],
        "fiddler_started_ns": [pointer],
        "fiddler_finished_ns": [pointer],
        "fiddler_read": [pointer, pointer, size],
    }
    for name, types in arguments.items():
        getattr(loaded, name).argtypes = types
    loaded.fiddler_pool_create.restype = pointer
    loaded.fiddler_started_ns.restype = long
    loaded.fiddler_finished_ns.restype = long
    loaded.fiddler_read.restype = size
    return loaded


@cache
def compiled() -> bool:
    """True if the kernel was built. Otherwise warns, once."""
    if library() is None:
        logging.getLogger("fiddler_run").warning(
            "the CPU kernel is not built; PyTorch computes experts at about half the speed;"
            " install a C++20 compiler such as g++, then install fiddler-opt again"
        )
    return library() is not None


@cache
def supported_variants() -> list[str]:
    """The instruction sets supported by both the kernel and this CPU, best first."""
    return [name for name in VARIANTS if library().fiddler_supports(name.encode())]
