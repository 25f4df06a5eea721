"""What only a CUDA device can show. The other tests run there too: their plans' GPU part is then in GPU memory."""

import gc
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from conftest import make_plan, random_plan

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from fiddler_opt.bench_device import describe_device
from fiddler_opt.bench_machine import Effort, MachineBench, measure_machine, release_gpu_memory
from fiddler_opt.compiler import compile_plan
from fiddler_opt.machine import Device
from fiddler_opt.model import ModelSpec
from fiddler_opt.problem import Budget
from fiddler_opt.routing import Routing
from fiddler_opt.unfinished import Unfinished
from fiddler_run import load_model, process_settings
from fiddler_run.arena import Arena
from fiddler_run.balance import observe_prompt
from fiddler_run.dispatch import LayerDispatch
from fiddler_run.errors import FiddlerError
from fiddler_run.executors import Executors
from fiddler_run.generate import Options, generate_ids
from fiddler_run.kernels.pytorch import apply_blocks, block_views
from fiddler_run.plan import Workload
from fiddler_run.recording import Recorder
from fiddler_run.timeline import Timeline
from fiddler_run.transfer import StagingRing

CUDA = torch.device("cuda", 0)
HASTY = Effort((1, 64, 1024), (1, 512), 1, 0.02, 0.1, 10**9)  # how precise the figures are does not matter here
WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 768,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
}


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


@pytest.fixture(scope="module")
def wide(random_checkpoint, tmp_path_factory):
    """A wider model (0.85 GB of experts in float32) and this machine's profile of it."""
    folder, _ = random_checkpoint(**WIDE)
    spec = ModelSpec.load(str(folder))
    bench = MachineBench(spec, HASTY, folder)
    unfinished = Unfinished(tmp_path_factory.mktemp("profiles") / "wide.machine.yaml", bench.identity)
    machine = measure_machine(bench, unfinished, "test", True, lambda name, finished: None)
    del bench
    release_gpu_memory()
    return folder, spec, machine


def test_a_profile_of_the_way_that_decode_takes(wide, tmp_path):
    """In bfloat16, in which the GPU tells the CPU what to do; `wide` is in float32."""
    _, spec, _ = wide
    spec = replace(spec, shape=spec.shape.model_copy(update={"dtype": "bfloat16"}))
    bench = MachineBench(spec, HASTY, None)
    assert bench._experts.executors.routes(1)
    machine = measure_machine(bench, Unfinished(tmp_path / "m.yaml", bench.identity), "test", True, lambda name, finished: None)
    assert {0.0, 1.0} < set(machine.absent_expert_us[1])
    fastest_us = spec.expert_bytes / 1e13 * 1e6  # 10 TB/s
    assert min(machine.device_expert_us.values()) > fastest_us
    assert min(machine.absent_expert_us[1].values()) > machine.device_expert_us[1]


def test_where_little_memory_can_be_page_locked(wide, tmp_path, monkeypatch):
    """The profile finds out, and its plans run without."""
    folder, spec, _ = wide

    def refuse(arena: Arena) -> None:
        raise FiddlerError("refused")

    monkeypatch.setattr(Arena, "pin", refuse)
    bench = MachineBench(spec, HASTY, None)
    machine = measure_machine(bench, Unfinished(tmp_path / "m.yaml", bench.identity), "test", True, lambda name, finished: None)
    del bench
    release_gpu_memory()
    assert not machine.streams
    assert machine.link.h2d_bytes_per_s > 1e9
    workload = Workload(prompt_tokens=300, output_tokens=8, num_beams=1, batch_size=1, max_seq_len=512)
    made = dict.fromkeys(("command", "machine", "machine_sha256", "machine_source", "routing", "created"), "test")
    plan = compile_plan(spec, machine, Routing.uniform(spec), workload, Budget(2**31), made)
    model, _ = load_model(plan, folder)
    ids = torch.randint(3, 700, (1, 300), generator=torch.Generator().manual_seed(1))
    _, measured = generate_ids(model, ids, Options(max_new_tokens=8), min_new_tokens=8, pad_token_id=0)
    assert measured.prefill_traffic.streamed_blocks == measured.traffic.streamed_blocks == 0


