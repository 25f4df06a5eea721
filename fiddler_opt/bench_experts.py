"""Times experts through the runtime's own functions. Rule: they lie, and are visited, all over the memory.

What lies far from the CPU is slower, on some machines by a fifth, and a run reads from everywhere.
"""

import time
from collections.abc import Callable
from itertools import cycle, pairwise, product
from math import gcd

import torch

from fiddler_opt.bench_timing import BUSY_CYCLES, ROUND, Stopwatch, Timing
from fiddler_opt.memory import STAGED_BLOCKS
from fiddler_opt.model import ModelSpec
from fiddler_run.arena import TORCH_DTYPES, Arena
from fiddler_run.dispatch import LayerDispatch
from fiddler_run.errors import FiddlerError
from fiddler_run.executors import Executors
from fiddler_run.host import num_cores, num_physical_cores
from fiddler_run.kernels.pytorch import apply_blocks
from fiddler_run.plan import MOST_ROUTED_TOKENS
from fiddler_run.timeline import whole_s

GPU_WORKING_SET_BYTES = 1_500_000_000
MAX_CPU_TOKENS = 512  # more are never best computed by a CPU alone
AROUND_BALANCE = 4  # shares tried on either side of the one that keeps CPU and link equally busy
MOST_SWEEPS = 3  # over shares, each further to where the best one seems to be
SHARE_STEP = 1 / 32  # between them, about: in fact whole blocks
MANY_TOKENS = 64  # of an expert in a prompt: for threads that decode does not need; more take long to time
MOST_CALLS = 4096  # tokens times experts that they call in a timed dispatch, where one token's experts alone are not more
SMOOTHED = 5  # shares that one parabola goes through
CLOSE = 1.05  # times that differ by less are equal: then fewer threads are better
PINNING_COSTS = 1.15  # a pinned thread waits where another program takes its core: it must be as much faster as this


