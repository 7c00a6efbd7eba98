"""RS+EPM, our reconstruction of RecurSeed and EdgePredictMix (Jo, Yu and Kim, 2022).

The training code was never published; this is built from the abstract, the released inference code
and the settings visible there. A classifier with a decoder teaches itself. An EMA teacher's
activation maps, corrected by how its features correlate (SCG: Pan et al., CVPR 2021), are the
target of the student's maps; together with the teacher's decoder, whose share rises, they give the
labels of the student's decoder (RecurSeed). Finally, objects whose pixels are certain are pasted
into other images, and pixels at edges of the probabilities have no label there (EdgePredictMix).
Our own choices are the decoder's share (up to a half), the normalisation of its maps, equal weights
for classes and background, that even certain pixels lose their label at edges, and the ramp of the
moving average's decay, which rises faster than the released code's 0.9999 (1 - exp(-n / 2000)).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.complement import labelled_pixels, weighted_cross_entropy
from core.crf.pamr import PAMR
from core.data.labels import BACKGROUND, IGNORE
from core.models.backbones import Backbone, BackboneConfig, OnBackbone
from core.models.deeplab import ASPP, Decoder
from core.run import distributed
from core.run.settings import (
    ClosedUnitInterval,
    Decay,
    NonNegativeFloat,
    OpenUnitInterval,
    PositiveInt,
    check,
)


@dataclass
class RsEpmConfig:
    """RS+EPM, our reconstruction, with the released code's values where it has them."""

    width: PositiveInt = 256  # Width of the ASPP and of the decoder.
    low_width: PositiveInt = 256  # Width of the projected low-level features.
    rates: tuple[PositiveInt, ...] = (6, 12, 18)  # Dilations of the ASPP.
    # Epoch from which the teacher's maps and labels count (RecurSeed).
    recur_from: NonNegativeFloat = 5
    mix_from: NonNegativeFloat = 15  # Epoch from which certain objects are pasted (EdgePredictMix).
    foreground: OpenUnitInterval = 0.55  # Probability from which a class is certain.
    background: OpenUnitInterval = 0.10  # Background is certain where every class is below this.
    # Weight of the decoder, against the maps, in the teacher's probabilities when mixing begins
    # (default).
    decoder_share: ClosedUnitInterval = 0.5
    # Dilations of the PAMR that refines the teacher's probabilities, at a quarter of the size.
    dilations: tuple[PositiveInt, ...] = (1, 2, 4, 8, 12, 24)
    # In mixed images, pixels whose probabilities differ by more than this from a neighbour's have
    # no label (default).
    edge: float = 0.3
    cam_weight: float = 1.0  # Weight of the maps' distance from the teacher's corrected maps.
    decoder_weight: float = 1.0  # Weight of the decoder's cross entropy.
    first_order: float = 0.5  # Cosines of cells below this count as 0 (SCG; also the next three).
    second_order: float = 0.1  # The same for paths through a third cell, times the number of cells.
    bright: float = 0.3  # Cells of the object: at least this in the stretched map.
    dark: float = 0.05  # Cells of the background: at most this in the stretched map.
    ema: Decay = 0.9999  # Decay of the teacher.

    def __post_init__(self):
        for low, high in (("recur_from", "mix_from"), ("background", "foreground")):
            ordered = getattr(self, low) <= getattr(self, high)
            check(ordered, f"wsss.rsepm.{low} must not be greater than wsss.rsepm.{high}")
        check(len(self.rates) > 0, "wsss.rsepm.rates needs at least one dilation")
        check(len(self.dilations) > 0, "wsss.rsepm.dilations needs at least one distance")


