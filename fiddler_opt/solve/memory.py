"""GPU memory by purpose. Everything but experts is counted here before anything is placed."""

from fiddler_opt.inputs.machine import KernelLimits, MachineProfile
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.units import format_bytes
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.parts import PURPOSES
from fiddler_run.plan.rank import GpuMemory
from fiddler_run.plan.schema import Workload
from fiddler_run.plan.shape import DTYPE_BYTES

# An allowance. cuBLAS keeps up to 32 MiB for each of two streams, CUDA graphs keep their
# intermediate results in a pool, and PyTorch's allocator rounds and splits. Half of this was too
# little for the graphs of 16 beams.
LIBRARY_WORKSPACE_BYTES = 2**28
ALLOCATOR_SLACK = 1.1
# the GPU maps page-locked memory with 8 bytes per 4 KiB; measured: 140.5 MB for 72 GB
PINNED_BYTES_PER_GPU_BYTE = 512
# The staging ring, of which the GPU reads a third while blocks arrive in the others: at least
# STAGED_BLOCKS of those for one rank, and up to STAGED_BYTES of the blocks of small experts, but no
# more than a part of a layer's. A third must take the link longer than Python takes to queue it.
STAGED_BLOCKS = 12
STAGED_BYTES = 96_000_000
STAGED_PART_OF_LAYER = 16
PREFILL_CHUNKS = (256, 512, 1024, 2048, 4096)


def chunk_candidates(workload: Workload) -> list[int]:
    """The candidate numbers of prompt tokens that pass through the layers at once."""
    return sorted({min(chunk, workload.max_seq_len) for chunk in PREFILL_CHUNKS})


