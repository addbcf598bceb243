"""Results on disk: a file appears whole or not at all, and none is replaced unasked."""

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from graphgbp.errors import OutputError

_UMASK = threading.Lock()  # to read the umask is to set it, for the whole process


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside its own, then rename it; on any failure nothing is left.

    Raises OutputError where the folder is missing or closed to us, or the disk is full.
    """
    _appear(path, lambda temporary: Path(temporary).write_bytes(content))


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file too long to be held at once, as `write_whole` writes one."""

    def fill(temporary: str) -> None:
        with open(temporary, "wb") as file:
            file.writelines(pieces)

    _appear(path, fill)


def copy_whole(source: Path, path: Path) -> None:
    """Copy a file as `write_whole` writes one; the folder is made where it is missing."""
    make_folder(path.parent)
    _appear(path, lambda temporary: shutil.copyfile(source, temporary))


def _appear(path: Path, fill: Callable[[str], object]) -> None:
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            fill(temporary)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise OutputError(f"cannot write '{path}': {error.strerror or error}") from None


def _umask() -> int:
    with _UMASK:
        mask = os.umask(0)
        os.umask(mask)
    return mask


def make_folder(folder: Path) -> None:
    """Raises OutputError where the folder cannot be made or is a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder '{folder}': {error.strerror or error}") from None


def refuse_existing(paths: Iterable[Path], remedy: str) -> None:
    """Raises OutputError naming every path that exists already, and the remedy."""
    existing = [f"'{path}'" for path in paths if path.exists()]
    if existing:
        shown = ", ".join(existing[:5]) + (f" and {len(existing) - 5} more" if len(existing) > 5 else "")
        raise OutputError(f"{shown} already {'exists' if len(existing) == 1 else 'exist'}; {remedy}")
