"""The settings of one experiment: typed, documented, read from one YAML file and the command line.

All five scripts read the same file. Every key below can be overridden as `--section.key value`;
a key that does not exist is refused, naming the nearest one. Sources: "Sec." and "Eq." are the MARS
paper's (ICCV 2023); "default" marks a choice of ours where the paper is silent. A new key's default
does what the code did without it: results of older code count as made with it (core/run/stage.py).
"""

import dataclasses
import difflib
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import jsonargparse
import yaml

from core.data.finder import is_utf8, user_path
from core.data.names import class_name, warn_of_names
from core.data.tags import folder_tags
from core.run.errors import UserError, raise_all, report_in
from core.run.text import read_text

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


@dataclass
class BackboneConfig:
    """A network of timm's, by name, and where its weights come from."""

    name: str = "resnet50.tv_in1k"
    """timm's architecture name, such as resnet101, efficientnet_b0, convnext_tiny or, for stage 1,
    vit_base_patch8_224; or wide_resnet38."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further constructor arguments of that architecture, for sizes of one's own."""
    weights: str = "timm"
    """A local .pth or .safetensors file; `timm`: timm fetches its own; `none`: random ones."""
    dilation: Literal["torchvision", "delayed", "none"] = "torchvision"
    """Dilation of ResNet layers that keep their size; other networks have timm's. torchvision: a
    layer's first block has the dilation of the layer before; delayed: it has none (the author's
    code); none: no block has (IRNet)."""

    def without_weights(self) -> "BackboneConfig":
        """The same network for a checkpoint that holds all of it."""
        return dataclasses.replace(self, weights="none")


@dataclass
class DataConfig:
    """Images, image-level tags and, for scoring only, masks."""

    format: Literal["voc", "folder"] = "voc"
    """voc: PASCAL VOC's layout; folder: image files of any name anywhere below `root`."""
    root: str = "data/VOCdevkit/VOC2012"
    """voc: folder with JPEGImages, Annotations, ImageSets/Segmentation and SegmentationClass."""
    tags: str | None = None
    """CSV below `root` with the columns image,tags. None: voc reads Annotations, folder takes the
    sub-folder of `root` that an image lies in."""
    masks: str | None = None
    """Folder of masks <id>.png below `root`. None: voc has SegmentationClass, folder has none."""
    train_list: str | None = None
    """List of training ids, without .txt: in ImageSets/Segmentation (voc; None: train) or in `root`
    (folder; None: all tagged images)."""
    val_list: str | None = None
    """List that is scored (voc; None: val. folder; None: all images with a mask)."""
    classes: tuple[str, ...] = ()
    """Foreground class names; label c is the c-th of them, 0 is background. Empty: VOC's 20, or
    all names in the tags, sorted."""
    biased_classes: tuple[str, ...] = ()
    """Classes known to come with a context; only scoring uses this, to show them apart."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What to do with images that are missing or cannot be decoded. skip: every stage decodes all
    images first and leaves these out; manifests and scores name them."""

    def __post_init__(self):
        for key in ("classes", "biased_classes"):
            names = tuple(class_name(name, f"data.{key}") for name in getattr(self, key))
            _check(all(names), f"data.{key} has an empty name")
            setattr(self, key, names)
        _check(len(self.classes) <= 253, "data.classes has over 253 names; labels are 8-bit")
        _check(len({*self.classes}) == len(self.classes), "data.classes names a class twice")

    def with_classes(self) -> "DataConfig":
        """The same with the class names filled in; warns of doubtful ones.

        Raises:
            UserError: there are no tags to take them from, or a biased class is none of them.
        """
        names, counts = self.classes or VOC_CLASSES, None
        if self.format == "folder" and not self.classes:
            problems: list[str] = []  # told later, where there is something to go on with
            table = folder_tags(Path(self.root), self.tags, self.masks, problems=problems)
            counts = Counter(name for tags in table.values() for name in tags)
            names = tuple(sorted(counts))
            raise_all([] if names else problems, "mend the tags")
            _check(len(names) > 0, f"no image of {self.root} has a tag; see data.tags")
        warn_of_names(names, counts)
        unknown = sorted(set(self.biased_classes) - set(names))
        _check(not unknown, f"data.biased_classes names {unknown}, which data.classes lacks")
        return dataclasses.replace(self, classes=names)


@dataclass
class CrfConfig:
    """Dense CRF; kernel widths in pixels and grey levels of the image it runs on."""

    backend: Literal["auto", "numba", "pydensecrf"] = "auto"
    """auto: numba where present, else pydensecrf."""
    iterations: int = 10
    """Mean-field iterations (the author's usual setting, here and below)."""
    sxy_gaussian: float = 1
    """Width of the spatial kernel, pixels."""
    weight_gaussian: float = 3
    """Weight of the spatial kernel."""
    sxy_bilateral: float = 67
    """Spatial width of the bilateral kernel, pixels."""
    srgb_bilateral: float = 3
    """Colour width of the bilateral kernel, grey levels."""
    weight_bilateral: float = 4
    """Weight of the bilateral kernel."""
    relaxation: float = 1
    """Step of mean field, between 0 and 2; 1.8 needs 6 iterations instead of 10. numba only."""
    vertices: int = 6
    """Lattice points per pixel, 1 to 6; 3 or 4 are faster and close. numba only."""

    def __post_init__(self):
        _check(self.iterations >= 0, f"crf.iterations must be at least 0, got {self.iterations}")
        for key in ("sxy_gaussian", "sxy_bilateral", "srgb_bilateral"):
            _check(getattr(self, key) > 0, f"crf.{key} must be positive, got {getattr(self, key)}")
        for key in ("weight_gaussian", "weight_bilateral"):
            _check(getattr(self, key) >= 0, f"crf.{key} must not be negative")
        _check(0 < self.relaxation < 2, f"crf.relaxation must be in (0, 2), got {self.relaxation}")
        _check(1 <= self.vertices <= 6, f"crf.vertices must be 1 to 6, got {self.vertices}")

    def settings(self) -> dict[str, Any]:
        """The keyword arguments of `core.crf.dense.DenseCRF`."""
        return dataclasses.asdict(self)


