"""The stages of `fiddler-opt profile`.

Finished work is saved, and the next call resumes where an interrupted one stopped.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.routing import Routing, RoutingProfile
from fiddler_opt.measure.prompts import encode_prompts, name_sets, read_prompts
from fiddler_opt.measure.settings import profile_settings
from fiddler_opt.measure.unfinished import Unfinished, forget_unfinished, unfinished_path
from fiddler_opt.solve.compiler import compile_plan
from fiddler_run.plan.schema import Budget, Plan, Workload
from fiddler_run.system.progress import byte_progress

if TYPE_CHECKING:
    from fiddler_opt.measure.routing import RoutingJob

SAVE_EVERY_S = 20.0  # of recording; at most this much is lost


def profile_machine(
    model: ModelSpec,
    path: Path,
    quick: bool,
    force: bool,
    folder: Path | None,
    command: str,
    console: Console,
    keep_parts: bool,
    num_ranks: int = 1,
) -> MachineProfile:
    """Times this machine and saves its profile.

    Args:
        num_ranks: how many ranks to time at once, each with its own GPU, if there are any.
        keep_parts: keep the timed parts, so that a command that is interrupted later does not time
            them again. The caller calls `forget_unfinished` at its end.

    Raises:
        FiddlerError: other programs use the machine and `force` is not set.
    """
    with console.status("importing torch and transformers"):
        from fiddler_opt.measure.machine import MachineBench, measure_machine, release_gpu_memory
        from fiddler_opt.measure.ranks import OtherRanks

    name = model.shape.name if folder is None else str(folder.resolve())
    with ExitStack() as stack:
        others = None
        if num_ranks > 1:
            with console.status("starting the other ranks"):
                others = stack.enter_context(OtherRanks(num_ranks, name, quick))
        bench = MachineBench(model, profile_settings(quick, num_ranks), folder)
        identity = bench.identity | ({"ranks": num_ranks} if others else {})
        unfinished = _unfinished(path, identity, list(bench.parts), keep_parts, console)
        with _progress(console) as progress:
            task = progress.add_task("timing", total=len(bench.parts))

            def on_part(name: str, finished: int) -> None:
                progress.update(task, description=f"timing {name}", completed=finished)

            machine = measure_machine(bench, unfinished, command, force, on_part, others)
            progress.update(task, description="timing", completed=len(bench.parts))
    machine.save(path)
    if not keep_parts:
        forget_unfinished(path)
    del bench  # frees the timed memory, which a model may need
    release_gpu_memory()
    return machine


def _unfinished(
    path: Path, identity: dict, parts: list[str], keep_parts: bool, console: Console
) -> Unfinished:
    """The parts of the profile at `path` that an interrupted command has timed."""
    unfinished = Unfinished(path, identity)
    done = sum(name in unfinished.parts for name in parts)
    if done == len(parts) and not keep_parts:
        forget_unfinished(path)  # kept by a command that recorded routing afterwards
        return Unfinished(path, identity)
    if done:
        console.print(f"resuming an unfinished profile: {done} of {len(parts)} parts are timed")
    return unfinished


def routing_job(
    model: ModelSpec, name: str, prompts: list[Path], output_tokens: int, context: int
) -> RoutingJob:
    """A job that records `prompts`, with up to `output_tokens` generated after each.

    Args:
        name: the checkpoint's folder or Hugging Face id.
        context: the maximum sequence length.

    Raises:
        FiddlerError: the checkpoint is incomplete, or prompts cannot be read or are too long.
    """
    from fiddler_opt.measure.routing import RoutingJob
    from fiddler_run.loading.model_check import ModelCheck

    checked = ModelCheck(model.shape, "the model", name, fetch=True)
    checked.refuse()
    sets = {
        set_name: encode_prompts(
            checked.tokenizer, read_prompts(path), context, str(path), model.vocab_size
        )
        for set_name, path in name_sets(prompts).items()
    }
    return RoutingJob(model.shape, sets, output_tokens, context)


def cpu_plan(model: ModelSpec, machine: MachineProfile, context: int, made: dict[str, str]) -> Plan:
    """A plan for the CPU alone. It fits every machine whose host memory holds the model."""
    workload = Workload(
        prompt_tokens=context - 1, output_tokens=1, num_beams=1, batch_size=1, max_seq_len=context
    )
    return compile_plan(model, machine, Routing.uniform(model), workload, Budget(gpu_bytes=0), made)


def profile_routing(
    job: RoutingJob,
    name: str,
    plan: Plan | Path,
    path: Path,
    trace_path: Path | None,
    command: str,
    console: Console,
) -> RoutingProfile:
    """Records a job's routing with the checkpoint `name` run by `plan`, and saves the profile.

    Args:
        trace_path: where to save the trace as well. None: not saved.
    """
    from fiddler_opt.measure.routing import RoutingRecorder, routing_profile
    from fiddler_run.loading.load import ModelLoader

    partial = unfinished_path(path)
    recorder = RoutingRecorder(job, job.resume(partial))
    if recorder.done:
        console.print(
            f"resuming an unfinished recording: {recorder.done} of {recorder.total} prompts are"
            " done"
        )
    if recorder.done < recorder.total:
        loader = ModelLoader(plan, name)
        with byte_progress(console) as progress:
            task = progress.add_task("loading experts", total=loader.plan.expert_bytes)
            model = loader.load(lambda count: progress.advance(task, count))
        with _progress(console) as progress:
            task = progress.add_task("prompts", total=recorder.total, completed=recorder.done)
            saved_s = time.monotonic()
            try:
                for done in recorder.run(model):
                    progress.update(task, completed=done)
                    if time.monotonic() - saved_s > SAVE_EVERY_S:
                        recorder.trace().save(partial)
                        saved_s = time.monotonic()
            except BaseException:  # including an interrupt
                recorder.trace().save(partial)
                raise
    trace = recorder.trace()
    routing = routing_profile(trace, job.shape, command, job.output_tokens)
    if trace_path is not None:
        trace.save(trace_path)
    routing.save(path)
    forget_unfinished(path)
    return routing


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)
