"""Arenas: memory of exactly the blocks' size, in RAM or in an unnamed file."""

import errno
import shutil

import pytest
import torch
from conftest import demo_shape, make_plan, with_rank

from fiddler_run.errors import FiddlerError
from fiddler_run.loading.machine_check import disk_problems
from fiddler_run.loading.model_check import refuse
from fiddler_run.weights.arena import Arena, will_need

CPU = torch.device("cpu")


def test_arena_works_without_huge_pages(monkeypatch):
    monkeypatch.setattr("fiddler_run.weights.arena.mmap.MADV_HUGEPAGE", -1, raising=False)
    assert Arena(2, 40, CPU).blocks.shape == (2, 40)


def test_disk_arena_keeps_blocks(tmp_path):
    arena = Arena(3, 20000, CPU, tmp_path)
    assert not any(tmp_path.iterdir())
    first = arena.take(1)
    second = arena.take(2)
    second.view(torch.float32).copy_(torch.arange(10000.0).view(2, 5000))
    will_need(second)
    assert torch.equal(arena.blocks[2].view(torch.float32), torch.arange(5000.0, 10000.0))
    assert not first.any()
    with pytest.raises(
        FiddlerError,
        match="none: cannot store experts: No such file or directory; name another folder",
    ):
        Arena(1, 8, CPU, tmp_path / "none")


def test_plan_beyond_the_free_disk_is_refused(tmp_path):
    plan = make_plan(demo_shape(), [[0] * 8] * 6)
    with pytest.raises(
        FiddlerError,
        match="keeps 1000000.00 GB of experts on disk, but .* GB is free there; name another",
    ):
        refuse(disk_problems(with_rank(plan, disk_bytes=10**15), tmp_path))


def test_disk_that_fills_before_loading_is_refused(tmp_path, monkeypatch):
    """Space is allocated at once: writing to a mapped file on a full disk kills the process."""

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fiddler_run.weights.arena.os.posix_fallocate", full)
    with pytest.raises(
        FiddlerError,
        match="cannot store experts: No space left on device; name another folder",
    ):
        Arena(4, 400, CPU, tmp_path)
    assert not any(tmp_path.iterdir())


def test_disk_arena_allocates_its_space(tmp_path):
    before = shutil.disk_usage(tmp_path).used
    arena = Arena(64, 2**20, CPU, tmp_path)  # 64 MiB
    assert shutil.disk_usage(tmp_path).used - before > 2**25
    del arena