@dataclass
class AugmentConfig:
    """Random views of a training image and its label map."""

    scale: tuple[float, float] = (0.5, 1.5)
    """Range of the random resize factor."""
    crop: int = 512
    """Side of the square crop, pixels; smaller images are padded."""
    flip: bool = True
    """Mirror every second view."""
    jitter: tuple[float, float, float, float] = (0.3, 0.3, 0.3, 0.1)
    """Strength of brightness, contrast, saturation and hue jitter."""

    def __post_init__(self):
        low, high = self.scale
        _check(0 < low <= high, f"augment.scale needs 0 < low <= high, got {low} and {high}")
        _check(self.crop >= 1, f"augment.crop must be at least 1 pixel, got {self.crop}")
        _check(
            min(self.jitter) >= 0 and self.jitter[3] <= 0.5,
            "augment.jitter must not be negative, and its hue at most 0.5",
        )


@dataclass
class SelfSupervisedConfig:
    """Self-supervised training of the backbone from scratch, for images far from ImageNet; on the
    centre square of each, whose side is 4/3 of `teacher_size`."""

    iterations: int = 0
    """Steps; 0 leaves the backbone as its weight file has it."""
    batch_size: int = 32
    """Images per step, each in two views."""
    lr: float = 1e-3
    """Peak learning rate of AdamW (cosine, after a warm-up of a tenth)."""
    weight_decay: float = 0.05
    """AdamW weight decay."""
    prototypes: int = 128
    """Clusters that cells are assigned to."""
    hidden: float = 0.5
    """Largest share of the student's view that is hidden."""
    teacher_size: int = 96
    """Side of the teacher's view, pixels."""
    student_size: int = 80
    """Side of the student's view, pixels, a crop of the teacher's."""
    ema: float = 0.99
    """Decay of the teacher."""


@dataclass
class LeopartConfig:
    """Leopart's training of a self-supervised transformer on parts (its code, ViT-S/16 on VOC)."""

    epochs: int = 500
    """Passes over the training images (COCO: 50)."""
    batch_size: int = 64
    """Images per step."""
    lr: float = 1e-5
    """Learning rate of the backbone, cosine to 0."""
    head_lr: float = 1e-4
    """Learning rate of the projection and the prototypes."""
    weight_decay: tuple[float, float] = (0.04, 0.5)
    """Weight decay of AdamW, from the first value to the second along a cosine."""
    ema: float = 0.9995
    """Decay of the teacher, rising to 1 along a cosine."""
    prototypes: int = 300
    """Parts that cells are assigned to."""
    hidden: int = 2048
    """Width of the projection's hidden layers."""
    width: int = 256
    """Width of the embeddings."""
    queue: int = 8192
    """Embeddings of earlier foreground that take part in the assignment, for each large crop."""
    mass: float = 0.6
    """Share of the class token's attention that is foreground."""
    large: int = 224
    """Side of the two large crops, pixels."""
    small: int = 96
    """Side of the small crops, pixels."""
    smalls: int = 4
    """Small crops of each image."""
    large_area: tuple[float, float] = (0.25, 1.0)
    """Range of a large crop's share of the image."""
    small_area: tuple[float, float] = (0.05, 0.25)
    """Range of a small crop's share of the image."""
    drop_path: float = 0.1
    """Stochastic depth of the student."""

    def __post_init__(self):
        _check(self.epochs >= 1, f"uss.leopart.epochs must be at least 1, got {self.epochs}")
        _check(self.batch_size >= 1, "uss.leopart.batch_size must be at least 1")
        _check(0 <= self.drop_path < 1, "uss.leopart.drop_path must lie in [0, 1)")
        _check(0 < self.ema < 1, f"uss.leopart.ema must lie in (0, 1), got {self.ema}")
        _check(0 < self.mass <= 1, f"uss.leopart.mass must lie in (0, 1], got {self.mass}")
        _check(self.queue >= 1, "uss.leopart.queue must be at least 1")


STEGO_PRESETS = {
    "cocostuff27_vitb8": (0.1538, 1.0, 0.10, 1.0, 0.20, 0.12),
    "cocostuff27_vits8": (0.63, 0.25, 0.67, 0.66, 0.02, 0.08),
    "cityscapes_vitb8": (0.906, 0.577, 1.0, 0.314, 0.175, 0.458),
    "potsdam_vits8": (0.63, 0.25, 0.67, 0.46, 0.02, 0.08),
    "code_default": (0.63, 0.25, 0.67, 0.46, 0.12, 0.18),
}
"""Published weights of negative, neighbour and own pairs, then their shifts b in the same order."""
STEGO_VALUES = [
    f"{v}_{pairs}" for v in ("weight", "shift") for pairs in ("negative", "inter", "intra")
]