def test_a_refused_page_lock_leaves_no_error_behind():
    arena = Arena(2, 10**6, torch.float32, torch.device("cpu"))
    arena.pin()
    with pytest.raises(FiddlerError, match="cannot page-lock"):
        arena.pin()  # it is already
    assert torch.ones(3, device=CUDA).sum().item() == 3


@pytest.mark.parametrize(("beams", "batch"), [(1, 1), (4, 1), (1, 4)])
@pytest.mark.parametrize("extra_mb", [100, 400])
def test_peak_memory_stays_under_the_plans_total(wide, beams, batch, extra_mb):
    folder, spec, machine = wide
    workload = Workload(prompt_tokens=512, output_tokens=16, num_beams=beams, batch_size=batch, max_seq_len=1024)
    made = dict.fromkeys(("command", "machine", "machine_sha256", "machine_source", "routing", "created"), "test")
    empty = 2**31 + extra_mb * 10**6
    torch.cuda.empty_cache()
    machine = machine.model_copy(update={"device": Device(**describe_device(CUDA))})
    plan = compile_plan(spec, machine, Routing.uniform(spec), workload, Budget(empty), made)
    torch.cuda.reset_peak_memory_stats()
    model, _ = load_model(plan, folder)
    ids = torch.randint(3, 700, (batch, 600), generator=torch.Generator().manual_seed(1))
    _, measured = generate_ids(model, ids, Options(max_new_tokens=16, num_beams=beams), min_new_tokens=16, pad_token_id=0)
    gpu = plan.gpu_memory_bytes
    assert measured.peak_gpu_bytes <= gpu.total - gpu.reserve
    assert used_bytes() <= gpu.total
    fixed = gpu.non_expert_weights + gpu.experts + gpu.staging
    assert measured.peak_gpu_bytes - fixed <= gpu.kv_cache + gpu.activations


def test_the_cap_is_real(wide):
    folder, spec, _ = wide
    plan = make_plan(spec.shape, [[0] * 8] * 3, block_neurons=spec.block_neurons)
    model, _ = load_model(plan, folder)
    allowed = process_settings.allowed_gpu_bytes(model.device)  # this plan's, and what models of other tests may take
    assert allowed >= plan.gpu_memory_bytes.total
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(allowed, dtype=torch.uint8, device=CUDA)


def test_the_cap_is_the_sum_of_what_loaded_models_may_take(wide):
    folder, spec, _ = wide
    plan = make_plan(spec.shape, [[0] * 8] * 3, block_neurons=spec.block_neurons)
    gc.collect()
    before = process_settings.allowed_gpu_bytes(CUDA) or 0
    models = [load_model(plan, folder)[0] for _ in range(2)]
    assert process_settings.allowed_gpu_bytes(CUDA) == before + 2 * plan.gpu_memory_bytes.total
    del models
    gc.collect()
    assert (process_settings.allowed_gpu_bytes(CUDA) or 0) == before


def test_a_plan_larger_than_the_free_memory(wide):
    folder, spec, _ = wide
    plan = make_plan(spec.shape, [[0] * 8] * 3, block_neurons=spec.block_neurons)
    memory = plan.gpu_memory_bytes.model_copy(update={"total": 10**13})
    with pytest.raises(FiddlerError, match="gpu_memory_bytes.total is 10000.00 GB, but .* GB free"):
        load_model(plan.model_copy(update={"gpu_memory_bytes": memory}), folder)


