"""Views of images and their label maps. Images are (3, H, W) uint8 RGB until `normalise`; padding
is 0 after it (the mean colour) and 255 (ignore) in label maps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from core.data.labels import IGNORE
from core.data.settings import AugmentConfig
from core.run import vision

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, RGB, in [0, 1]
STD = (0.229, 0.224, 0.225)


def normalise(images: Tensor) -> Tensor:
    """(..., 3, H, W) uint8 -> float32, normalised by ImageNet's mean and deviation."""
    return normalise_unit(images.float() / 255)


def normalise_unit(images: Tensor) -> Tensor:
    """The same for (..., 3, H, W) floats in [0, 1]."""
    mean, std = torch.tensor((MEAN, STD), device=images.device)[..., None, None]
    return (images - mean) / std


def denormalise(images: Tensor) -> Tensor:
    """The inverse of `normalise`: (..., 3, H, W) float32 -> uint8."""
    mean, std = torch.tensor((MEAN, STD), device=images.device)[..., None, None]
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Seeds random draws on the CPU within the block, and restores the generator afterwards."""
    # torch.manual_seed would also ask every kind of accelerator, which takes as long as a crop.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class TrainingView:
    """Random resize, flip, jitter and crop of an image and its label map, a function of the seed
    that is given with each call."""

    def __init__(self, config: AugmentConfig):
        self.config = config
        v2, tv_tensors = vision.v2, vision.tv_tensors
        steps = [v2.RandomHorizontalFlip()] if config.flip else []
        if any(config.jitter):
            steps.append(v2.ColorJitter(*config.jitter))
        steps.append(v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True))
        steps.append(v2.Normalize(MEAN, STD))
        fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORE}
        steps.append(v2.RandomCrop(config.crop, pad_if_needed=True, fill=fill))
        self._steps = v2.Compose(steps)

    def __call__(self, image: Tensor, label: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """(3, H, W) uint8 and (H, W) int64 -> (3, crop, crop) float32 and (crop, crop) int64."""
        with drawn_from(seed):
            low, high = self.config.long_side or self.config.scale
            factor = low + (high - low) * torch.rand(()).item()
            if self.config.long_side:
                factor /= max(image.shape[-2:])
            size = [max(1, round(n * factor)) for n in image.shape[-2:]]
            image = vision.v2.functional.resize(image, size, antialias=True)
            # torchvision's own resize of masks is up to half a pixel off that of images.
            label = F.interpolate(label[None, None].float(), size, mode="nearest-exact")[0, 0]
            pair = (vision.tv_tensors.Image(image), vision.tv_tensors.Mask(label.long()))
            image, label = self._steps(*pair)
        return image.as_subclass(Tensor), label.as_subclass(Tensor)
