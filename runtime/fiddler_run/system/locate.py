"""Finds the plans and profiles that come with the package."""

import site
import sys
from pathlib import Path

from fiddler_run.system.files import exists, is_file

_INSTALLED = [Path(prefix) / "share" / "fiddler-opt" for prefix in (sys.prefix, site.getuserbase())]
SHIPPED_FOLDERS = [Path(__file__).parents[3], *_INSTALLED]  # first the root of a source checkout


def shipped_file(path: str | Path) -> Path:
    """`path` if it exists, else the file of that name that comes with the package, such as
    plans/demo.yaml.
    """
    if exists(path):
        return Path(path)
    candidates = (folder / path for folder in SHIPPED_FOLDERS)
    return next((candidate for candidate in candidates if is_file(candidate)), Path(path))
