"""Cache policies for expert blocks in GPU memory, simulated on recorded routing.

An expert of a layer is an item, numbered layer * num_experts + expert. It has `blocks_per_expert`
blocks, any number of which may be resident. A call needs all of them. All policies hold the same
number of blocks in one pool for all layers. They change what they hold after decode steps only:
prefill calls nearly every expert, and would replace everything.
"""

import heapq
from collections import OrderedDict
from collections.abc import Sequence

from fiddler_run.plan.split import split

Items = Sequence[int]  # the experts that one layer calls in one step, each once


class Static:
    """Keeps what it starts with. The base of the other policies.

    `resident` holds the blocks of each item in GPU memory.
    """

    def __init__(self, resident: Sequence[int], blocks_per_expert: int):
        self.resident = list(resident)
        self.blocks_per_expert = blocks_per_expert

    def held(self, items: Items) -> int:
        """The resident blocks of called items."""
        return sum(self.resident[item] for item in items)

    def update(self, items: Items) -> int:
        """Replaces blocks after a decode step has used these items. Returns the blocks copied."""
        return 0

    def _missing(self, item: int) -> int:
        return self.blocks_per_expert - self.resident[item]

    def _move(self, victim: int, item: int, most: int) -> int:
        """Replaces up to `most` blocks of `victim` by blocks of `item`. Returns their number."""
        moved = min(most, self.resident[victim])
        self.resident[victim] -= moved
        self.resident[item] += moved
        return moved


class Lru(Static):
    """Inserts every missing block, in place of those of the item that was called longest ago."""

    def __init__(self, resident: Sequence[int], blocks_per_expert: int, by_use: Items):
        """`by_use`: all items, the least used first."""
        super().__init__(resident, blocks_per_expert)
        self._recent = OrderedDict.fromkeys(item for item in by_use if resident[item])

    def update(self, items: Items) -> int:
        for item in items:
            self._recent[item] = None
            self._recent.move_to_end(item)
        copied = 0
        for item in items:
            while missing := self._missing(item):
                victim = next(iter(self._recent))
                if victim in items:  # fewer blocks than one layer calls
                    break
                copied += self._move(victim, item, missing)
                if not self.resident[victim]:
                    del self._recent[victim]
        for item in items:
            if not self.resident[item]:
                del self._recent[item]
        return copied


class Lfu(Static):
    """Keeps the items that were called most often, and of those the ones called last.

    It counts all calls so far, and copies a block only in place of one of an item with fewer calls.
    """

    def __init__(self, resident: Sequence[int], blocks_per_expert: int):
        super().__init__(resident, blocks_per_expert)
        self._use = [(0, 0)] * len(self.resident)  # calls, last step
        self._least = [(0, 0, item) for item, count in enumerate(resident) if count]
        self._steps = 0

    def update(self, items: Items) -> int:
        self._steps += 1
        for item in items:
            self._use[item] = (self._use[item][0] + 1, self._steps)
        copied = 0
        for item in items:
            while missing := self._missing(item):
                victim = self._least_used()
                if victim is None or self._use[victim][0] >= self._use[item][0]:
                    break
                copied += self._move(victim, item, missing)
        for item in items:
            if self.resident[item]:
                heapq.heappush(self._least, (*self._use[item], item))
        return copied

    def _least_used(self) -> int | None:
        """The resident item with the fewest calls, without those of this step."""
        while self._least:
            calls, step, item = self._least[0]
            if self.resident[item] and self._use[item] == (calls, step):
                return item
            heapq.heappop(self._least)  # called again since, or evicted
        return None


class Belady(Static):
    """The optimum (Belady 1966, with bypass): no policy with as many blocks has more hits.

    It knows all decode steps. It starts with the blocks that are needed first, and inserts a block
    only in place of one that is needed later.
    """

    def __init__(self, num_blocks: int, blocks_per_expert: int, num_items: int, calls: list[Items]):
        """`calls`: the items of each layer of each decode step, in order of the calls of `update`.

        `num_blocks` may be resident.
        """
        super().__init__([0] * num_items, blocks_per_expert)
        self._next = [len(calls)] * num_items
        self._following: list[list[int]] = [[] for _ in calls]
        for number in range(len(calls) - 1, -1, -1):
            self._following[number] = [self._next[item] for item in calls[number]]
            for item in calls[number]:
                self._next[item] = number
        for item in sorted(range(num_items), key=self._next.__getitem__):
            self.resident[item] = min(num_blocks, blocks_per_expert)
            num_blocks -= self.resident[item]
        self._farthest = [(-self._next[i], i) for i, count in enumerate(self.resident) if count]
        heapq.heapify(self._farthest)
        self._updates = 0

    def update(self, items: Items) -> int:
        for item, following in zip(items, self._following[self._updates], strict=True):
            self._next[item] = following
            if self.resident[item]:
                heapq.heappush(self._farthest, (-following, item))
        self._updates += 1
        copied = 0
        # soonest first, so that no block is copied that another of this step replaces
        for item in sorted(items, key=self._next.__getitem__):
            had = self.resident[item]
            while missing := self._missing(item):
                victim = self._needed_last()
                if victim is None or self._next[victim] <= self._next[item]:
                    break
                copied += self._move(victim, item, missing)
            if self.resident[item] and not had:
                heapq.heappush(self._farthest, (-self._next[item], item))
        return copied

    def _needed_last(self) -> int | None:
        """The resident item whose next call is the farthest."""
        while self._farthest:
            following, item = self._farthest[0]
            if self.resident[item] and self._next[item] == -following:
                return item
            heapq.heappop(self._farthest)
        return None


class DynamicTail(Static):
    """Keeps a part of each layer's blocks fixed, and in the rest what was streamed anyway.

    The tail of a layer has as many blocks as `slots` experts, or as the layer has. It starts with
    the blocks of the layer's least used items. While the CPU computes host blocks, the link is idle
    for a part of the time: `share` of the host blocks that a step needs are streamed and kept, in
    place of tail blocks of the item that was called longest ago.
    """

    def __init__(
        self,
        resident: Sequence[int],
        blocks_per_expert: int,
        by_use: Items,
        num_experts: int,
        slots: int,
        share: float,
    ):
        """`by_use`: all items, the least used first."""
        super().__init__(resident, blocks_per_expert)
        self._num_experts = num_experts
        self._share = share
        self._tails: list[OrderedDict[int, int]] = [  # by layer, the tail blocks of items
            OrderedDict() for _ in range(len(self.resident) // num_experts)
        ]
        room = [slots * blocks_per_expert] * len(self._tails)
        for item in by_use:
            layer = item // num_experts
            taken = min(room[layer], self.resident[item])
            if taken:
                self._tails[layer][item] = taken
                room[layer] -= taken

    def update(self, items: Items) -> int:
        tail = self._tails[items[0] // self._num_experts]
        for item in items:
            if item in tail:
                tail.move_to_end(item)
        copied = 0
        missing = [self._missing(item) for item in items]
        total = max(1, sum(missing))
        share = int(self._share * total) / total  # no more than the link carries in that time
        for item, most in zip(items, split((share, each) for each in missing), strict=True):
            left = most
            while left:
                victim = next(iter(tail), item)
                if victim in items:
                    break
                moved = self._move(victim, item, min(left, tail[victim]))
                tail[victim] -= moved
                tail[item] = tail.get(item, 0) + moved
                if not tail[victim]:
                    del tail[victim]
                left -= moved
            copied += most - left
        return copied
