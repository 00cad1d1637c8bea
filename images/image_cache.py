"""Decoded images of a folder, kept in one file: decoding 50,000 takes longer than a training."""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.safe_files import replace_when_complete
from common.user_errors import UserError

LEAST_FILES = 1000  # of a folder that is kept; fewer take a moment


def cached_decode(paths: list[Path], cache_dir: str | Path, decode: Callable) -> dict:
    """What decode(paths) returns for image files, or what it returned for the same files before.

    That is read from a file in `cache_dir` as long as names, sizes and times of the image files,
    all of one folder, are the same. Where it is damaged or cannot be written, they are decoded.
    Those that "files" does not have are tried again, since another time may have more memory.
    """
    if len(paths) < LEAST_FILES:
        return decode(paths)
    folder = os.path.commonpath(paths)
    key = state_of(paths, folder)
    name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:16]
    file = Path(cache_dir) / f"decoded_{name}.npz"
    if os.path.isfile(file):
        # The format of the file has its own exceptions for every kind of damage.
        with contextlib.suppress(Exception), np.load(file) as kept:
            arrays = {name: kept[name] for name in kept.files}
            unread = np.delete(np.array(paths), np.unique(arrays["files"])).tolist()
            if arrays.pop("key") == key and not len(decode(unread)["files"]):
                return arrays
    arrays = decode(paths)
    with contextlib.suppress(OSError, UserError):
        os.makedirs(cache_dir, exist_ok=True)
        with replace_when_complete(file) as temporary:
            np.savez(temporary, key=key, **arrays)
    return arrays


def state_of(paths: list[Path], folder: str) -> str:
    """One number for names, sizes and times of files in a folder, as hexadecimal text."""
    digest = hashlib.sha256()
    for path in paths:
        figures = (0, 0, 0)
        with contextlib.suppress(OSError):  # a link that leads nowhere, which is skipped later
            state = os.stat(path)
            figures = (state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        digest.update(os.fsencode(os.path.relpath(path, folder)) + b"\0%d %d %d " % figures)
    return digest.hexdigest()
