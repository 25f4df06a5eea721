"""Chooses the number of CPU threads for experts, and whether to pin them to cores."""

from fiddler_opt.measure.experts import MANY_TOKENS, ExpertBench
from fiddler_run.system.host import num_cores, num_physical_cores

TIE_TOLERANCE = 1.05  # times within this ratio are equal, and fewer threads win
# A pinned thread stops while another program uses its core, so pinning must win by this ratio.
PINNING_PENALTY = 1.15


def choose_threads(bench: ExpertBench) -> dict:
    """The best number of threads, by the time of an expert for one token and for many, equally
    weighted.

    Candidates are all physical cores, one fewer, half of them, and all logical cores, each pinned
    and not pinned.
    """
    logical = num_cores()
    physical = min(num_physical_cores(), logical)
    counts = sorted({max(1, physical // 2), max(1, physical - 1), physical, logical})
    one = {}
    many = {}
    for choice in [(count, pinned) for count in counts for pinned in (False, True)]:
        bench.use_threads(*choice)
        one[choice] = bench.host_expert(1, [0.0])[0.0]
        many[choice] = bench.host_expert(MANY_TOKENS, [0.0])[0.0]
    fastest = min(one.values()), min(many.values())
    score = {
        choice: (one[choice] / fastest[0] + many[choice] / fastest[1])
        * (PINNING_PENALTY if choice[1] else 1)
        for choice in one
    }
    limit = TIE_TOLERANCE * min(score.values())
    threads, pinned = min(choice for choice in score if score[choice] <= limit)
    return {
        "threads": threads,
        "pinned": pinned,
        "threads_us": {count: round(one[count, False], 1) for count in counts},
        "pinned_threads_us": {count: round(one[count, True], 1) for count in counts},
    }