class RsEpmClassifier(OnBackbone):
    """Class scores of cells, whose means are the logits, and DeepLab v3+'s decoder; named as in
    the released weights."""

    RELEASED: ClassVar = [
        ("model.fc.", None),
        ("model.", "backbone.net."),
        *((name, name) for name in ("classifier.", "aspp.", "decoder.")),
    ]

    def __init__(
        self, backbone: BackboneConfig, num_classes: int, output_stride: int, settings: RsEpmConfig
    ):
        super().__init__()
        self.backbone = Backbone(backbone, (1, 2, 3, 4), output_stride)
        low, *_, last = self.backbone.dims
        self.classifier = nn.Conv2d(last, num_classes, 1, bias=False)
        self.aspp = ASPP(last, settings.width, settings.rates, dropout=0.5, mean_norm=True)
        outputs = num_classes + 1
        self.decoder = Decoder(
            low, settings.low_width, settings.width, outputs, dropouts=(0.5, 0.1), last=3
        )

    def from_features(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Four stages -> (B, C, H/stride, W/stride) scores and (B, 1 + C, H/4, W/4) logits."""
        low, *_, last = features
        return self.classifier(last), self.decoder(low, self.aspp(last))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> the same."""
        return self.from_features(self.backbone(images))

    def activation(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/4, W/4) the decoder's probabilities of the classes."""
        return self(images)[1].float().softmax(1)[:, 1:]


class RecurSeed:
    """The losses of one step of a student, `network`, with its EMA, `teacher`, which are both
    `RsEpmClassifier`s; `epoch` is the number of steps in one pass over the images."""

    def __init__(self, config: RsEpmConfig, network: nn.Module, teacher: nn.Module, epoch: float):
        self.config, self.network, self.teacher = config, network, teacher
        self.recur_from, self.mix_from = config.recur_from * epoch, config.mix_from * epoch
        self._refine = PAMR(dilations=config.dilations)

    def __call__(
        self, images: Tensor, tags: Tensor, inside: Tensor, step: int
    ) -> dict[str, Tensor]:
        """The losses of a batch: "loss" and its parts, all ().

        Args:
            images: (B, 3, H, W), normalised.
            tags: (B, C) multi-hot.
            inside: (B, H, W) bool, False in padding: nothing is learnt there.
        """
        if step < self.recur_from:
            return {"loss": _tag_loss(self.network(images)[0], tags)}
        inside = inside[:, None].float()
        target, probs = self._targets(images, tags, inside, step)
        label = certain_label(probs, self.config.foreground, self.config.background)
        label = label.where(_resized(inside, label.shape[-2:])[:, 0] > 0, IGNORE)
        maps, logits = self.network(images)
        figures = {
            "classes": _tag_loss(maps, tags),
            "cam": map_loss(maps, target, tags, _resized(inside, target.shape[-2:])),
            "decoder": _decoder_loss(logits, label),
        }
        weights = {"cam": self.config.cam_weight, "decoder": self.config.decoder_weight}
        if step >= self.mix_from:
            edge = edge_strength(probs) > self.config.edge
            images, label, tags = mixed(images, label.where(~edge, IGNORE), tags)
            maps, logits = self.network(images)
            figures["mixed"] = _tag_loss(maps, tags) + _decoder_loss(logits, label)
        return {"loss": sum(weights.get(k, 1) * v for k, v in figures.items()), **figures}

    @torch.no_grad()
    def _targets(
        self, images: Tensor, tags: Tensor, inside: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """The teacher's corrected maps (B, C, h, w) and refined probabilities (B, 1 + C, H/4, W/4).

        The decoder knows nothing when the recursion begins, so its share rises from 0 until mixing
        begins. Its maps are divided by their maximum, as for labels: otherwise a tagged class that
        it has not learnt yet would be taught as background.
        """
        views = [images, images.flip(-1)]
        features = [self.teacher.backbone(view) for view in views]
        maps, logits = zip(*(self.teacher.from_features(f) for f in features), strict=True)
        present = tags[:, :, None, None]
        levels = [level.float() for level in features[0][1:]]  # strides 8 to 16
        size = levels[0].shape[-2:]
        seen = maps[0].float().relu() + maps[1].float().relu().flip(-1)
        seen = F.interpolate(seen, size, mode="bilinear") * present
        cells = _resized(inside, size)
        target = []
        parts = [value.split(1) for value in (seen, cells, *levels)]
        with torch.autocast(images.device.type, enabled=False):  # sums over thousands of cells
            # One image at a time: the matrices are as large as cells squared.
            for map_of_one, cells_of_one, *levels_of_one in zip(*parts, strict=True):
                correlation = self_correlation(levels_of_one, self.config)
                target.append(correct_maps(correlation, map_of_one, cells_of_one, self.config))
        target = torch.cat(target)
        own, mirrored = (z.float().softmax(1)[:, 1:] for z in logits)
        decoded = own + mirrored.flip(-1)
        decoded = decoded / (decoded.amax((2, 3), keepdim=True) + 1e-5)
        progress = min(1.0, (step - self.recur_from) / max(1, self.mix_from - self.recur_from))
        share = self.config.decoder_share * progress
        first = F.interpolate(target, decoded.shape[-2:], mode="bilinear")
        probs = torch.lerp(first, decoded, share) * present
        probs = torch.cat([1 - probs.amax(1, keepdim=True), probs], 1)
        return target, self._refine(images, probs / probs.sum(1, keepdim=True))


def _resized(inside: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 1, H, W) of 0 and 1 -> (B, 1, *size), by each cell's centre."""
    return F.interpolate(inside, size, mode="nearest-exact")


def _tag_loss(maps: Tensor, tags: Tensor) -> Tensor:
    return F.multilabel_soft_margin_loss(maps.mean((2, 3)).float(), tags)


def _decoder_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross entropy over certain pixels; classes and background have the same weight (ours)."""
    counts = distributed.mean(labelled_pixels(label))
    return weighted_cross_entropy(logits.float(), label, balanced=True, counts=counts) / 2


def map_loss(maps: Tensor, target: Tensor, tags: Tensor, inside: Tensor) -> Tensor:
    """Mean difference of the tagged classes' maps, each divided by its maximum, from the target.

    Args:
        maps: (B, C, h, w) scores, any sign.
        target: (B, C, h', w') in [0, 1].
        tags: (B, C) multi-hot.
        inside: (B, 1, h', w'), 0 where the difference does not count.
    """
    maps = maps.float().relu()
    maps = maps / (maps.amax((2, 3), keepdim=True) + 1e-5)
    maps = F.interpolate(maps, target.shape[-2:], mode="bilinear")
    difference = ((maps - target).abs() * inside).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1)
    return (difference * tags).sum() / distributed.mean(tags.sum()).clamp(min=1)


def self_correlation(levels: list[Tensor], config: RsEpmConfig) -> Tensor:
    """How cells of an image correlate, directly and through a third cell, summed over levels.

    `levels` are (B, D_l, h_l, w_l) features, all of them resized to the first one's cells. The
    result is (B, N, N), not negative, N = h w; the columns of each level sum to 1.
    """
    total = 0
    for level in levels:
        cells = F.interpolate(level, levels[0].shape[-2:], mode="bilinear")
        cells = F.normalize(cells.flatten(2), dim=1)
        first = cells.transpose(1, 2) @ cells
        first = _columns(first.where(first >= config.first_order, 0))
        count = first.shape[1]
        other = _columns(first * (1 - torch.eye(count, device=first.device)))
        second = _columns(other @ other)
        second = second.where(second >= config.second_order / count, 0)
        total = total + _columns(torch.maximum(first, second))
    return total


def _columns(matrix: Tensor) -> Tensor:
    return matrix / matrix.sum(1, keepdim=True).clamp(min=1e-5)


def _stretched(maps: Tensor) -> Tensor:
    """Each of (..., N) maps to [0, 1]."""
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-5)


def correct_maps(correlation: Tensor, maps: Tensor, inside: Tensor, config: RsEpmConfig) -> Tensor:
    """What correlates with each map's bright cells, minus what correlates with its dark ones.

    Args:
        correlation: (B, N, N) of `self_correlation`.
        maps: (B, C, h, w) not negative, N = h w.
        inside: (B, 1, h, w), 0 in padding, which is neither.

    Returns:
        (B, C, h, w) in [0, 1].
    """
    flat, inside = _stretched((maps * inside).flatten(2)), inside.flatten(2)

    def like(cells: Tensor) -> Tensor:
        return _stretched(cells * inside @ correlation.transpose(1, 2) * inside)

    difference = like(flat >= config.bright) - like(flat <= config.dark)
    return _stretched(difference.relu() * inside).view_as(maps)


def certain_label(probs: Tensor, foreground: float, background: float) -> Tensor:
    """(B, 1 + C, h, w) probabilities, background first -> (B, h, w) int64 labels of certain pixels.

    The best class from `foreground` on, background below `background`, else 255.
    """
    best, label = probs[:, 1:].max(1)
    label = (label + 1).where(best >= foreground, IGNORE)
    return label.where(best >= background, BACKGROUND)


def edge_strength(probs: Tensor) -> Tensor:
    """(B, C, h, w) probabilities -> (B, h, w) in [0, 1]: largest change to one of four neighbours,
    e(p) = 1/2 max_q sum_c |P(c, p) - P(c, q)|."""
    edge = probs.new_zeros(probs.shape[0], *probs.shape[-2:])
    # Each axis with the paddings (left, right, top, bottom) to its two neighbours.
    for axis, *pads in ((2, (0, 0, 1, 0), (0, 0, 0, 1)), (3, (1, 0), (0, 1))):
        change = probs.diff(dim=axis).abs().sum(1) / 2
        for pad in pads:
            edge = edge.maximum(F.pad(change, pad))
    return edge


def mixed(images: Tensor, label: Tensor, tags: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pastes a random half of each image's certain objects into the next image of the batch.

    Takes and gives (B, 3, H, W) images, (B, h, w) int64 labels, 255 where nothing is certain, and
    (B, C) multi-hot tags; a class whose certain pixels are all covered has no tag any more.
    """
    images, label, tags = images.clone(), label.clone(), tags.clone()
    for k, (upper, named) in enumerate(zip(images.roll(1, 0), label.roll(1, 0), strict=True)):
        classes = named[(named != BACKGROUND) & (named != IGNORE)].unique()
        chosen = classes[torch.randperm(len(classes))[: (len(classes) + 1) // 2]]
        pasted = torch.isin(named, chosen)
        covered = set(label[k][pasted].tolist()) - set(label[k][~pasted].tolist())
        for c in covered - {BACKGROUND, IGNORE}:
            tags[k, c - 1] = 0
        tags[k, chosen - 1] = 1
        label[k] = named.where(pasted, label[k])
        view = F.interpolate(pasted[None, None].float(), images.shape[-2:], mode="nearest")[0]
        images[k] = torch.lerp(images[k], upper, view)
    return images, label, tags
