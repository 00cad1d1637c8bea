"""Options that several scripts have: the same word with the same meaning and unit everywhere.

What a dataclass declares as an option (common/options.py) is added by `add_fields`; what is no
setting of a training or a degradation stands here.
"""

import argparse
import contextlib
import ctypes
import os
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

import torch

from common.options import Number, as_option
from common.user_errors import UserError
from experiment.recipe import Recipe
from images.degradations import KINDS, TASKS, GaussianNoise

PUBLISHED_CHECKPOINT = "best_denoising_model_proper.pt"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


class _Formatter(argparse.HelpFormatter):
    """Wraps each line of a text by itself, and no option at its hyphens."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=100)

    def _fill_text(self, text, width, indent):
        return "\n".join("\n".join(self._wrapped(line, width)) for line in text.splitlines())

    def _split_lines(self, text, width):
        return self._wrapped(" ".join(text.split()), width)

    def _wrapped(self, line, width):
        further = 6 * " " if line.startswith(" ") else ""
        return textwrap.wrap(line, width, subsequent_indent=further, break_on_hyphens=False)


def make_parser(description: str, example: str, recipes: Mapping[str, Recipe] | None = None):
    """An argparse parser without options, whose help ends with the values of the recipes."""
    epilog = f"{recipe_values(recipes) if recipes else ''}example: {example}"
    return _Parser(description=description, epilog=epilog, formatter_class=_Formatter)


def add_option(group, name: str, **settings) -> None:
    """add_argument, with the default named in the help text."""
    default = settings.get("default")
    if default is not None and "(default" not in settings["help"]:
        shown = in_words(default) if isinstance(default, tuple) else "%(default)s"
        settings["help"] += f" (default: {shown})"
    group.add_argument(name, **settings)


def add_fields(group, kind: type, names: Iterable[str] = (), with_defaults=True, **changes) -> None:
    """Options out of those fields of a dataclass that common.options.option made, or of some.

    Without defaults, an option that is not given is None. changes: {name of a field: settings of
    add_argument in place of what it declares}.
    """
    for declared in fields(kind):
        if "help" in declared.metadata and (not names or declared.name in names):
            settings = dict(declared.metadata)
            if type(declared.default) is bool:
                settings["action"] = argparse.BooleanOptionalAction
            if with_defaults:
                settings["default"] = declared.default
            settings |= changes.get(declared.name, {})
            add_option(group, as_option(declared.name), **settings)


def add_data(parser, of_model: bool = False) -> None:
    """--dataset and --data-dir; `of_model`: by default the images of a model's training."""
    group = parser.add_argument_group("data")
    default, metavar = None if of_model else "cifar10", "cifar10|photos|FOLDER"
    what = "CIFAR-10; crops of the photographs inside scikit-image, which need no download; or a "
    what += "folder with train/ and test/ image files (default: cifar10)"
    if of_model:
        what = "images to use (default: those of the model's training)"
    add_option(group, "--dataset", default=default, metavar=metavar, help=what)
    what = "where CIFAR-10 is or gets downloaded to, and where the decoded images of a large "
    what += "folder are kept"
    add_option(group, "--data-dir", default="./data", metavar="DIR", help=what)


def add_noise(parser) -> None:
    """The options of Gaussian noise and --seed, for scripts that look at a training's images."""
    group = parser.add_argument_group("noise", "by default Gaussian, σ = 0.2")
    add_noise_kind(group)
    add_fields(group, GaussianNoise, ("noise_level", "noise_map"), with_defaults=False)
    add_fields(group, Recipe, ("seed",))


def add_noise_kind(group) -> None:
    what = "gaussian: independent from pixel to pixel; camera: as in the files of cameras"
    group.add_argument("--noise", choices=["gaussian", "camera"], help=what)


def add_checkpoint(parser, default: str | Path = PUBLISHED_CHECKPOINT) -> None:
    group, what = parser.add_argument_group("model"), "trained model to read"
    add_option(group, "--checkpoint", default=str(default), metavar="FILE", help=what)


