"""A machine profile as it would be with another link or other RAM: what `whatif` may assume of hardware that is not there.

Rule: each measured time is multiplied by what a roofline says afterwards over what it says of the profiled machine, so overheads
keep their proportion, the profiled rates give the profile back, and nothing faster makes anything slower. For t tokens:

    CPU alone        C = max(m, a t)            m  reading an expert for one token: all of it the memory's time
                                                a  seconds a token at the best rate seen: arithmetic, which no RAM speeds up
    link alone       L = max(c, g)              c  copying an expert, g  the GPU's work on it, which hides behind the copy
    both at once     J = max(C L / (C + L), M)  each does its share; M  an expert's bytes through the memory that feeds both

Nothing gets faster than M. M is the least time that the profile has for CPU and link together, for any t, if it is noticeably
longer than C L / (C + L) there: then the memory was the limit, and a faster link cannot lower it. Otherwise no limit was seen
(M = 0), and what is said of a much faster link is optimistic. Faster RAM divides m and M. The GPU, and all that is not an
expert, stay as profiled.
"""

from dataclasses import dataclass
from functools import cached_property

from fiddler_opt.machine import MachineProfile, Share, seconds_at
from fiddler_run.errors import FiddlerError

NOTICEABLY = 1.1  # blocks and noise alone make CPU and link up to a tenth slower together than their rates add up to
ENDS = (0.0, 1.0)  # shares of the CPU alone, of the link alone


def with_link(machine: MachineProfile, bytes_per_s: float) -> MachineProfile:
    """The machine with a link that copies `bytes_per_s` to the GPU; its other rates change in proportion.

    Raises:
        FiddlerError: nothing is copied over a link there.
    """
    return with_rates(machine, link_bytes_per_s=bytes_per_s)


def with_ram(machine: MachineProfile, bytes_per_s: float) -> MachineProfile:
    """The machine with RAM of which the CPU reads `bytes_per_s` of an expert's weights, for one token."""
    return with_rates(machine, ram_bytes_per_s=bytes_per_s)


def with_rates(
    machine: MachineProfile, link_bytes_per_s: float | None = None, ram_bytes_per_s: float | None = None
) -> MachineProfile:
    """Both of them; None: as profiled.

    Raises:
        FiddlerError: a link is asked for, and there is none that experts are copied over.
    """
    link, link_factor = machine.link, 1.0
    if link_bytes_per_s is not None:
        if link is None:
            raise FiddlerError("--link: the machine profile has no GPU, so no link; vary --ram, or name another with --machine")
        if not machine.streams:
            raise FiddlerError(
                "--link: by the machine profile no experts are copied over it; vary --ram, or name another with --machine"
            )
        link_factor = link_bytes_per_s / link.h2d_bytes_per_s
        link = link.model_copy(
            update={
                "generation": None,
                "width": None,
                "h2d_bytes_per_s": link.h2d_bytes_per_s * link_factor,
                "h2d_pageable_bytes_per_s": link.h2d_pageable_bytes_per_s and link.h2d_pageable_bytes_per_s * link_factor,
                "d2h_bytes_per_s": link.d2h_bytes_per_s and link.d2h_bytes_per_s * link_factor,
            }
        )
    ram_factor = 1.0 if ram_bytes_per_s is None else ram_bytes_per_s / ram_rate(machine)
    before = Rooflines(machine)
    after = Rooflines(machine, link_factor, ram_factor)
    absent = {tokens: _scaled(by_share, tokens, before, after) for tokens, by_share in machine.absent_expert_us.items()}
    update = {"link": link, "absent_expert_us": absent}
    if machine.device.kind == "host":  # the CPU stands in for the GPU, out of the same memory
        ratio = {tokens: after.cpu_us(tokens) / before.cpu_us(tokens) for tokens in machine.device_expert_us}
        update["device_expert_us"] = {tokens: us * ratio[tokens] for tokens, us in machine.device_expert_us.items()}
    return machine.model_copy(update=update)


