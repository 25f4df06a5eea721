"""Layers of ranks after the first, as recordings of a size of batch."""

import torch
from captures import OperationCapture

from fiddler_run.ranks.exchange import Sizes
from fiddler_run.ranks.recorded import MAX_SIZES, RecordedLayers

HIDDEN = 4


class TensorExchange:
    """Stands in for NCCL: the inputs of a size are always in the same memory."""

    can_record = True
    device = torch.device("cpu")

    def __init__(self):
        self.inputs = {}
        self.sent = []
        self.sums = {}

    def set(self, sizes, states):
        of_size = self.inputs.setdefault(sizes, torch.zeros(sizes.tokens, HIDDEN))
        of_size.copy_(states)

    def receive(self, sizes):
        return self.inputs[sizes].clone(), None, None

    def send(self, partial):
        self.sums.setdefault(partial.shape, torch.zeros(partial.shape)).copy_(partial)


class Layer:
    """Multiplies its inputs by `factor`. Notes what it was told, in order."""

    def __init__(self, factor, told):
        self.factor = factor
        self.told = told
        self.fails = False

    def can_record(self, tokens):
        return tokens <= 8

    def begin_step(self):
        self.told.append("step")

    def record(self, number, states, index, weights):
        assert number == 1  # each layer is a step of its own
        self.told.append("record")
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        add = self.told.append
        return states * self.factor, lambda: add("submit"), lambda: add("finish")


class NotedCapture(OperationCapture):
    """Notes when it is launched. The first time is at its end."""

    told: list

    def end(self):
        super().end()
        self.told.append("launch")

    def replay(self):
        self.told.append("launch")
        super().replay()


def sizes_of(tokens):
    return Sizes(tokens, 2, HIDDEN, torch.float32)


def layers_and_told():
    told = []
    exchange = TensorExchange()
    layers = [Layer(2, told), Layer(3, told)]
    NotedCapture.told = told
    return exchange, layers, told, RecordedLayers(layers, exchange, NotedCapture)


def run(recorded, exchange, layer, states):
    sizes = sizes_of(len(states))
    exchange.set(sizes, states)
    assert recorded.run(layer, sizes)
    return exchange.sums[states.shape].clone()


def test_layer_is_recorded_once_and_repeated_for_new_inputs():
    exchange, _, told, recorded = layers_and_told()
    first, second = torch.randn(2, 3, HIDDEN)
    assert torch.equal(run(recorded, exchange, 0, first), first * 2)
    assert told == ["step", "record", "submit", "launch", "finish"]
    assert torch.equal(run(recorded, exchange, 1, first), first * 3)
    told.clear()
    assert torch.equal(run(recorded, exchange, 0, second), second * 2)
    assert torch.equal(run(recorded, exchange, 1, second), second * 3)
    assert told == ["step", "submit", "launch", "finish"] * 2


def test_recordings_of_the_oldest_size_make_room():
    exchange, _, told, recorded = layers_and_told()
    for tokens in range(1, MAX_SIZES + 2):
        run(recorded, exchange, 0, torch.randn(tokens, HIDDEN))
    told.clear()
    run(recorded, exchange, 0, torch.randn(2, HIDDEN))
    assert "record" not in told
    run(recorded, exchange, 0, torch.randn(1, HIDDEN))
    assert "record" in told


def test_layer_that_cannot_be_recorded_is_left_to_the_caller(caplog):
    exchange, layers, told, recorded = layers_and_told()
    assert not recorded.run(0, sizes_of(9))  # too large a batch
    exchange.can_record = False
    assert not recorded.run(0, sizes_of(1))
    exchange.can_record = True
    assert told == []
    layers[0].fails = True
    sizes = sizes_of(1)
    exchange.set(sizes, torch.randn(1, HIDDEN))
    assert not recorded.run(0, sizes)
    assert exchange.sums == {}
    assert told == ["step", "record"]  # no job was submitted
    assert not recorded.run(1, sizes)  # nor is another layer tried
    assert "no CUDA graphs in another rank" in caplog.text
