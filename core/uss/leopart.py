"""Leopart: self-supervised learning of object parts (Ziegler and Asano, CVPR 2022).

A DINO transformer is trained further so that object parts gather around prototypes: where two crops
overlap, the student must predict in one crop what the teacher assigns in the other. Only places
that the teacher attends to as foreground count.
"""

import itertools
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from core.data.lists import Split
from core.data.transforms import MEAN, STD, drawn_from
from core.models.backbones import OnBackbone
from core.models.feature_networks import ViT
from core.run import distributed, vision
from core.run.settings import Decay, Dropout, NonNegativeInt, PositiveInt, Share
from core.uss.self_supervision import sinkhorn

TEACHER_TEMPERATURE, STUDENT_TEMPERATURE = 0.05, 0.1
CELLS = 7  # per side, of an aligned overlap
Box = tuple[float, ...]  # top, left, bottom, right


@dataclass
class LeopartConfig:
    """Leopart's training of a self-supervised transformer on parts (its code, ViT-S/16 on VOC)."""

    epochs: PositiveInt = 500  # Passes over the training images (COCO: 50).
    batch_size: PositiveInt = 64  # Images per step.
    lr: float = 1e-5  # Learning rate of the backbone, cosine to 0.
    head_lr: float = 1e-4  # Learning rate of the projection and the prototypes.
    # Weight decay of AdamW, from the first value to the second along a cosine.
    weight_decay: tuple[float, float] = (0.04, 0.5)
    ema: Decay = 0.9995  # Decay of the teacher, rising to 1 along a cosine.
    prototypes: PositiveInt = 300  # Parts that cells are assigned to.
    hidden: PositiveInt = 2048  # Width of the projection's hidden layers.
    width: PositiveInt = 256  # Width of the embeddings.
    # Number of earlier foreground embeddings that join the assignment, for each large crop.
    queue: PositiveInt = 8192
    mass: Share = 0.6  # Share of the class token's attention that is foreground.
    large: PositiveInt = 224  # Side of the two large crops, pixels.
    small: PositiveInt = 96  # Side of the small crops, pixels.
    smalls: NonNegativeInt = 4  # Small crops of each image.
    large_area: tuple[Share, Share] = (0.25, 1.0)  # Range of a large crop's share of the image.
    small_area: tuple[Share, Share] = (0.05, 0.25)  # Range of a small crop's share of the image.
    drop_path: Dropout = 0.1  # Stochastic depth of the student.


def roi_align(maps: Tensor, boxes: Tensor, cells: int = CELLS) -> Tensor:
    """torchvision's `roi_align` (aligned, sampling_ratio -1), whose compiled operator is not
    available everywhere (core/run/vision.py): means of ceil(n / cells) bilinear samples per axis,
    n being the box's length in cells of the map.

    Args:
        maps: (B, C, h, w).
        boxes: (B, 4) top, left, bottom, right as shares of the map's sides, in [0, 1].

    Returns:
        (B, C, cells, cells) float32; samples beyond the outermost cells have the border's value.
    """
    rows = _sampling(boxes[:, 0], boxes[:, 2], maps.shape[2], cells)
    columns = _sampling(boxes[:, 1], boxes[:, 3], maps.shape[3], cells)
    with torch.autocast(maps.device.type, enabled=False):
        return torch.einsum("bih,bchw,bjw->bcij", rows, maps.float(), columns)


