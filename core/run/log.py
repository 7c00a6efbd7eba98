"""What a run reports besides its progress bars: notes on its input, JSON lines, TensorBoard.

Nothing here imports torch before it is needed: tools that only read data do without.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.run.settings import Runtime

if TYPE_CHECKING:
    from torch import Tensor

MOST_PICTURES = 8  # of one batch
printed: dict[str, str] = {}
"""The notes printed so far, by their subject."""


def _is_first() -> bool:
    """Whether this is the first of several processes, which alone reports."""
    return os.environ.get("RANK", "0") == "0"


def note(text: str, about: str = "", title: str = "note") -> None:
    """Prints a decision made while reading input to standard error, once for each subject.

    Args:
        text: the line.
        about: subject of the line; empty: the text itself.
        title: first word of the line.
    """
    about = about or text
    if about not in printed:
        printed[about] = f"{title}: {text}"
        if _is_first():
            print(printed[about], file=sys.stderr)


def warn(text: str) -> None:
    """Prints a line about something that is probably not what the user wants."""
    note(text, title="warning")


def warnings() -> int:
    """The number of warnings printed."""
    return sum(line.startswith("warning: ") for line in printed.values())


def emit(runtime: Runtime, event: str, **values: Any) -> None:
    """With `log: jsonl`, writes one JSON object to the original standard output."""
    if runtime.log == "jsonl" and _is_first():
        print(json.dumps({"event": event, **values}), file=sys.__stdout__, flush=True)


class Board:
    """TensorBoard's files in `<folder>/tensorboard` if `tensorboard` is set; else does nothing.

    Args:
        folder: folder of the training.
        runtime: says whether to write.
        start: first iteration; whatever a killed run wrote from there on is dropped.
    """

    def __init__(self, folder: Path, runtime: Runtime, start: int):
        self._writer = None
        if not (runtime.tensorboard and _is_first()):
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    @property
    def enabled(self) -> bool:
        """Whether anything is written."""
        return self._writer is not None

    def scalars(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Writes figures by name."""
        if self._writer is not None:
            for key, value in figures.items():
                self._writer.add_scalar(key, value, iteration)
            self._writer.flush()

    def pictures(self, iteration: int, images: Mapping[str, "Tensor"]) -> None:
        """Writes pictures (B, 3, H, W) uint8 by name."""
        if self._writer is not None:
            for key, value in images.items():
                self._writer.add_images(key, value[:MOST_PICTURES].cpu(), iteration)
            self._writer.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._writer is not None:
            self._writer.close()
