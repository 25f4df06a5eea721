"""`replay`: cache policies on hand-made, random and recorded routing."""

import random
from itertools import product

import numpy as np
import pytest
from command_line import assert_refused, run
from conftest import DEMO, ROOT, demo_shape, make_plan, random_plan
from planning import machine_profile, random_machine, random_routing, routed, small_model
from transformers import AutoTokenizer

from fiddler_opt.inputs.routing import Routing
from fiddler_opt.insight import replay
from fiddler_opt.insight.caches import Belady, DynamicTail, Lfu, Lru
from fiddler_opt.insight.replay import StepTimes, passes, policies
from fiddler_opt.insight.replay_report import verdict
from fiddler_opt.insight.synthetic import Synthetic
from fiddler_opt.measure.routing import RoutingJob, RoutingRecorder, RoutingTrace, routing_profile
from fiddler_opt.solve.compiler import compile_plan
from fiddler_opt.solve.placement import placement_of
from fiddler_opt.solve.problem import Problem
from fiddler_run.generation.generate import generate_ids
from fiddler_run.generation.sampling import Options
from fiddler_run.plan.schema import Budget, Workload

TIMES = StepTimes(1e-3, 0.0, 1e-6, 1e-5, 2e-5, overlap=True)
SHAPE = demo_shape().model_copy(update={"num_layers": 3, "num_experts": 6})
BLOCKS = 8
PLAN = "plans/rtx4090.yaml"


def trace_of(experts: np.ndarray, decode: np.ndarray) -> RoutingTrace:
    """A trace [tokens, layers, k] whose prompts begin where prefill follows decode."""
    starts = ~decode & np.append(True, decode[:-1])
    prompt = (starts.cumsum() - 1).astype(np.int32)
    sets = np.zeros(prompt[-1] + 1, dtype=np.int32)
    return RoutingTrace(experts.astype(np.uint8), prompt, decode, sets, ["set"], "")


def random_trace(rng: random.Random, shape=SHAPE, tokens: int = 40) -> RoutingTrace:
    """Skewed choices that repeat at random. A prompt of three tokens, then 12 generated ones."""
    weights = [rng.random() ** rng.choice([0, 1, 4]) + 1e-3 for _ in range(shape.num_experts)]
    repeat = rng.random()
    rows = []
    for token in range(tokens):
        layers = []
        for layer in range(shape.num_layers):
            chosen = [rng.choice(rows[-1][layer])] if token and rng.random() < repeat else []
            while len(chosen) < shape.num_experts_per_tok:
                (expert,) = rng.choices(range(shape.num_experts), weights)
                if expert not in chosen:
                    chosen.append(expert)
            layers.append(chosen)
        rows.append(layers)
    return trace_of(np.array(rows), np.arange(tokens) % 15 >= 3)


def test_optimum_is_at_least_as_good_as_every_policy():
    rng = random.Random(1)
    for number in range(200):
        count = rng.randint(0, BLOCKS)
        equal = [[count] * SHAPE.num_experts] * SHAPE.num_layers
        plan = make_plan(SHAPE, equal) if number % 2 else random_plan(SHAPE, rng)
        chances = [[rng.random() for _ in range(SHAPE.num_experts)] for _ in range(3)]
        all_passes = passes(random_trace(rng), plan)
        calls = [items for each in all_passes if each.decode for items in each.calls]
        made = policies(plan, routed("", chances, []), calls, rng.random(), [1, 2, 9])
        caches = {words: make() for words, make in made.items()}
        found = {words: replay.run(c, all_passes, TIMES, plan) for words, c in caches.items()}
        best = found[replay.OPTIMUM].hit_rate
        for words, each in found.items():
            assert each.hit_rate <= best, (number, words)
            assert sum(caches[words].resident) == plan.rank.num_resident_blocks, words
            assert all(0 <= count <= BLOCKS for count in caches[words].resident), words


