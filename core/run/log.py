"""What a run reports besides its progress bars: JSON lines for machines, TensorBoard for people."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from core.run import distributed
from core.run.settings import Runtime

MOST_PICTURES = 8  # of one batch


def emit(runtime: Runtime, event: str, **values: Any) -> None:
    """With `log: jsonl`, writes one JSON object to the original standard output."""
    if runtime.log == "jsonl" and distributed.rank() == 0:
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
        if not runtime.tensorboard or distributed.rank():
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

    def pictures(self, iteration: int, images: Mapping[str, Tensor]) -> None:
        """Writes pictures (B, 3, H, W) uint8 by name."""
        if self._writer is not None:
            for key, value in images.items():
                self._writer.add_images(key, value[:MOST_PICTURES].cpu(), iteration)
            self._writer.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._writer is not None:
            self._writer.close()
