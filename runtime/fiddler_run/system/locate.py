"""Finds the plans, profiles and models included in the package."""

import site
import sysconfig
from pathlib import Path

from fiddler_run.system.files import exists, is_file

# Debian's Python installs below /usr/local, which is not its sys.prefix.
_PREFIXES = (sysconfig.get_path("data"), site.getuserbase())
_INSTALLED = [Path(prefix) / "share" / "fiddler-opt" for prefix in _PREFIXES]
# the root of a source checkout comes first
SHIPPED_FOLDERS = [Path(__file__).parents[3], *_INSTALLED]


def shipped_file(path: str | Path) -> Path:
    """`path` if it exists, else the included file of that name, else `path`."""
    if exists(path):
        return Path(path)
    candidates = (folder / path for folder in SHIPPED_FOLDERS)
    return next((candidate for candidate in candidates if is_file(candidate)), Path(path))


def shipped_model(name: str | Path) -> Path | None:
    """The folder of an included model, such as examples/tiny-mixtral. None if there is none."""
    candidates = (folder / name for folder in SHIPPED_FOLDERS)
    return next((folder for folder in candidates if is_file(folder / "config.json")), None)