def add_task(parser, default: str) -> None:
    """--task and the options of every task, None where not given; the default is told."""
    group = parser.add_argument_group("task and noise", f"by default {default}")
    what = "what the model restores: noisy images; images enlarged after a bicubic reduction; "
    what += "images with holes; or JPEG files with their artefacts"
    group.add_argument("--task", choices=TASKS, help=what)
    add_noise_kind(group)
    added = set()  # kinds of noise share some
    for kind in KINDS:
        names = {declared.name for declared in fields(kind)} - added
        if names:
            add_fields(group, kind, names, with_defaults=False)
        added |= names


def add_recipe(parser, recipes: Mapping[str, Recipe], without=(), **choices: Iterable[str]) -> None:
    """--recipe, the first by default, and an option for every setting of a training but those that
    the script decides itself, `without`; choices: {field: its values}, where other rooms know them.
    """
    add_task(parser, "those of the recipe, below")
    group = parser.add_argument_group("training", "by default that of the recipe, below")
    names = list(recipes)
    add_option(group, "--recipe", choices=names, default=names[0], help="see below")
    chosen = [f.name for f in fields(Recipe) if f.name not in without]
    changes = {name: {"choices": list(values)} for name, values in choices.items()}
    add_fields(group, Recipe, chosen, with_defaults=False, **changes)


def recipe_values(recipes: Mapping[str, Recipe]) -> str:
    """The values of the first recipe, and what the others change of them."""
    text, first = "recipes; all but the first say what they change of it:\n", {}
    for name, recipe in recipes.items():
        text += f"  {name}: {differences(recipe.as_dict(), first)}\n"
        first = first or recipe.as_dict()
    return f"{text}\n"


def differences(settings: Mapping, others: Mapping) -> str:
    """The settings that are not as in others, as options: "lr 0.004, flip"."""
    return ", ".join(
        f"{name.replace('_', '-')} {in_words(value)}".rstrip()
        for name, value in settings.items()
        if value is not None and others.get(name, False) != value
    )


def in_words(value) -> str:
    """A setting as the command line has it."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, dict.fromkeys(value)))
    return "" if value is True else str(value)


def add_computation(parser, dtype: bool = False, compile: bool = False) -> None:
    """--device and --threads, and what else a script has of how to compute."""
    group = parser.add_argument_group("computation")
    devices, what = ["auto", "cpu", "cuda", "mps"], "auto takes cuda, else mps, else cpu"
    add_option(group, "--device", default="auto", choices=devices, help=what)
    what = "CPU threads (default: as torch chooses)"
    add_option(group, "--threads", type=Number(int, 1, most=1024), help=what)
    if dtype:
        add_fields(group, Recipe, ("dtype",))
    if compile:
        what = "use torch.compile, which takes up to a minute at the start (default: no)"
        group.add_argument("--compile", action="store_true", help=what)


def add_output(parser, default: str, what: str):
    """Returns the group of --output."""
    group = parser.add_argument_group("output")
    add_option(group, "--output", type=output_file, default=default, metavar="FILE", help=what)
    return group


def output_file(text: str) -> str:
    """argparse type: the path of a file; of a link, the path that it leads to."""
    if Path(text).name in ("", "..") or text.endswith(("/", os.sep)):
        raise argparse.ArgumentTypeError(f"must name a file, got '{text}'")
    return os.path.realpath(text) if os.path.islink(text) else text


def select_device(name: str, threads: int | None = None) -> torch.device:
    """The torch.device for `--device`, or a UserError; sets torch's CPU threads to `--threads`."""
    if threads:
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 convolutions mean float32
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = [device for device in there if there[device]] + ["cpu"]
    name = available[0] if name == "auto" else name
    if name not in available:
        raise UserError(f"--device {name}: this machine has none; use {' or '.join(available)}")
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)


def hint_of_load(threads: int | None) -> str:
    """A sentence where other work keeps this machine's cores, whose threads wait for each other."""
    cores, load = os.cpu_count() or 1, os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    if threads or cores == 1 or load < 0.75 * cores:
        return ""
    return f"this machine is busy (load {load:.1f} on {cores} cores): --threads 1 may be faster"


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Context in which matrix products run in `dtype` (a name); float32 leaves all as it is."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


def keep_freed_memory() -> None:
    """Makes glibc keep the blocks that a step frees for the next step, at most its peak.

    By default it returns them to the system, which has to clear every page of them again; about a
    tenth of the refined model's step goes there. Other C libraries are left as they are.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
