"""The decode path: runs a small batch through one layer's experts without waiting for Python.

A prompt of up to MAX_DECODE_TOKENS tokens takes it too.

Python submits the CPU's job and queues the GPU's work while the previous layer is computed. GPU and
CPU then signal each other through flags in page-locked memory:

    GPU      publish inputs ... wait for table | resident and streamed blocks, in place | combine
    CPU      wait for inputs, split, write table | its blocks                           | done
"""

import torch

from fiddler_run.engine.resources import Resources
from fiddler_run.engine.timeline import Lane, Work
from fiddler_run.kernels.decode_layer import DecodeLayer
from fiddler_run.kernels.limits import MAX_DECODE_TOKENS


class DecodePath:
    """Queues layers of small batches."""

    def __init__(self, resources: Resources):
        self._resources = resources

    def takes(self, tokens: int) -> bool:
        """True if a batch of this size takes the decode path."""
        return self._resources.kernels.decode is not None and tokens <= MAX_DECODE_TOKENS

    def run(
        self,
        layer: DecodeLayer,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Queues the experts' weighted sums [tokens, hidden] on the GPU, in the states' dtype.

        The GPU never waits for a job that has not been submitted.
        """
        resources = self._resources
        resources.check_dtype(hidden_states)
        resources.jobs.begin_decode()
        try:
            return self._queue(layer, hidden_states, top_k_index, top_k_weights)
        except BaseException:
            resources.abandon()  # before anything else is sent
            raise

    def _queue(
        self,
        layer: DecodeLayer,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        resources = self._resources
        resources.check_hand_over()
        kernels = resources.kernels.decode
        buffers = resources.buffers
        jobs = resources.jobs
        timeline = resources.timeline
        tokens, top_k = top_k_index.shape
        work = (Lane.GPU, Work.RESIDENT)
        if layer.streams(tokens):
            work = (Lane.LINK, Work.IN_PLACE)

        timeline.begin(Lane.PYTHON, Work.QUEUE)
        max_blocks = layer.max_blocks(tokens * top_k)
        max_groups = layer.max_groups(tokens * top_k)
        tensors = (hidden_states, top_k_index, top_k_weights)
        inputs = buffers.decode_inputs(*tensors, max_blocks, max_groups)
        cpu_output = buffers.output(hidden_states.shape)
        host = [inputs.states, inputs.index, inputs.weights]
        kernels.publish_inputs(tensors, host, inputs.inputs_ready, jobs.last)
        jobs.submit_decode(layer, inputs, resources.counted, cpu_output)
        table = kernels.wait_for_table(
            inputs.table, inputs.table_ready, buffers.gave_up, jobs.last, resources.device
        )
        timeline.begin(*work)
        results = kernels.expert_gemv(table, max_blocks, max_groups, hidden_states, top_k_weights)
        timeline.end(*work)
        kernels.wait(buffers.output_ready, buffers.gave_up, jobs.last)
        total = kernels.combine(results, top_k_index, layer.num_experts, cpu_output, hidden_states)
        timeline.end(Lane.PYTHON, Work.QUEUE)
        jobs.finish(max_pending=1)  # this layer's job has just been submitted
        return total