@pytest.mark.parametrize("slots", [3, 6])
def test_streamed_blocks_are_the_resident_ones_bit_for_bit(slots):
    """A ring of few places reused a thousand times: no copy overtakes the computation that still reads its place."""
    torch.manual_seed(0)
    hidden, neurons = 512, 256
    blocks = torch.randn(40, 3 * neurons * hidden, dtype=torch.bfloat16).mul_(0.05)
    torch.cuda.cudart().cudaHostRegister(blocks.data_ptr(), blocks.nbytes, 0)
    try:
        resident = blocks.to(CUDA)
        ring, timeline = StagingRing(slots, blocks.shape[1], torch.bfloat16, CUDA), Timeline(CUDA)
        states = torch.randn(5, hidden, dtype=torch.bfloat16, device=CUDA)
        rng = random.Random(0)
        where = [(first := rng.randrange(38), first + rng.randint(1, ring.at_once)) for _ in range(1000)]
        pieces = [blocks[first:stop] for first, stop in where]
        torch.cuda._sleep(int(2e8))  # a tenth of a second for the host to queue ahead of the device
        results = []
        for start in range(0, 1000, 50):
            ring.stream_ahead(pieces[start + rng.randint(0, 1) :], timeline)  # right ones or wrong ones
            for arriving in ring.stream(pieces[start : start + 50], timeline):
                with arriving as staged:
                    results.append(apply_blocks(staged, states))
        for (first, stop), result in zip(where, results, strict=True):
            assert torch.equal(result, apply_blocks(resident[first:stop], states))
    finally:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(blocks.data_ptr())


def test_host_memory_of_absent_experts_is_page_locked(wide):
    folder, spec, _ = wide
    model, _ = load_model(random_plan(spec.shape, random.Random(1), spec.block_neurons), folder)
    dispatch = model.experts_modules()[0].dispatch
    assert all(expert.absent.is_pinned() for expert in dispatch.experts if expert.num_absent)
    assert all(expert.resident.is_cuda for expert in dispatch.experts if expert.num_resident)


@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 33, 64, 130])
def test_blocks_read_in_place_and_staged_ones_agree(tokens):
    """Both ways a GPU takes, for every executor's share, against float64; the same bits twice."""
    torch.manual_seed(tokens)
    hidden, neurons = 256, 96
    blocks = torch.randn(12, 3 * neurons * hidden).mul_(0.05).bfloat16()
    torch.cuda.cudart().cudaHostRegister(blocks.data_ptr(), blocks.nbytes, 0)
    try:
        executors = Executors(torch.bfloat16, hidden, neurons, 2, 3, CUDA)
        assert executors.kernels is not None
        states = torch.randn(tokens, hidden).bfloat16()
        index = torch.stack([torch.randperm(3)[:2] for _ in range(tokens)])
        weights = torch.rand(tokens, 2).softmax(dim=1)
        expected = torch.zeros(tokens, hidden, dtype=torch.float64)
        for token in range(tokens):
            for expert, weight in zip(index[token].tolist(), weights[token].double(), strict=True):
                for gate_up, down in zip(*block_views(blocks[4 * expert : 4 * expert + 4].double(), hidden), strict=True):
                    gate, up = (gate_up @ states[token].double()).chunk(2)
                    expected[token] += weight * (down @ (torch.nn.functional.silu(gate) * up))
        for resident, share in ((0, 0.0), (0, 1.0), (4, 0.0), (1, 0.4), (2, 0.5), (3, 0.0)):
            places = (
                [blocks[4 * e : 4 * e + resident].to(CUDA) for e in range(3)],
                [blocks[4 * e + resident : 4 * e + 4] for e in range(3)],
            )
            dispatch = LayerDispatch(0, *places, lambda _, s=share: s, executors)
            kernels = executors.kernels
            for way in (kernels, None):
                executors.kernels = way
                outputs = [dispatch(states.to(CUDA), index.to(CUDA), weights.to(CUDA)).cpu() for _ in range(2)]
                assert torch.equal(*outputs)
                assert (outputs[0].double() - expected).norm() <= 3e-3 * expected.norm()
            executors.kernels = kernels
    finally:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(blocks.data_ptr())


