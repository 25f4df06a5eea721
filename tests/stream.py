"""A stand-in for the decode path's GPU kernels: a thread that computes on the CPU."""

import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from hand_over import BLOCKS, applied, number_of, wait_for

from fiddler_run.encodings.base import Encoding


class Stream:
    """Stands in for the decode path's GPU kernels: queued work runs in order, in its own thread."""

    def __init__(self, delay_s: float = 1e-3, encoding: Encoding = BLOCKS):
        """`delay_s`: the delay before each layer's inputs are published."""
        self.encoding = encoding
        self.by_address: dict[int, torch.Tensor] = {}  # blocks
        self.delay_s = delay_s
        self.thread = ThreadPoolExecutor(1)
        self.max_pending = 0
        self.queued: list[Future] = []

    def queue(self, work) -> None:
        self.max_pending = max(self.max_pending, sum(not each.done() for each in self.queued))
        self.queued.append(
            self.thread.submit(torch.inference_mode(torch.is_inference_mode_enabled())(work))
        )

    def finish(self) -> None:
        for each in self.queued:
            each.result(timeout=60)

    def publish_inputs(self, tensors, host, inputs_ready, job):
        def work():
            time.sleep(self.delay_s)
            for to, tensor in zip(host, tensors, strict=True):
                to.copy_(tensor)
            inputs_ready[: len(tensors[0])] = number_of(job)

        self.queue(work)

    def wait_for_table(self, table, table_ready, gave_up, job, device):
        copied = torch.empty_like(table)
        self.queue(lambda: (wait_for(table_ready, number_of(job)), copied.copy_(table)))
        return copied

    def expert_gemv(self, table, max_blocks, max_groups, states, weights):
        results = torch.zeros((*weights.shape, states.shape[1]))

        def work():
            rows = table.tolist()
            groups = table[1 + 2 * max_blocks :][: 4 * max_groups].view(-1, 4).tolist()
            choices = rows[1 + 2 * max_blocks + 4 * max_groups :]
            for address, group in zip(rows[1 : 1 + rows[0]], rows[1 + max_blocks :], strict=False):
                _, _, first, last = groups[group]
                for choice in choices[first:last]:
                    token, place = divmod(choice, weights.shape[1])
                    results[token, place] += weights[token, place] * applied(
                        self.by_address[address][None], states[token], self.encoding
                    )

        self.queue(work)
        return results

    def wait(self, flag, gave_up, job):
        self.queue(lambda: wait_for(flag, number_of(job)))

    def combine(self, results, index, num_experts, cpu_output, dtype):
        output = torch.empty(results.shape[::2], dtype=dtype)
        self.queue(lambda: output.copy_(results.sum(dim=1) + cpu_output))
        return output


class SynchronousStream(Stream):
    """Finishes each layer before it returns: CPU tensors cannot be pending, as CUDA tensors can."""

    def combine(self, *arguments):
        output = super().combine(*arguments)
        self.finish()
        self.queued.clear()
        return output
