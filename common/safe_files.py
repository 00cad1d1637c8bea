"""Writing files so that nothing is lost: to a temporary name first, then renamed."""

import contextlib
import csv
import glob
import io
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import filelock
from matplotlib import pyplot as plt

from common.user_errors import UserError


@contextlib.contextmanager
def replace_when_complete(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` when the block succeeds.

    A link is followed. The temporary name keeps the suffix, from which matplotlib takes the format.
    Raises a UserError if `path` is something else than a file, or its folder cannot be written.
    """
    path = file_to_write(path)
    temporary = make_temporary(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def make_temporary(path: Path) -> Path:
    """An empty file beside `path`; raises a UserError if its folder cannot be written."""
    try:
        handle, temporary = tempfile.mkstemp(path.suffix, temporary_prefix(path), path.parent)
        os.close(handle)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0o600 would hide the file from a group
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another file") from None
    return Path(temporary)


def file_to_write(path: Path | str) -> Path:
    """The Path that `path` is or links to; raises a UserError if there cannot be a file of ours."""
    place = Path(os.path.realpath(path))
    if not os.path.isdir(place.parent):
        raise UserError(f"cannot write {path}: its folder does not exist; create it")
    if os.path.exists(place) and not os.path.isfile(place):
        raise UserError(f"cannot write {path}: it is a folder or a device; name a file")
    return place


def temporary_prefix(path: Path) -> str:
    return f".{path.name}.incomplete-"


def check_writable(path: Path | str) -> None:
    """Raises the UserError of replace_when_complete now, not after an hour of work."""
    make_temporary(file_to_write(path)).unlink(missing_ok=True)


def check_picture(path: Path | str) -> None:
    """Raises a UserError if `path` is no kind of picture, or could not be written."""
    if Path(path).suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"cannot draw {path}: unknown kind of picture; use .png, .pdf or .svg")
    check_writable(path)


@contextlib.contextmanager
def locked(paths: Iterable[Path | str]) -> Iterator[None]:
    """Within the block, no other process writes these files; ends with the process in any case.

    What a run that was killed left half written is removed. Raises a UserError if another process
    has them, or they could not be written.
    """
    with contextlib.ExitStack() as stack:
        for path in map(file_to_write, paths):
            lock = filelock.FileLock(path.with_name(f"{temporary_prefix(path)}lock"))
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                words = "wait for it, or name another --output"
                raise UserError(f"another run is writing {path}; {words}") from None
            except OSError as error:
                raise UserError(f"cannot write {path}: {error.strerror}; name another") from None
            stack.callback(lock.release)
            stack.callback(remove_held, Path(lock.lock_file))
            for left in path.parent.glob(glob.escape(temporary_prefix(path)) + "*"):
                if str(left) != lock.lock_file and left.is_file():
                    left.unlink()
            check_writable(path)
        yield


def remove_held(lock_file: Path) -> None:
    """Before its release, after which it may be another run's; Windows lets the release do it."""
    with contextlib.suppress(PermissionError):
        lock_file.unlink(missing_ok=True)


def write_figure(figure: plt.Figure, path: Path | str, dpi: int = 110) -> None:
    """Saves a figure and closes it."""
    with replace_when_complete(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
    plt.close(figure)


def write_text(text: str, path: Path | str) -> None:
    with replace_when_complete(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def csv_text(rows: list[dict]) -> str:
    """A CSV file with a header, of dicts with the same keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
