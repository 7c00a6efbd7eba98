"""AdvCAM (Lee, Kim and Yoon, CVPR 2021): maps gathered while an image climbs towards its class.

The image is changed, a little at a time, so that a class scores higher and the others lower. Parts
of the object that the classifier had not looked at light up one after the other; the maps of all
steps are summed. What is bright already must stay as it is, or it would outshine the rest.
"""

import copy
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, multiprocessing
from torch.nn import functional as F

from core.data.lists import Split
from core.data.transforms import normalise
from core.run.errors import UserError
from core.run.settings import PositiveFloat, PositiveInt, check
from core.wsss.cam import CamClassifier


@dataclass
class AdvCamConfig:
    """AdvCAM's adversarial climbing (all defaults: its code for VOC)."""

    steps: PositiveInt = 27  # Steps of the climb, T; half as many at scales below 1.
    step: float = 0.08  # Largest change of a normalised pixel in one step.
    penalty: float = 7.0  # Weight of changes to regions that are bright already.
    bright: float = 0.5  # Cells above this share of the map's maximum are bright.
    # Scales of the image, each also mirrored, whose maps are summed.
    scales: tuple[PositiveFloat, ...] = (0.5, 1.0, 1.5, 2.0)

    def __post_init__(self):
        check(len(self.scales) > 0, "wsss.advcam.scales needs at least one number")


def adversarial_cam(
    classifier: CamClassifier, views: Tensor, label: int, steps: int, config: AdvCamConfig
) -> Tensor:
    """Sum of the Grad-CAM maps of one class along the climb.

    Args:
        classifier: classifier in evaluation mode.
        views: (2, 3, H, W) float32, the normalised image and its mirror image.
        label: the class, 0-based.
        steps: T, of the climb; the first map is that of the image itself.

    Returns:
        (h, w) not negative, at the classifier's stride, in the first view's orientation.
    """
    total, first = 0, None
    views = views.detach().clone()
    for _ in range(steps):
        views.requires_grad_(True)
        current, scores = _grad_cam(classifier, views, label)
        first = current.detach() if first is None else first
        total = total + current.detach()
        bright = current.detach() > config.bright * current.detach().max()
        others = scores.sum() - scores[label]
        change = ((current - first).abs() * bright).sum()
        objective = scores[label] - others - config.penalty * change
        (gradient,) = torch.autograd.grad(objective, views)
        with torch.no_grad():
            step = config.step * gradient / gradient.abs().max().clamp(min=1e-12)
            views = (views + step).clamp(views.min(), views.max())
    return total


def _grad_cam(classifier: CamClassifier, views: Tensor, label: int) -> tuple[Tensor, Tensor]:
    """(h, w) map of one class summed over both views, and (C,) pooled scores, both with a graph."""
    features = classifier.backbone(views)[-1]
    maps = classifier.classifier(features).relu()
    (slope,) = torch.autograd.grad(maps[:, label].sum(), features, retain_graph=True)
    weight = slope.sum((2, 3), keepdim=True) / (slope > 0).sum().clamp(min=1)
    both = (weight * features).sum(1).relu()
    return both[0] + both[1].flip(-1), maps.mean((2, 3)).sum(0)


class AdversarialCam:
    """Computes the maps of one image; each process of `map_over_devices` has a copy."""

    def __init__(self, classifier: CamClassifier, split: Split, config: AdvCamConfig):
        self.classifier, self.split, self.config = classifier.requires_grad_(False), split, config

    def to(self, device: torch.device) -> "AdversarialCam":
        self.classifier, self.device = self.classifier.to(device), device
        return self

    def __call__(self, index: int) -> np.ndarray:
        """Maps of the tagged classes over all scales: (K, ceil(H / 4), ceil(W / 4)) float32, not
        negative."""
        image = torch.from_numpy(self.split.read_image(index)).permute(2, 0, 1)
        labels = self.split.tags[index].nonzero()[0].tolist()
        image = normalise(image).to(self.device)
        config = self.config
        size = [-(-n // 4) for n in image.shape[1:]]
        total = image.new_zeros(len(labels), *size)
        for scale in config.scales:
            resized = [max(1, round(n * scale)) for n in image.shape[1:]]
            view = F.interpolate(image[None], resized, mode="bicubic", antialias=scale < 1)[0]
            views = torch.stack([view, view.flip(-1)])
            steps = config.steps if scale >= 1 else max(1, config.steps // 2)
            for k, label in enumerate(labels):
                climbed = adversarial_cam(self.classifier, views, label, steps, config)
                total[k] += F.interpolate(climbed[None, None], size, mode="bilinear")[0, 0]
        return total.cpu().numpy()


def map_over_devices(
    climb: AdversarialCam, todo: Sequence[int], devices: Sequence[torch.device]
) -> Iterator[tuple[int, np.ndarray]]:
    """(image, maps) of all images `todo`, in order, computed by one process per device."""
    if len(devices) == 1:
        climb.to(devices[0])
        yield from ((index, climb(index)) for index in todo)
        return
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for device in devices:
        places.put(device)
    threads = max(1, (os.cpu_count() or 1) // len(devices))
    initial = (copy.deepcopy(climb).to(torch.device("cpu")), places, threads)
    try:
        with ProcessPoolExecutor(len(devices), context, _begin, initial) as pool:
            yield from zip(todo, pool.map(_work, todo), strict=True)
    except BrokenProcessPool:
        raise UserError(
            "a process that makes maps died, perhaps for lack of memory; lower workers, or free "
            "the GPUs. Finished maps stay; run the same command again"
        ) from None


def _begin(climb: AdversarialCam, places: multiprocessing.Queue, threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work.climb = climb.to(places.get())  # a process of a pool keeps what it works with


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # leaves no process behind when the parent is killed


def _work(index: int) -> np.ndarray:
    return _work.climb(index)