def staged_blocks(model: ModelSpec) -> int:
    """Blocks of the staging ring."""
    of_layer = model.shape.num_experts * model.blocks_per_expert // STAGED_PART_OF_LAYER
    least = -(-STAGED_BLOCKS * model.for_ranks(1).block_bytes // model.block_bytes)
    return max(least, min(of_layer, STAGED_BYTES // model.block_bytes))


def host_embedding_bytes(model: ModelSpec, machine: MachineProfile, gpu_bytes: int) -> int:
    """Bytes of the embedding table if it is kept in host memory although there is a GPU, else 0.

    A step reads only a few of its rows. If it is tied to the output head, which reads all rows, it
    stays on the GPU.
    """
    on_gpu = machine.device.kind == "cuda" and gpu_bytes > 0
    return model.embedding_bytes if on_gpu and not model.tie_word_embeddings else 0


def fixed_memory(
    model: ModelSpec,
    machine: MachineProfile,
    workload: Workload,
    total: int,
    chunk_tokens: int,
    number: int = 0,
) -> GpuMemory:
    """The GPU bytes of rank `number` without resident experts.

    A total of zero is a rank without a GPU. Reserve and staging are zero on a machine without CUDA,
    and staging is zero where nothing is streamed. Ranks after the first have experts only. The
    reserve assumes that all experts could be page-locked by one rank.

    Raises:
        FiddlerError: the total exceeds the device, or is too small even without experts.
    """
    if total == 0:
        return GpuMemory(**dict.fromkeys(GpuMemory.model_fields, 0))
    rank = machine.rank_profile(number)
    device = rank.device
    of_rank = f" of rank {number}" if machine.num_ranks > 1 else ""
    if total > device.memory_bytes:
        raise FiddlerError(
            f"--gpu-mem {format_bytes(total)}{of_rank} is more than the"
            f" {format_bytes(device.memory_bytes)} that {device.name} has according to the machine"
            " profile"
        )
    weights = 0
    kv_cache = 0
    activations = share_activation_bytes(model, rank.kernels, workload, chunk_tokens)
    if number == 0:
        weights = model.non_expert_bytes - host_embedding_bytes(model, rank, total)
        kv_cache = model.sizes.cache_bytes(workload.sequences, workload.max_seq_len)
        others = machine.num_ranks - 1
        activations = activation_bytes(model, rank.kernels, workload, chunk_tokens, others)
    parts = {
        "non_expert_weights": weights,
        "kv_cache": kv_cache,
        "staging": staged_blocks(model) * model.block_bytes if rank.streams else 0,
        "activations": activations,
        "reserve": model.all_expert_bytes // PINNED_BYTES_PER_GPU_BYTE if rank.streams else 0,
    }
    if device.kind == "cuda":
        parts["activations"] += LIBRARY_WORKSPACE_BYTES
        parts["reserve"] += device.context_bytes
    used = sum(parts.values())
    if used > total:
        raise _too_small(total, used, parts, number, of_rank)
    return GpuMemory(total=total, experts=0, **parts)


def _too_small(
    total: int, used: int, parts: dict[str, int], number: int, of_rank: str
) -> FiddlerError:
    needs = ", ".join(
        f"{PURPOSES.get(purpose, purpose)} {format_bytes(size)}"
        for purpose, size in parts.items()
        if size
    )
    ways = (
        "give it more, lower --num-beams or --batch-size, or let it use its CPU alone with 0GB"
        if number
        else "give more, lower --max-seq-len, --num-beams or --batch-size, or plan for the CPU"
        " alone with --gpu-mem 0GB"
    )
    return FiddlerError(
        f"--gpu-mem {format_bytes(total)}{of_rank} is too small: {format_bytes(used)} is needed"
        f" before any expert ({needs}); {ways}"
    )


def activation_bytes(
    model: ModelSpec,
    limits: KernelLimits,
    workload: Workload,
    chunk_tokens: int,
    num_other_ranks: int = 0,
) -> int:
    """An upper estimate of the memory of a forward pass, without weights and cache.

    A pass takes a chunk of each prompt, or one token of each sequence.

    Per token: about ten vectors of the hidden size in the model's dtype (residual, norm, q, k, v,
    attention output) and six in float32 (norm, dispatch sums), one in float32 from each other rank,
    and for each chosen expert its input and the sum of its blocks; and `product_bytes`. Per prompt:
    the attention mask of the chunk. Per sequence: keys and values expanded to all heads, and three
    copies of the logits in float32. Without a fused attention kernel, also the scores of all heads:
    two copies in the model's dtype, and one in float32.
    """
    shape = model.shape
    width = DTYPE_BYTES[model.shape.dtype]
    tokens = pass_tokens(workload, chunk_tokens)
    per_token = shape.hidden_size * (
        10 * width + (6 + num_other_ranks) * 4 + shape.num_experts_per_tok * (width + 4)
    )
    masks = workload.batch_size * chunk_tokens * workload.max_seq_len * width
    expanded = workload.max_seq_len * model.sizes.attended_elements * width
    logits = 3 * 4 * model.vocab_size
    scores = tokens * workload.max_seq_len * model.sizes.score_heads * (2 * width + 4)
    return int(
        ALLOCATOR_SLACK
        * (
            tokens * per_token
            + product_bytes(model, limits, tokens)
            + masks
            + scores
            + workload.sequences * (expanded + logits)
        )
    )


def share_activation_bytes(
    model: ModelSpec, limits: KernelLimits, workload: Workload, chunk_tokens: int
) -> int:
    """As `activation_bytes`, for a rank that computes only its share of the experts.

    Per token: the hidden state in the model's dtype, as received and as computed with; three
    vectors in float32 (dispatch sums and the result); for each chosen expert its index of 8 bytes,
    its weight of 4, its input and the sum of its blocks; and `product_bytes`.
    """
    shape = model.shape
    width = DTYPE_BYTES[model.shape.dtype]
    tokens = pass_tokens(workload, chunk_tokens)
    of_choice = 12 + shape.hidden_size * (width + 4)
    per_token = shape.hidden_size * (2 * width + 3 * 4) + shape.num_experts_per_tok * of_choice
    return int(ALLOCATOR_SLACK * (tokens * per_token + product_bytes(model, limits, tokens)))


def pass_tokens(workload: Workload, chunk_tokens: int) -> int:
    """The most tokens of one pass."""
    return max(chunk_tokens * workload.batch_size, workload.sequences)


def product_bytes(model: ModelSpec, limits: KernelLimits, tokens: int) -> int:
    """An upper estimate of the memory of the experts' products on the GPU.

    Per token and block computed at once: gate, up, their product and the result, in float32; and
    the decoded weights of blocks. For few tokens instead: the product for each token and block of
    the experts they may call, and the result of each choice, in float32.
    """
    shape = model.shape
    width = DTYPE_BYTES[model.shape.dtype]
    products = (
        max(tokens, limits.token_blocks) * 4 * (4 * model.block_neurons + 2 * shape.hidden_size)
    )
    products += limits.decoded_blocks * model.block_format.decoded_bytes
    few = min(tokens, limits.decode_tokens)
    blocks = min(few * shape.num_experts_per_tok, shape.num_experts) * model.blocks_per_expert
    of_few = (
        max(few, 16) * blocks * model.block_neurons * width
        + few * shape.num_experts_per_tok * 4 * shape.hidden_size
    )
    return max(products, of_few)