@dataclass
class UssConfig:
    """Stage 1, unsupervised semantic features: STEGO on a frozen self-supervised network."""

    backbone: BackboneConfig = field(
        default_factory=lambda: BackboneConfig(name="vit_base_patch8_224.dino")
    )
    """A vision transformer, or any network whose stages give feature maps."""
    backbone_stage: int = 4
    """Stage that gives the features, 1 to 4. A ResNet's has stride 8 (stage 1: 4), for which it is
    dilated; other networks' have their own strides 4, 8, 16 and 32. A ViT gives its last tokens."""
    features_dir: str | None = None
    """Use <id>.npy feature files, (D, h, w), from this folder instead of stage 1."""
    self_supervised: SelfSupervisedConfig = field(default_factory=SelfSupervisedConfig)
    """Training of the network itself, where no weights fit the images."""
    method: Literal["stego", "frozen", "leopart"] = "stego"
    """stego: a trained code head; frozen: the network's features as they are; leopart: those of a
    DINO ViT trained further on parts of objects."""
    leopart: LeopartConfig = field(default_factory=LeopartConfig)
    """Settings of Leopart's training."""
    code_dim: int = 70
    """Width of STEGO's code."""
    iterations: int = 5000
    """STEGO's true iterations."""
    batch_size: int = 16
    """Images per STEGO step."""
    resolution: int = 224
    """Side of the square images that STEGO trains on, pixels."""
    lr: float = 5e-4
    """Adam's learning rate for the head."""
    samples: int = 11
    """Random points per image side: samples^2 points per image."""
    neighbours: int = 7
    """A positive pair is an image and one of its nearest neighbours."""
    dropout: float = 0.1
    """Channel dropout on the frozen features."""
    preset: Literal[
        "cocostuff27_vitb8",
        "cocostuff27_vits8",
        "cityscapes_vitb8",
        "potsdam_vits8",
        "code_default",
    ] = "cocostuff27_vitb8"
    """STEGO's published settings of the next six, for data sets of its paper; VOC has none."""
    weight_intra: float | None = None
    """Weight of pairs of an image with itself. None, here and in the next five: the preset's."""
    weight_inter: float | None = None
    """Weight of nearest-neighbour pairs."""
    weight_negative: float | None = None
    """Weight of random pairs."""
    shift_intra: float | None = None
    """Shift b of pairs of an image with itself: a higher one pushes codes apart."""
    shift_inter: float | None = None
    """Shift b of nearest-neighbour pairs."""
    shift_negative: float | None = None
    """Shift b of random pairs."""
    five_crops: bool = False
    """Train on the corners and the centre of each image, half its sides long, as STEGO does on
    COCO-Stuff and Cityscapes, instead of on its centre square."""
    probe_clusters: int = 27
    """Clusters that follow the codes as a monitor, without any influence on them; 0: none."""
    weights: str | None = None
    """A released STEGO checkpoint, backbone and head, used instead of training the head."""
    tokens: Literal["last", "keys"] = "last"
    """Of a ViT: the last block's tokens after the norm, or the keys of its attention."""
    scales: tuple[float, ...] = (1.0,)
    """Factors by which images are resized, then up to a multiple of the patch, for extraction; the
    features of further scales are averaged with the first one's, on its grid."""
    flip: bool = True
    """Average features with those of the mirrored image."""
    centre: bool = False
    """Subtract the data set's mean feature: for features whose cosines are all high."""
    cache: bool = False
    """Keep the training images' features on disk (float16) instead of computing them twice in stage
    3. VOC with DINO ViT-B/8 and STEGO: 0.4 MB an image, 4 GB."""

    def __post_init__(self):
        _check(min(self.scales, default=0) > 0, "uss.scales needs positive numbers")
        _check(self.batch_size >= 1, f"uss.batch_size must be at least 1, got {self.batch_size}")
        _check(self.iterations >= 1, f"uss.iterations must be at least 1, got {self.iterations}")
        _check(
            1 <= self.backbone_stage <= 4,
            f"uss.backbone_stage must lie in 1..4, got {self.backbone_stage}",
        )
        _check(self.samples > 0, f"uss.samples must be positive, got {self.samples}")
        _check(self.probe_clusters >= 0, "uss.probe_clusters must not be negative")
        _check(
            self.weights is None or self.method == "stego",
            "uss.weights is a STEGO checkpoint; set uss.method to stego, or uss.backbone.weights",
        )
        for name, value in zip(STEGO_VALUES, STEGO_PRESETS[self.preset], strict=True):
            if getattr(self, name) is None:
                setattr(self, name, value)


@dataclass
class AdvCamConfig:
    """AdvCAM's climb (all defaults: its code for VOC)."""

    steps: int = 27
    """T; half as many at scales below 1."""
    step: float = 0.08
    """Largest change of a normalised pixel in one step."""
    penalty: float = 7.0
    """Weight of changes to what is bright already."""
    bright: float = 0.5
    """Bright is what exceeds this share of the map's maximum."""
    scales: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    """Scales whose maps are summed; always with the mirrored image."""

    def __post_init__(self):
        _check(self.steps >= 1, f"wsss.advcam.steps must be at least 1, got {self.steps}")
        _check(min(self.scales, default=0) > 0, "wsss.advcam.scales needs positive numbers")


@dataclass
class SeamConfig:
    """SEAM's two views (its code's default)."""

    second_scale: float = 0.3
    """Size of the view whose maps must agree with the image's, as a factor."""

    def __post_init__(self):
        _check(
            0 < self.second_scale < 1,
            f"wsss.seam.second_scale must lie in (0, 1), got {self.second_scale}",
        )


