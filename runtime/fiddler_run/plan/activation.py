"""Activation: how an expert's neurons combine gate and up."""

import math
from typing import Annotated, Literal

from pydantic import Field

from fiddler_run.plan.yaml_file import Ratio, Section


class Activation(Section):
    """What a neuron multiplies its column of down by, given its gate and up values.

        act(min(gate, limit)) * (min(max(up, -limit), limit) + offset)

    `act` is one of

        silu       g * sigmoid(alpha * g)
        gelu_tanh  g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g^3)))

    `limit` null: nothing is limited. A gate of zero gives zero, so zeros can pad a block.

    With `relu2`, experts have no gate: a neuron multiplies by max(up, 0)^2. It has no constants.
    """

    function: Literal["silu", "gelu_tanh", "relu2"]
    alpha: Ratio = 1.0
    offset: Ratio = 0.0
    limit: Annotated[float, Field(gt=0)] | None = None

    def problems(self) -> list[str]:
        without = {"silu": (), "gelu_tanh": ("alpha",), "relu2": ("alpha", "offset", "limit")}
        return [
            f"model.activation.{key}: {getattr(self, key):g}, but {self.function} has no {key}"
            for key in without[self.function]
            if getattr(self, key) != type(self).model_fields[key].default
        ]

    @property
    def gated(self) -> bool:
        """True if experts have a gate."""
        return self.function != "relu2"

    @property
    def bound(self) -> float:
        """`limit` as a number: infinite if there is none."""
        return math.inf if self.limit is None else self.limit


SILU = Activation(function="silu")
