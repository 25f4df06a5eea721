"""The encodings by name. To add one, add a file to this folder and a line here."""

from fiddler_run.encodings.base import Encoding
from fiddler_run.encodings.lossless12 import Lossless12
from fiddler_run.encodings.plain import Bf16, Fp16, Fp32

ENCODINGS: dict[str, type[Encoding]] = {each.name: each for each in (Bf16, Fp16, Fp32, Lossless12)}


def encodings_of(dtype: str, hidden_size: int) -> list[str]:
    """The encodings of `dtype` that can store rows of `hidden_size`, the plain one first."""
    return [
        name
        for name, each in ENCODINGS.items()
        if each.dtype == dtype and each.size_problem(hidden_size) is None
    ]


def plain_encoding(dtype: str) -> str:
    """The name of the encoding that stores weights of `dtype` unchanged."""
    return next(each.name for each in (Bf16, Fp16, Fp32) if each.dtype == dtype)
