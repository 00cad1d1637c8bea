"""Writing files so that nothing is lost: to a temporary name first, then renamed."""

import contextlib
import csv
import glob
import io
import os
import tempfile
from pathlib import Path

import filelock
from matplotlib import pyplot as plt

from common.user_errors import UserError

PICTURES = (".png", ".pdf", ".svg")


@contextlib.contextmanager
def replace_when_complete(path):
    """Yields a temporary path beside `path`; renames it to `path` when the block succeeds.

    A link is followed. The temporary name keeps the suffix, from which matplotlib takes the format.

    Raises:
        UserError: `path` is something else than a file, or its folder cannot be written.
    """
    path = place_of(path)
    try:
        handle, temporary = tempfile.mkstemp(path.suffix, temporary_prefix(path), path.parent)
        os.close(handle)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0o600 would hide the file from a group
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another file") from None
    try:
        yield Path(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def place_of(path):
    """The Path that `path` is or links to.

    Raises:
        UserError: there cannot be a file of ours.
    """
    place = Path(os.path.realpath(path))
    if not os.path.isdir(place.parent):
        raise UserError(f"cannot write {path}: its folder does not exist; create it")
    if os.path.exists(place) and not os.path.isfile(place):
        raise UserError(f"cannot write {path}: it is a folder or a device; name a file")
    return place


def temporary_prefix(path):
    return f".{path.name}.incomplete-"


def check_writable(path):
    """Fails now, not after an hour of work, if `path` could not be written.

    Raises:
        UserError: as replace_when_complete does.
    """
    with contextlib.suppress(_Abandon), replace_when_complete(path):
        raise _Abandon


class _Abandon(Exception):
    pass


def check_picture(path):
    """Fails now if a picture could not be written to `path`.

    Raises:
        UserError: it is none of PICTURES, or as check_writable does.
    """
    if Path(path).suffix.lower() not in PICTURES:
        raise UserError(f"cannot draw {path}: unknown kind of picture; use .png, .pdf or .svg")
    check_writable(path)


@contextlib.contextmanager
def locked(paths):
    """Within the block, no other process writes these files; ends with the process in any case.

    What a run that was killed left half written is removed.

    Raises:
        UserError: another process has them, or they could not be written.
    """
    with contextlib.ExitStack() as stack:
        for path in map(place_of, paths):
            lock = filelock.FileLock(path.with_name(f"{temporary_prefix(path)}lock"))
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                raise UserError(
                    f"another run is writing {path}; wait for it, or name another --output"
                ) from None
            except OSError as error:
                raise UserError(f"cannot write {path}: {error.strerror}; name another") from None
            stack.callback(lock.release)
            stack.callback(Path(lock.lock_file).unlink, missing_ok=True)
            for left in path.parent.glob(glob.escape(temporary_prefix(path)) + "*"):
                if str(left) != lock.lock_file and left.is_file():
                    left.unlink()
            check_writable(path)
        yield


def write_figure(figure, path, dpi=110):
    """Saves a matplotlib figure and closes it."""
    with replace_when_complete(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
    plt.close(figure)


def write_text(text, path):
    with replace_when_complete(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def csv_text(rows):
    """A CSV file with a header, of dicts with the same keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
