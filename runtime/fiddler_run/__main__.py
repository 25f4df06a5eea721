"""`python -m fiddler_run` is `fiddler-run`."""

import sys

from fiddler_run.command import fiddler_run

sys.exit(fiddler_run())
