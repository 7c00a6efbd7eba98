"""Stage 4's settings, and label maps by a trained network: views, refinement, files."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from core.complement import ComplementConfig
from core.crf.dense import CrfConfig, DenseCRF, make_crf
from core.data.labels import write_label
from core.data.lists import Split
from core.data.loader import batches_by_size
from core.data.settings import AugmentConfig
from core.inference import multi_scale, windowed
from core.models.deeplab import DeepLab, DeepLabConfig
from core.run.device import autocast, pick_device, to_device
from core.run.settings import (
    ClosedUnitInterval,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Runtime,
    check,
    location,
)
from core.run.threads import make_missing


@dataclass
class SegmentationConfig(ComplementConfig, DeepLabConfig):
    """Stage 4, a DeepLab with an EMA teacher (Eq. 6-7)."""

    # wsss: plain pseudo labels; ignore: biased pixels left out; complement: filled by the teacher;
    # mars: the same with the certainty-weighted loss; supervised: ground truth, the upper bound.
    mode: Literal["wsss", "ignore", "complement", "mars", "supervised"] = "mars"
    name: str | None = location()  # Folder name below <run_dir>/segmentation; None: the mode.
    # Use <id>.png labels from this folder instead of stage 2's or 3's.
    labels_dir: str | None = location()
    # Average the loss over background and foreground pixels separately, and add the two (AdvCAM).
    balanced: bool = False
    epochs: PositiveInt = 100  # Passes over the training images (the author's later code).
    # Draw images of rare classes more often. 0: every image once per epoch; 0.5: a class of n
    # images in proportion to sqrt(n); 1: all classes about equally often. For skewed collections.
    class_balance: ClosedUnitInterval = 0
    batch_size: PositiveInt = 16  # Images per step.
    # sgd has momentum 0.9 and a polynomial schedule; adamw a one-cycle one.
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 1e-3  # Learning rate of the backbone.
    head_lr: float = 1e-2  # Learning rate of the new layers.
    weight_decay: float = 4e-5  # Weight decay.
    augment: AugmentConfig = field(default_factory=AugmentConfig)  # Views for training.

    def unused(self) -> list[str]:
        """Keys of the heads and modes that are not chosen."""
        keys = {
            "deeplabv1": ["low_dim", "head_dropout"],
            "deeplabv2": ["low_dim", "head_dropout", "head_momentum", "aspp_dim", "dropout"],
            "deeplabv3plus": ["head_momentum"],
        }[self.network]
        if self.mode not in ("complement", "mars"):
            keys = [*keys, "warmup", "warmup_label", "fill_prior", "refine", "crf"]
        return keys if self.refine == "crf" else [*keys, "crf"]


@dataclass
class EvaluationConfig:
    """Stage 5, scoring."""

    scales: tuple[PositiveFloat, ...] = (0.5, 1.0, 1.5, 2.0)  # Test-time scales (the author's).
    flip: bool = True  # Average with the mirrored image.
    # Side of the overlapping windows in which larger images are predicted, pixels; 0: whole images.
    window: NonNegativeInt = 0
    refine: Literal["crf", "none"] = "crf"  # Post-processing of the averaged probabilities.
    crf: CrfConfig = field(default_factory=CrfConfig)  # Settings of that refinement.

    def __post_init__(self):
        check(len(self.scales) > 0, "evaluation.scales needs at least one number")
        large = self.window == 0 or self.window >= 32
        check(large, f"evaluation.window must be 0 or at least 32, got {self.window}")

    def unused(self) -> list[str]:
        """The CRF's settings, if there is no CRF."""
        return ["crf"] if self.refine == "none" else []


def predict(
    network: DeepLab, split: Split, folder: Path, settings: EvaluationConfig, runtime: Runtime
) -> None:
    """Writes the predicted label map of every image that has none yet in `folder`."""
    device = pick_device(runtime)
    network, amp = to_device(network, device), autocast(runtime, device)
    crf = make_crf(settings.crf, device) if settings.refine == "crf" else None
    paths = [folder / f"{i}.png" for i in split.ids]

    def finish(item: tuple[int, np.ndarray]) -> None:
        index, probs = item
        label = most_likely(split.read_image(index), probs, crf)
        write_label(paths[index], label)

    def seen(todo: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        wanted, largest = set(todo), 1 if settings.window else max(settings.scales)
        for indices, images in batches_by_size(split, todo, device, largest):
            with amp:
                probs = probabilities(network, images, settings)
            found = zip(indices, probs.cpu().numpy(), strict=True)
            yield from (item for item in found if item[0] in wanted)

    make_missing(paths, finish, runtime.workers, "predicting", seen)


def probabilities(network: DeepLab, images: Tensor, settings: EvaluationConfig) -> Tensor:
    """Probabilities of labels: normalised images, (B, 3, H, W) -> (B, 1 + C, H, W) float32.

    They are the mean over all configured views; v1's code averages logits instead.
    """
    of_logits = network.head.averages_logits

    def view(images: Tensor) -> Tensor:
        logits = network(images).float()
        return logits if of_logits else logits.softmax(1)

    seen = windowed(view, settings.window) if settings.window else view
    maps = multi_scale(seen, images, settings.scales, settings.flip)
    return maps.softmax(1) if of_logits else maps


def most_likely(image: np.ndarray, probs: np.ndarray, crf: DenseCRF | None) -> np.ndarray:
    """(1 + C, H, W) probabilities -> (H, W) uint8 labels, refined over the labels that matter.

    Labels that nowhere exceed 0.05 are left out, as in the author's later code.
    """
    peaks = probs.max((1, 2))
    present = np.flatnonzero(peaks > min(0.05, peaks.max() / 2))
    probs = probs[present]
    if crf is not None and len(present) > 1:
        probs = crf(image, np.ascontiguousarray(probs))
    return present[probs.argmax(0)].astype(np.uint8)