def with_gpu_memory(machine: MachineProfile, size: int) -> MachineProfile:
    """The machine with a GPU of at least `size` bytes."""
    device = machine.device
    larger = {"memory_bytes": max(size, device.memory_bytes), "free_bytes": max(size, device.free_bytes)}
    return machine.model_copy(update={"device": device.model_copy(update=larger)})


def ram_rate(machine: MachineProfile) -> float:
    """Bytes per second at which the CPU reads an expert's weights, for one token."""
    return machine.shape.expert_bytes / machine.absent_expert_us[1][0.0] * 1e6


def memory_rate(machine: MachineProfile) -> float | None:
    """Bytes per second that the host memory gives CPU and link together; None: the profile saw no limit."""
    floor_us = Rooflines(machine).memory_us
    return machine.shape.expert_bytes / floor_us * 1e6 if floor_us else None


@dataclass(frozen=True)
class Rooflines:
    """Microseconds of one absent expert by the formulas above, with a link and RAM that are faster by a factor."""

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
        return max(copy / self.link_factor, 1e6 * seconds_at(machine.device_expert_us, tokens))

    @cached_property
    def memory_us(self) -> float:
        best = self.machine.best_absent_us
        tokens = min(best, key=best.get)
        limited = self.machine.streams and best[tokens] > NOTICEABLY * _balance_us(*profiled_us(self.machine, tokens))
        return best[tokens] / self.ram_factor if limited else 0.0


def profiled_us(machine: MachineProfile, tokens: int) -> tuple[float, float]:
    """C and L as profiled; where one was not timed: C as the planner continues it, L as its copy takes."""
    by_share = machine.absent_expert_us[tokens]
    cpu = by_share.get(0.0) or 1e6 * seconds_at(machine.cpu_expert_us, tokens)
    copy = 1e6 * machine.shape.expert_bytes / machine.link.h2d_bytes_per_s if machine.streams else float("inf")
    return cpu, by_share.get(1.0) or max(copy, 1e6 * seconds_at(machine.device_expert_us, tokens))


def _balance_us(cpu_us: float, link_us: float) -> float:
    return 1 / (1 / cpu_us + 1 / link_us)


def _scaled(by_share: dict[Share, float], tokens: int, before: Rooflines, after: Rooflines) -> dict[Share, float]:
    """The shares 0 and 1 as far as they were timed, and the best one."""
    floor_us = after.memory_us
    cpu, link = profiled_us(before.machine, tokens)
    new_cpu = max(floor_us, cpu * after.cpu_us(tokens) / before.cpu_us(tokens))
    if not before.machine.streams:
        return {0.0: round(new_cpu, 3)}
    new_link = max(floor_us, link * after.link_us(tokens) / before.link_us(tokens))
    best = min(by_share, key=by_share.get)
    factor = max(_balance_us(new_cpu, new_link), floor_us) / max(_balance_us(cpu, link), before.memory_us)
    new_best_us = round(max(floor_us, by_share[best] * factor), 3)
    ends = {share: round(us, 3) for share, us in zip(ENDS, (new_cpu, new_link), strict=True) if share in by_share}
    if ends and min(ends.values()) <= new_best_us:
        return ends
    allowed, new_allowed = _allowed(cpu, link, by_share[best]), _allowed(new_cpu, new_link, new_best_us)
    moved = best + _into(best, new_allowed) - _into(best, allowed)
    return {**ends, round(_into(moved, (0.001, 0.999)), 3): new_best_us}  # the ends keep their own times


def _allowed(cpu_us: float, link_us: float, best_us: float) -> tuple[float, float]:
    """The shares with which both CPU and link are done in time."""
    return 1 - best_us / cpu_us, best_us / link_us


def _into(share: Share, allowed: tuple[float, float]) -> Share:
    return min(max(share, allowed[0]), allowed[1])