class ExpertBench:
    """Random experts of a model's shape, in host memory and, where there is a GPU, in its memory; timed dispatches over them.

    `page_locked`: whether the GPU can read those in host memory.
    """

    def __init__(self, model: ModelSpec, host_bytes: int, stopwatch: Stopwatch, device: torch.device):
        """`host_bytes`: take so much host memory, but no more than all of the model's experts do."""
        self.device, self.on_gpu, self.stopwatch = device, device.type == "cuda", stopwatch
        self.top_k, self.hidden_size = model.shape.num_experts_per_tok, model.shape.hidden_size
        self.dtype, self.block_neurons = TORCH_DTYPES[model.shape.dtype], model.block_neurons
        self.blocks = model.shape.blocks_per_expert(model.block_neurons)
        everything = model.shape.num_layers * model.shape.num_experts
        self.num_experts = min(everything, max(3, self.top_k, host_bytes // model.expert_bytes))
        self.layer_experts = min(model.shape.num_experts, self.num_experts)
        self.timed_bytes = self.num_experts * model.expert_bytes
        host = Arena(self.num_experts * self.blocks, model.block_elements, self.dtype, torch.device("cpu"))
        self.absent = list(host.blocks.split(self.blocks))
        self.absent[0].normal_(std=0.02, generator=torch.Generator().manual_seed(0))
        for expert in self.absent[1:]:
            expert.copy_(self.absent[0])
        self.resident = self.absent  # with a count of 0
        self.page_locked = self.on_gpu and _page_locked(host)
        if self.on_gpu:
            # As many as exceed the GPU's caches; some stand for several.
            on_gpu = [expert.to(device) for expert in self.absent[: max(1, GPU_WORKING_SET_BYTES // model.expert_bytes)]]
            self.resident = [on_gpu[number % len(on_gpu)] for number in range(self.num_experts)]
        self.host, self._turn = host, 0  # figures are timed in turn in places of their own
        self.use_threads(num_cores(), pinned=False)

    def use_threads(self, threads: int, pinned: bool) -> None:
        torch.set_num_threads(threads)
        slots = STAGED_BLOCKS if self.on_gpu else 0
        self.executors = Executors(self.dtype, self.hidden_size, self.block_neurons, threads, slots, self.device, pinned)

    @property
    def kernel(self) -> str:
        """What computes experts on the CPU."""
        return self.executors.cpu.variant

    def threads(self) -> dict:
        """The best number of threads, and whether pinned: by the time of an expert for one token and for a prompt's, which
        count alike. Tried: all physical cores, one less, half of them; and all logical ones, if those are more."""
        physical, logical = min(num_physical_cores(), num_cores()), num_cores()
        counts = sorted({max(1, physical // 2), max(1, physical - 1), physical, logical})
        one, many = {}, {}
        for which in [(threads, pinned) for threads in counts for pinned in (False, True)]:
            self.use_threads(*which)
            one[which], many[which] = (self._expert(tokens, 0.0).us for tokens in (1, MANY_TOKENS))
        score = {
            (threads, pinned): (PINNING_COSTS if pinned else 1)
            * (one[threads, pinned] / min(one.values()) + many[threads, pinned] / min(many.values()))
            for threads, pinned in one
        }
        threads, pinned = min(which for which in score if score[which] <= CLOSE * min(score.values()))
        by_threads = {pinned: {count: round(one[count, pinned], 1) for count in counts} for pinned in (False, True)}
        return {"threads": threads, "pinned": pinned, "threads_us": by_threads[False], "pinned_threads_us": by_threads[True]}

    def shares(self, tokens: int, known: dict[float, float] | None = None) -> dict[float, Timing]:
        """One absent expert called by `tokens` tokens, by the share sent over the link: none, all, and around the best; of `known`,
        microseconds by share, those that matter."""
        self._turn += 1
        if not self.page_locked:
            return {0.0: self._expert(tokens, 0.0)}
        if known is not None:
            return self._experts(tokens, _near_the_best(known, ends=tokens <= MANY_TOKENS))
        ends = [0.0, 1.0] if tokens <= MAX_CPU_TOKENS else [1.0]
        times = self._experts(tokens, ends)
        balance = times[0.0].us / (times[0.0].us + times[1.0].us) if 0.0 in times else 0.96
        block = 1 / (self.top_k * self.blocks)  # of the blocks in a call
        step = block * max(1, round(SHARE_STEP / block))
        first = round(balance / step) - AROUND_BALANCE
        last = first + 2 * AROUND_BALANCE
        for _ in range(MOST_SWEEPS):
            new = [share for share in (round(step * n, 4) for n in range(first, last + 1)) if 0 < share < 1 and share not in times]
            times |= self._experts(tokens, new) if new else {}
            tried = sorted(share for share in times if 0 < share < 1)
            best = min(tried, key=lambda share: times[share].us, default=None)
            if best in tried[:2]:  # rather below: what the CPU does beside the link may be faster than it seemed alone
                first -= AROUND_BALANCE
            elif best in tried[-2:]:
                last += AROUND_BALANCE
            else:
                break
        return times

    def resident_expert(self, tokens: int) -> Timing:
        """One expert in GPU memory."""
        measure = self._applied(tokens) if self._is_prompt(tokens) else self._seen(tokens, self.blocks, 0.0, ("resident",))
        return self.stopwatch.gather(measure)[0]

    def _applied(self, tokens: int) -> Callable[[], list[float]]:
        """Microseconds of the product that prompts use: the GPU's, or Python's if it takes longer to queue that."""
        experts, states = cycle(self.resident), torch.randn(tokens, self.hidden_size, dtype=self.dtype, device=self.device)

        def measure() -> list[float]:
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(BUSY_CYCLES)  # or the GPU would wait for Python
            begun.record()
            started = time.perf_counter()
            apply_blocks(next(experts), states)
            queued_us = (time.perf_counter() - started) * 1e6
            ended.record()
            ended.synchronize()
            return [max(queued_us, begun.elapsed_time(ended) * 1e3)]

        return measure

    def _seen(self, tokens: int, resident: int, share: float, names: tuple[str, ...]) -> Callable[[], list[float]]:
        """Microseconds of an expert from when the first of what the timeline calls `names` begins to when the last ends, in each
        layer of a dispatch; Python has queued them before, as in a run, if it need not wait for the router."""
        dispatch, timeline = self._dispatch(resident, self.blocks, tokens, share), self.executors.timeline
        called, layers = self._called(tokens), range(self._layers)

        def measure() -> list[float]:
            with timeline.recording() as recorded:
                if self.device.type == "cuda":
                    torch.cuda._sleep(BUSY_CYCLES)
                dispatch()
            spans = [span for span in recorded if span.name in names]
            return [whole_s([span for span in spans if span.call == call]) * 1e6 / called for call in layers]

        return measure

    def copies(self) -> dict[str, float]:
        """Bytes per second to the GPU and back, in pieces as the runtime copies for prompts; one token's round trip."""
        at_once, state = self.executors.ring.at_once, torch.ones(1, self.hidden_size, dtype=self.dtype, device=self.device)
        slots = torch.empty_like(self.absent[0], device=self.device).split(at_once)
        pageable, mailbox = self.absent[0].clone().split(at_once), torch.empty(state.shape, dtype=self.dtype, pin_memory=True)
        experts = [self.absent[expert].split(at_once) for expert in self._in_places()]
        if not self.page_locked:
            locked = torch.empty(slots[0].shape, dtype=self.dtype, pin_memory=True)
            experts = [[locked[: len(piece)] for piece in slots]]
        pinned = cycle(experts)

        def copy(source, target):
            for to, piece in zip(target, source, strict=True):
                to.copy_(piece, non_blocking=True)

        def round_trip():
            mailbox.copy_(state, non_blocking=True)
            torch.cuda.current_stream().record_event().synchronize()
            state.copy_(mailbox, non_blocking=True)

        calls = (
            lambda: copy(next(pinned), slots),
            lambda: copy(pageable, slots),
            lambda: copy(slots, next(pinned)),
            round_trip,
        )
        *seconds, trip = (timing.us * 1e-6 for timing in self.stopwatch.time(*calls))
        h2d, pageable_h2d, d2h = (round(self.absent[0].nbytes / each) for each in seconds)
        return {
            "h2d_bytes_per_s": h2d,
            "h2d_pageable_bytes_per_s": pageable_h2d,
            "d2h_bytes_per_s": d2h,
            "round_trip_us": round(trip * 1e6, 1),
        }

    def _expert(self, tokens: int, share: float) -> Timing:
        return self._experts(tokens, [share])[share]

    def _experts(self, tokens: int, shares: list[float]) -> dict[float, Timing]:
        """What one absent expert, called by `tokens` tokens, takes of a dispatch, by the share that is sent over the link."""
        if self.executors.routes(self._rows(tokens)):
            times = self.stopwatch.gather(*(self._seen(tokens, 0, share, ("blocks", "in place")) for share in shares))
            return dict(zip(shares, times, strict=True))
        # What Python does before and after is not told from the experts' time but by a dispatch that has no blocks.
        calls = [self._dispatch(0, self.blocks, tokens, share) for share in shares]
        per_sample = max(1, ROUND // self._layers) if tokens <= MANY_TOKENS else 1  # longer calls vary less
        empty, *filled = self.stopwatch.time(self._dispatch(0, 0, tokens, 0.0), *calls, calls_per_sample=per_sample)
        experts = self._called(tokens) * self._layers
        return {share: (timing - empty) / experts for share, timing in zip(shares, filled, strict=True)}

    def _rows(self, tokens: int) -> int:
        """Tokens of a dispatch in which each called expert has `tokens` of them."""
        return tokens * self._called(tokens) // self.top_k

    def _is_prompt(self, tokens: int) -> bool:
        """Whether, where every expert has so many tokens, there are so many that the runtime takes the way of long prompts."""
        return tokens * self.layer_experts // self.top_k > MOST_ROUTED_TOKENS

    def _called(self, tokens: int) -> int:
        """How many of a layer's experts are called: those of one token; by a prompt all, or as many as are quick."""
        return max(self.top_k, min(self.layer_experts, MOST_CALLS // tokens)) if self._is_prompt(tokens) else self.top_k

    @property
    def _layers(self) -> int:
        """How many layers are timed at once: each is prepared while the one before it is computed. No more, since of two layers
        Python need not wait for the first."""
        return 2 if self.on_gpu and self.num_experts >= 2 * self.layer_experts else 1

    def _dispatch(self, resident: int, stop: int, tokens: int, share: float) -> Callable[[], object]:
        """A call that dispatches as many tokens as it takes for each called expert to have `tokens` of them; to other experts each
        time. Of each expert, blocks 0 to `resident` are on the device, those up to `stop` in host memory."""
        called, at_once = self._called(tokens), self._layers
        layers = [
            LayerDispatch(
                0,
                [self.resident[expert][:resident] for expert in experts],
                [self.absent[expert][resident:stop] for expert in experts],
                lambda _: share,
                self.executors,
            )
            for experts in _in_groups(self._in_places(), self.layer_experts)
        ]
        passed = _in_groups(layers, at_once)
        for group in passed:
            for layer, following in pairwise(group):
                layer.next = following
        rows = self._rows(tokens)
        states = torch.randn(rows, self.hidden_size, dtype=self.dtype, device=self.device)
        weights = torch.full((rows, self.top_k), 1 / self.top_k, device=self.device)
        choices = torch.arange(rows * self.top_k, device=self.device).view(rows, self.top_k) % called
        chosen = [(choices + first) % self.layer_experts for first in range(0, self.layer_experts, called)]
        places = list(product(chosen, passed))
        first = int(self._turn * 0.618 * len(places)) % len(places)  # all shares in the same places
        in_turn, executors = cycle(places[first:] + places[:first]), self.executors

        def dispatch() -> None:
            index, group = next(in_turn)
            for layer in group:
                layer(states, index, weights)
            executors.finish_cpu()  # the calling thread takes its part of the CPU's work, as it does when a model runs

        return dispatch

    def _in_places(self) -> list[int]:
        """All experts, in an order in which any few in a row lie all over the memory."""
        stride = next(
            s for s in range(max(1, round(0.618 * self.num_experts)), 2 * self.num_experts) if gcd(s, self.num_experts) == 1
        )
        return [number * stride % self.num_experts for number in range(self.num_experts)]


def _near_the_best(us: dict[float, float], ends: bool) -> list[float]:
    """The best share and those around it, as many as are smoothed together; `ends`: none and all too."""
    best, inside = min(us, key=us.get), sorted(share for share in us if 0 < share < 1)
    nearest = min(range(len(inside)), key=lambda number: abs(inside[number] - best), default=0)
    first = max(0, min(nearest - SMOOTHED // 2, len(inside) - SMOOTHED))
    wanted = {best, *inside[first : first + SMOOTHED]} | ({0.0, 1.0} if ends else set())
    return [share for share in us if share in wanted]


def _page_locked(host: Arena) -> bool:
    """Tries to page-lock it, which some systems allow for little memory only, as WSL does."""
    try:
        host.pin()
    except FiddlerError:
        return False
    return True


def _in_groups(things: list, size: int) -> list[tuple]:
    """Without those that are left over."""
    return list(zip(*[iter(things)] * size, strict=False))
