"""`fiddler-opt pack`: writes a checkpoint whose experts are stored encoded."""

import argparse
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from fiddler_opt.commands.files import load_spec
from fiddler_opt.units import format_bytes
from fiddler_run.encodings.lossless12 import Lossless12
from fiddler_run.errors import FiddlerError
from fiddler_run.system.files import cannot_write

HELP = "write a checkpoint whose experts are stored in 12 bits: a quarter less to read from disk"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or Hugging Face id")
    parser.add_argument(
        "-o", "--output", metavar="DIR", required=True, help="new folder for the checkpoint"
    )


def run(flags: argparse.Namespace, console: Console) -> None:
    with console.status("importing torch and transformers"):
        from rich.progress import Progress

        from fiddler_run.loading.model_check import ModelCheck
        from fiddler_run.weights.packed import PackedFormat
        from fiddler_run.weights.packing import Packer, require_space

    model = load_spec(flags.model, console).in_encoding(Lossless12.name)
    if not model.shape.activation.gated:
        raise FiddlerError(f"{flags.model}: experts without a gate cannot be packed")
    folder = Path(flags.output)
    made = make_folder(folder)
    try:
        # before a download
        require_space(folder, model.all_expert_bytes + model.non_expert_bytes)
        checked = ModelCheck(model.shape, flags.model, flags.model, fetch=True)
        checked.refuse()
        packed = PackedFormat(model.block_format, model.shape.intermediate_size)
        packer = Packer(checked.files, checked.tensors, model.shape, packed, folder)
        with Progress(console=console) as progress:
            task = progress.add_task("packing layers", total=model.shape.num_layers)
            result = packer.pack(checked.folder, lambda: progress.advance(task))
    except BaseException:
        forget(folder, made)
        raise
    console.print(
        f"{result.experts} experts: {format_bytes(result.original_bytes)} ->"
        f" {format_bytes(result.expert_bytes)}; all were read back and compared with the original"
    )
    if result.raw_experts:
        console.print(
            f"note: {result.raw_experts} of them have too many unusual weights for"
            f" {Lossless12.name}, and are stored unchanged",
            style="yellow",
        )
    print(flags.output)


def make_folder(folder: Path) -> list[Path]:
    """Makes a folder, or takes an empty one. Returns what was made, the innermost first.

    Raises:
        FiddlerError: it is not empty or not a folder, or the system refuses.
    """
    try:
        existed = folder.is_dir()
        if existed and any(folder.iterdir()):
            raise FiddlerError(f"{folder}: not empty; name a new folder with -o")
        if not existed and folder.exists():
            raise FiddlerError(f"{folder}: a file; name a new folder with -o")
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise cannot_write(folder, error) from None
    return made


def forget(folder: Path, made: list[Path]) -> None:
    """Removes what an unfinished pack has written to a folder that was empty before, and the
    folders that it has made.
    """
    with suppress(OSError):
        for path in folder.iterdir():
            path.unlink()
        for each in made:
            each.rmdir()
