"""Unsupervised semantic features F of images, computed by a frozen or trained network."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from core.data.features import FeatureSource
from core.data.lists import Split
from core.data.loader import batches_by_size
from core.models.backbones import BackboneConfig
from core.models.feature_networks import feature_network
from core.run.settings import PositiveFloat, PositiveInt, check, location
from core.uss.leopart import LeopartConfig
from core.uss.self_supervision import SelfSupervisedConfig
from core.uss.stego import StegoConfig, StegoHead


@dataclass
class UssConfig(StegoConfig):
    """Stage 1, unsupervised semantic features: STEGO on a frozen self-supervised network."""

    # A vision transformer, or any network whose stages give feature maps.
    backbone: BackboneConfig = field(
        default_factory=lambda: BackboneConfig(name="vit_base_patch8_224.dino")
    )
    # Stage that gives the features, 1 to 4. A ResNet is dilated to stride 8 (stage 1: 4); stages of
    # other networks have their own strides 4, 8, 16 and 32. Several, such as [3, 4], are joined on
    # the grid of the first one named. A ViT gives its last tokens.
    backbone_stage: Literal[1, 2, 3, 4] | tuple[Literal[1, 2, 3, 4], ...] = 4
    # Use <id>.npy feature files, (D, h, w), from this folder instead of stage 1.
    features_dir: str | None = location()
    # Training of the backbone itself, for images that no existing weights suit.
    self_supervised: SelfSupervisedConfig = field(default_factory=SelfSupervisedConfig)
    # stego: a trained code head; frozen: the network's features as they are; leopart: the features
    # of a DINO ViT trained further on object parts.
    method: Literal["stego", "frozen", "leopart"] = "stego"
    leopart: LeopartConfig = field(default_factory=LeopartConfig)  # Leopart's training.
    # ViT only: the last block's tokens after the norm, or the keys of its attention.
    tokens: Literal["last", "keys"] = "last"
    # Factors by which images are resized for extraction (then up to a multiple of the patch). The
    # features at further scales are averaged with those at the first, on its grid.
    scales: tuple[PositiveFloat, ...] = (1.0,)
    flip: bool = True  # Average features with the mirrored image's.
    # Subtract the data set's mean feature, for features whose cosines are all high.
    centre: bool = False
    # Whiten: keep this many principal components of the centred features over the data set, scaled
    # to unit variance. Recommended for CNNs, whose features share a few dominant directions.
    whiten: PositiveInt | None = None
    # Keep the training images' features on disk (float16) instead of computing them twice in stage
    # 3. VOC with DINO ViT-B/8 and STEGO: 0.4 MB per image, 4 GB.
    cache: bool = location(False)

    def __post_init__(self):
        super().__post_init__()
        check(len(self.scales) > 0, "uss.scales needs at least one number")
        check(self.backbone_stage != (), "uss.backbone_stage needs at least one stage")
        remedy = "set uss.method to stego, or uss.backbone.weights"
        fits = self.weights is None or self.method == "stego"
        check(fits, f"uss.weights is a STEGO checkpoint; {remedy}")

    def unused(self) -> list[str]:
        """Keys of the methods that are not chosen."""
        keys = [] if self.method == "leopart" else ["leopart"]
        keys += [] if self.self_supervised.iterations else ["self_supervised"]
        if self.method != "stego":
            keys += [item.name for item in fields(StegoConfig)]
        if self.weights:  # STEGO's training and the start of its backbone
            used = ("code_dim", "weights")
            keys += [item.name for item in fields(StegoConfig) if item.name not in used]
            keys.append("backbone.weights")
        return keys


class SemanticFeatures(nn.Module):
    """A frozen network, STEGO's head if trained, and the data set's mean and whitening."""

    RELEASED: ClassVar = [  # STEGO's, by Lightning
        ("net.model.head.", None),
        ("net.model.", "backbone.net."),
        ("net.cluster1.", "head.cluster1."),
        ("net.cluster2.", "head.cluster2."),
        *((f"{part}.", None) for part in ("linear_probe", "cluster_probe", "decoder")),
        ("train_cluster_probe.", None),
    ]

    def __init__(self, config: UssConfig):
        super().__init__()
        self.config = config
        self.backbone = feature_network(config.backbone, config.backbone_stage, config.tokens)
        self.head = None
        if config.method == "stego":
            self.head = StegoHead(self.backbone.dim, config.code_dim, config.dropout)
        width = config.code_dim if self.head else self.backbone.dim
        whiten = config.whiten
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("projection", torch.zeros(whiten, width) if whiten else None)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images of any size -> (B, D, h, w) features; see `raw`."""
        return standardised(self.raw(images), self.mean, self.projection)

    def raw(self, images: Tensor) -> Tensor:
        """The features before the data set's mean and whitening.

        The image is resized by each of `scales`, then up to the next multiple of the patch; (h, w)
        is the grid of the first.
        """
        first, *further = (self._at(images, scale) for scale in self.config.scales)
        maps = [first, *(F.interpolate(m, first.shape[-2:], mode="bilinear") for m in further)]
        return sum(maps) / len(maps)

    def _at(self, images: Tensor, scale: float) -> Tensor:
        patch = self.backbone.patch
        size = [-(-max(1, round(n * scale)) // patch) * patch for n in images.shape[-2:]]
        if size != list(images.shape[-2:]):
            images = F.interpolate(images, size, mode="bicubic")
        feat = self._encode(images)
        return (feat + self._encode(images.flip(-1)).flip(-1)) / 2 if self.config.flip else feat

    def _encode(self, images: Tensor) -> Tensor:
        feat = self.backbone(images)  # sides are multiples of the patch
        return (self.head(feat) if self.head else feat).float()


def network_features(
    network: Callable[[Tensor], Tensor], split: Split, device: torch.device, amp: torch.autocast
) -> FeatureSource:
    """Features computed on the fly, in batches of consecutive images of one size."""

    @torch.inference_mode()
    def source(indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        wanted = set(indices)
        for batch, images in batches_by_size(split, wanted, device):
            with amp:
                feats = network(images).float().cpu()
            yield from ((k, f) for k, f in zip(batch, feats, strict=True) if k in wanted)

    return source


def statistics(
    source: FeatureSource, count: int, whiten: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """The mean feature and the whitening of a data set, in which each image counts alike.

    Args:
        source: features of `count` images.
        whiten: number W of principal components; None: the mean alone.

    Returns:
        (D,) mean; (W, D) projection, rows of unit variance, largest component first; or None.

    Raises:
        UserError: the features have fewer than W channels.
    """
    total, products = 0, 0
    for _, feat in tqdm(source(range(count)), "feature statistics", count, unit="image"):
        points = feat.double().flatten(1)
        total = total + points.mean(1)
        if whiten:
            found = f"{whiten} components of features with {len(feat)} channels"
            check(whiten <= len(feat), f"uss.whiten: {found}; lower it")
            products = products + points @ points.T / points.shape[1]
    mean = total / count
    if not whiten:
        return mean.float(), None
    variances, axes = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    variances = variances.clamp(min=1e-6 * variances[-1])  # fewer cells than channels
    projection = (axes / variances.sqrt()).T.flip(0)[:whiten]
    return mean.float(), projection.float().contiguous()


def standardised(feat: Tensor, mean: Tensor, projection: Tensor | None) -> Tensor:
    """(..., D, h, w) features without the (D,) mean -> (..., W, h, w) by a (W, D) projection."""
    feat = feat - mean[:, None, None]
    if projection is None:
        return feat
    return torch.einsum("kd,...dhw->...khw", projection, feat)


def standardised_source(source: FeatureSource, count: int, whiten: int | None) -> FeatureSource:
    """The same features after `statistics` and `standardised`."""
    mean, projection = statistics(source, count, whiten)

    def transformed(indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        yield from ((index, standardised(f, mean, projection)) for index, f in source(indices))

    return transformed
