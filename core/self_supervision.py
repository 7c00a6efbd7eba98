"""Self-supervised training of a feature network from scratch, for images far from ImageNet.

Dense self-distillation: a student sees a jittered crop with parts of it hidden and predicts, cell
by cell, which prototype the EMA teacher assigns to the same place of the whole view. Sinkhorn
iterations spread the assignments evenly over the prototypes, as in SwAV (Caron et al., NeurIPS
2020), and hiding parts makes the student infer a cell from its surroundings, as in iBOT (Zhou et
al., ICLR 2022).
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.config import Config, SelfSupervisedConfig
from core.datasets import Draws, RawImages, Split, make_loader
from core.models.backbones import to_device
from core.training import EMA, autocast, one_cycle, pick_device, train
from core.transforms import normalise_unit

STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04


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

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, K, h, w) cosine similarities."""
        cells = F.normalize(self.project(self.backbone(images)).float(), dim=1)
        return torch.einsum("bdhw,kd->bkhw", cells, F.normalize(self.prototypes, dim=1))


@torch.no_grad()
def sinkhorn(similarity: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Soft assignments that use all prototypes about equally.

    (N, K) similarities -> (N, K) non-negative, rows of sum 1 and columns of sum about N / K.
    """
    q = torch.exp((similarity - similarity.max()) / temperature)
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q


def random_crops(count: int, low: float, high: float) -> Tensor:
    """(count, 2, 3) affine maps of random square crops, half of them mirrored.

    A crop's side is a share in [low, high] of the image's.
    """
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


def distillation_loss(
    student: PrototypeNetwork,
    teacher: PrototypeNetwork,
    images: Tensor,
    config: SelfSupervisedConfig,
) -> Tensor:
    """Cross entropy between the teacher's assignments and the student's, where the views overlap.

    Args:
        student: in training mode.
        teacher: its moving average.
        images: (B, 3, H, W) in [0, 1].
        config: crop sizes and hidden share.

    Returns:
        () mean over all cells of the student's crops.
    """
    count = len(images)
    whole = crop(images, random_crops(count, 0.7, 1.0), config.teacher_size)
    inner = random_crops(count, 0.55, 0.9)
    part = normalise_unit(jitter(crop(whole, inner, config.student_size)))
    with torch.no_grad():
        seen = teacher(normalise_unit(jitter(whole)))
    size = config.student_size // (config.teacher_size // seen.shape[-1])
    target = crop(seen, inner, size).flatten(2).transpose(1, 2).flatten(0, 1)  # (B cells, K)
    target = sinkhorn(target, TEACHER_TEMPERATURE)
    hidden = random_mask(count, size, config.hidden).to(images)[:, None]
    part = part * (1 - F.interpolate(hidden, part.shape[-2:]))
    logits = student(part).flatten(2).transpose(1, 2).flatten(0, 1)
    return -(target * F.log_softmax(logits / STUDENT_TEMPERATURE, 1)).sum(1).mean()


def train_backbone(config: Config, backbone: nn.Module, split: Split, folder: Path) -> None:
    """Trains `backbone` in place on images alone; it ends with the teacher's weights."""
    settings, device = config.uss.self_supervised, pick_device(config)
    student = to_device(PrototypeNetwork(backbone, settings.prototypes), device).train()
    ema = EMA(student, settings.ema)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    cast, dataset = autocast(config, device), RawImages(split)

    def batches(start: int):
        draws = Draws(len(split), settings.batch_size, settings.iterations, config.seed, start)
        return make_loader(dataset, draws, config.workers)

    def step(batch: dict[str, Tensor], t: int) -> dict[str, Tensor]:
        images = batch["image"].to(device).float() / 255
        with cast:
            return {"loss": distillation_loss(student, ema.network, images, settings)}

    train(
        "self-supervision",
        {"network": student, "ema": ema.network},
        optimizer,
        one_cycle(settings.iterations),
        batches,
        step,
        settings.iterations,
        folder,
        config,
        ema,
    )
    backbone.load_state_dict(ema.network.backbone.state_dict())
    backbone.eval()
