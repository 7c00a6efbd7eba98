"""What a run tells beside its progress bars: JSON lines for machines, TensorBoard for people."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from core.config import Config
from core.run import distributed

MOST_PICTURES = 8  # of one batch


def emit(config: Config, event: str, **values: Any) -> None:
    """With `log: jsonl`, writes one JSON object to what was standard output at the start."""
    if config.log == "jsonl" and distributed.rank() == 0:
        print(json.dumps({"event": event, **values}), file=sys.__stdout__, flush=True)


class Board:
    """TensorBoard's files in `<folder>/tensorboard`, where `tensorboard` is set; else nothing.

    Args:
        folder: of the training.
        config: says whether.
        start: first iteration; what a killed run wrote from there on is dropped.
    """

    def __init__(self, folder: Path, config: Config, start: int):
        self._writer = None
        if not config.tensorboard or distributed.rank():
            return
        from torch.utils.tensorboard import SummaryWriter  # a second, for those who want it

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def scalars(self, iteration: int, figures: Mapping[str, float]) -> None:
        if self._writer is not None:
            for key, value in figures.items():
                self._writer.add_scalar(key, value, iteration)
            self._writer.flush()

    def pictures(self, iteration: int, draw: Callable[[], Mapping[str, Tensor]]) -> None:
        """Shows `draw()`: pictures (B, 3, H, W) uint8 by name; it is not called for nothing."""
        if self._writer is not None:
            for key, images in draw().items():
                self._writer.add_images(key, images[:MOST_PICTURES].cpu(), iteration)
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
