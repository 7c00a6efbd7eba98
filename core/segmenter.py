"""A trained segmenter and its label maps, for scoring and for photographs without a mask."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from core.config import Config, EvaluationConfig, SegmentationConfig, overlaid
from core.crf.dense import DenseCRF, make_crf
from core.data.labels import write_label
from core.data.loader import batches_by_size
from core.data.splits import Split
from core.inference import multi_scale, windowed
from core.models.backbones import to_device
from core.models.deeplab import DeepLab, build_deeplab
from core.run import checkpoint, distributed
from core.run.errors import UserError
from core.run.files import read_json
from core.run.loop import autocast, pick_device
from core.run.stage import Run
from core.run.threads import in_threads


def trained_weights(run: Run) -> Path:
    """The checkpoint of the configured training.

    Raises:
        UserError: it has not come to its end.
    """
    weights = run.segmentation() / "checkpoint.pth"
    if not weights.is_file() or not read_json(weights.with_name("manifest.json"))["finished"]:
        raise UserError(f"{weights.parent} holds no finished training; run train_segmentation.py")
    return weights


def load_segmenter(
    weights: Path, config: Config, configured: bool = False
) -> tuple[DeepLab, tuple[str, ...]]:
    """The EMA teacher of a training, which is what a user deploys, and the names of its classes.

    A checkpoint says itself which network it holds and what its labels are called, so nothing of
    the training data is needed; one that does not is taken for the configured network.

    Args:
        weights: the checkpoint.
        config: the whole configuration.
        configured: refuse a network that was trained with other settings or for other classes.
    """
    content = checkpoint.load(weights)
    if configured:
        checkpoint.refuse_other(weights, content, "segmentation", config, named=True)
    settings, classes = config.segmentation, config.data.classes
    made_from = content.get("made_from")
    if made_from is not None:
        settings = overlaid(SegmentationConfig(), made_from["settings"], "segmentation.")
        classes = tuple(made_from["classes"])
    blank = dataclasses.replace(settings, backbone=settings.backbone.without_weights())
    network = build_deeplab(blank, len(classes))
    return checkpoint.into(network, content, "ema", weights, "segmentation"), classes


def predict(config: Config, network: DeepLab, split: Split, folder: Path) -> None:
    """Writes the predicted label map of every image that has none yet."""
    settings, device = config.evaluation, pick_device(config)
    network = to_device(network, device)
    cast = autocast(config, device)
    crf = make_crf(settings.crf.settings()) if settings.refine == "crf" else None
    todo = distributed.my_share([folder / f"{i}.png" for i in split.ids])

    def finish(item: tuple[int, np.ndarray]) -> None:
        index, probs = item
        label = most_likely(split.read_image(index), probs, crf)
        write_label(folder / f"{split.ids[index]}.png", label)

    def seen() -> Iterator[tuple[int, np.ndarray]]:
        wanted = set(todo)
        for indices, images in batches_by_size(split, config.segmentation.batch_size, todo):
            with cast:
                probs = probabilities(network, images.to(device), settings)
            for index, own in zip(indices, probs.cpu().numpy(), strict=True):
                if index in wanted:
                    yield index, own

    done = len(split) - len(todo)
    for _ in in_threads(finish, seen(), config.workers, "predicting", len(split), done):
        pass
    distributed.barrier()


def probabilities(network: DeepLab, images: Tensor, settings: EvaluationConfig) -> Tensor:
    """Probabilities of labels over all configured views.

    Args:
        network: in evaluation mode.
        images: (B, 3, H, W), normalised.
        settings: scales, mirroring and windows.

    Returns:
        (B, 1 + C, H, W) float32: the mean over the views; v1's code averages logits instead.
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
