"""Where the command `fiddler-opt` starts: before what takes time to import."""

from fiddler_run.command import start


def main() -> int:
    return start("fiddler-opt", "fiddler_opt.cli")
