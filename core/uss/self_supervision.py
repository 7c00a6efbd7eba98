"""Self-supervised training of a feature network from scratch.

The student sees composites: a jittered crop of one image with a random outline of another pasted
in, parts of it hidden. Two losses work on the same pass.

- Dense self-distillation: for each cell the student predicts which prototype the EMA teacher
  assigns to that place of the image it comes from, regardless of what is pasted next to it.
  Sinkhorn iterations spread the assignments over the prototypes (SwAV, Caron et al., NeurIPS
  2020); hiding parts makes the student infer a cell from its surroundings (iBOT, Zhou et al., ICLR
  2022).
- Figure-ground contrast: cells of the pasted figure are pulled together and away from the ground of
  every composite, and the other way round (in the spirit of CP2, Wang et al., ECCV 2022). It gives
  things a direction in feature space that their surroundings do not share.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.data.transforms import normalise_unit
from core.run.settings import ClosedUnitInterval, Decay, NonNegativeInt, PositiveInt

STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04


@dataclass
class SelfSupervisedConfig:
    """Self-supervised training of the backbone from scratch, for images far from ImageNet."""

    iterations: NonNegativeInt = 0  # Steps; 0: the backbone stays as in its weight file.
    batch_size: PositiveInt = 32  # Images per step, each in two views.
    lr: float = 1e-3  # Peak learning rate of AdamW (cosine, after a warm-up of a tenth).
    weight_decay: float = 0.05  # AdamW weight decay.
    prototypes: PositiveInt = 128  # Clusters that cells are assigned to.
    hidden: ClosedUnitInterval = 0.5  # Largest share of the student's view that is hidden.
    # Side of the teacher's view, pixels; images are centre squares of 4/3 of it.
    teacher_size: PositiveInt = 96
    student_size: PositiveInt = 80  # Side of the student's view, pixels, a crop of the teacher's.
    ema: Decay = 0.99  # Decay of the teacher.


class PrototypeNetwork(nn.Module):
    """A feature network, a projection and prototypes: similarity of each cell to each prototype."""

    def __init__(self, backbone: nn.Module, prototypes: int, width: int = 64):
        super().__init__()
        self.backbone = backbone
        self.project = nn.Sequential(
            nn.Conv2d(backbone.dim, 256, 1),
            nn.BatchNorm2d(256),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, width, 1),
        )
        self.prototypes = nn.Parameter(torch.randn(prototypes, width) * 0.1)

    def forward(self, feat: Tensor) -> Tensor:
        """(B, D, h, w) features of the backbone -> (B, K, h, w) cosine similarities."""
        cells = F.normalize(self.project(feat).float(), dim=1)
        with torch.autocast(cells.device.type, enabled=False):  # a small temperature divides them
            return torch.einsum("bdhw,kd->bkhw", cells, F.normalize(self.prototypes, dim=1))


@torch.no_grad()
def sinkhorn(similarity: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Soft assignments that use all prototypes about equally; sums need single precision.

    (N, K) similarities -> (N, K) non-negative, rows of sum 1 and columns of sum about N / K.
    """
    q = torch.exp((similarity - similarity.max()) / temperature)
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q


def random_crops(count: int, low: float, high: float) -> Tensor:
    """(count, 2, 3) affine maps of random square crops, half of them mirrored; a crop's side is a
    share in [low, high] of the image's."""
    side = torch.empty(count).uniform_(low, high)
    x, y = ((torch.rand(count) * 2 - 1) * (1 - side) for _ in range(2))
    mirror = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    zero = torch.zeros(count)
    return torch.stack([side * mirror, zero, x, zero, side, y], 1).view(count, 2, 3)


