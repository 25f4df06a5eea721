"""The plan: the file that the planner writes and the runtime executes.

Every decision is a plain number. An expert's neurons are cut into blocks of `block_neurons`, stored
in one `encoding`. A rank says where its blocks are and how its host blocks are served.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fiddler_run.encodings.base import Encoding
from fiddler_run.encodings.table import ENCODINGS
from fiddler_run.plan.placement import Part, parts_of, placement_problems
from fiddler_run.plan.prediction import Predicted, Provenance, Rates
from fiddler_run.plan.rank import Rank
from fiddler_run.plan.shape import ModelShape
from fiddler_run.plan.yaml_file import BytesOrZero, Count, Section, Width, YamlFile

MAX_RANKS = 64


class Workload(Section):
    """The workload that the plan was made for.

    `batch_size` sequences at once, each of `prompt_tokens` and then `output_tokens`, searched with
    `num_beams`.
    """

    prompt_tokens: Count
    output_tokens: Count
    num_beams: Count
    batch_size: Count
    max_seq_len: Count

    @property
    def sequences(self) -> int:
        """Number of sequences that pass through the model at once."""
        return self.num_beams * self.batch_size

    def problems(self) -> list[str]:
        if self.prompt_tokens + self.output_tokens <= self.max_seq_len:
            return []
        return [
            f"workload.max_seq_len: {self.max_seq_len} is less than "
            f"{self.prompt_tokens} prompt + {self.output_tokens} output tokens"
        ]


class Budget(Section):
    """The bytes that the planner was given. `host_bytes` null: as much as the experts need.

    `gpu_bytes` is for the first rank, `other_gpu_bytes` for the ranks after it.
    """

    optional: ClassVar[tuple[str, ...]] = ("other_gpu_bytes",)

    gpu_bytes: BytesOrZero
    host_bytes: BytesOrZero | None = None
    other_gpu_bytes: list[BytesOrZero] = []


class Plan(YamlFile):
    kind: ClassVar[str] = "plan"
    made_by: ClassVar[str] = "fiddler-opt plan"

    version: Literal[3]
    model: ModelShape
    encoding: str
    workload: Workload
    budget: Budget
    prefill_chunk_tokens: Count
    block_neurons: Width
    ranks: Annotated[list[Rank], Field(min_length=1, max_length=MAX_RANKS)]
    predicted: Predicted
    bytes_per_s: Rates
    provenance: Provenance

    header: ClassVar[str] = (
        'Written by `fiddler-opt plan`; run it with `fiddler-run --plan <this file> "prompt"`.'
    )
    key_comments: ClassVar[dict[str, str]] = {
        "activation": "act(min(gate, limit)) * (clamp(up, -limit, limit) + offset), or relu(up)^2",
        "encoding": "how blocks are stored",
        "budget": "what the planner was given",
        "block_neurons": "an expert is cut into blocks of this many neurons",
        "ranks": "each a process with one GPU, or none",
        "machine": "ranks with the same number share a machine",
        "device": "cuda, or cpu: the GPU part is kept in host memory and computed by the CPU",
        "cpu_pinned": "true if each CPU thread stays on its own core",
        "stream_share": (
            "the share of an expert's host blocks that is streamed, by tokens that chose the expert"
        ),
        "resident_blocks": "by layer, for each expert: the number of its blocks in GPU memory",
        "host_blocks": "likewise in this rank's host memory, after the resident blocks",
        "disk_blocks": "likewise on disk, after all others; empty: none",
        "bytes_per_s": "expert bytes for one token; host: by CPU and link together",
    }

    def problems(self) -> list[str]:
        encoding = ENCODINGS.get(self.encoding)
        if encoding is None:
            return [f"encoding: {self.encoding} is unknown; known are {', '.join(ENCODINGS)}"]
        problems = []
        if encoding.dtype != self.model.dtype:
            problems.append(
                f"encoding: {self.encoding} stores {encoding.dtype}, the model is"
                f" {self.model.dtype}"
            )
        model = self.model
        for key, size in (
            ("model.hidden_size", model.hidden_size),
            ("block_neurons", self.block_neurons),
        ):
            problem = encoding.size_problem(size)
            if problem is not None:
                problems.append(f"{key}: {problem}, which {self.encoding} needs")
        misplaced = placement_problems(
            self.ranks, model.num_layers, model.num_experts, self.blocks_per_expert
        )
        for number, rank in enumerate(self.ranks):
            problems += [f"ranks[{number}].{problem}" for problem in rank.share_problems()]
        problems += misplaced
        for number, rank in enumerate(self.ranks):
            num_host_blocks = None if misplaced else self.host_blocks_of(number)
            found = rank.memory_problems(self.block_bytes, num_host_blocks)
            problems += [f"ranks[{number}].{problem}" for problem in found]
        return problems

    def ranks_beside(self, number: int) -> list[int]:
        """The ranks on the machine of rank `number`, itself included."""
        machine = self.ranks[number].machine
        return [other for other, rank in enumerate(self.ranks) if rank.machine == machine]

    def gpu_ranks_beside(self, number: int) -> list[int]:
        """Those of them that use a GPU, in the order of the GPUs."""
        ranks = self.ranks
        return [
            other
            for other in self.ranks_beside(number)
            if ranks[other].device == "cuda" and ranks[other].gpu_memory_bytes.total
        ]

    def resident_rows(self) -> list[list[int]]:
        """By layer and expert, the blocks in the GPU memory of all ranks."""
        of_layers = (
            [rank.resident_blocks[layer] for rank in self.ranks]
            for layer in range(self.model.num_layers)
        )
        return [[sum(counts) for counts in zip(*rows, strict=True)] for rows in of_layers]

    def parts_of(self, number: int, layer: int) -> list[Part]:
        """The part of each of a layer's experts that a rank has."""
        shape = self.model
        return parts_of(self.ranks, number, layer, shape.num_experts, self.blocks_per_expert)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts, as stored."""
        return sum(rank.expert_bytes for rank in self.ranks)

    @property
    def rank(self) -> Rank:
        """The first rank, which runs all but the experts. Usually the only one."""
        return self.ranks[0]

    @property
    def block_format(self) -> Encoding:
        """The encoding of the plan's blocks, for its sizes."""
        model = self.model
        return ENCODINGS[self.encoding](
            model.hidden_size, self.block_neurons, model.activation.gated
        )

    @property
    def block_bytes(self) -> int:
        return self.block_format.block_bytes

    @property
    def blocks_per_expert(self) -> int:
        return self.block_format.blocks_per_expert(self.model.intermediate_size)

    def held_ram_bytes(self, on_gpu: bool, number: int = 0) -> int:
        """Host memory for a rank's experts and, if it is kept there, the embedding table.

        `on_gpu`: the GPU part is on a GPU. Otherwise, it is in host memory, too.
        """
        rank = self.ranks[number]
        host = rank.host_memory_bytes
        return host.experts + host.embedding + (0 if on_gpu else rank.gpu_memory_bytes.experts)

    @property
    def loading_ram_bytes(self) -> int:
        """The same on the plan's devices for the first machine, while the model is loaded."""
        return self.loading_ram_bytes_beside(0)

    def loading_ram_bytes_beside(self, number: int) -> int:
        """The same for the machine of rank `number`."""
        numbers = self.ranks_beside(number)
        held = (self.held_ram_bytes(self.ranks[n].device == "cuda", n) for n in numbers)
        return sum(held) + len(numbers) * self.model.loading_bytes

    @property
    def num_host_blocks(self) -> int:
        """Blocks in the host memory of all ranks."""
        return sum(map(self.host_blocks_of, range(len(self.ranks))))

    def host_blocks_of(self, number: int) -> int:
        """Blocks in a rank's host memory."""
        rank = self.ranks[number]
        if len(self.ranks) > 1:
            return rank.num_listed_host_blocks
        all_blocks = self.model.num_layers * self.model.num_experts * self.blocks_per_expert
        return all_blocks - rank.num_resident_blocks - rank.num_disk_blocks
