"""RoutingTrace: the experts that each token of recorded prompts chose, as a file."""

import io
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np

from fiddler_run.errors import FiddlerError
from fiddler_run.system.files import cannot_read, write_whole


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Choices of experts in the order in which tokens were routed, prompt after prompt.

    The trace of an unfinished job lacks the last prompts.

    Attributes:
        experts: uint8 [tokens, layers, k], in the router's order; uint16 above 256 experts.
        prompt: int32 [tokens], the token's prompt, numbered over all sets.
        decode: bool [tokens], True for generated tokens.
        prompt_sets: int32 [prompts], the index of each prompt's set in `set_names`.
        fingerprint: the job's fingerprint.
    """

    experts: np.ndarray
    prompt: np.ndarray
    decode: np.ndarray
    prompt_sets: np.ndarray
    set_names: list[str]
    fingerprint: str

    def save(self, path: str | Path) -> None:
        """Writes a compressed .npz atomically.

        Raises:
            FiddlerError: the file cannot be written.
        """
        file = io.BytesIO()
        np.savez_compressed(
            file, **{field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}
        )
        write_whole(path, file.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a trace written by `save`.

        Raises:
            FiddlerError: the file cannot be read, or is not a routing trace.
        """
        try:
            content = Path(path).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise cannot_read(path, error) from None
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                arrays = {field.name: file[field.name] for field in fields(cls)}
            names = arrays.pop("set_names").tolist()
            fingerprint = arrays.pop("fingerprint").item()
            trace = cls(**arrays, set_names=names, fingerprint=fingerprint)
            trace._check()
        # damage raises BadZipFile, zlib.error, KeyError, ValueError, TypeError and others
        except Exception as error:
            raise FiddlerError(
                f"{path}: not a routing trace: {' '.join(str(error).split())}; remove it, and"
                " record one with `fiddler-opt profile`"
            ) from None
        return trace

    def _check(self) -> None:
        """Checks the arrays' types and lengths.

        Raises:
            ValueError: the arrays do not fit together.
        """
        tokens = len(self.prompt)
        prompts = len(self.prompt_sets)
        sets = len(self.set_names)
        starts = np.flatnonzero(np.diff(self.prompt, prepend=-1))
        fits = {
            "experts": (
                self.experts.dtype in (np.uint8, np.uint16)
                and self.experts.ndim == 3
                and len(self.experts) == tokens
            ),
            "prompt": (
                self.prompt.dtype == np.int32
                and np.array_equal(self.prompt[starts], np.arange(prompts))
            ),
            "decode": (
                self.decode.dtype == bool
                and self.decode.shape == (tokens,)
                and not self.decode[starts].any()
            ),
            "prompt_sets": (
                self.prompt_sets.dtype == np.int32
                and not np.any((self.prompt_sets < 0) | (self.prompt_sets >= sets))
            ),
            "fingerprint": isinstance(self.fingerprint, str),
        }
        for name, fit in fits.items():
            if not fit:
                raise ValueError(f"{name} does not fit the rest")
