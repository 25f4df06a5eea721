"""The decode path: runs a small batch through one layer's experts without waiting for Python.

A prompt of up to MAX_DECODE_TOKENS tokens takes it too.

Python submits the CPU's job and queues the GPU's work while the previous layer is computed. GPU and
CPU then signal each other through flags in page-locked memory:

    GPU      publish inputs ... wait for table | resident and streamed blocks, in place | combine
    CPU      wait for inputs, split, write table | its blocks                           | done
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from fiddler_run.engine.resources import Resources
from fiddler_run.engine.timeline import Lane, Work
from fiddler_run.kernels.decode_layer import DecodeInputs, DecodeLayer, Job
from fiddler_run.kernels.limits import MAX_DECODE_TOKENS


class DecodePath:
    """Queues layers of small batches."""

    def __init__(self, resources: Resources):
        self._resources = resources

    def takes(self, tokens: int) -> bool:
        """True if a batch of this size takes the decode path."""
        return self._resources.kernels.decode is not None and tokens <= MAX_DECODE_TOKENS

    def run(self, layer: DecodeLayer, *tensors: torch.Tensor) -> torch.Tensor:
        """Queues the experts' weighted sums [tokens, hidden] on the GPU, in `output_dtype`.

        The GPU never waits for a job that has not been submitted.

        Args:
            tensors: hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k].
        """
        resources = self._resources
        call = self._prepared(layer, tensors)
        self._submit(call)
        try:
            output = self._queue(call, Job(resources.no_job, resources.jobs.last))
            resources.jobs.finish(max_pending=1)  # this layer's job has just been submitted
        except BaseException:
            resources.abandon()  # before anything else is sent
            raise
        return output

    def begin_step(self) -> None:
        """Tells the GPU the last job before a step whose layers were recorded."""
        self._resources.job_before_step.fill_(self._resources.jobs.last)

    def record(
        self, layer: DecodeLayer, number: int, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, Callable[[], None], Callable[[], None]]:
        """As `run`, while a CUDA graph is captured: for the step's layer `number`, from 1.

        Returns:
            The output; what to call before each launch of the graph; and what to call after it.
        """
        resources = self._resources
        call = self._prepared(layer, tensors)
        output = self._queue(call, Job(resources.job_before_step, number))
        return output, lambda: self._submit(call), lambda: resources.jobs.finish(max_pending=1)

    def _prepared(self, layer: DecodeLayer, tensors: tuple[torch.Tensor, ...]) -> _Call:
        resources = self._resources
        resources.check_dtype(tensors[0])
        choices = tensors[1].numel()
        inputs = resources.buffers.decode_inputs(
            *tensors, layer.max_blocks(choices), layer.max_groups(choices)
        )
        return _Call(layer, tensors, inputs, resources.buffers.output(tensors[0].shape))

    def _submit(self, call: _Call) -> None:
        resources = self._resources
        resources.check_hand_over()
        resources.jobs.begin_decode()
        try:
            resources.jobs.submit_decode(
                call.layer, call.inputs, resources.counted, call.cpu_output
            )
        except BaseException:
            resources.abandon()
            raise

    def _queue(self, call: _Call, job: Job) -> torch.Tensor:
        resources = self._resources
        kernels = resources.kernels.decode
        buffers = resources.buffers
        timeline = resources.timeline
        layer, tensors, inputs, cpu_output = call
        hidden_states, index, weights = tensors
        work = (Lane.GPU, Work.RESIDENT)
        if layer.streams(len(index)):
            work = (Lane.LINK, Work.IN_PLACE)
        timeline.begin(Lane.PYTHON, Work.QUEUE)
        host = [inputs.states, inputs.index, inputs.weights]
        kernels.publish_inputs(tensors, host, inputs.inputs_ready, job)
        table = kernels.wait_for_table(
            inputs.table, inputs.table_ready, buffers.gave_up, job, resources.device
        )
        timeline.begin(*work)
        results = kernels.expert_gemv(
            table, inputs.max_blocks, inputs.max_groups, hidden_states, weights
        )
        timeline.end(*work)
        kernels.wait(buffers.output_ready, buffers.gave_up, job)
        total = kernels.combine(
            results, index, layer.num_experts, cpu_output, resources.output_dtype
        )
        timeline.end(Lane.PYTHON, Work.QUEUE)
        return total


class _Call(NamedTuple):
    """A layer, its inputs on the GPU, and where they and the results go in host memory."""

    layer: DecodeLayer
    tensors: tuple[torch.Tensor, ...]
    inputs: DecodeInputs
    cpu_output: torch.Tensor
