"""Decoded images of a folder, kept in one file: decoding 50,000 takes longer than a training."""

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np

from experiment.run_files import replace_when_complete
from experiment.user_errors import UserError

LEAST_FILES = 1000  # of a folder that is kept; fewer take a moment


def remembered(paths, cache_dir, decode):
    """What decode() returns for image files, or what it returned for the same files before.

    It is read from a file in `cache_dir` as long as names, sizes and times of the image files are
    the same. Where two runs write it at once, either leaves a complete one; where it is damaged or
    cannot be written, the images are decoded.

    Args:
        paths: of the image files, all of one folder.
        cache_dir: folder for the file, made where it is missing.
        decode: function() -> dict of arrays.

    Returns:
        dict of arrays.
    """
    if len(paths) < LEAST_FILES:
        return decode()
    key = state_of(paths)
    folder = os.path.commonpath(paths)
    name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:16]
    file = Path(cache_dir) / f"decoded_{name}.npz"
    # The format of the file has its own exceptions for every kind of damage.
    with contextlib.suppress(Exception), np.load(file) as kept:
        if kept["key"] == key:
            return {name: kept[name] for name in kept.files if name != "key"}
    arrays = decode()
    with contextlib.suppress(OSError, UserError):
        os.makedirs(cache_dir, exist_ok=True)
        with replace_when_complete(file) as temporary:
            np.savez(temporary, key=key, **arrays)
    return arrays


def state_of(paths):
    """One number for names, sizes and times of files, as hexadecimal text."""
    digest = hashlib.sha256()
    for path in paths:
        state = os.stat(path)
        digest.update(os.fsencode(path) + b"\0%d %d " % (state.st_size, state.st_mtime_ns))
    return digest.hexdigest()