def _sampling(start: Tensor, end: Tensor, length: int, cells: int) -> Tensor:
    """(B, cells, length) weights of the `length` cells along one axis in the means of `roi_align`,
    whose boxes go from `start` to `end`, (B,) shares of that axis."""
    start, end = start[:, None, None], end[:, None, None]
    start, extent = start.float() * length, (end - start).float() * length
    # The slack keeps rounding of a whole number of cells from adding a sample.
    count = (extent / cells - 1e-4).ceil().clamp(min=1)
    each = torch.arange(-(-length // cells), device=start.device)  # samples at most
    mean = torch.arange(cells, device=start.device)[:, None]
    place = start + (mean + (each + 0.5) / count) * extent / cells
    place = (place - 0.5).clamp(0, length - 1)[..., None]  # from edges to centres of cells
    near = (1 - (place - torch.arange(length, device=start.device)).abs()).clamp(min=0)
    return (near * (each < count)[..., None]).sum(2) / count


def overlap(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 4) boxes of two crops in an image -> their intersection as boxes within either crop."""
    low, high = first[:, :2].maximum(second[:, :2]), first[:, 2:].minimum(second[:, 2:])
    common = torch.cat([low, high], 1)

    def within(crop: Tensor) -> Tensor:
        origin = crop[:, :2].repeat(1, 2)
        return (common - origin) / (crop[:, 2:] - crop[:, :2]).repeat(1, 2)

    return within(first), within(second)


def foreground(attention: Tensor, mass: float) -> Tensor:
    """What the class token attends to: the smallest set of cells that holds the share `mass` of it.

    (B, h, w), not negative -> (B, h, w) bool; components of one or two cells (8-connected) are left
    out.
    """
    with torch.autocast(attention.device.type, enabled=False):
        blurred = vision.v2.functional.gaussian_blur(attention.float()[:, None], 7, 0.6)
    smooth = blurred[:, 0].flatten(1)
    smooth = smooth / smooth.sum(1, keepdim=True)
    values, order = smooth.sort(1, descending=True)
    kept = values.cumsum(1) - values < mass
    chosen = torch.zeros_like(kept).scatter_(1, order, kept).view_as(attention)
    masks = chosen.cpu().numpy().astype(np.uint8)
    for mask in masks:
        _, components, statistics, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
        small = np.flatnonzero(statistics[:, cv2.CC_STAT_AREA] <= 2)
        mask[np.isin(components, small)] = 0
    return torch.from_numpy(masks).bool().to(attention.device)


class LeopartNetwork(OnBackbone):
    """A transformer, a projection of its patch tokens, and prototypes, named as in Leopart."""

    def __init__(self, backbone: ViT, config: LeopartConfig):
        super().__init__()
        self.backbone = backbone
        self.projection_head = nn.Sequential(
            nn.Linear(backbone.dim, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.width),
        )
        self.prototypes = nn.Linear(config.width, config.prototypes, bias=False)
        self._heads: int = backbone.net.blocks[-1].attn.num_heads

    def embeddings(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, width, h, w), of unit length."""
        tokens = self.backbone(images).permute(0, 2, 3, 1)
        return F.normalize(self.projection_head(tokens).float(), dim=-1).permute(0, 3, 1, 2)

    def scores(self, embeddings: Tensor) -> Tensor:
        """(B, width, h, w) -> (B, prototypes, h, w) cosines, float32 for a small temperature."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return torch.einsum("bdhw,kd->bkhw", embeddings.float(), self.prototypes.weight.float())

    def with_attention(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings, and (B, h, w) the class token's attention in the last block, mean of its
        heads."""
        seen: list[Tensor] = []
        layer = self.backbone.net.blocks[-1].attn.qkv
        handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
        embeddings = self.embeddings(images)
        handle.remove()
        queries, keys, _ = seen[0].float().unflatten(2, (3, self._heads, -1)).unbind(2)
        with torch.autocast(images.device.type, enabled=False):
            logits = torch.einsum("bhd,bnhd->bhn", queries[:, 0], keys) * queries.shape[-1] ** -0.5
        patches = logits.softmax(2).mean(1)[:, self.backbone.net.num_prefix_tokens :]
        return embeddings, patches.unflatten(1, embeddings.shape[-2:])

    def parameter_groups(self, lr: float, head_lr: float) -> list[dict]:
        """Backbone and heads, each with its learning rate; biases and scales do not decay."""
        groups = []
        for group in super().parameter_groups(lr, head_lr):
            for decays in (True, False):
                chosen = [p for p in group["params"] if (p.ndim > 1) == decays]
                groups.append({**group, "params": chosen, "decays": float(decays)})
        return groups

    @torch.no_grad()
    def normalise_prototypes(self) -> None:
        """Makes every prototype a unit vector."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))


class Queue(nn.Module):
    """Embeddings of earlier foreground cells, one list of them for each large crop."""

    def __init__(self, length: int, width: int):
        super().__init__()
        self.register_buffer("rows", torch.zeros(2, length, width))

    def full(self, crop: int) -> bool:
        return bool(self.rows[crop, -1].any())

    def push(self, crop: int, embeddings: Tensor, most: int) -> None:
        """Puts at most `most` random rows of (N, width) embeddings from each process in front of
        the others, on all processes, so that their queues stay equal."""
        length = self.rows.shape[1]
        chosen = embeddings[torch.randperm(len(embeddings))[: min(most, length)]]
        chosen = distributed.gather(chosen)
        self.rows[crop] = torch.cat([chosen, self.rows[crop]])[:length]


class MultiCrops(Dataset):
    """Two large and some small overlapping crops of an image, each with its own colours."""

    def __init__(self, split: Split, config: LeopartConfig):
        self.split, self.config = split, config
        v2 = vision.v2
        self._colours = v2.Compose(
            [
                v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], p=0.5),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor | str]:
        """{"large": (2, 3, S, S), "small": (n, 3, s, s), "boxes": (2 + n, 4) as shares, "id"}."""
        index, seed = draw
        config = self.config
        image = torch.from_numpy(self.split.read_image(index)).permute(2, 0, 1)
        kinds = [(config.large, config.large_area, 0.02)] * 2
        kinds += [(config.small, config.small_area, 0.01)] * config.smalls
        boxes: list[Box] = []
        views = []
        with drawn_from(seed):
            for side, area, least in kinds:
                place, box = random_crop(image, area, boxes[:2], least)
                view = vision.v2.functional.resized_crop(image, *place, [side] * 2, antialias=True)
                views.append(self._colours(view))
                boxes.append(box)
        return {
            "large": torch.stack(views[:2]),
            "small": torch.stack(views[2:]),
            "boxes": torch.tensor(boxes),
            "id": self.split.ids[index],
        }


def random_crop(
    image: Tensor, area: tuple[float, float], others: list[Box], least: float
) -> tuple[tuple[int, ...], Box]:
    """Top, left, height and width, and the box, of a random crop that shares at least `least` of
    the image's area with each of `others`; after 100 draws without one, the one that shares most.
    `area` is the range of the crop's share of the image."""
    rows, cols = image.shape[-2:]
    most, best = -1.0, None
    for _ in range(100):
        place = vision.v2.RandomResizedCrop.get_params(image, list(area), [3 / 4, 4 / 3])
        top, left, height, width = place
        box = (top / rows, left / cols, (top + height) / rows, (left + width) / cols)
        shared = 1.0
        for other in others:
            tall = min(other[2], box[2]) - max(other[0], box[0])
            wide = min(other[3], box[3]) - max(other[1], box[1])
            shared = min(shared, max(0.0, tall) * max(0.0, wide))
        if shared > most:
            most, best = shared, (place, box)
        if shared > least:
            break
    return best


def part_loss(
    teacher: list[Tensor], student: list[Tensor], masks: list[Tensor], boxes: Tensor
) -> Tensor:
    """Cross entropy of the student's scores with the teacher's assignments on the overlaps.

    Args:
        teacher: (B, K, h, w) assignments of both large crops; sums over K are 1.
        student: (B, K, h', w') cosines of all crops with the prototypes.
        masks: (B, h, w) bool foreground of both large crops.
        boxes: (B, crops, 4) places of the crops in the image.

    Returns:
        () mean over large crops and the other crops of each.
    """
    losses = []
    for i, v in itertools.product(range(len(teacher)), range(len(student))):
        if i != v:
            here, there = overlap(boxes[:, i], boxes[:, v])
            wanted = roi_align(teacher[i], here)
            inside = roi_align(masks[i][:, None].float(), here)[:, 0] >= 1 - 1e-5  # rounding
            found = F.log_softmax(roi_align(student[v], there) / STUDENT_TEMPERATURE, 1)
            entropy = -(wanted * found).sum(1)
            losses.append((entropy * inside).sum() / inside.sum().clamp(min=1))
    return sum(losses) / len(losses)


def add_drop_path(backbone: ViT, rate: float) -> None:
    """Stochastic depth in training, rising from none in the first block to `rate` in the last."""
    blocks = backbone.net.blocks
    drop_path = vision.timm.layers.DropPath
    for k, block in enumerate(blocks):
        share = rate * k / max(1, len(blocks) - 1)
        block.drop_path1, block.drop_path2 = drop_path(share), drop_path(share)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher <- decay teacher + (1 - decay) student."""
    for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        ours.lerp_(theirs, 1 - decay)


def crops_loss(
    student: LeopartNetwork,
    teacher: LeopartNetwork,
    queue: Queue,
    batch: dict[str, Tensor],
    config: LeopartConfig,
) -> Tensor:
    """The loss of one batch of `MultiCrops`; the teacher's foreground enters the queue."""
    large, small = batch["large"], batch["small"]
    scores = [student.scores(student.embeddings(large[:, i])) for i in range(2)]
    if small.shape[1]:
        joined = student.scores(student.embeddings(small.flatten(0, 1)))
        scores += [*joined.unflatten(0, small.shape[:2]).unbind(1)]
    targets, masks = [], []
    with torch.no_grad():
        for i in range(2):
            embeddings, attention = teacher.with_attention(large[:, i])
            masks.append(foreground(attention, config.mass))
            similarity = teacher.scores(embeddings).permute(0, 2, 3, 1)
            cells = similarity.flatten(0, 2)  # (B h w, K)
            if queue.full(i):
                with torch.autocast(cells.device.type, enabled=False):
                    earlier = queue.rows[i] @ student.prototypes.weight.float().T
                cells = torch.cat([cells, earlier])
            shares = sinkhorn(cells, TEACHER_TEMPERATURE)[: attention.numel()]
            targets.append(shares.view_as(similarity).permute(0, 3, 1, 2))
            queue.push(i, embeddings.permute(0, 2, 3, 1)[masks[i]], 10 * len(large))
    return part_loss(targets, scores, masks, batch["boxes"])