@dataclass
class RsEpmConfig:
    """RS+EPM, our reconstruction. Values are the released code's where it has them; its average of
    weights rises more slowly."""

    width: int = 256
    """Width of the ASPP and of the decoder."""
    low_width: int = 256
    """Width of the projected low-level features."""
    rates: tuple[int, ...] = (6, 12, 18)
    """Dilations of the ASPP."""
    recur_from: float = 5
    """Epoch at which the teacher's maps and labels begin to count (RecurSeed)."""
    mix_from: float = 15
    """Epoch at which certain objects begin to be pasted (EdgePredictMix)."""
    foreground: float = 0.55
    """Probability from which a class is certain."""
    background: float = 0.10
    """Background is certain where every class has less than this."""
    decoder_share: float = 0.5
    """Weight of the decoder in the teacher's probabilities when mixing begins, beside its maps
    (default)."""
    dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24)
    """Of the PAMR that refines the teacher's probabilities, at a quarter of the images' size."""
    edge: float = 0.3
    """Pixels whose probabilities change by more than this to a neighbour have no label in mixed
    images (default)."""
    cam_weight: float = 1.0
    """Weight of the maps' distance from the teacher's corrected ones."""
    decoder_weight: float = 1.0
    """Weight of the decoder's cross entropy."""
    first_order: float = 0.5
    """Cosines of cells below this count as 0 (SCG; also the next three)."""
    second_order: float = 0.1
    """The same for correlations through a third cell, times the number of cells."""
    bright: float = 0.3
    """A cell belongs to the object from this value of the stretched map on."""
    dark: float = 0.05
    """A cell belongs to the background up to this value."""
    ema: float = 0.9999
    """Decay of the teacher."""

    def __post_init__(self):
        _check(
            0 <= self.recur_from <= self.mix_from,
            "wsss.rsepm.recur_from must not be negative, nor greater than wsss.rsepm.mix_from",
        )
        _check(
            0 < self.background <= self.foreground < 1,
            "wsss.rsepm.background and wsss.rsepm.foreground must lie in (0, 1), in this order",
        )
        _check(len(self.rates) > 0, "wsss.rsepm.rates needs at least one dilation")
        _check(min(self.dilations, default=0) >= 1, "wsss.rsepm.dilations must be at least 1")
        _check(0 < self.ema < 1, f"wsss.rsepm.ema must lie in (0, 1), got {self.ema}")


@dataclass
class PairConfig:
    """Training of a network of pairs, and the random walk along them."""

    epochs: int = 3
    """Passes over the training images."""
    batch_size: int = 32
    """Images per step."""
    lr: float = 0.1
    """Learning rate of SGD without momentum, polynomial schedule."""
    weight_decay: float = 1e-4
    """Weight decay."""
    radius: int = 10
    """Pairs nearer than this are learnt from, in cells."""
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(jitter=(0, 0, 0, 0)))
    """Views for training."""
    beta: float = 10
    """Exponent of the affinities in the walk."""
    doublings: int = 8
    """log2 of the walk's number of steps."""
    weights: str | None = None
    """A released checkpoint of this network (IRNet's or PSA's), used instead of training one."""

    def __post_init__(self):
        section = f"wsss.{type(self).__name__.removesuffix('Config').lower()}"
        for key, least in (("epochs", 1), ("radius", 2), ("batch_size", 1)):
            got = getattr(self, key)
            _check(got >= least, f"{section}.{key} must be at least {least}, got {got}")


@dataclass
class IrnConfig(PairConfig):
    """IRNet's second half: boundaries at stride 4 (all defaults: its code). Unlike there, the
    network sees the bare image and not a canvas of 512 x 512, and seeds come from maps at a quarter
    of the size."""

    foreground: float = 0.30
    """A class that beats this background score is confident."""
    background: float = 0.05
    """Where no class beats this score, background is confident."""
    crf: CrfConfig = field(default_factory=lambda: CrfConfig("auto", 10, 3, 3, 50, 5, 10))
    """Refinement of both decisions."""
    walk_radius: int = 5
    """Pairs nearer than this are walked between, in cells."""
    exponent: float = 1.0
    """Exponent of the activation maps before the walk (AdvCAM: 1.5)."""
    threshold: float = 0.25
    """Background score against the maps after the walk, whose maximum is 1."""

    def __post_init__(self):
        super().__post_init__()
        _check(
            0 < self.background <= self.foreground < 1,
            "wsss.irn.background and wsss.irn.foreground must lie in (0, 1), in this order",
        )
        _check(self.walk_radius >= 2, "wsss.irn.walk_radius must be at least 2")
        _check(0 < self.threshold < 1, "wsss.irn.threshold must lie in (0, 1)")