def test_the_device_waits_for_the_cpu():
    from fiddler_run.kernels import gpu

    finished = torch.zeros(1, dtype=torch.int64, pin_memory=True)
    cpu_output = torch.zeros((3, 256), pin_memory=True)
    results = torch.ones((3, 2, 256), device=CUDA)
    states = torch.zeros((3, 256), dtype=torch.bfloat16, device=CUDA)
    gave_up = torch.zeros(1, dtype=torch.int64, pin_memory=True)
    index = torch.zeros((3, 2), dtype=torch.int64, device=CUDA)
    gpu.add_up(results, index, 1, cpu_output, finished, gave_up, 0, states)  # compiled before
    torch.cuda.synchronize()
    output = gpu.add_up(results, index, 1, cpu_output, finished, gave_up, 5, states)
    done = torch.cuda.current_stream().record_event()
    try:
        finished.fill_(4)
        time.sleep(0.2)
        assert not done.query()
        cpu_output.fill_(2.5)
    finally:
        finished.fill_(5)
    assert torch.equal(output.cpu(), torch.full((3, 256), 4.5, dtype=torch.bfloat16))
    assert gave_up.item() == 0


def test_a_gpu_does_not_wait_for_ever(monkeypatch):
    """For a process that is stopped: the kernels end, what follows reads no table that was never written, and no second wait takes
    as long."""
    from fiddler_run.kernels import gpu

    described, gave_up = (torch.zeros(1, dtype=torch.int64, pin_memory=True) for _ in range(2))
    table = torch.full((40,), 2**60, dtype=torch.int64).pin_memory()  # as memory that holds anything
    gpu.fetch(table, described, gave_up, 0, CUDA)  # compiled before
    torch.cuda.synchronize()
    monkeypatch.setattr(gpu, "PATIENCE_S", 0.3)
    started = time.monotonic()
    fetched = gpu.fetch(table, described, gave_up, 7, CUDA)
    torch.cuda.synchronize()
    assert 0.2 < time.monotonic() - started < 5
    assert gave_up.item() == 7
    assert not fetched.any()
    monkeypatch.setattr(gpu, "PATIENCE_S", 30.0)
    gpu.fetch(table, described, gave_up, 8, CUDA)
    torch.cuda.synchronize()
    assert time.monotonic() - started < 10


def test_a_model_says_that_the_gpu_gave_up(wide_bfloat16, monkeypatch):
    """Where its CPU's threads never begin; afterwards it is right again."""
    from fiddler_run.kernels import gpu

    model, _ = wide_bfloat16
    ids = torch.randint(3, 700, (1, 8), generator=torch.Generator().manual_seed(2)).to(CUDA)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **arguments)
    submit = model.executors.cpu.submit_routed
    calls = []

    def forget_the_third(*given) -> None:
        calls.append(1)
        if len(calls) != 3:
            submit(*given)

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "PATIENCE_S", 0.2)
        patch.setattr(model.executors.cpu, "submit_routed", forget_the_third)
        with pytest.raises(FiddlerError, match="the GPU waited .* s for this process, which was stopped"):
            model.generate(ids, **arguments)
    assert torch.equal(model.generate(ids, **arguments), expected)


def test_a_cache_that_the_plan_has_not_counted(wide_bfloat16):
    """Refused in words before it runs out of memory half-way."""
    model, _ = wide_bfloat16
    ids = torch.randint(3, 700, (1, 8), device=CUDA)
    few = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    assert few.sequences.shape == (1, 12)
    many = ids.expand(4000, -1)
    with pytest.raises(FiddlerError, match="a KV cache for 4000 x .* tokens besides the plan's needs .* GB"):
        model.generate(many, attention_mask=torch.ones_like(many), max_new_tokens=2000, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_choices_of_experts_that_do_not_exist(wide_bfloat16, tokens):
    """As transformers marks those that another process computes: in decode and in prompts they add nothing."""
    model, _ = wide_bfloat16
    dispatch = model.experts_modules()[1].dispatch
    generator = torch.Generator(CUDA).manual_seed(tokens)
    states = torch.randn(tokens, 1024, generator=generator, device=CUDA).bfloat16()
    weights, index = torch.rand(tokens, 8, generator=generator, device=CUDA).topk(2)
    without = weights.clone()
    without[:, 1] = 0.0
    expected = dispatch(states, index, without).float()
    for outside in (8, 9, -1):
        marked = index.clone()
        marked[:, 1] = outside
        found = dispatch(states, marked, weights).float()
        assert (found - expected).norm() <= 1e-2 * expected.norm()
        found = dispatch(states, marked.int(), weights).float()
        assert (found - expected).norm() <= 1e-2 * expected.norm()
    model.executors.settle()


def test_threads_on_streams_of_their_own(wide_bfloat16):
    """Each answer is as alone, streamed or not."""
    model, _ = wide_bfloat16
    prompts = [
        torch.randint(3, 700, (1, 9 + number), generator=torch.Generator().manual_seed(number)).to(CUDA) for number in range(3)
    ]
    arguments = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}

    def generated(ids: torch.Tensor) -> torch.Tensor:
        return model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)

    def on_a_stream(ids: torch.Tensor) -> torch.Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            output = generated(ids)
            torch.cuda.current_stream().synchronize()
            return output

    alone = [generated(ids) for ids in prompts]
    torch.cuda.synchronize()
    with ThreadPoolExecutor(6) as threads:
        for run in (generated, on_a_stream):
            found = list(threads.map(run, prompts * 4))
            assert all(torch.equal(*pair) for pair in zip(found, alone * 4, strict=True))


