"""Reads every text file from users and writes every file for them.

Every problem with a file is a FiddlerError that names it. Writing is atomic.
"""

import os
import re
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from fiddler_run.errors import FiddlerError

MAX_TEXT_BYTES = 64_000_000  # the routing profile of a model with 48 layers of 128 experts has 9 MB


def read_text(path: str | Path) -> str:
    """Reads the UTF-8 text of a file or a pipe, without a byte-order mark.

    Raises:
        FiddlerError: the file cannot be read, is not UTF-8 text, or exceeds `MAX_TEXT_BYTES`.
    """
    return decode_text(read_bytes(path, MAX_TEXT_BYTES), str(path))


def read_bytes(path: str | Path, max_bytes: int) -> bytes:
    """Reads the content of a file or a pipe.

    Raises:
        FiddlerError: the file cannot be read, or exceeds `max_bytes`.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise cannot_read(path, error) from None
    if len(content) > max_bytes:
        raise FiddlerError(
            f"{path}: larger than {max_bytes / 1e6:g} MB; this cannot be the expected kind of file"
        )
    return content


def decode_text(content: bytes, origin: str) -> str:
    """Decodes UTF-8 bytes that came from `origin`, without a byte-order mark.

    Raises:
        FiddlerError: the bytes are not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FiddlerError(
            f"{origin}: not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None


def exists(path: str | Path) -> bool:
    """True if `path` exists.

    Raises:
        FiddlerError: the system denies access.
    """
    return _look(path) is not None


def is_folder(path: str | Path) -> bool:
    """True if `path` is a folder. Raises as `exists`."""
    mode = _look(path)
    return mode is not None and stat.S_ISDIR(mode)


def is_file(path: str | Path) -> bool:
    """True if `path` is a regular file. Raises as `exists`."""
    mode = _look(path)
    return mode is not None and stat.S_ISREG(mode)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Writes `path` atomically: to a temporary file next to it, which is then renamed.

    Text is encoded as UTF-8.

    Raises:
        FiddlerError: the file cannot be written.
    """
    require_writable(path)
    target = Path(os.path.realpath(path))  # a link stays a link; its target is replaced
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def partial_files(path: Path) -> list[Path]:
    """Temporary files left behind by processes that were killed inside `write_whole(path, ...)`."""
    pattern = re.compile(rf"\.{re.escape(path.name[:200])}\.[0-9a-f]{{16}}\.partial")
    try:
        return [found for found in path.parent.iterdir() if pattern.fullmatch(found.name)]
    except OSError:
        return []


def require_writable(path: str | Path) -> None:
    """Checks before long work that `write_whole(path, ...)` can succeed. Leaves nothing behind.

    Raises:
        FiddlerError: the file cannot be written.
    """
    try:
        target = Path(os.path.realpath(path))
        mode = _mode(target)
        if mode is not None and stat.S_ISDIR(mode):
            raise FiddlerError(f"{path}: cannot write: it is a folder; name a file")
        if mode is not None and not stat.S_ISREG(mode):
            raise FiddlerError(f"{path}: cannot write: it is not a regular file")
        folder = next(parent for parent in target.parents if _mode(parent) is not None)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        raise cannot_write(path, error) from None


def cannot_read(path: str | Path, error: Exception) -> FiddlerError:
    return FiddlerError(f"{path}: cannot read: {reason(error)}")


def cannot_write(path: str | Path, error: Exception) -> FiddlerError:
    return FiddlerError(f"{path}: cannot write: {reason(error)}")


def reason(error: Exception) -> str:
    """The message of another library's error in one line, or the name of its type."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    said = getattr(error, "strerror", None) or " ".join(str(error).split())
    said = said or type(error).__name__
    return said if len(said) <= 300 else said[:300] + " ..."


def _mode(path: Path) -> int | None:
    """The mode of the file at `path`. None if there is none."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _look(path: str | Path) -> int | None:
    try:
        return _mode(Path(path))
    # OSError: an inaccessible folder, a loop of links, a name too long. ValueError: a NUL in it.
    except (OSError, ValueError) as error:
        raise cannot_read(path, error) from None
