"""What a run reports besides its progress bars: notes on its input, JSON lines, TensorBoard.
Nothing here imports torch before it is needed: tools that only read data do without."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.run.settings import Runtime

MOST_PICTURES = 8  # of one batch
printed: dict[str, str] = {}
"""The notes printed so far, by their subject."""


def _is_first() -> bool:
    """Whether this is the first of several processes, which alone reports."""
    return os.environ.get("RANK", "0") == "0"


def note(text: str, about: str = "", title: str = "note") -> None:
    """Prints a decision made while reading input to standard error, once for each subject; `about`
    is the subject, by default the text itself, and `title` the first word of the line."""
    about = about or text
    if about not in printed:
        printed[about] = f"{title}: {text}"
        if _is_first():
            print(printed[about], file=sys.stderr)


def warn(text: str) -> None:
    """Prints a line about something that is probably not what the user wants."""
    note(text, title="warning")


def emit(runtime: Runtime, event: str, **values: Any) -> None:
    """With `log: jsonl`, writes one JSON object to the original standard output."""
    if runtime.log == "jsonl" and _is_first():
        print(json.dumps({"event": event, **values}), file=sys.__stdout__, flush=True)


class Board:
    """Writes TensorBoard's files to `<folder>/tensorboard` if `tensorboard` is set; what a killed
    run wrote from iteration `start` on is dropped."""

    def __init__(self, folder: Path, runtime: Runtime, start: int):
        self.enabled = runtime.tensorboard and _is_first()
        if self.enabled:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def scalars(self, iteration: int, figures: Mapping[str, float]) -> None:
        if self.enabled:
            for key, value in figures.items():
                self._writer.add_scalar(key, value, iteration)
            self._writer.flush()

    def pictures(self, iteration: int, images: Mapping[str, Any]) -> None:
        """Writes tensors (B, 3, H, W) uint8 by name."""
        if self.enabled:
            for key, value in images.items():
                self._writer.add_images(key, value[:MOST_PICTURES].cpu(), iteration)
            self._writer.flush()

    def close(self) -> None:
        if self.enabled:
            self._writer.close()
