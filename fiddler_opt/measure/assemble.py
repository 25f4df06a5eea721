"""Makes a MachineProfile from the measured parts."""

from collections.abc import Collection
from datetime import date

import torch

from fiddler_opt.inputs import facts
from fiddler_opt.inputs.machine import (
    Cpu,
    Device,
    EncodedExperts,
    KernelLimits,
    Link,
    MachineProfile,
    MeasuredShape,
    Memory,
    Network,
    ProfileProvenance,
    RankProfile,
)
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.measure.ranks import prefix
from fiddler_opt.measure.rounds import TimedParts, drift_between_rounds, merged_rounds
from fiddler_run.system.host import cpu_name, num_cores, num_physical_cores

EXPERTS = "experts"  # the kind of parts that time experts in the plain encoding


def machine_profile(
    parts: dict[str, dict], timed: TimedParts, models: dict[str, ModelSpec], command: str
) -> MachineProfile:
    """The profile made from finished parts.

    Args:
        models: by kind, the model in the encoding that was timed.
    """
    # the kinds that fill the profile's own tables: experts in the plain encoding, and layers
    own = {kind for kind, _ in timed.values() if kind == EXPERTS or kind not in models}
    return MachineProfile(
        version=5,
        source="measured",
        disk_bytes_per_s=parts["host"]["disk_bytes_per_s"],
        shape=MeasuredShape.of(models[EXPERTS]),
        kernels=KernelLimits.of_runtime(),
        **_of_rank(parts, timed, models),
        **_tables(parts, timed, own),
        provenance=ProfileProvenance(
            command=command,
            created=date.today().isoformat(),
            software=f"PyTorch {torch.__version__}",
        ),
    )


def ranks_profile(
    parts: dict[str, dict],
    timed: TimedParts,
    models: dict[str, ModelSpec],
    command: str,
    count: int,
    network: dict[str, float],
) -> MachineProfile:
    """The profile of several ranks; the names of the others' parts begin with `prefix`.

    Args:
        network: see `OtherRanks.network`. The GPU memory of the exchange counts as the driver's.
    """
    of_exchange = network["exchange_bytes"]
    parts = {
        name: {**values, "context_bytes": values["context_bytes"] + of_exchange}
        if name.endswith("device")
        else values
        for name, values in parts.items()
    }
    others = []
    for rank in range(1, count):
        start = prefix(rank)
        found = {n.removeprefix(start): v for n, v in parts.items() if n.startswith(start)}
        own = _tables(found, timed, [EXPERTS])
        others.append(RankProfile(machine=0, **_of_rank(found, timed, models), **own))
    return machine_profile(parts, timed, models, command).model_copy(
        update={
            "other_ranks": others,
            "network": Network(
                round_trip_us=network["round_trip_us"], bytes_per_s=network["bytes_per_s"]
            ),
        }
    )


def _of_rank(
    parts: dict[str, dict], timed: TimedParts, models: dict[str, ModelSpec]
) -> dict[str, object]:
    """The sections that each rank has."""
    chosen = dict(parts["threads"])
    timed_bytes = chosen.pop("timed_bytes")
    del chosen["page_locked"]
    return {
        "cpu": Cpu(
            name=cpu_name(), cores=num_cores(), physical_cores=num_physical_cores(), **chosen
        ),
        "memory": Memory(
            available_bytes=parts["host"]["available_bytes"],
            timed_bytes=timed_bytes,
            memlock_bytes=facts.memlock_limit_bytes(),
        ),
        "device": Device(**parts["device"]),
        "link": Link(**parts["link"]) if "link" in parts else None,
        "encodings": {
            model.encoding: EncodedExperts(
                block_neurons=model.block_neurons,
                expert_bytes=model.expert_bytes,
                **_tables(parts, timed, [kind]),
            )
            for kind, model in models.items()
            if kind != EXPERTS
        },
    }


def _tables(parts: dict[str, dict], timed: TimedParts, kinds: Collection[str]) -> dict:
    """The tables that parts of these kinds fill, by their keys in the profile."""
    of_kinds = {name: each for name, each in timed.items() if each[0] in kinds}
    return {
        **merged_rounds(parts, of_kinds),
        "drift": drift_between_rounds(parts, of_kinds),
    }
