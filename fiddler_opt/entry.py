"""Entry point of `fiddler-opt`. Handles signals before the slow imports begin."""

import gc

from fiddler_run.command import start

# Integer programs are many small objects without cycles. By default, a fifth of the time is spent
# on looking for some.
GC_THRESHOLD = 100_000


def main() -> int:
    gc.set_threshold(GC_THRESHOLD)
    return start("fiddler-opt", "fiddler_opt.cli")
