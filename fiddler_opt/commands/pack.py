"""`fiddler-opt pack`: writes a checkpoint whose experts are stored encoded."""

import argparse
from pathlib import Path

from rich.console import Console

from fiddler_opt.commands.files import load_spec
from fiddler_opt.units import format_bytes
from fiddler_run.encodings.lossless12 import Lossless12
from fiddler_run.errors import FiddlerError
from fiddler_run.models.table import FAMILIES
from fiddler_run.system.files import cannot_write, is_file
from fiddler_run.weights.tensor_files import INDEX, SINGLE_FILE

HELP = "write a checkpoint whose experts are stored in 12 bits, which loads faster"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or Hugging Face id")
    parser.add_argument(
        "-o", "--output", metavar="DIR", required=True, help="folder to write the checkpoint to"
    )


def run(flags: argparse.Namespace, console: Console) -> None:
    with console.status("importing torch and transformers"):
        from rich.progress import Progress

        from fiddler_run.loading.model_check import ModelCheck
        from fiddler_run.weights.packed import PackedFormat
        from fiddler_run.weights.packing import Packer, require_space

    folder = Path(flags.output)
    require_no_checkpoint(folder)
    model = load_spec(flags.model, console).in_encoding(Lossless12.name)
    checked = ModelCheck(model.shape, flags.model, flags.model, fetch=True)
    checked.refuse()
    made = make_folder(folder)
    try:
        packed = PackedFormat(model.block_format, model.shape.intermediate_size)
        family = FAMILIES[checked.config.family]
        packer = Packer(checked.files, family, model.shape, packed, folder)
        require_space(folder, packer.needed_bytes)
        with Progress(console=console) as progress:
            task = progress.add_task("packing layers", total=model.shape.num_layers)
            result = packer.pack(checked.folder, lambda: progress.advance(task))
    finally:
        if made and not any(folder.iterdir()):
            folder.rmdir()
    console.print(
        f"{result.experts} experts: {format_bytes(result.original_bytes)} ->"
        f" {format_bytes(result.expert_bytes)}; all were read back and compared with the original"
    )
    if result.raw_experts:
        console.print(
            f"note: {result.raw_experts} experts have too many unusual weights for"
            f" {Lossless12.name}, and are stored unchanged",
            style="yellow",
        )
    print(flags.output)


def require_no_checkpoint(folder: Path) -> None:
    """Checks that writing to `folder` overwrites no checkpoint.

    Raises:
        FiddlerError: it holds one.
    """
    for name in (INDEX, SINGLE_FILE):
        if is_file(folder / name):
            raise FiddlerError(f"{folder}: already holds {name}; name a new folder with -o")


def make_folder(folder: Path) -> bool:
    """Makes a folder. Returns True if it did not exist.

    Raises:
        FiddlerError: the system refuses.
    """
    existed = folder.is_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    return not existed
