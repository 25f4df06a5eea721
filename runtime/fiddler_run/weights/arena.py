"""Arenas hold blocks. An arena is one allocation of exactly their size."""

import ctypes
import mmap
import os
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

import torch

from fiddler_run.errors import FiddlerError


class Arena:
    """`num_blocks` equal blocks in one allocation of exactly their size, handed out in order.

    With a `folder`, they are in an unnamed file there, which disappears with the process; the
    system caches as much of it as memory allows.

    In host memory, the arena uses huge pages if the system provides them. `pin` page-locks it, so
    that copies to a GPU are asynchronous and run at full speed. `Tensor.pin_memory()` would round
    the size up to a power of two.
    """

    def __init__(
        self, num_blocks: int, block_bytes: int, device: torch.device, folder: Path | None = None
    ):
        self._memory: mmap.mmap | None = None  # kept alive by any view of the blocks
        size = num_blocks * block_bytes
        if size > 0 and (folder is not None or device.type == "cpu"):
            self._memory = _huge_pages(size) if folder is None else _on_disk(size, folder)
            flat = torch.frombuffer(self._memory, dtype=torch.uint8)
            self.blocks = flat.view(num_blocks, block_bytes)
        else:
            self.blocks = torch.empty((num_blocks, block_bytes), dtype=torch.uint8, device=device)
        self._taken = 0

    def take(self, count: int) -> torch.Tensor:
        """Takes the next `count` blocks: uint8 [count, block_bytes]."""
        assert self._taken + count <= len(self.blocks)
        self._taken += count
        return self.blocks[self._taken - count : self._taken]

    def pin(self) -> None:
        """Page-locks an arena in host memory as long as any view of it lives.

        Fill the arena with several threads first, so that its pages are allocated in parallel.

        Raises:
            FiddlerError: the system refuses.
        """
        if len(self.blocks) == 0:
            return
        status = torch.cuda.cudart().cudaHostRegister(self.blocks.data_ptr(), self.blocks.nbytes, 0)
        if int(status) != 0:
            with suppress(RuntimeError):
                # raises the same error again, which clears it from CUDA
                torch.zeros(1, device="cuda")
            raise FiddlerError(
                f"cannot page-lock {self.blocks.nbytes / 1e9:.1f} GB of host memory for experts"
                f" ({status}); free some, raise the limit with `ulimit -l unlimited`, or leave them"
                " to the CPU: `staging: 0` and `stream_share: {1: 0.0}` in the plan"
            )
        weakref.finalize(self._memory, _unpin, self.blocks.data_ptr(), os.getpid()).atexit = False


def _unpin(address: int, pid: int) -> None:
    if os.getpid() == pid:  # a forked process has no CUDA
        torch.cuda.synchronize()  # copies from it may still be in progress
        torch.cuda.cudart().cudaHostUnregister(address)


def _huge_pages(size: int) -> mmap.mmap:
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise FiddlerError(
            f"cannot allocate {size / 1e9:.1f} GB of host memory for experts ({error}); free some"
        ) from None
    with suppress(OSError, AttributeError):  # the kernel was built without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _on_disk(size: int, folder: Path) -> mmap.mmap:
    """Maps a file in `folder` that no other process sees.

    Raises:
        FiddlerError: the folder is not writable, or has no room.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # Allocates the disk space now: writing to a mapped file on a full disk kills the
            # process.
            os.posix_fallocate(file.fileno(), 0, size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise FiddlerError(
            f"{folder}: cannot store experts: {error.strerror or error}; name another folder with"
            " --disk-folder"
        ) from None


def will_need(blocks: torch.Tensor) -> None:
    """Asks the system to read blocks of an arena on disk, uint8 [count, block_bytes], ahead."""
    start = blocks.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    _libc.madvise(
        ctypes.c_void_p(start),
        ctypes.c_size_t(blocks.data_ptr() + blocks.nbytes - start),
        mmap.MADV_WILLNEED,
    )


_libc = ctypes.CDLL(None)
