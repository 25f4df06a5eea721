"""fiddler_run: executes a plan. Never imports the planner."""

from fiddler_run.errors import FiddlerError

__all__ = ["FiddlerError", "load_model"]


def __getattr__(name: str):
    # imported on demand: importing torch and transformers takes seconds and is not needed for plan
    # files
    if name == "load_model":
        from fiddler_run.loading.load import load_model

        return load_model
    raise AttributeError(f"module 'fiddler_run' has no attribute {name!r}")
