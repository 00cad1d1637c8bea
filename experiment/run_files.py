"""The files that a training run leaves on the disk."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass
class RunFiles:
    """The files of a run, named after its checkpoint."""

    checkpoint: Path

    def __post_init__(self):
        stem = str(self.checkpoint).removesuffix(".pt")
        self.history = Path(f"{stem}_history.csv")
        self.curve = Path(f"{stem}_curve.png")
        self.resume = Path(f"{stem}_resume.pt")
        self.all = (self.checkpoint, self.history, self.curve, self.resume)
        self.saved = False  # whether this run has written any

    def how_to_go_on(self):
        """The sentence that ends an interrupted run."""
        if not self.saved:
            return "interrupted before the first epoch was complete; nothing is kept"
        return (
            f"interrupted; {self.resume} has the run up to its last complete epoch, "
            f"{self.checkpoint} the best model so far; to go on, repeat the command with --resume"
        )

    def keep_existing(self, but=()):
        """Renames what another run left under these names, all `but` those of this one."""
        kept, number = self, 0
        while any(path.exists() for path in kept.all):
            number += 1
            kept = RunFiles(self.checkpoint.with_suffix(f".{number}{self.checkpoint.suffix}"))
        for path, new in zip(self.all, kept.all, strict=True):
            if path.exists() and path not in but:
                os.replace(path, new)
                print(f"kept the existing {path} as {new}")
        if kept.resume.exists() and kept is not self:
            print(f"that run was not complete; --resume --output {kept.checkpoint} goes on with it")