def crop(images: Tensor, theta: Tensor, size: int) -> Tensor:
    """Bilinear samples of (B, D, H, W) maps inside affine crops: (B, D, size, size)."""
    grid = F.affine_grid(theta.to(images), [len(images), 1, size, size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def jitter(images: Tensor) -> Tensor:
    """Random hue turn, saturation, contrast and brightness of (B, 3, H, W) in [0, 1]."""
    count = len(images)
    angle = torch.rand(count) * math.pi * (torch.rand(count) < 0.8)
    cos, sin, third = torch.cos(angle), torch.sin(angle), 1 / 3
    # A turn about the grey axis: Rodrigues' formula for the axis (1, 1, 1) / sqrt(3).
    same = cos + third * (1 - cos)
    minus = third * (1 - cos) - math.sqrt(third) * sin
    plus = third * (1 - cos) + math.sqrt(third) * sin
    turn = torch.stack([same, minus, plus, plus, same, minus, minus, plus, same], 1)
    saturation = torch.empty(count, 1, 1).uniform_(0.3, 1.5) * (torch.rand(count, 1, 1) > 0.15)
    mix = saturation * torch.eye(3) + (1 - saturation) * third
    contrast = torch.empty(count, 1, 1).uniform_(0.6, 1.4)
    matrix = (turn.view(count, 3, 3) @ mix * contrast).to(images)
    shift = torch.empty(count, 3, 1, 1).uniform_(-0.125, 0.125).to(images)
    return (torch.einsum("bij,bjhw->bihw", matrix, images - 0.5) + 0.5 + shift).clamp(0, 1)


def random_mask(count: int, size: int, most: float) -> Tensor:
    """(count, size, size) bool: smooth blotches that hide a share in [0, most] of each image."""
    field = F.interpolate(torch.rand(count, 1, 5, 5), (size, size), mode="bilinear")[:, 0]
    field = (field + 0.3 * torch.rand(count, size, size)).flatten(1)
    share = torch.rand(count) * most
    rank = field.argsort(1).argsort(1)
    return (rank >= ((1 - share) * size * size)[:, None]).view(count, size, size)


def random_outlines(count: int, size: int) -> Tensor:
    """(count, 1, size, size) float32: one to four overlapping wavy blobs each, with soft edges."""
    masks = np.zeros((count, size, size), np.float32)
    for mask in masks:
        blobs = int(torch.randint(1, 5, ()))
        centre = 0.25 + 0.5 * torch.rand(2)
        for _ in range(blobs):
            corners = int(torch.randint(4, 40, ()))
            lobes, phase, lean, wave, flat, radius = torch.rand(6).tolist()
            turn = torch.arange(corners) * (2 * math.pi / corners)
            reach = 1 + 0.4 * wave * torch.cos(round(1 + 5 * lobes) * turn + 6 * phase)
            reach = reach * (0.1 + 0.2 * radius)
            x, y = reach * torch.cos(turn), reach * torch.sin(turn) * (0.3 + 0.7 * flat)
            cos, sin = math.cos(math.pi * lean), math.sin(math.pi * lean)
            points = torch.stack([x * cos - y * sin, x * sin + y * cos], 1)
            points = (points + centre + 0.1 * torch.randn(2)) * size
            cv2.fillPoly(mask, [points.round().int().numpy()], 1.0)
    return F.avg_pool2d(torch.from_numpy(masks)[:, None], 3, 1, 1)


def figure_ground_loss(feat: Tensor, pasted: Tensor, temperature: float = 0.1) -> Tensor:
    """Cells should be closer to their own side of their composite than to the other side of any.

    Args:
        feat: (B, D, h, w) features of composites.
        pasted: (B, h, w) share of each cell that is pasted; cells between 0.1 and 0.6 are left out.

    Returns:
        () mean over the cells of each side, averaged over the two sides.
    """
    cells = F.normalize(feat.float(), dim=1).flatten(2)  # (B, D, N)
    sides = [(pasted > 0.6).flatten(1).float(), (pasted < 0.1).flatten(1).float()]
    means = [F.normalize(torch.einsum("bdn,bn->bd", cells, side), dim=1) for side in sides]
    total = cells.new_zeros(())
    for side, own, other in zip(sides, means, means[::-1], strict=True):
        near = torch.einsum("bdn,bd->bn", cells, own) / temperature
        here = torch.einsum("bdn,bd->bn", cells, other) / temperature
        everywhere = torch.einsum("bdn,kd->bkn", cells, other) / temperature
        away = everywhere.logsumexp(1) - math.log(len(feat))
        loss = F.softplus(here - near) + F.softplus(away - near)
        total = total + (loss * side).sum() / side.sum().clamp(min=1)
    return total / 2


def self_supervised_losses(
    student: nn.Module, teacher: nn.Module, images: Tensor, config: SelfSupervisedConfig
) -> dict[str, Tensor]:
    """Both losses on composites of a batch, and "loss", their sum.

    Args:
        student: a `PrototypeNetwork` in training mode; `teacher` is its moving average.
        images: (B, 3, H, W) in [0, 1]; image b is pasted onto image b + 1.
    """
    count = len(images)
    whole = crop(images, random_crops(count, 0.7, 1.0), config.teacher_size)
    inner = random_crops(count, 0.55, 0.9)
    part = crop(whole, inner, config.student_size)
    with torch.no_grad():
        seen = teacher(teacher.backbone(normalise_unit(jitter(whole))))
    size = config.student_size // (config.teacher_size // seen.shape[-1])
    target = crop(seen, inner, size).flatten(2).transpose(1, 2)  # (B, cells, K)
    target = sinkhorn(target.flatten(0, 1), TEACHER_TEMPERATURE).unflatten(0, target.shape[:2])

    outline = random_outlines(count, config.student_size).to(images)
    ground = jitter(part)
    # A figure's light is not its ground's: one of its own, or the one that it has as a ground.
    own_light = torch.rand(count, 1, 1, 1, device=images.device) < 0.5
    figure = torch.where(own_light, jitter(part.roll(1, 0)), ground.roll(1, 0))
    composite = normalise_unit(ground * (1 - outline) + figure * outline)
    hidden = random_mask(count, size, config.hidden).to(images)[:, None]
    composite = composite * (1 - F.interpolate(hidden, composite.shape[-2:]))
    pasted = F.adaptive_avg_pool2d(outline, size)[:, 0]
    is_figure = (pasted >= 0.5).flatten(1)[..., None]
    target = torch.where(is_figure, target.roll(1, 0), target)

    feat = student.backbone(composite)
    logits = student(feat).flatten(2).transpose(1, 2) / STUDENT_TEMPERATURE
    entropy = -(target * F.log_softmax(logits, 2)).sum(2)
    pure = ((pasted < 0.1) | (pasted > 0.6)).flatten(1).float()
    distillation = (entropy * pure).sum() / pure.sum()
    with torch.autocast(images.device.type, enabled=False):
        contrast = figure_ground_loss(feat, pasted)
    loss = distillation + contrast
    return {"loss": loss, "distillation": distillation, "figure_ground": contrast}