def test_what_is_replaced_after_a_recording_is_used(wide_bfloat16):
    """Graphs read weights by address; a head, a norm or a router that is replaced lies elsewhere."""
    model, _ = wide_bfloat16
    ids = torch.randint(3, 700, (1, 12), generator=torch.Generator().manual_seed(5)).to(CUDA)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    before = model.generate(ids, **arguments)
    routers = [layer.mlp.gate for layer in model.model.layers]
    kept = [router.weight for router in routers]
    try:
        for router in routers:
            router.weight = torch.nn.Parameter(router.weight.flip(0).clone(), requires_grad=False)
        after = model.generate(ids, **arguments)
        with model.model.layers[0].register_forward_hook(lambda *_: None):
            expected = model.generate(ids, **arguments)
    finally:
        for router, weight in zip(routers, kept, strict=True):
            router.weight = weight
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)
    assert torch.equal(model.generate(ids, **arguments), before)


def test_page_locks_live_as_long_as_views():
    arena = Arena(4, 10**6, torch.float32, torch.device("cpu"))
    view = arena.take(2)
    arena.pin()
    del arena
    gc.collect()
    assert view.is_pinned()
    view.fill_(3.0)
    assert view.to(CUDA, non_blocking=True).sum().item() == 3.0 * view.numel()


@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_what_is_marked_as_arrived_has_arrived(tokens):
    from fiddler_run.kernels import gpu

    host = [
        torch.zeros(shape, dtype=dtype, pin_memory=True)
        for shape, dtype in (((tokens, 4096), torch.bfloat16), ((tokens, 2), torch.int64), ((tokens, 2), torch.float32))
    ]
    arrived = torch.zeros(64, dtype=torch.int64, pin_memory=True)
    marks, seen = (
        arrived.numpy(),
        [tensor.numpy() if tensor.dtype != torch.bfloat16 else tensor.view(torch.int16).numpy() for tensor in host],
    )
    for job in range(1, 200):
        value = job % 100
        tensors = [torch.full(tensor.shape, value, dtype=tensor.dtype, device=CUDA) for tensor in host]
        expected = tensors[0].view(torch.int16)[0, 0].item()
        gpu.send(tuple(tensors), host, arrived, job)
        deadline = time.monotonic() + 10
        while marks[:tokens].min() < job:
            assert time.monotonic() < deadline
        assert [(array == wanted).all() for array, wanted in zip(seen, (expected, value, value), strict=True)] == [True] * 3
    assert not marks[tokens:].any()


def test_no_kernel_is_compiled_during_decode(wide_bfloat16):
    """Numbers of blocks, calls and jobs are no reason to compile another variant, which would take a second."""
    from fiddler_run.kernels import gpu

    model, _ = wide_bfloat16
    kernels = gpu._send, gpu._wait, gpu._fetch, gpu._gate_up, gpu._down, gpu._add_up
    variants = [len(kernel.device_caches[0][0]) for kernel in kernels]
    ids = torch.randint(3, 700, (1, 20), device=CUDA)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, min_new_tokens=40, do_sample=False)
    assert [len(kernel.device_caches[0][0]) for kernel in kernels] == variants


