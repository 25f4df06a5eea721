"""Entry point of `fiddler-opt`. Handles signals before the slow imports begin."""

from fiddler_run.command import start


def main() -> int:
    return start("fiddler-opt", "fiddler_opt.cli")
