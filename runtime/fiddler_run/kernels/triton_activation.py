"""The activation of an expert's neurons in the GPU kernels; plan/activation.py has its formula."""

import triton
import triton.language as tl


@triton.jit
def glu(
    gate, up, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    """Applies an activation to float32 values. NaN stays NaN. `LIMIT` None: no limit.

    For experts without a gate, `gate` is `up`.
    """
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if OFFSET != 0:
        up += OFFSET
    if FUNCTION == "relu2":
        acted = tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif FUNCTION == "gelu_tanh":  # (1 + tanh(x)) / 2 is sigmoid(2 * x)
        acted = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    elif ALPHA != 1:
        acted = gate * tl.sigmoid(ALPHA * gate)
    else:
        acted = gate * tl.sigmoid(gate)
    return acted * up
