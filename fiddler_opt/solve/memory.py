"""GPU memory by purpose: all that is not experts is counted here before anything is placed."""

from fiddler_opt.inputs.machine import KernelLimits, MachineProfile
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.units import format_bytes
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.rank import GpuMemory
from fiddler_run.plan.schema import Workload
from fiddler_run.plan.shape import DTYPE_BYTES

# Allowances: cuBLAS keeps up to 32 MiB for each of two streams, CUDA graphs keep their intermediate
# results in memory of their own, and PyTorch's allocator rounds and splits. Half of it was too
# little for the graphs of 16 beams.
LIBRARY_WORKSPACE_BYTES = 2**28
ALLOCATOR_SLACK = 1.1
# the GPU maps page-locked host memory with 8 bytes for each 4 KiB; measured: 140.5 MB for 72 GB
PINNED_BYTES_PER_GPU_BYTE = 512
STAGED_BLOCKS = 8  # the GPU reads one half while the other arrives
PREFILL_CHUNKS = (256, 512, 1024, 2048, 4096)


def chunk_candidates(workload: Workload) -> list[int]:
    """Tokens of a prompt that could pass the layers at once."""
    return sorted({min(chunk, workload.max_seq_len) for chunk in PREFILL_CHUNKS})


def host_embedding_bytes(model: ModelSpec, machine: MachineProfile, gpu_bytes: int) -> int:
    """Bytes of the embedding table if it lies in host memory beside a GPU, else 0.

    A step reads only a few of its rows. Tied to the output head, which reads all, it stays on the
    GPU.
    """
    on_gpu = machine.device.kind == "cuda" and gpu_bytes > 0
    return model.embedding_bytes if on_gpu and not model.tie_word_embeddings else 0


def fixed_memory(
    model: ModelSpec, machine: MachineProfile, workload: Workload, total: int, chunk_tokens: int
) -> GpuMemory:
    """The GPU bytes of a plan with no expert resident yet.

    A total of zero is a plan without a GPU. Reserve and staging are zero on a machine without CUDA;
    where nothing is streamed, so is staging.

    Raises:
        FiddlerError: the total exceeds the device, or does not even hold what is not experts.
    """
    if total == 0:
        return GpuMemory(**dict.fromkeys(GpuMemory.model_fields, 0))
    device = machine.device
    if total > device.memory_bytes:
        raise FiddlerError(
            f"--gpu-mem {format_bytes(total)} is more than the {format_bytes(device.memory_bytes)}"
            f" that {device.name} has by the machine profile"
        )
    on_gpu = device.kind == "cuda"
    streams = machine.streams
    parts = {
        "non_expert_weights": (
            model.non_expert_bytes - host_embedding_bytes(model, machine, total)
        ),
        "kv_cache": model.kv_bytes_per_token * workload.max_seq_len * workload.sequences,
        "staging": STAGED_BLOCKS * model.block_bytes if streams else 0,
        "activations": activation_bytes(model, machine.kernels, workload, chunk_tokens),
        "reserve": model.all_expert_bytes // PINNED_BYTES_PER_GPU_BYTE if streams else 0,
    }
    if on_gpu:
        parts["activations"] += LIBRARY_WORKSPACE_BYTES
        parts["reserve"] += device.context_bytes
    used = sum(parts.values())
    if used > total:
        needs = ", ".join(
            f"{purpose.replace('_', ' ')} {format_bytes(size)}"
            for purpose, size in parts.items()
            if size
        )
        raise FiddlerError(
            f"--gpu-mem {format_bytes(total)} is too small: {format_bytes(used)} are needed before"
            f" any expert ({needs}); give more, lower --max-seq-len, --num-beams or --batch-size,"
            " or plan for the CPU alone with --gpu-mem 0GB"
        )
    return GpuMemory(total=total, experts=0, **parts)


def activation_bytes(
    model: ModelSpec, limits: KernelLimits, workload: Workload, chunk_tokens: int
) -> int:
    """Upper estimate of one forward pass's memory besides weights and cache.

    A pass is a chunk of each prompt, or a token of each sequence.

    Per token: about ten vectors of hidden size in the model's dtype (residual, norm, q, k, v,
    attention's output) and six in float32 (norm, sums of the dispatch), and for each expert it
    chose its input and the sum of that expert's blocks. Per token and block that the GPU computes
    at once: gate and up, their product, and the result, in float32. Or, of a few tokens, the
    product for each token and block of the experts that they may call, and each choice's result in
    float32. Per prompt: the attention mask of the chunk. Per sequence: keys and values expanded to
    all heads, and the logits in float32 thrice.
    """
    shape = model.shape
    width = DTYPE_BYTES[model.shape.dtype]
    tokens = max(chunk_tokens * workload.batch_size, workload.sequences)
    per_token = shape.hidden_size * (10 * width + 6 * 4 + shape.num_experts_per_tok * (width + 4))
    products = (
        max(tokens, limits.token_blocks) * 4 * (4 * model.block_neurons + 2 * shape.hidden_size)
    )
    few = min(tokens, limits.decode_tokens)
    blocks = min(few * shape.num_experts_per_tok, shape.num_experts) * model.blocks_per_expert
    of_few = (
        max(few, 16) * blocks * model.block_neurons * width
        + few * shape.num_experts_per_tok * 4 * shape.hidden_size
    )
    masks = workload.batch_size * chunk_tokens * workload.max_seq_len * width
    expanded = (
        2 * workload.max_seq_len * model.sizes.num_attention_heads * model.sizes.head_dim * width
    )
    logits = 3 * 4 * model.vocab_size
    return int(
        ALLOCATOR_SLACK
        * (
            tokens * per_token
            + max(products, of_few)
            + masks
            + workload.sequences * (expanded + logits)
        )
    )
