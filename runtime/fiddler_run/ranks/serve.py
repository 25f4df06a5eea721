"""A rank other than 0: computes its share of each expert when rank 0 says so."""

from __future__ import annotations

from dataclasses import astuple

import torch

from fiddler_run.engine.timeline import Lane, Work
from fiddler_run.engine.tuning import RouterSizes, tune
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan
from fiddler_run.ranks.connection import Connection
from fiddler_run.ranks.exchange import Exchange, Sizes
from fiddler_run.ranks.recorded import RecordedLayers
from fiddler_run.ranks.share import Share


@torch.inference_mode()
def serve(connection: Connection, exchange: Exchange, share: Share, plan: Plan) -> None:
    """Does what rank 0 says until it ends this rank.

    Raises:
        FiddlerError: rank 0 has gone.
    """
    engine, layers = share
    resources = engine.resources
    recorded = RecordedLayers(layers, exchange)
    timeline = resources.timeline
    router = RouterSizes.of(plan.model)
    while (message := connection.receive()) is not None:
        match message["do"]:
            case "layer":
                sizes = Sizes(message["tokens"], message["k"], router.hidden_size, resources.dtype)
                number = message["layer"]
                if not (message["recorded"] and recorded.run(number, sizes)):
                    inputs = exchange.receive(sizes)
                    timeline.end(Lane.GPU, Work.EXCHANGE)
                    partial = layers[number](*inputs)
                    timeline.drop(Lane.GPU, Work.DENSE)  # only rank 0 has dense layers
                    timeline.begin(Lane.GPU, Work.EXCHANGE)
                    exchange.send(partial)
            case "trace":
                resources.settle()
                timeline.start()
                connection.send(request=message["request"])
            case "traced":
                resources.settle()
                spans = [astuple(span) for span in timeline.stop()]
                connection.send(request=message["request"], spans=spans, origin_s=timeline.origin_s)
            case "tune":
                resources.settle()
                tune(layers, resources, router, message["prompt_tokens"])
                resources.forget_traffic()
                connection.send(request=message["request"])
            case "count":
                resources.settle()
                counted = resources.counted.tolist()
                connection.send(request=message["request"], traffic=counted)
            case "forget":
                resources.settle()
                resources.forget_traffic()
            case "end":
                connection.ended_normally = True
                return
    raise FiddlerError("rank 0 is gone")
