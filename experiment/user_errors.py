"""Errors that a user can put right, and how a script ends with one."""

import sys


class UserError(Exception):
    """Something the user can put right; `run_main` prints its one sentence, without a traceback."""


def run_main(main):
    """Runs a script's main() and exits with the code that it returns.

    Bad input ends in one sentence on stderr and exit code 2, Ctrl-C in one and exit code 130.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # not every terminal and log file knows σ
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt as interrupt:
        print(interrupt.args[0] if interrupt.args else "interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