@dataclass
class PsaConfig(PairConfig):
    """PSA's affinity network as SEAM uses it: features at stride 8 (all defaults: SEAM's code).
    Unlike there, seeds are sampled at the cells' centres, where it averages scores over 8 x 8
    pixels; the walk takes every pair inside the image, where it leaves out those of the frame; and
    cells are stretched onto the image, where it pads and crops."""

    epochs: int = 8
    """Passes over the training images."""
    batch_size: int = 8
    """Images per step."""
    lr: float = 0.01
    """Learning rate of the backbone; the heads have ten times it."""
    weight_decay: float = 5e-4
    """Weight decay."""
    radius: int = 5
    """Pairs nearer than this are learnt from and walked between, in cells."""
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(scale=(1, 1), crop=448))
    """Views for training."""
    beta: float = 8
    """Exponent of the affinities in the walk."""
    doublings: int = 6
    """log2 of the walk's number of steps."""
    low_exponent: float = 4
    """A class is confident where it beats the background (1 - best)^low."""
    high_exponent: float = 24
    """Background is confident where (1 - best)^high still wins."""
    walk_exponent: float = 6
    """Background (1 - best)^walk is spread beside the classes."""
    crf: CrfConfig = field(default_factory=lambda: CrfConfig("auto", 10, 3, 3, 80, 13, 10))
    """Refinement of both decisions."""


@dataclass
class WsssConfig:
    """Stage 2, a WSSS method on image-level tags. seam and rsepm have networks of their own:
    `pooling`, `norm` and `frozen_stages` do nothing there, nor does `output_stride` with seam."""

    method: Literal["cam", "irn", "advcam", "seam", "rsepm"] = "cam"
    """cam: activation maps, refined by `refine`; irn: spread by IRNet's random walk instead;
    advcam: AdvCAM's maps, spread in the same way; seam: SEAM's maps, spread by PSA's;
    rsepm: a decoder's maps by our reconstruction of RS+EPM, spread by IRNet's walk."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """A network with maps at strides 4 to 32 (irn, advcam and rsepm spread along boundaries, for
    which the same network needs a map at stride 2, too)."""
    irn: IrnConfig = field(default_factory=IrnConfig)
    """Settings of IRNet's second half."""
    psa: PsaConfig = field(default_factory=PsaConfig)
    """Settings of the spreading that SEAM uses."""
    advcam: AdvCamConfig = field(default_factory=AdvCamConfig)
    """Settings of AdvCAM's maps."""
    seam: SeamConfig = field(default_factory=SeamConfig)
    """Settings of SEAM's training."""
    rsepm: RsEpmConfig = field(default_factory=RsEpmConfig)
    """Settings of RS+EPM's training."""
    weights: str | None = None
    """A released checkpoint of the method (IRNet's, AdvCAM's, SEAM's or RS+EPM's classifier), used
    instead of training one."""
    labels_dir: str | None = None
    """Use <id>.png pseudo labels from this folder instead of stage 2."""
    output_stride: Literal[8, 16] = 16
    """Pixels per cell of the activation map. The last stages are dilated for it; where timm cannot
    do that (Swin, PVT, HRNet, DenseNet), their maps are enlarged and stay as coarse as before."""
    norm: Literal["train", "frozen"] = "train"
    """Backbone normalisation: batch statistics, or those of the weight file."""
    frozen_stages: int | None = None
    """The backbone's stem and so many of its four stages (a ResNet's layers) are not trained
    (IRNet: 2; AdvCAM: 0, the stem alone). None: everything is trained."""
    pooling: Literal["mean", "logmeanexp"] = "mean"
    """From map to class score: the mean, as IRNet; log-mean-exp learns small objects faster."""
    epochs: int = 5
    """Passes over the training images."""
    batch_size: int = 16
    """Images per step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw has a one-cycle schedule; sgd a polynomial one and no momentum, which is what the
    released code of IRNet, SEAM and AdvCAM comes to."""
    lr: float = 1e-4
    """Learning rate of the backbone, at its peak."""
    head_lr: float = 1e-3
    """Learning rate of the new layers, at its peak."""
    weight_decay: float = 0.02
    """AdamW weight decay."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Views for training."""
    scales: tuple[float, ...] = (1.0, 0.5, 1.5, 2.0)
    """Scales whose activation maps are summed."""
    flip: bool = True
    """Add the mirrored image at each scale."""
    threshold: float = 0.30
    """Background score against the class maps in [0, 1]."""
    object_share: float | None = None
    """Choose that score so that this share of all pixels passes, instead: an assumption about the
    images, not a look at masks. Maps of two trainings differ in scale; objects do not."""
    sharpness: float = 6.0
    """The CRF's unary is the softmax of this factor times the scores."""
    refine: Literal["crf", "none"] = "crf"
    """Refinement of the maps before the argmax."""
    crf: CrfConfig = field(default_factory=CrfConfig)
    """Settings of that refinement."""

    def __post_init__(self):
        _check(0 < self.threshold < 1, f"wsss.threshold must lie in (0, 1), got {self.threshold}")
        share = self.object_share
        _check(share is None or 0 < share < 1, f"wsss.object_share must lie in (0, 1), got {share}")
        fixed = self.frozen_stages
        _check(fixed is None or 0 <= fixed <= 4, "wsss.frozen_stages must lie in 0..4, or be null")
        _check(self.epochs >= 1, f"wsss.epochs must be at least 1, got {self.epochs}")
        _check(self.batch_size >= 1, f"wsss.batch_size must be at least 1, got {self.batch_size}")
        _check(min(self.scales, default=0) > 0, "wsss.scales needs one or more positive numbers")
        if self.method == "rsepm" and not self.weights:
            last = self.rsepm.mix_from
            _check(
                self.epochs > last,
                f"rsepm needs more than {last} epochs, when its last phase begins, got "
                f"{self.epochs}; raise wsss.epochs or lower wsss.rsepm.recur_from and mix_from",
            )
            _check(
                self.batch_size > 1, "rsepm normalises over batches; wsss.batch_size must be > 1"
            )


