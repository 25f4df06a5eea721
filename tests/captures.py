"""A stand-in for CUDA graphs on a CPU: records operations, and repeats them in the same memory."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OperationCapture(TorchDispatchMode):
    """Like GraphCapture, except that operations run while they are captured."""

    def __init__(self):
        super().__init__()
        self._operations = []

    def begin(self) -> None:
        self.__enter__()

    def end(self) -> None:
        self.__exit__(None, None, None)

    abort = end

    def replay(self) -> None:
        with torch.no_grad():
            for operation, arguments, named, outputs in self._operations:
                repeated = operation(*arguments, **named)
                for old, new in zip(tree_leaves(outputs), tree_leaves(repeated), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        outputs = operation(*arguments, **(named or {}))
        self._operations.append((operation, arguments, named or {}, outputs))
        return outputs


def record_on_any_device(model) -> None:
    """Lets the model's decode steps run from tapes, also on a CPU."""
    if model.device.type == "cpu":
        model.session.make_capture = OperationCapture
        model.session.forget_decode()
