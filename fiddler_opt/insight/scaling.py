"""Scaling: the assumed profile of a machine with another link or other RAM, for `whatif`.

Each measured time is multiplied by a ratio of rooflines: the new machine's over the profiled
machine's. So overheads keep their proportion, the profiled rates give the profile back, and no
faster part makes anything slower. For t tokens:

    CPU alone     C = max(m, a t)            m  memory: reading an expert for one token
                                             a  arithmetic: seconds per token at the best rate seen
    link alone    L = max(c, g)              c  copying an expert
                                             g  the GPU's work on it, hidden behind the copy
    both at once  J = max(C L / (C + L), M)  M  an expert's bytes through the memory of both

No time falls below M. M is the shortest time in the profile for CPU and link together, at any t, if
that time is clearly longer than C L / (C + L). In that case memory was the limit, and a faster link
cannot shorten it. Otherwise no limit was seen (M = 0), and predictions for a much faster link are
optimistic. Faster RAM divides m and M but does not speed up arithmetic. Times of the GPU and of
everything but experts stay as profiled.
"""

from dataclasses import dataclass
from functools import cached_property

from fiddler_opt.inputs.machine import MachineProfile, Share, seconds_at
from fiddler_opt.inputs.machine_parts import Link
from fiddler_run.errors import FiddlerError

# Blocks and noise alone make CPU and link together up to 10% slower than the sum of their rates.
CLEARLY_LONGER = 1.1
ENDS = (0.0, 1.0)  # the CPU alone, the link alone


def with_rates(
    machine: MachineProfile,
    link_bytes_per_s: float | None = None,
    ram_bytes_per_s: float | None = None,
) -> MachineProfile:
    """The profile of the machine with another link, other RAM, or both.

    Args:
        link_bytes_per_s: rate of copies to the GPU. None: as profiled.
        ram_bytes_per_s: rate at which the CPU reads an expert's weights for one token. None: as
            profiled.

    Raises:
        FiddlerError: a link rate is given, but the profile has no link that copies experts.
    """
    link = machine.link
    link_factor = 1.0
    if link_bytes_per_s is not None:
        _require_link(machine)
        link_factor = link_bytes_per_s / link.h2d_bytes_per_s
        link = _scaled_link(link, link_factor)
    ram_factor = 1.0 if ram_bytes_per_s is None else ram_bytes_per_s / ram_rate(machine)
    scaled = _with_factors(machine, link_factor, ram_factor)
    others = {
        name: _with_factors(machine.in_encoding(name), link_factor, ram_factor).encoded_experts
        for name in machine.encodings
    }
    return scaled.model_copy(update={"link": link, "encodings": others})


def _with_factors(machine: MachineProfile, link_factor: float, ram_factor: float) -> MachineProfile:
    """The profile whose experts are served by a link and RAM, each faster by a factor."""
    before = Rooflines(machine)
    after = Rooflines(machine, link_factor, ram_factor)
    host = {
        tokens: _scaled(by_share, tokens, before, after)
        for tokens, by_share in machine.host_expert_us.items()
    }
    update = {"host_expert_us": host}
    if machine.device.kind == "cpu":  # the CPU takes the GPU's part, from the same memory
        update["resident_expert_us"] = {
            tokens: us * (after.cpu_us(tokens) / before.cpu_us(tokens))
            for tokens, us in machine.resident_expert_us.items()
        }
    return machine.model_copy(update=update)


def _require_link(machine: MachineProfile) -> None:
    if machine.link is None:
        raise FiddlerError(
            "--link: the machine profile has no GPU, so no link; vary --ram, or name another with"
            " --machine"
        )
    if not machine.streams:
        raise FiddlerError(
            "--link: in the machine profile, no experts are copied over the link; vary --ram, or"
            " name another with --machine"
        )


def _scaled_link(link: Link, factor: float) -> Link:
    """The link with all rates scaled by `factor`."""
    rates = ("h2d_bytes_per_s", "h2d_pageable_bytes_per_s", "d2h_bytes_per_s")
    scaled = {key: getattr(link, key) and getattr(link, key) * factor for key in rates}
    return link.model_copy(update={"generation": None, "width": None, **scaled})


