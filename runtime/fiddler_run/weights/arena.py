"""Where blocks lie: an arena is one allocation of exactly their size."""

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

    With a `folder` they lie in a file there, which has no name and is gone with the process; the
    system keeps in memory what of it there is room for.

    In host memory it consists of huge pages where the system grants them; `pin` page-locks it, so
    that copies to a GPU are asynchronous and at full speed. (`Tensor.pin_memory()` would round the
    size up to a power of two.)
    """

    def __init__(
        self, num_blocks: int, block_bytes: int, device: torch.device, folder: Path | None = None
    ):
        self._memory: mmap.mmap | None = None  # lives as long as any view of the blocks
        size = num_blocks * block_bytes
        if size > 0 and (folder is not None or device.type == "cpu"):
            self._memory = _huge_pages(size) if folder is None else _on_disk(size, folder)
            flat = torch.frombuffer(self._memory, dtype=torch.uint8)
            self.blocks = flat.view(num_blocks, block_bytes)
        else:
            self.blocks = torch.empty((num_blocks, block_bytes), dtype=torch.uint8, device=device)
        self._taken = 0

    def take(self, count: int) -> torch.Tensor:
        """The next `count` blocks: uint8 [count, block_bytes]."""
        assert self._taken + count <= len(self.blocks)
        self._taken += count
        return self.blocks[self._taken - count : self._taken]

    def pin(self) -> None:
        """Page-locks an arena in host memory, as long as any view of it lives. Best once it has
        been filled, by several threads: that gives it its pages.

        Raises:
            FiddlerError: the system refuses.
        """
        if len(self.blocks) == 0:
            return
        status = torch.cuda.cudart().cudaHostRegister(self.blocks.data_ptr(), self.blocks.nbytes, 0)
        if int(status) != 0:
            with suppress(RuntimeError):
                # raises the same error again, which CUDA then forgets
                torch.zeros(1, device="cuda")
            raise FiddlerError(
                f"cannot page-lock {self.blocks.nbytes / 1e9:.1f} GB of host memory for experts"
                f" ({status}); free some, raise the limit with `ulimit -l unlimited`, or leave them"
                " to the CPU: `staging: 0` and `stream_share: {1: 0.0}` in the plan"
            )
        weakref.finalize(self._memory, _unpin, self.blocks.data_ptr(), os.getpid()).atexit = False


def _unpin(address: int, pid: int) -> None:
    if os.getpid() == pid:  # a forked process has no CUDA
        torch.cuda.synchronize()  # copies from it may still be under way
        torch.cuda.cudart().cudaHostUnregister(address)


def _huge_pages(size: int) -> mmap.mmap:
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise FiddlerError(
            f"cannot take {size / 1e9:.1f} GB of host memory for experts ({error}); free some"
        ) from None
    with suppress(OSError, AttributeError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _on_disk(size: int, folder: Path) -> mmap.mmap:
    """A mapped file in `folder` that no other process sees.

    Raises:
        FiddlerError: the folder cannot be written, or has no room.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # The room is taken now: a process that writes to a mapped file when the disk is full is
            # killed.
            os.posix_fallocate(file.fileno(), 0, size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise FiddlerError(
            f"{folder}: cannot keep experts there: {error.strerror or error}; name another folder"
            " with --disk-folder"
        ) from None


def will_need(blocks: torch.Tensor) -> None:
    """Asks the system to read blocks of an arena on disk uint8 [count, block_bytes] ahead of their
    use.
    """
    start = blocks.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    _libc.madvise(
        ctypes.c_void_p(start),
        ctypes.c_size_t(blocks.data_ptr() + blocks.nbytes - start),
        mmap.MADV_WILLNEED,
    )


_libc = ctypes.CDLL(None)
