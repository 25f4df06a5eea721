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
    ProfileProvenance,
)
from fiddler_opt.inputs.model import ModelSpec
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
    chosen = dict(parts["threads"])
    timed_bytes = chosen.pop("timed_bytes")
    del chosen["page_locked"]
    encodings = {
        model.encoding: EncodedExperts(
            block_neurons=model.block_neurons,
            expert_bytes=model.expert_bytes,
            **_tables(parts, timed, [kind]),
        )
        for kind, model in models.items()
        if kind != EXPERTS
    }
    # the kinds that fill the profile's own tables: experts in the plain encoding, and layers
    own = {kind for kind, _ in timed.values() if kind == EXPERTS or kind not in models}
    return MachineProfile(
        version=5,
        source="measured",
        cpu=Cpu(name=cpu_name(), cores=num_cores(), physical_cores=num_physical_cores(), **chosen),
        memory=Memory(
            available_bytes=parts["host"]["available_bytes"],
            timed_bytes=timed_bytes,
            memlock_bytes=facts.memlock_limit_bytes(),
        ),
        device=Device(**parts["device"]),
        link=Link(**parts["link"]) if "link" in parts else None,
        disk_bytes_per_s=parts["host"]["disk_bytes_per_s"],
        shape=MeasuredShape.of(models[EXPERTS]),
        kernels=KernelLimits.of_runtime(),
        **_tables(parts, timed, own),
        encodings=encodings,
        provenance=ProfileProvenance(
            command=command,
            created=date.today().isoformat(),
            software=f"PyTorch {torch.__version__}",
        ),
    )


def _tables(parts: dict[str, dict], timed: TimedParts, kinds: Collection[str]) -> dict:
    """The tables that parts of these kinds fill, by their keys in the profile."""
    of_kinds = {name: each for name, each in timed.items() if each[0] in kinds}
    return {
        **merged_rounds(parts, of_kinds),
        "drift": drift_between_rounds(parts, of_kinds),
    }
