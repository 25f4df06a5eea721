"""Prints a machine profile in the terminal."""

from rich.console import Console
from rich.table import Table

from fiddler_opt.inputs.machine import Link, MachineProfile
from fiddler_opt.insight.table import table
from fiddler_opt.units import format_bytes


def print_machine(console: Console, machine: MachineProfile) -> None:
    """Prints the rates for one expert's weights by tokens. Without a GPU, only the CPU's."""
    cpu = machine.cpu
    pinned = ", pinned" if cpu.pinned else ""
    threads = "1 thread" if cpu.threads == 1 else f"{cpu.threads} threads"
    console.print(f"{cpu.name}: {threads} on {cpu.physical_cores} cores{pinned}, {cpu.kernel}")
    console.print(f"device: {machine.device.name}, {format_bytes(machine.device.memory_bytes)}")
    for encoding in (machine.shape.encoding, *machine.encodings):
        console.print(_rates(machine.in_encoding(encoding)))
    if machine.link:
        console.print(f"link: {_link(machine.link)}")
        if not machine.streams:
            console.print(
                "experts could not be page-locked: plans leave host experts to the CPU;"
                " `fiddler-opt doctor` names the limit",
                style="yellow",
            )
    console.print(
        "attention and router of a layer, for one token:"
        f" {machine.dense_layer_us[1] / 1e3:.2f} ms, of which"
        f" {machine.dense_device_us[1] / 1e3:.2f} ms do not overlap with experts; embedding, output"
        f" head and sampling: {machine.head_us[1] / 1e3:.2f} ms"
    )
    _print_conditions(console, machine)
    for number in range(1, machine.num_ranks):
        _print_rank(console, number, machine)
    if machine.network:
        console.print(
            f"network: {machine.network.round_trip_us:.0f} us a layer for one token,"
            f" {format_bytes(machine.network.bytes_per_s)}/s"
        )


def _print_rank(console: Console, number: int, machine: MachineProfile) -> None:
    """Prints the rates of a rank after the first."""
    rank = machine.rank_profile(number)
    console.print(
        f"rank {number}, machine {machine.other_ranks[number - 1].machine}: {rank.device.name},"
        f" {format_bytes(rank.device.memory_bytes)}; {rank.cpu.name}, {rank.cpu.threads} threads"
    )
    console.print(_rates(rank))


def _rates(machine: MachineProfile) -> Table:
    gpu = machine.device.kind == "cuda"
    of_gpu = ("link", "both", "stream share", "GPU") if gpu else ()
    rates = table("tokens", "CPU", *of_gpu, "drift")
    rates.title = (
        f"GB/s of one expert's weights in {machine.shape.encoding}, by tokens that chose it"
    )
    rates.title_justify = "left"
    for tokens, by_share in machine.host_expert_us.items():
        row = [_rate(machine, by_share.get(0.0))]
        if gpu:
            row += [
                _rate(machine, by_share.get(1.0)),
                _rate(machine, machine.best_host_us[tokens]),
                f"{machine.stream_share[tokens]:.0%}",
                _rate(machine, machine.resident_expert_us.get(tokens)),
            ]
        drift = machine.drift.get(tokens)
        rates.add_row(str(tokens), *row, "-" if drift is None else f"{drift:.0%}")
    return rates


def _print_conditions(console: Console, machine: MachineProfile) -> None:
    """Prints the conditions under which experts were timed."""
    cpu = machine.cpu
    if cpu.threads_us:
        by_threads = ", ".join(
            f"{threads}{pinned}: {machine.shape.expert_bytes / us / 1e3:.1f}"
            for pinned, times in (("", cpu.threads_us), (" pinned", cpu.pinned_threads_us))
            for threads, us in times.items()
        )
        console.print(f"one expert and one token, GB/s by number of threads: {by_threads}")
    if machine.memory.timed_bytes:
        timed = format_bytes(machine.memory.timed_bytes)
        drift = f"; rounds differ by {machine.typical_drift:.0%} (drift)" if machine.drift else ""
        console.print(
            f"timed in {timed} of {format_bytes(machine.memory.available_bytes)} free memory{drift}"
        )
    if machine.disk_bytes_per_s:
        console.print(f"the checkpoint's disk: {format_bytes(machine.disk_bytes_per_s)}/s")


def _link(link: Link) -> str:
    lanes = f"PCIe {link.generation} x{link.width}, " if link.generation and link.width else ""
    rates = {
        "to the GPU": link.h2d_bytes_per_s,
        "from pageable memory": link.h2d_pageable_bytes_per_s,
        "back": link.d2h_bytes_per_s,
    }
    known = ", ".join(f"{format_bytes(rate)}/s {name}" for name, rate in rates.items() if rate)
    round_trip = f", round trip {link.round_trip_us:.0f} us" if link.round_trip_us else ""
    return f"{lanes}{known}{round_trip}"


def _rate(machine: MachineProfile, microseconds: float | None) -> str:
    return "-" if microseconds is None else f"{machine.shape.expert_bytes / microseconds / 1e3:.1f}"
