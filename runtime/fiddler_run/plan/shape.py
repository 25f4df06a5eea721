"""ModelShape: the model sizes that a plan depends on, by Hugging Face's names."""

from typing import ClassVar, Literal

from fiddler_run.plan.activation import SILU, Activation
from fiddler_run.plan.yaml_file import ExpertCount, LayerCount, Section, Width

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
Dtype = Literal["bfloat16", "float16", "float32"]
LOADING_THREADS = 8  # more threads need more memory and do not read faster


class ModelShape(Section):
    """The sizes that determine the geometry of a model's experts, and their activation."""

    optional: ClassVar[tuple[str, ...]] = ("activation",)

    name: str
    num_layers: LayerCount
    num_experts: ExpertCount
    num_experts_per_tok: ExpertCount
    hidden_size: Width
    intermediate_size: Width
    dtype: Dtype
    activation: Activation = SILU

    def problems(self) -> list[str]:
        if self.num_experts_per_tok <= self.num_experts:
            return []
        return [
            f"model.num_experts_per_tok: {self.num_experts_per_tok} is more than the"
            f" {self.num_experts} experts"
        ]

    @property
    def expert_elements(self) -> int:
        """Number of weights of one expert."""
        matrices = 3 if self.activation.gated else 2
        return matrices * self.hidden_size * self.intermediate_size

    @property
    def loading_bytes(self) -> int:
        """Host memory for experts while they are read, besides those already placed."""
        return LOADING_THREADS * self.expert_elements * DTYPE_BYTES[self.dtype]
