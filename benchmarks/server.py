"""Measures what the server adds to a generation.

    python benchmarks/server.py --machine profiles/local.machine.yaml -o FOLDER

Loads one model and alternates two ways to generate the same tokens: directly, and as a streamed
answer to an HTTP request, timed where the client reads it. Then asks for a second turn of a
conversation, with and without its first turn in the cache. Writes server.json.
"""

import http.client
import json
import statistics
import sys
import threading
import time
from pathlib import Path

import uvicorn
from runs import PROVENANCE, arguments_parser, random_ids

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.routing import Routing
from fiddler_opt.solve.compiler import compile_plan
from fiddler_opt.units import parse_bytes
from fiddler_run.command import exit_status
from fiddler_run.generation.defaults import GenerationDefaults
from fiddler_run.generation.generate import generate_ids
from fiddler_run.generation.sampling import Options
from fiddler_run.loading.load import ModelLoader
from fiddler_run.plan.schema import Budget, Plan, Workload
from fiddler_run.serving.address import Address
from fiddler_run.serving.app import Server, model_name
from fiddler_run.serving.metrics import Metrics
from fiddler_run.serving.requests import Defaults, Requests
from fiddler_run.serving.worker import Worker
from fiddler_run.system.files import write_whole

CANCELLED_AFTER = 5  # tokens


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--gpu-mem", default="24GB", metavar="SIZE")
    parser.add_argument("--encoding", default="bf16", metavar="NAME")
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--output-tokens", type=int, default=48, metavar="N")
    parser.add_argument("--rounds", type=int, default=4, metavar="N")
    flags = parser.parse_args()
    loader = ModelLoader(make_plan(flags), flags.model, flags.load_format)
    with_server = Bench(loader, flags.output_tokens)
    result = {"model": loader.plan.model.name, "encoding": loader.plan.encoding}
    result |= with_server.overhead(flags.prompt_tokens, flags.rounds)
    result |= with_server.second_turn()
    result |= with_server.cancelled()
    folder = Path(flags.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "server.json", json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


def make_plan(flags) -> Plan:
    spec = ModelSpec.load(flags.model).in_encoding(flags.encoding)
    workload = Workload(
        prompt_tokens=flags.prompt_tokens,
        output_tokens=flags.output_tokens,
        num_beams=1,
        batch_size=1,
        max_seq_len=2560,
    )
    budget = Budget(gpu_bytes=parse_bytes(flags.gpu_mem, "--gpu-mem"))
    machine = MachineProfile.load(flags.machine).in_encoding(flags.encoding)
    return compile_plan(spec, machine, Routing.uniform(spec), workload, budget, PROVENANCE)


class Bench:
    """A server in this process, and its client."""

    def __init__(self, loader: ModelLoader, output_tokens: int):
        plan = loader.plan
        self.output_tokens = output_tokens
        self.name = model_name(plan)
        metrics = Metrics(plan)
        self.worker = Worker(loader.load, loader.tokenizer, 16, metrics.count)
        never_ending = GenerationDefaults()
        requests = Requests(plan, loader.tokenizer, loader.vocab_size, never_ending, Defaults())
        app = Server(plan, self.worker, requests, metrics, None).app(["*"])
        listening = Address("127.0.0.1", 0, None).listen()
        self.port = listening.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        threading.Thread(target=server.run, args=([listening],), daemon=True).start()
        self.worker.start()
        while self.worker.state == "loading":
            time.sleep(0.1)
        if self.worker.error is not None:
            raise self.worker.error
        self.model = self.worker.model

    def overhead(self, prompt_tokens: int, rounds: int) -> dict[str, object]:
        """Decode speed and time to first token, directly and through HTTP, by round."""
        direct = []
        served = []
        for number in range(-1, rounds):
            ids = random_ids(self.model, prompt_tokens, seed=number + 9)
            self.model.cache.tokens = []
            measured = generate_ids(self.model, ids, Options(self.output_tokens))[1]
            self.model.cache.tokens = []
            times = self.ask(ids[0].tolist(), self.output_tokens)
            if number >= 0:  # the first round warms up
                direct.append((measured.decode_tokens_per_s, measured.ttft_s))
                speed = (len(times) - 2) / (times[-1] - times[1])
                served.append((speed, times[1] - times[0]))
        ratios = [there[0] / here[0] for here, there in zip(direct, served, strict=True)]
        first = [there[1] - here[1] for here, there in zip(direct, served, strict=True)]
        return {
            "direct": direct,
            "served": served,
            "served_decode_speed_ratio": statistics.median(ratios),
            "served_first_token_later_s": statistics.median(first),
        }

    def second_turn(self, first_tokens: int = 2000) -> dict[str, object]:
        """Time to first token of a second turn, after a first one of many tokens."""
        first = random_ids(self.model, first_tokens, seed=3)[0].tolist()
        second = random_ids(self.model, 20, seed=4)[0].tolist()
        found = {}
        for name, forgets in (("fresh", True), ("reused", False)):
            self.ask(first, 16)
            ids = [*self.model.cache.tokens, *second]
            if forgets:
                self.model.cache.tokens = []
            times = self.ask(ids, 4)
            found[f"second_turn_first_token_{name}_s"] = times[1] - times[0]
        return found

    def cancelled(self) -> dict[str, object]:
        """Seconds from a client's leaving to the end of its answer."""
        ids = random_ids(self.model, 16, seed=5)[0].tolist()
        self.ask(ids, 400, leaves_after=CANCELLED_AFTER)
        started = time.perf_counter()
        while self.worker.running is not None:
            time.sleep(0.001)
        return {"cancelled_after_s": time.perf_counter() - started}

    def ask(self, ids: list[int], tokens: int, leaves_after: int | None = None) -> list[float]:
        """When a streamed request was sent, and when each of its chunks came."""
        body = {"model": self.name, "prompt": ids, "max_tokens": tokens, "temperature": 0}
        body = {**body, "stream": True, "logprobs": None}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        times = [time.perf_counter()]
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        for line in response:
            if line.startswith(b'data: {"'):
                times.append(time.perf_counter())
                if leaves_after is not None and len(times) > leaves_after:
                    break
        connection.close()
        response.close()
        return times[:-1] if leaves_after is None else times  # the last chunk has no token


if __name__ == "__main__":
    sys.exit(exit_status(main, "server.py"))