@torch.inference_mode()
def test_recordings_give_what_they_record():
    """With new inputs each time, for each shape; results that are the next segment's inputs are not copied."""
    torch.manual_seed(0)
    first, second = (torch.randn(64, 64, device=CUDA) for _ in range(2))
    recorder = Recorder(CUDA)
    one = recorder.segment(lambda x: (x @ first, x.sum(dim=1)))
    two = recorder.segment(lambda x, y: x @ second + y[:, None])
    for rows in (1, 5, 1):
        for _ in range(3):
            states = torch.randn(rows, 64, device=CUDA)
            expected = states @ first @ second + states.sum(dim=1)[:, None]
            torch.testing.assert_close(two(*one(states)), expected, rtol=1e-3, atol=1e-2)
    assert recorder.active


def test_what_cannot_be_recorded_runs_as_it_is(caplog):
    recorder = Recorder(CUDA)
    fine, waits = recorder.segment(lambda x: x + 1), recorder.segment(lambda x: x * x.sum().item())
    states = torch.full((2,), 3.0, device=CUDA)
    assert fine(states).tolist() == [4.0, 4.0]
    assert waits(states).tolist() == [18.0, 18.0]
    assert not recorder.active
    assert "no CUDA graphs" in caplog.text
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert fine(states * 2).tolist() == [7.0, 7.0]
    assert waits(states * 2).tolist() == [72.0, 72.0]


def test_decode_is_recorded(wide_bfloat16, caplog):
    """And gives the same tokens as the whole model does, step by step, however many sequences."""
    model, _ = wide_bfloat16
    for sequences in (1, 3):
        ids = torch.randint(3, 700, (sequences, 20), generator=torch.Generator().manual_seed(1)).to(CUDA)
        arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
        recorded = model.generate(ids, **arguments)
        with model.model.layers[0].register_forward_hook(lambda *_: None):  # which only the whole model calls
            whole = model.generate(ids, **arguments)
        assert torch.equal(recorded, whole)
    before, after = model.session.decode._layers[0][1:]
    assert len(before._recordings) >= 2
    assert len(after._recordings) >= 2
    assert not caplog.text


@pytest.fixture(scope="module")
def wide_bfloat16(random_checkpoint):
    """Random weights in bfloat16, the kernels' own dtype, placed at random."""
    folder, shape = random_checkpoint(**WIDE)
    plan = random_plan(shape.model_copy(update={"dtype": "bfloat16"}), random.Random(3), block_neurons=224)
    return load_model(plan, folder, load_format="dummy")


def test_long_prompts_are_computed_alike_however_divided(wide_bfloat16):
    model, _ = wide_bfloat16
    dispatches = [experts.dispatch for experts in model.experts_modules()]
    found = dispatches[0].prompts_favour_link
    assert len(observe_prompt(model, 400)) == len(dispatches)
    generator = torch.Generator(CUDA).manual_seed(1)
    states = torch.randn(400, 1024, generator=generator, device=CUDA).bfloat16()
    weights, index = torch.rand(400, 8, generator=generator, device=CUDA).topk(2)
    expected = None
    for favour in (1.0, 8.0, 0.125):
        for dispatch in dispatches:
            dispatch.prompts_favour_link = favour
        outputs = [dispatch(states, index, weights).float() for dispatch in dispatches]
        expected = expected or outputs
        for output, other in zip(outputs, expected, strict=True):
            assert (output - other).abs().max() < 1e-2 * other.abs().max()
    for dispatch in dispatches:
        dispatch.prompts_favour_link = found


def test_a_whole_model_gives_the_same_tokens_twice(wide_bfloat16):
    model, _ = wide_bfloat16
    ids = torch.randint(3, 700, (2, 30), generator=torch.Generator().manual_seed(1)).to(CUDA)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
    assert torch.equal(model.generate(ids, **arguments), model.generate(ids, **arguments))
