"""The activation of an expert's neurons in the GPU kernels; plan/activation.py has its formula."""

import triton
import triton.language as tl


@triton.jit
def glu(
    gate, up, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    """Applies an activation to float32 values. NaN stays NaN. `LIMIT` None: no limit."""
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if OFFSET != 0:
        up += OFFSET
    if FUNCTION == "gelu_tanh":  # (1 + tanh(x)) / 2 is sigmoid(2 * x)
        sigmoid = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    elif ALPHA != 1:
        sigmoid = tl.sigmoid(ALPHA * gate)
    else:
        sigmoid = tl.sigmoid(gate)
    return gate * sigmoid * up
