"""Cutting an expert into blocks loses nothing, whatever the block size and wherever the cut between arenas."""

import errno
import shutil

import pytest
import torch
from conftest import demo_shape, make_plan
from torch.nn.functional import silu

from fiddler_run.arena import Arena, fill_blocks, will_need
from fiddler_run.check import disk_problems
from fiddler_run.errors import FiddlerError
from fiddler_run.kernels.pytorch import apply_blocks
from fiddler_run.model_check import refuse

HIDDEN = 24


def expert(intermediate: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(intermediate)
    return torch.randn(intermediate, HIDDEN), torch.randn(intermediate, HIDDEN), torch.randn(HIDDEN, intermediate)


def reference(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    x, gate, up, down = (tensor.double() for tensor in (x, gate, up, down))
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


@pytest.mark.parametrize(("intermediate", "block"), [(64, 16), (64, 64), (100, 32), (5, 32), (33, 32)])
def test_any_cut_gives_the_same_expert(intermediate, block):
    weights = expert(intermediate)
    count = -(-intermediate // block)
    x = torch.randn(7, HIDDEN)
    expected = reference(x, *weights)
    for cut in range(count + 1):
        first, second = torch.full((cut, 3 * block * HIDDEN), torch.nan), torch.full((count - cut, 3 * block * HIDDEN), torch.nan)
        fill_blocks(first, *weights, first_neuron=0)
        fill_blocks(second, *weights, first_neuron=cut * block)
        total = apply_blocks(first, x) + apply_blocks(second, x)
        assert torch.allclose(total.double(), expected, rtol=1e-4, atol=1e-4)


def test_block_layout():
    gate, up, down = expert(4)
    blocks = torch.empty(2, 3 * 2 * HIDDEN)
    fill_blocks(blocks, gate, up, down, first_neuron=0)
    expected = torch.cat([gate[2:4].flatten(), up[2:4].flatten(), down[:, 2:4].flatten()])
    assert torch.equal(blocks[1], expected)


def test_an_arena_on_disk(tmp_path):
    arena = Arena(3, 5000, torch.float32, torch.device("cpu"), tmp_path)
    assert not any(tmp_path.iterdir())
    first, second = arena.take(1), arena.take(2)
    second.copy_(torch.arange(10000.0).view(2, 5000))
    will_need(second)
    assert torch.equal(arena.blocks[2], torch.arange(5000.0, 10000.0))
    assert not first.any()
    with pytest.raises(FiddlerError, match="none: cannot keep experts there: No such file or directory; name another folder"):
        Arena(1, 8, torch.float32, torch.device("cpu"), tmp_path / "none")


def test_too_little_disk(tmp_path):
    plan = make_plan(demo_shape(), [[0] * 8] * 6)
    with pytest.raises(FiddlerError, match="1000000.00 GB of experts are to lie on disk, but .* GB are free there; name another"):
        refuse(disk_problems(plan.model_copy(update={"disk_bytes": 10**15}), tmp_path))


def test_a_disk_that_fills_between_check_and_load(tmp_path, monkeypatch):
    """The room is taken at once: writing to a mapped file on a full disk would kill the process."""

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fiddler_run.arena.os.posix_fallocate", full)
    with pytest.raises(FiddlerError, match="cannot keep experts there: No space left on device; name another folder"):
        Arena(4, 100, torch.float32, torch.device("cpu"), tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_room_on_disk_is_taken(tmp_path):
    before = shutil.disk_usage(tmp_path).used
    arena = Arena(64, 2**18, torch.float32, torch.device("cpu"), tmp_path)  # 64 MiB
    assert shutil.disk_usage(tmp_path).used - before > 2**25
    del arena
