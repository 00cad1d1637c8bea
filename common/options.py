"""Settings that a dataclass declares once: default, range and help.

The command line makes its options of them, and the dataclass checks every value that it is given.
"""

import argparse
import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from common.user_errors import UserError


class BadOption(ValueError):
    """A setting is out of its range; its words go on after a name: "must be at least 1, got 0"."""

    def __init__(self, name: str, words: str):
        super().__init__(f"{name} {words}")
        self.name, self.words = name, words


@dataclass(frozen=True)
class Number:
    """A range of whole or finite numbers; called, as by argparse, it reads one from a text."""

    kind: type  # int or float
    least: float = 0
    above: bool = False  # whether `least` itself is out of the range
    most: float | None = None  # None: 2³¹ - 1 for int, whatever is finite for float

    def __call__(self, text: str) -> int | float:
        numerator, slash, denominator = text.partition("/")  # the field writes σ as 25/255
        try:
            value = self.kind(numerator) / float(denominator) if slash else self.kind(text)
        except (ValueError, ArithmeticError):
            value = math.nan
        if not self.holds(value):
            raise argparse.ArgumentTypeError(f"must be {self}, got '{text}'")
        return value

    def holds(self, value: Any) -> bool:
        """Whether it is a number of this kind, in this range."""
        if type(value) not in ((int,) if self.kind is int else (int, float)):
            return False
        most = self.most if self.most is not None else 2**31 - 1 if self.kind is int else 1e300
        return (value > self.least if self.above else value >= self.least) and value <= most

    def __str__(self):
        noun = "a whole number" if self.kind is int else "a number"
        upper = f" and at most {self.most}" if self.most is not None else ""
        return f"{noun} {'above' if self.above else 'of at least'} {self.least}{upper}"


def as_option(name: str) -> str:
    """A field's name as the command line has it: "batch_size" -> "--batch-size"."""
    return f"--{name.replace('_', '-')}"


@contextlib.contextmanager
def told_as_options() -> Iterator[None]:
    """Within the block, a BadOption becomes a UserError that names the option."""
    try:
        yield
    except BadOption as error:
        raise UserError(f"{as_option(error.name)} {error.words}") from None


def option(default: Any, help: str, **settings) -> Any:
    """A field of a dataclass that is an option of the command line, with its settings for argparse.

    A default of None: it may be missing; a tuple: it has several values. Its `type` is a Number.
    """
    return field(default=default, metadata={"help": help, **settings})


def check_fields(settings: Any) -> None:
    """Raises a BadOption if a field is not of the type or in the range that its metadata declares.

    Those with a help are options of the command line as well.
    """
    for declared in fields(settings):
        value, default = getattr(settings, declared.name), declared.default
        if not declared.metadata or (value is None and default is None):
            continue
        several = isinstance(default, tuple) or "nargs" in declared.metadata
        values = value if isinstance(value, tuple) else (value,)
        number, choices = (declared.metadata.get(key) for key in ("type", "choices"))
        if choices:
            typed = [(type(choice), choice) for choice in choices]  # since 1 == 1.0 == True
            good = all((type(one), one) in typed for one in values)
            wanted = f"one of {', '.join(map(str, choices))}"
        elif number:
            good = all(number.holds(one) for one in values)
            wanted = f"numbers, each {number}" if several else number
        else:
            good = all(type(one) is (bool if type(default) is bool else str) for one in values)
            wanted = "true or false" if type(default) is bool else "a text"
        if not good or isinstance(value, tuple) != several:
            raise BadOption(declared.name, f"must be {wanted}, got {value!r:.60}")
        if declared.metadata.get("nargs") == 2 and (len(value) != 2 or value[0] > value[1]):
            words = f"must be two numbers in ascending order, got {value}"
            raise BadOption(declared.name, words)


def given_fields(kind: type, settings: Mapping) -> dict:
    """Those of the settings that a dataclass has fields for; lists become tuples."""
    given = {f.name: settings[f.name] for f in fields(kind) if f.name in settings}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