def test_optimum_matches_exhaustive_search():
    """One layer of three experts of two blocks. All states that a step can lead to are tried."""
    rng = random.Random(2)
    for room in (1, 2, 3, 4) * 8:
        calls = [rng.sample(range(3), rng.choice([1, 2])) for _ in range(7)]
        states = [state for state in product(range(3), repeat=3) if sum(state) == room]
        best = dict.fromkeys(states, 0)
        for items in calls:
            reached = {state: sum(state[i] for i in items) + best[state] for state in states}
            best = {
                after: max(
                    hits
                    for before, hits in reached.items()
                    if all(i in items or after[i] <= before[i] for i in range(3))
                )
                for after in states
            }
        optimum = Belady(room, 2, 3, calls)
        hits = 0
        for items in calls:
            hits += optimum.held(items)
            optimum.update(items)
        assert hits == max(best.values())


def test_policies_by_hand():
    """Four experts of two blocks in one layer; the plan keeps 2, 1, 1 and 0."""
    resident = [2, 1, 1, 0]
    lru = Lru(resident, 2, by_use=[3, 2, 1, 0])
    assert (lru.held([1, 3]), lru.update([1, 3])) == (1, 3)
    assert lru.resident == [0, 2, 0, 2]
    lru.update([0, 2])
    assert lru.resident == [2, 0, 2, 0]

    lfu = Lfu(resident, 2)
    lfu.update([3])
    assert lfu.resident == [0, 1, 1, 2]  # of equally few calls, the first
    assert lfu.update([0]) == 2  # in place of those that were never called
    assert lfu.resident == [2, 0, 0, 2]
    assert lfu.update([1]) == 0  # called as often as the others
    assert lfu.update([1]) == 2
    assert lfu.resident == [2, 2, 0, 0]

    tail = DynamicTail(resident, 2, [3, 2, 1, 0], num_experts=4, slots=1, share=0.5)
    assert tail.update([3]) == 1  # one of two host blocks is streamed, in place of expert 2
    assert tail.resident == [2, 1, 0, 1]
    assert tail.update([2, 3]) == 1  # of three host blocks; the tail keeps those called now
    assert tail.resident == [2, 0, 1, 1]
    assert tail.update([0]) == 0


def test_fixed_hit_rate_is_the_runtimes(place):
    """A recorded trace, replayed with another plan, has the hit rate that its run measures."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    texts = ["Once upon a time", "12 + 30 =", "Long ago there was a curious bear. " * 18]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    assert len(prompts[-1]) > 128  # prefilled in two chunks
    job = RoutingJob(demo_shape(), {"set": prompts}, 12, 256)
    recorder = RoutingRecorder(job)
    model, _ = place(make_plan(demo_shape(), [[3] * 8] * 6))
    for _ in recorder.run(model):
        pass
    plan = random_plan(demo_shape(), random.Random(3))
    model, _ = place(plan)
    runs = []
    for ids in prompts:
        options = Options(max_new_tokens=job.new_tokens(len(ids)))
        ids = tokenizer.pad({"input_ids": [ids]}, return_tensors="pt")["input_ids"]
        runs.append(generate_ids(model, ids, options, pad_token_id=0)[1])
    all_passes = passes(recorder.trace(), plan)
    routing = routed("", [[0.25] * 8] * 6, [])
    made = policies(plan, routing, [], 0.0, [1])[replay.PLANNED]
    found = replay.run(made(), all_passes, TIMES, plan)
    for name, replayed in (
        ("traffic", found.hit_rate),
        ("prefill_traffic", found.prefill_hit_rate),
    ):
        measured = sum((getattr(each, name) for each in runs[1:]), getattr(runs[0], name))
        assert measured.needed_blocks > 0
        assert replayed == pytest.approx(measured.hit_rate, abs=1e-3)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_fixed_speed_is_the_cost_models(kind):
    """Under the trace's own frequencies of pairs, for which the cost model is exact."""
    rng = random.Random(4)
    model = small_model()
    machine = random_machine(rng) if kind == "cuda" else machine_profile(model, kind="cpu")
    workload = Workload(prompt_tokens=8, output_tokens=9, num_beams=1, batch_size=1, max_seq_len=64)
    plan = compile_plan(
        model,
        machine,
        random_routing(model, rng),
        workload,
        Budget(gpu_bytes=machine_bytes(model, machine, workload)),
        dict.fromkeys(
            ("command", "machine", "machine_sha256", "machine_source", "routing", "created"), ""
        ),
    )
    trace = Synthetic(0.7, 0.8).trace(plan)
    profile = routing_profile(trace, model.shape, "test", 9)
    routing = Routing.from_profile(profile, model, "test")
    problem = Problem.of(plan, model, machine)
    found = replay.replay(plan, problem, routing, trace, [1])
    cost = problem.cost(routing)
    step_s = cost.decode_step_s(placement_of(plan))
    fixed = found[replay.PLANNED]
    assert 0 < fixed.hit_rate < 1
    assert fixed.tokens_per_s == pytest.approx(1 / step_s, rel=1e-9)
    assert fixed.hit_rate == pytest.approx(cost.hit_rate(placement_of(plan)), rel=1e-9)
    for each in found.values():
        assert each.tokens_per_s <= each.free_copies_tokens_per_s * (1 + 1e-12)
    assert verdict(found).count("\n") == 0


