"""What the server says about its plan, and about what it is doing."""

from fiddler_run.generation.answer import Answer
from fiddler_run.plan.schema import Plan
from fiddler_run.serving.errors import ApiError
from fiddler_run.serving.worker import Worker

Json = dict[str, object]


def progress(plan: Plan, worker: Worker) -> Json:
    """How much of the model is loaded."""
    return {
        "state": worker.state,
        "error": None if worker.error is None else str(worker.error),
        "loaded_bytes": worker.loaded_bytes,
        "total_bytes": plan.expert_bytes,
    }


def require_ready(plan: Plan, worker: Worker) -> None:
    """Checks that the model can answer.

    Raises:
        ApiError: it is still loading, or has failed to load.
    """
    if worker.state == "loading":
        loaded = f"{worker.loaded_bytes / 1e9:.1f} of {plan.expert_bytes / 1e9:.1f} GB"
        raise ApiError(503, f"the model is loading: {loaded}; try again later")
    if worker.state == "failed":
        raise ApiError(503, f"the model could not be loaded: {worker.error}")


def status(plan: Plan, worker: Worker) -> Json:
    """What the worker is doing, and figures of its last answer."""
    last = worker.last
    return {
        **progress(plan, worker),
        "running": worker.running is not None,
        "waiting": worker.num_waiting,
        "last": None if last is None else _figures(plan, last),
    }


def about(plan: Plan, model: str, can_chat: bool) -> Json:
    """What the plan says."""
    rank = plan.rank
    predicted = plan.predicted
    layers = range(plan.model.num_layers)
    on_disk = [rank.disk_blocks[layer] for layer in layers] if rank.disk_blocks else None
    return {
        "model": model,
        "context": plan.workload.max_seq_len,
        "has_chat_template": can_chat,
        "device": rank.device,
        "blocks_per_expert": plan.blocks_per_expert,
        "block_bytes": plan.block_bytes,
        "stream_share": rank.stream_share_at(1),
        "predicted": {
            "decode_tokens_per_s": predicted.decode_tokens_per_s,
            "bound_tokens_per_s": predicted.bound_tokens_per_s,
            "ttft_s": predicted.ttft_s,
            "gpu_hit_rate": predicted.gpu_hit_rate,
            "prompt_tokens": plan.workload.prompt_tokens,
        },
        "resident_blocks": plan.resident_rows(),
        "disk_blocks": on_disk,
    }


def calls(plan: Plan, worker: Worker) -> Json:
    """How many tokens each expert has computed, by layer."""
    shape = plan.model
    if worker.state != "ready":
        return {"calls": [[0] * shape.num_experts] * shape.num_layers}
    return {"calls": [layer.calls.tolist() for layer in worker.model.layers]}


def _figures(plan: Plan, answer: Answer) -> Json:
    measured = answer.measured
    traffic = measured.all_traffic
    return {
        "prompt_tokens": measured.prompt_tokens,
        "output_tokens": measured.output_tokens,
        "reused_tokens": measured.reused_tokens,
        "ttft_s": measured.ttft_s,
        "decode_tokens_per_s": measured.decode_tokens_per_s,
        "gpu_hit_rate": traffic.hit_rate,
        "bytes": traffic.bytes_by_resource(plan.block_bytes),
        "finish": answer.finish,
    }
