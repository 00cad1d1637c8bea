"""Errors that a user can put right, and how a script ends with one."""

import contextlib
import os
import sys

import matplotlib
import torch


class UserError(Exception):
    """Something the user can put right; `run_main` prints its one sentence, without a traceback."""


class Diverged(UserError):
    """The loss of a training is not finite any more."""


class PatientStream:
    """stdout or stderr, where a lost terminal or a full disk does not end a run."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115, it lives as long as stdout
        if hasattr(self.stream, "reconfigure"):  # not every terminal and log file knows σ
            with self.patience():
                self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with self.patience():
            self.stream.write(text)
        return len(text)

    def flush(self):
        with self.patience():
            self.stream.flush()

    @contextlib.contextmanager
    def patience(self):
        try:
            yield
        except (OSError, ValueError):  # ValueError: it is closed
            # From now on to nowhere, what is still buffered as well.
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())


def printable(text):
    """Text with the names and contents of files in it, without control characters."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def counted(number: int, noun: str) -> str:
    """ "1 image", "1,017 images"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def reason(error):
    """Why a file could not be read, in words: decoders have exceptions for every kind of damage."""
    puzzling = isinstance(error, LookupError | TypeError | AttributeError | ArithmeticError)
    told = "" if puzzling else str(error)
    return told or f"damaged, or larger than the memory ({type(error).__name__})"


def exhausted(error):
    """Whether it says that there is not enough memory; torch has a class for a GPU's alone."""
    of_its_own = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return of_its_own or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def run_main(main):
    """Runs a script's main() and exits with the code that it returns.

    Bad input ends in one sentence on stderr and exit code 2, Ctrl-C in one and exit code 130.
    """
    matplotlib.use("Agg")  # figures go to files, also where there is no display
    matplotlib.rcParams["text.parse_math"] = False  # a $ in the name of a folder is no formula
    out, err = PatientStream(sys.stdout), PatientStream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code, told = 2, None
        try:
            code = main()
        except UserError as error:
            told = error
        except KeyboardInterrupt as interrupt:
            print(interrupt.args[0] if interrupt.args else "interrupted", file=sys.stderr)
            code = 130
        except (MemoryError, RuntimeError) as error:
            if not exhausted(error):
                raise
            told = (
                "there is not enough memory; give it less at once: fewer or smaller images, a "
                "smaller --batch-size or --tile where there is one"
            )
        if told is not None:
            print(f"error: {printable(told)}", file=sys.stderr)
        out.flush()
    sys.exit(code)
