"""Rules between the values of a machine profile."""

from collections.abc import Sequence

from fiddler_opt.inputs.machine_parts import (
    EncodedExperts,
    HostTimes,
    MeasuredShape,
    Network,
    RankProfile,
)


def table_problems(where: str, rank: RankProfile, shape: MeasuredShape) -> list[str]:
    """The problems of one rank's tables.

    Args:
        where: the key of the rank with a dot; empty for the profile's own tables.
        shape: of the experts that were timed.
    """
    problems = [
        f"{where}{key}: needs an entry for 1 token"
        for key in ("host_expert_us", "resident_expert_us")
        if 1 not in getattr(rank, key)
    ]
    problems += _host_problems(f"{where}host_expert_us", rank.host_expert_us)
    for name, experts in rank.encodings.items():
        key = f"{where}encodings.{name}"
        problems += shape.encoding_problems(key, name, experts)
        if 1 not in experts.host_expert_us or 1 not in experts.resident_expert_us:
            problems.append(f"{key}: needs entries for 1 token")
        problems += _host_problems(f"{key}.host_expert_us", experts.host_expert_us)
    if (rank.device.kind == "cuda") != (rank.link is not None):
        needed = "be given" if rank.link is None else "be null"
        problems.append(f"{where}link: must {needed} for a device of kind {rank.device.kind}")
    return problems


def _host_problems(key: str, times: HostTimes) -> list[str]:
    problems = [
        f"{key}[{tokens}]: needs at least one share" for tokens, row in times.items() if not row
    ]
    if 0.0 not in times.get(1, {0.0: 1.0}):
        problems.append(f"{key}[1]: needs an entry for the share 0.0, the CPU alone")
    return problems


def ranks_problems(
    others: Sequence[RankProfile], network: Network | None, encodings: dict[str, EncodedExperts]
) -> list[str]:
    """The problems of the ranks after the first.

    Args:
        encodings: those of the first rank, whose blocks must have the same size.
    """
    if bool(others) != (network is not None):
        return [
            "network: missing, but there are other_ranks"
            if others
            else "network: only with other_ranks; remove it"
        ]
    problems = []
    last = 0
    for number, rank in enumerate(others):
        where = f"other_ranks[{number}]"
        if not last <= rank.machine <= last + 1:
            problems.append(
                f"{where}.machine: {rank.machine}, but after a rank of machine {last} comes one of"
                f" {last} or {last + 1}"
            )
        last = rank.machine
        for name in rank.encodings.keys() & encodings.keys():
            sizes = [each[name].block_neurons for each in (encodings, rank.encodings)]
            if sizes[0] != sizes[1]:
                problems.append(
                    f"{where}.encodings.{name}.block_neurons: {sizes[1]}, the first rank's is"
                    f" {sizes[0]}"
                )
    return problems