@dataclass
class DebiasConfig:
    """Stage 3, debiased centroids and debiased labels (Eq. 1-5)."""

    preset: Literal["exact", "fast", "grid", "naive"] = "exact"
    """exact: K-means and similarity at every pixel, through the linearity of upsampling; fast: the
    same with fewer steps and lattice points of the CRF; grid: on the features' cells, for small
    images; naive: as exact, on upsampled features, slow: the reference."""
    k_fg: int = 2
    """Clusters per class region, K_fg (Sec. 4.1)."""
    k_bg: int = 2
    """Clusters per background region, K_bg (Sec. 4.1)."""
    alpha: float = 0.40
    """Share of the farthest foreground centroids that is kept (Sec. 4.1)."""
    distance: Literal["mean", "nearest"] = "mean"
    """Mean over all background centroids (Eq. 1), or over the `nearest` ones (introduction)."""
    nearest: int = 10
    """How many background centroids the second form averages over; 1 is the minimum."""
    scale: Literal["raw", "max", "minmax"] = "raw"
    """Similarity map as it is; or divided by its maximum in each image's labelled region; or
    stretched to [0, 1] there."""
    unary: Literal["gamma", "logistic"] = "gamma"
    """Its unary: p_fg = M, p_bg = (1 - M)^gamma; or p_fg = logistic(slope (M - threshold))."""
    gamma: float = 1.0
    """Exponent of the first form; 1 is a threshold of 0.5 (default)."""
    threshold: float = 0.5
    """Centre of the second form."""
    slope: float = 10.0
    """Slope of the second form."""
    refine: Literal["crf", "none"] = "crf"
    """Refinement of the similarity map (Sec. 3.3)."""
    crf: CrfConfig = field(default_factory=CrfConfig)
    """Settings of that refinement."""
    output_dir: str | None = None
    """Where to write centroids and labels; None: <run_dir>/debias."""

    def __post_init__(self):
        _check(self.k_fg >= 1 and self.k_bg >= 1, "debias.k_fg and debias.k_bg must be at least 1")
        _check(self.nearest >= 1, f"debias.nearest must be at least 1, got {self.nearest}")
        _check(
            0 < self.alpha <= 1, f"debias.alpha must lie in (0, 1], got {self.alpha}; paper: 0.40"
        )
        _check(0 < self.threshold < 1, f"debias.threshold must lie in (0, 1), got {self.threshold}")


@dataclass
class SegmentationConfig:
    """Stage 4, a DeepLab with an EMA teacher (Eq. 6-7)."""

    mode: Literal["wsss", "ignore", "complement", "mars", "supervised"] = "mars"
    """wsss: plain pseudo labels; ignore: biased pixels left out; complement: the teacher fills
    them;
    mars: the same under the certainty-weighted loss; supervised: ground truth, the upper bound."""
    name: str | None = None
    """Folder name below <run_dir>/segmentation; None: the mode."""
    labels_dir: str | None = None
    """Use <id>.png labels from this folder instead of stage 2's (wsss) or stage 3's."""
    backbone: BackboneConfig = field(
        default_factory=lambda: BackboneConfig(name="resnet101.tv_in1k")
    )
    """A network with maps at strides 4 to 32."""
    network: Literal["deeplabv1", "deeplabv2", "deeplabv3plus"] = "deeplabv3plus"
    """The head on the backbone."""
    output_stride: Literal[8, 16] = 8
    """Pixels per cell of the deepest feature map; see wsss.output_stride."""
    aspp_dim: int = 256
    """Width of v3+'s ASPP and decoder, or of v1's head (512 in the literature)."""
    low_dim: int = 48
    """Width of v3+'s projected low-level features."""
    rates: tuple[int, ...] = (12, 24, 36)
    """Dilations: of v3+'s ASPP; (6, 12, 18, 24) for v2; (12,) for v1."""
    train_scales: tuple[float, ...] = ()
    """Smaller copies of the image that v2 is trained on, too, (0.5, 0.75) in its Caffe version."""
    balanced: bool = False
    """Average the loss over background and over class pixels apart, and add the two (AdvCAM)."""
    dropout: float = 0.1
    """Dropout before the last layer."""
    head_dropout: tuple[float, float] = (0.0, 0.0)
    """Further dropout in v3+'s head, behind the ASPP and behind the decoder's first convolution."""
    head_momentum: float = 0.1
    """Share of a batch in the running statistics of v1's head. Its code has 3e-4, which takes
    10,000 steps to forget where it began."""
    norm: Literal["train", "frozen"] = "train"
    """Backbone normalisation: batch statistics, or those of the weight file."""
    epochs: int = 100
    """Passes over the training images (the author's later code; also the next values)."""
    batch_size: int = 16
    """Images per step."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd has momentum 0.9 and a polynomial schedule; adamw a one-cycle one."""
    lr: float = 1e-3
    """Learning rate of the backbone."""
    head_lr: float = 1e-2
    """Learning rate of the new layers."""
    weight_decay: float = 4e-5
    """Weight decay."""
    ema: float = 0.999
    """Decay of the teacher, an exponential moving average of all float state."""
    warmup: float = 0.0
    """Share of the training before the teacher fills biased pixels; they are ignored until then."""
    refine: Literal["none", "crf", "pamr"] = "crf"
    """Refinement R of the teacher's prediction (Sec. 3.4)."""
    crf: CrfConfig = field(default_factory=CrfConfig)
    """Settings of that refinement."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Views for training."""

    def __post_init__(self):
        _check(self.epochs >= 1, f"segmentation.epochs must be at least 1, got {self.epochs}")
        _check(
            0 <= min(self.dropout, *self.head_dropout)
            and max(self.dropout, *self.head_dropout) < 1,
            "segmentation.dropout and segmentation.head_dropout must lie in [0, 1)",
        )
        _check(self.batch_size >= 1, "segmentation.batch_size must be at least 1")
        _check(len(self.rates) > 0, "segmentation.rates needs at least one dilation")
        _check(0 < self.head_momentum <= 1, "segmentation.head_momentum must lie in (0, 1]")
        _check(0 < self.ema < 1, f"segmentation.ema must lie in (0, 1), got {self.ema}")
        _check(0 <= self.warmup < 1, f"segmentation.warmup must lie in [0, 1), got {self.warmup}")


