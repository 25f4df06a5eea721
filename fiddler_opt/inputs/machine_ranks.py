"""Joins the profiles of several machines into one profile."""

from collections.abc import Sequence

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.machine_parts import Network
from fiddler_opt.units import parse_network
from fiddler_run.errors import FiddlerError
from fiddler_run.system.locate import shipped_file

JOINED_BY = " + "  # between the names of joined files


def load_machines(names: Sequence[str], network: str | None) -> MachineProfile:
    """Loads a profile, or joins several.

    Args:
        network: between the machines, such as `0.2ms,1GB/s`.

    Raises:
        FiddlerError: a file cannot be read, the files cannot be joined, or the network is missing.
    """
    profiles = [MachineProfile.load(shipped_file(name)) for name in names]
    if len(profiles) == 1:
        if network is not None:
            raise FiddlerError(
                "--network is between several --machine files, but there is one; remove it"
            )
        return profiles[0]
    if network is None:
        raise FiddlerError(
            f"--machine names {len(profiles)} machines; add their network's round trip and rate,"
            " such as --network 0.2ms,1GB/s"
        )
    return joined(profiles, names, network_of(network))


def network_of(text: str) -> Network:
    """Parses the flag --network, such as `0.2ms,1GB/s`.

    Raises:
        FiddlerError: the text is not a time above zero and a rate.
    """
    round_trip_us, bytes_per_s = parse_network(text, "--network")
    return Network(round_trip_us=round_trip_us, bytes_per_s=bytes_per_s)


def joined(
    profiles: Sequence[MachineProfile], names: Sequence[str], network: Network
) -> MachineProfile:
    """The profile of all ranks of several machines. The first rank is that of the first machine.

    Args:
        names: the files of the profiles, for errors.
        network: between the machines.

    Raises:
        FiddlerError: the profiles timed different experts.
    """
    first = profiles[0]
    others = []
    machine = -1
    for profile, name in zip(profiles, names, strict=True):
        if profile.shape != first.shape:
            raise FiddlerError(
                f"{name}: was timed on other experts than {names[0]}; profile both with the same"
                " --model"
            )
        machine += 1
        numbers = [0, *(rank.machine for rank in profile.other_ranks)]
        others += [
            profile.as_rank(number, machine=machine + within)
            for number, within in enumerate(numbers)
        ]
        machine += numbers[-1]
    result = first.model_copy(update={"other_ranks": others[1:], "network": network})
    problems = result.problems()
    if problems:
        raise FiddlerError(
            f"{' + '.join(names)}: {problems[0]}; profile all machines with the same release"
        )
    return result


def repeated(machine: MachineProfile, count: int, network: Network) -> MachineProfile:
    """The profile of `count` machines that are all like the one of a single rank."""
    if count == 1:
        return machine
    return joined([machine] * count, ["the profile"] * count, network)
