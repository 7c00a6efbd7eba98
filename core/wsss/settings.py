"""Stage 2's methods, and its settings, composed of the methods' own."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple

import numpy as np
from torch import nn

from core.crf.dense import CrfConfig
from core.data.settings import AugmentConfig
from core.models.backbones import BackboneConfig
from core.run.settings import (
    ClosedUnitInterval,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    check,
    location,
)
from core.wsss.advcam import AdvCamConfig
from core.wsss.affinity import PairConfig
from core.wsss.cam import CamClassifier, normalise_cams
from core.wsss.irn import BoundaryNetwork, IrnConfig
from core.wsss.psa import AffinityNetwork, PsaConfig
from core.wsss.rsepm import RecurSeed, RsEpmClassifier, RsEpmConfig
from core.wsss.seam import SeamClassifier, SeamConfig, normalise_refined

PAIR_NETWORKS = {"irn": BoundaryNetwork, "psa": AffinityNetwork}
"""Networks whose pairs a random walk follows, by their section of `WsssConfig`."""


class Method(NamedTuple):
    """All that distinguishes methods in train_wsss.py and core/wsss/outputs.py."""

    # (settings, backbone, number of classes) -> a network with `activation`, `parameter_groups`
    # and, without a teacher, `loss`; `RELEASED` names its tensors in released weights.
    network: Callable[["WsssConfig", BackboneConfig, int], nn.Module]
    walk: str | None = None  # key of `PAIR_NETWORKS`; None: labels straight from the maps
    # Losses of whole batches, made from the section of the method's own name (which has the decay
    # `ema`), student, EMA teacher and steps in an epoch. The maps are then the teacher's.
    teacher: Callable[..., Callable[..., dict]] | None = None
    climbs: bool = False  # maps by adversarial climbing instead of `activation`
    full_size: bool = False  # maps at the image's size, resized to it by the nearest cell
    normalise: Callable[[np.ndarray], np.ndarray] = normalise_cams  # (K, h, w) maps to [0, 1]
    unused: tuple[str, ...] = ()  # keys without effect, besides other methods' sections


def _cam(config: "WsssConfig", backbone: BackboneConfig, num_classes: int) -> CamClassifier:
    frozen_norm = config.norm == "frozen"
    options = (config.output_stride, config.pooling, frozen_norm, config.frozen_stages)
    return CamClassifier(backbone, num_classes, *options)


def _seam(config: "WsssConfig", backbone: BackboneConfig, num_classes: int) -> SeamClassifier:
    return SeamClassifier(backbone, num_classes, config.seam)


def _rsepm(config: "WsssConfig", backbone: BackboneConfig, num_classes: int) -> RsEpmClassifier:
    return RsEpmClassifier(backbone, num_classes, config.output_stride, config.rsepm)


OF_CAM = ("pooling", "norm", "frozen_stages")  # of `CamClassifier` alone
METHODS = {
    "cam": Method(_cam),
    "irn": Method(_cam, "irn"),
    "advcam": Method(_cam, "irn", climbs=True, unused=("scales", "flip")),
    "seam": Method(_seam, "psa", normalise=normalise_refined, unused=(*OF_CAM, "output_stride")),
    "rsepm": Method(_rsepm, "irn", teacher=RecurSeed, full_size=True, unused=OF_CAM),
}


@dataclass
class WsssConfig:
    """Stage 2, a WSSS method on image-level tags."""

    # cam: activation maps, refined by `refine`; irn: propagated by IRNet's random walk instead;
    # advcam: AdvCAM's maps, propagated in the same way; seam: SEAM's maps, propagated by PSA's
    # walk; rsepm: a decoder's maps by our reconstruction of RS+EPM, propagated by IRNet's walk.
    method: Literal[tuple(METHODS)] = "cam"
    # A network with maps at strides 4 to 32 (irn, advcam and rsepm also need stride 2).
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    irn: IrnConfig = field(default_factory=IrnConfig)  # IRNet's boundary network and walk.
    psa: PsaConfig = field(default_factory=PsaConfig)  # PSA's affinity network and walk (SEAM).
    advcam: AdvCamConfig = field(default_factory=AdvCamConfig)  # AdvCAM's maps.
    seam: SeamConfig = field(default_factory=SeamConfig)  # SEAM's training.
    rsepm: RsEpmConfig = field(default_factory=RsEpmConfig)  # RS+EPM's training.
    # A released checkpoint of the method (IRNet's, AdvCAM's, SEAM's or RS+EPM's classifier), used
    # instead of training one.
    weights: str | None = None
    labels_dir: str | None = location()  # Use <id>.png pseudo labels from here instead of stage 2.
    # Pixels per cell of the activation map. For networks that timm cannot dilate (Swin, PVT, HRNet,
    # DenseNet), the last maps are enlarged and stay as coarse as they were.
    output_stride: Literal[8, 16] = 16
    # Backbone normalisation, train: by batch statistics; frozen: by the weight file's.
    norm: Literal["train", "frozen"] = "train"
    # Backbone stages that are not trained, besides the stem (IRNet: 2; AdvCAM: 0, the stem alone).
    # None: everything is trained.
    frozen_stages: Literal[0, 1, 2, 3, 4] | None = None
    # How a map becomes a class score: by its mean, as in IRNet, or its log-mean-exp, which learns
    # small objects faster.
    pooling: Literal["mean", "logmeanexp"] = "mean"
    epochs: PositiveInt = 5  # Passes over the training images.
    # Draw images of rare classes more often. 0: every image once per epoch; 0.5: a class of n
    # images in proportion to sqrt(n); 1: all classes about equally often. For skewed collections.
    class_balance: ClosedUnitInterval = 0
    batch_size: PositiveInt = 16  # Images per step.
    # adamw has a one-cycle schedule; sgd a polynomial one without momentum, which is what the
    # released code of IRNet, SEAM and AdvCAM amounts to.
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-4  # Learning rate of the backbone, at its peak.
    head_lr: float = 1e-3  # Learning rate of the new layers, at its peak.
    weight_decay: float = 0.02  # Weight decay.
    augment: AugmentConfig = field(default_factory=AugmentConfig)  # Views for training.
    # Scales of the image whose activation maps are averaged.
    scales: tuple[PositiveFloat, ...] = (1.0, 0.5, 1.5, 2.0)
    flip: bool = True  # Add the mirrored image at each scale.
    threshold: OpenUnitInterval = 0.30  # Background score against the class maps in [0, 1].
    # Instead of `threshold`, choose the score that this share of all pixels exceeds: an assumption
    # about the images, made without masks. The scale of maps varies between trainings.
    object_share: OpenUnitInterval | None = None
    sharpness: float = 6.0  # The CRF's unary is the softmax of this factor times the scores.
    refine: Literal["crf", "none"] = "crf"  # Refinement of the maps before the argmax.
    crf: CrfConfig = field(default_factory=CrfConfig)  # Settings of that refinement.

    def __post_init__(self):
        check(len(self.scales) > 0, "wsss.scales needs at least one number")
        if self.method == "rsepm" and not self.weights:
            check(
                self.epochs > self.rsepm.mix_from,
                f"rsepm needs more than {self.rsepm.mix_from} epochs, when its last phase begins, "
                f"got {self.epochs}; raise wsss.epochs or lower wsss.rsepm.mix_from",
            )
            check(self.batch_size > 1, "rsepm needs a wsss.batch_size above 1: it mixes images")

    @property
    def pairs(self) -> PairConfig | None:
        """Settings of the random walk; None: the method has none."""
        walk = METHODS[self.method].walk
        return getattr(self, walk) if walk else None

    def unused(self) -> list[str]:
        """Keys of the methods that are not chosen, and of training where weights are given."""
        method, sections = METHODS[self.method], {*METHODS, *PAIR_NETWORKS}
        sections &= {item.name for item in fields(self)}
        keys = [*(sections - {self.method, method.walk}), *method.unused]
        if self.pairs:
            keys += ["threshold", "object_share", "sharpness", "refine", "crf"]
        if self.object_share is not None:
            keys += ["threshold"]
        if self.refine == "none":
            keys += ["sharpness", "crf"]
        if self.weights:
            keys += ["epochs", "class_balance", "batch_size", "optimizer", "lr", "head_lr"]
            keys += ["weight_decay", "augment", "pooling", "norm", "frozen_stages"]
            if not self.pairs or self.pairs.weights:
                keys += ["backbone.weights"]
        return keys
