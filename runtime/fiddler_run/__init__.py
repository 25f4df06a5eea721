"""fiddler_run: executes a plan. It never imports the planner."""

from fiddler_run.errors import FiddlerError

__all__ = ["FiddlerError", "load_model"]


def __getattr__(name: str):
    # imported on demand: torch and transformers take seconds, which plan files do not need
    if name == "load_model":
        from fiddler_run.loading.load import load_model

        return load_model
    raise AttributeError(f"module 'fiddler_run' has no attribute {name!r}")