def with_gpu_memory(machine: MachineProfile, size: int) -> MachineProfile:
    """The profile of the machine with at least `size` bytes of GPU memory."""
    device = machine.device
    larger = {
        "memory_bytes": max(size, device.memory_bytes),
        "free_bytes": max(size, device.free_bytes),
    }
    return machine.model_copy(update={"device": device.model_copy(update=larger)})


def ram_rate(machine: MachineProfile) -> float:
    """Bytes per second at which the CPU reads an expert's weights for one token."""
    return machine.shape.expert_bytes / machine.host_expert_us[1][0.0] * 1e6


def memory_rate(machine: MachineProfile) -> float | None:
    """Bytes per second that CPU and link together read from host memory. None: no limit seen."""
    floor_us = Rooflines(machine).memory_us
    return machine.shape.expert_bytes / floor_us * 1e6 if floor_us else None


@dataclass(frozen=True)
class Rooflines:
    """Microseconds of one host expert by the formulas above, with a faster link and faster RAM."""

    machine: MachineProfile
    link_factor: float = 1.0
    ram_factor: float = 1.0

    def cpu_us(self, tokens: int) -> float:
        measured = self.machine.cpu_expert_us
        arithmetic = min(us / count for count, us in measured.items())
        return max(measured[1] / self.ram_factor, arithmetic * tokens)

    def link_us(self, tokens: int) -> float:
        machine = self.machine
        copy = 1e6 * machine.shape.expert_bytes / machine.link.h2d_bytes_per_s
        return max(copy / self.link_factor, 1e6 * seconds_at(machine.resident_expert_us, tokens))

    @cached_property
    def memory_us(self) -> float:
        best = self.machine.best_host_us
        tokens = min(best, key=best.get)
        limited = self.machine.streams and best[tokens] > CLEARLY_LONGER * _balance_us(
            *profiled_us(self.machine, tokens)
        )
        return best[tokens] / self.ram_factor if limited else 0.0


def profiled_us(machine: MachineProfile, tokens: int) -> tuple[float, float]:
    """C and L as profiled. Where not timed, C by the planner's extrapolation, L by its copy."""
    by_share = machine.host_expert_us[tokens]
    cpu = by_share.get(0.0) or 1e6 * seconds_at(machine.cpu_expert_us, tokens)
    copy = (
        1e6 * machine.shape.expert_bytes / machine.link.h2d_bytes_per_s
        if machine.streams
        else float("inf")
    )
    return cpu, by_share.get(1.0) or max(copy, 1e6 * seconds_at(machine.resident_expert_us, tokens))


def _balance_us(cpu_us: float, link_us: float) -> float:
    return 1 / (1 / cpu_us + 1 / link_us)


def _scaled(
    by_share: dict[Share, float], tokens: int, before: Rooflines, after: Rooflines
) -> dict[Share, float]:
    """Times at the shares 0 and 1, if they were timed, and at the best share."""
    floor_us = after.memory_us
    cpu, link = profiled_us(before.machine, tokens)
    new_cpu = max(floor_us, cpu * after.cpu_us(tokens) / before.cpu_us(tokens))
    if not before.machine.streams:
        return {0.0: round(new_cpu, 3)}
    new_link = max(floor_us, link * after.link_us(tokens) / before.link_us(tokens))
    best = min(by_share, key=by_share.get)
    factor = max(_balance_us(new_cpu, new_link), floor_us) / max(
        _balance_us(cpu, link), before.memory_us
    )
    new_best_us = round(max(floor_us, by_share[best] * factor), 3)
    ends = {
        share: round(us, 3)
        for share, us in zip(ENDS, (new_cpu, new_link), strict=True)
        if share in by_share
    }
    if ends and min(ends.values()) <= new_best_us:
        return ends
    allowed = _allowed(cpu, link, by_share[best])
    new_allowed = _allowed(new_cpu, new_link, new_best_us)
    moved = best + _into(best, new_allowed) - _into(best, allowed)
    # the end points keep their own times
    return {
        **ends,
        round(_into(moved, (0.001, 0.999)), 3): new_best_us,
    }


def _allowed(cpu_us: float, link_us: float, best_us: float) -> tuple[float, float]:
    """The range of shares at which both CPU and link finish within `best_us`."""
    return 1 - best_us / cpu_us, best_us / link_us


def _into(share: Share, allowed: tuple[float, float]) -> Share:
    return min(max(share, allowed[0]), allowed[1])