def machine_bytes(model, machine, workload) -> int:
    """A budget that leaves a third of the experts' bytes for experts."""
    whole = Problem(model, machine, workload, Budget(gpu_bytes=machine.device.memory_bytes), 64)
    return whole.memory().used + model.all_expert_bytes // 3


@pytest.mark.parametrize(("skew", "repeat"), [(0.0, 0.46), (0.0, 0.67), (1.5, 0.0), (0.7, 0.9)])
def test_synthetic_routing_is_as_asked(skew, repeat):
    shape = demo_shape().model_copy(update={"num_layers": 32})
    plan = make_plan(shape, [[8, 7, 6, 5, 4, 3, 2, 1]] * 32)
    trace = Synthetic(skew, repeat).trace(plan)
    follows = np.diff(trace.prompt, prepend=-1) == 0
    again = (trace.experts[1:, :, :, None] == trace.experts[:-1, :, None, :]).any(axis=(2, 3))
    assert again[follows[1:]].mean() == pytest.approx(repeat, abs=0.01)
    assert all(len(set(row)) == 2 for row in trace.experts[:50].reshape(-1, 2).tolist())
    counts = np.bincount(trace.experts.ravel(), minlength=8) / trace.experts.size
    if skew == 0:
        assert counts == pytest.approx(np.full(8, 1 / 8), abs=0.01)
    else:
        assert all(np.diff(counts) < 0)  # the plan keeps most of the most popular


def test_command_prints_and_plots(tmp_path):
    flags = ("--synthetic", "0.5,0.6", "--tail", "1", "--plot", "p.png")
    result = run("fiddler-opt", "replay", "plans/demo.yaml", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for words in ("the plan", "tail of 1 expert a layer", "LRU", "LFU", "Belady", "not pay"):
        assert words in result.stdout
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_refusals(tmp_path):
    def replayed(*flags: object):
        return run("fiddler-opt", "replay", *flags, cwd=tmp_path)

    assert_refused(replayed(PLAN), "TRACE or --synthetic")
    assert_refused(replayed(PLAN, "none.npz"), "none.npz: cannot read")
    assert_refused(replayed(PLAN, "--synthetic", "0.5"), "--synthetic 0.5", "0.5,0.6")
    assert_refused(replayed(PLAN, "--synthetic", "0.5,1.5"), "repetition from 0 to 1")
    assert_refused(replayed(PLAN, "--synthetic", "0,0.5", "--tail", "x"), "--tail x")
    assert_refused(replayed(ROOT / "profiles/rtx4090.machine.yaml", "t.npz"), "a machine profile")
    random_trace(random.Random(5)).save(tmp_path / "other.npz")
    assert_refused(replayed(PLAN, "other.npz"), "3 layers with experts", "has 32")
    shape = demo_shape()
    nothing = make_plan(shape, [[0] * 8] * 6)
    with pytest.raises(Exception, match="no blocks in GPU memory"):
        replay.require_replayable(nothing, "p.yaml")
    rng = random.Random(6)
    tokens = random_trace(rng, shape)
    silent = RoutingTrace(**{**vars(tokens), "decode": np.zeros(40, dtype=bool)})
    with pytest.raises(Exception, match="no generated tokens"):
        passes(silent, nothing)