@dataclass
class EvaluationConfig:
    """Stage 5, scoring."""

    scales: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    """Scales of test-time augmentation (the author's)."""
    flip: bool = True
    """Average with the mirrored image."""
    window: int = 0
    """Side of the overlapping windows through which larger images are seen, pixels; 0: whole."""
    refine: Literal["crf", "none"] = "crf"
    """Post-processing of the averaged probabilities."""
    crf: CrfConfig = field(default_factory=CrfConfig)
    """Settings of that refinement."""

    def __post_init__(self):
        _check(min(self.scales, default=0) > 0, "evaluation.scales needs positive numbers")
        _check(
            self.window == 0 or self.window >= 32,
            f"evaluation.window must be 0 or at least 32, got {self.window}",
        )


@dataclass
class Config:
    """Settings of the whole experiment:"""

    run_dir: str = "runs/voc"
    """Folder of all results of this experiment."""
    seed: int = 0
    """Seed of every random choice."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on GPUs, and on CPUs that have instructions for it. The instructions
    decide and no stopwatch, so that a run that goes on after a kill computes the same."""
    workers: int = 4
    """Processes that load images, and threads of per-image work; 0: none beside the main one."""
    checkpoint_every: int = 200
    """Iterations between checkpoints of a training."""
    log: Literal["text", "jsonl"] = "text"
    """jsonl: standard output is one JSON object per line, of stages and of trainings; words for
    people go to standard error."""
    tensorboard: bool = False
    """Scalars and pictures of every training for TensorBoard, in its folder's `tensorboard/`."""
    accumulate: int = 1
    """Parts that a batch is cut into where memory is short, in the training of the classifier and
    of stage 4. A batch keeps its size and, up to rounding, its gradient; but batch normalisation
    (norm: train) sees the statistics of a part."""
    sync_norm: bool = False
    """Where several processes share a batch, batch normalisation sees all of it and not each its
    part, in the same trainings; slower."""
    compile: bool = False
    """torch.compile for stage 4's network; needs a C++ compiler, and takes minutes at first."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data set."""
    uss: UssConfig = field(default_factory=UssConfig)
    """Stage 1."""
    wsss: WsssConfig = field(default_factory=WsssConfig)
    """Stage 2."""
    debias: DebiasConfig = field(default_factory=DebiasConfig)
    """Stage 3."""
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    """Stage 4."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Stage 5."""

    def __post_init__(self):
        _check(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        _check(self.workers >= 0, f"workers must not be negative, got {self.workers}")
        _check(self.checkpoint_every >= 1, "checkpoint_every must be at least 1")
        _check(self.accumulate >= 1, "accumulate must be at least 1")
        folders = (self.run_dir, self.wsss.labels_dir, self.debias.output_dir)
        root = Path(self.data.root).resolve()
        for folder in [Path(f).resolve() for f in folders if f]:
            inside = self.data.format == "folder" and root in (folder, *folder.parents)
            _check(
                not inside,
                f"{folder} lies in data.root; its pictures would be read as images. Choose another",
            )


YAML = "tag:yaml.org,2002:"
NAME_LISTS = ("data.classes", "data.biased_classes")
A_LIST = "a list stands in brackets, on the command line between quotes: '[a, b]'"


RENAMED = {"uss.stage": "uss.backbone_stage", "wsss.fixed_layers": "wsss.frozen_stages"}
"""Keys of earlier versions."""


class _Parser(jsonargparse.ArgumentParser):
    """Takes class names as the text that they are; says one thing when the configuration is wrong,
    and names the nearest key."""

    def parse_args(self, args: Sequence[str] | None = None, *rest, **options):
        words = [*(sys.argv[1:] if args is None else args)]
        for k, word in enumerate(words):
            for key in NAME_LISTS:
                if word.startswith(f"--{key}="):
                    words[k] = f"--{key}={_json_names(word.partition('=')[2])}"
                elif k and words[k - 1] == f"--{key}":
                    words[k] = _json_names(word)
        return super().parse_args(words, *rest, **options)

    def parse_path(self, path, *rest, **options):
        text = read_text(user_path(str(path)), "the configuration")
        return self.parse_string(_with_names_quoted(text, str(path)), path, *rest, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        unknown = re.search(r"does not accept option '([\w.]+)'", message)
        unknown = unknown or re.search(r"Option '([\w.]+)' is not accepted", message)
        unknown = unknown or re.search(r"unrecognized arguments: --([\w.-]+)", message)
        if unknown:
            key = unknown[1]
            group = re.search(r"Group '([\w.]+)'", message)
            full = f"{group[1]}.{key}" if group and not key.startswith(group[1]) else key
            known = [a.dest for a in self._actions]
            near = difflib.get_close_matches(full, known, 1, 0.5)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            hint = f"; it is `{RENAMED[full]}` now" if full in RENAMED else hint
            message = f"there is no setting `{full}`{hint} (--help lists all of them)"
        elif "<class 'tuple'>" in message or "nrecognized arguments" in message:
            message = f"{message}\n{A_LIST}"
        sys.exit(f"error: {message}")


def overlaid(section: Any, flat: Mapping[str, Any], prefix: str = "") -> Any:
    """A section of the configuration with flat settings laid over it.

    Args:
        section: dataclass with the values of all keys that `flat` lacks.
        flat: values by full key, such as {"segmentation.backbone.name": "resnet50"}.
        prefix: full key of the section with a dot at its end; empty for the whole configuration.
    """
    values = {}
    for item in dataclasses.fields(section):
        key, value = prefix + item.name, getattr(section, item.name)
        below = {k: v for k, v in flat.items() if k.startswith(f"{key}.")}
        if dataclasses.is_dataclass(value):
            values[item.name] = overlaid(value, below, f"{key}.")
        elif below:  # a table whose keys are the user's
            values[item.name] = {k.removeprefix(f"{key}."): v for k, v in below.items()}
        elif key in flat:
            values[item.name] = tuple(flat[key]) if isinstance(flat[key], list) else flat[key]
    return dataclasses.replace(section, **values)


def _json_names(text: str) -> str:
    """Names that somebody wrote as "a,b" or "[a, b]", as a list in JSON."""
    names = re.split("[,\n]", text)
    if text.lstrip().startswith("["):
        try:
            items = yaml.compose(text, yaml.SafeLoader).value
        except yaml.YAMLError:
            return text  # refused by the parser
        if not all(isinstance(item, yaml.ScalarNode) for item in items):
            return text
        names = [item.value for item in items]
    return json.dumps([name.strip() for name in names if name.strip()], ensure_ascii=False)


def _with_names_quoted(text: str, path: str) -> str:
    """YAML whose class names are text: `no`, `1` and `null` stand between quotes.

    Raises:
        UserError: they are no list of names.
    """
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError:
        return text  # refused by the parser
    changes = {}
    for key, node in _name_lists(root):
        if node.tag == YAML + "null":
            continue
        if isinstance(node, yaml.ScalarNode) and node.tag == YAML + "str":
            end = "\n" * node.value.endswith("\n")
            changes[node.start_mark.index] = (node, _json_names(node.value) + end)
            continue
        if not isinstance(node, yaml.SequenceNode):
            raise UserError(f"{path}, line {node.start_mark.line + 1}: {key} is no list; {A_LIST}")
        for item in node.value:
            if isinstance(item, yaml.ScalarNode) and item.style is None:
                line = item.start_mark.line + 1
                _check(item.value != "", f"{path}, line {line}: {key} has an empty name")
                name = json.dumps(item.value, ensure_ascii=False)
                changes[item.start_mark.index] = (item, name)
    for start, (node, name) in sorted(changes.items(), reverse=True):
        text = text[:start] + name + text[node.end_mark.index :]
    return text


def _name_lists(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, yaml.Node]]:
    """Those of `NAME_LISTS` that a YAML mapping has, and their values."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if name in NAME_LISTS:
                yield name, value
            elif any(full.startswith(f"{name}.") for full in NAME_LISTS):
                yield from _name_lists(value, f"{name}.")


def make_parser(prog: str, description: str) -> jsonargparse.ArgumentParser:
    """A parser with `--config` and every key of `Config`."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=prog, description=description)
    parser.add_argument("--config", action="config", help="The experiment, a YAML file.")
    parser.add_class_arguments(Config, None)
    return parser


def _refuse_empty(parsed: Any, kind: type, prefix: str = "") -> None:
    """Refuses null where a key has no such value; jsonargparse lets it pass for lists."""
    for item in dataclasses.fields(kind):
        key = prefix + item.name
        if dataclasses.is_dataclass(item.type):
            _refuse_empty(parsed, item.type, f"{key}.")
        elif parsed.get(key, ()) is None and type(None) not in get_args(item.type):
            raise UserError(f"{key} is empty; give it a value or take its line out")


def parse(
    parser: jsonargparse.ArgumentParser, args: list[str] | None = None, named: bool = True
) -> tuple[Config, Any]:
    """Parses the command line; returns the configuration and the other arguments.

    Args:
        parser: from `make_parser`.
        args: the command line; None: the process's own.
        named: whether class names that no setting gives are taken from the data set.

    Raises:
        UserError: a value lies outside its range.
        SystemExit: an unknown key or a value of the wrong type, after one message.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=DeprecationWarning)
        parsed = parser.parse_args(args)
        _refuse_empty(parsed, Config)
        for key, value in [*parsed.items()]:
            if isinstance(value, str) and (value.startswith("~") or not is_utf8(value)):
                parsed[key] = str(user_path(value))  # nothing but a path begins so
        namespace = parser.instantiate(parsed)
    values = vars(namespace)
    names = {f.name for f in dataclasses.fields(Config)}
    config = Config(**{k: v for k, v in values.items() if k in names})
    report_in(Path(config.run_dir))
    if named:
        config.data = config.data.with_classes()
    if config.log == "jsonl":
        sys.stdout = sys.stderr  # what is printed; core.run.log.tell keeps the other
    return config, namespace
