"""Settings of the data set and of the views of a training image."""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core.data.names import class_name, warn_of_names
from core.data.tags import folder_tags
from core.run.errors import raise_all
from core.run.settings import NonNegativeFloat, PositiveFloat, PositiveInt, check

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


@dataclass
class DataConfig:
    """Images, image-level tags and, for scoring only, masks."""

    # voc: PASCAL VOC's layout; folder: image files of any name anywhere below `root`.
    format: Literal["voc", "folder"] = "voc"
    # voc: folder with JPEGImages, Annotations, ImageSets/Segmentation and SegmentationClass.
    root: str = "data/VOCdevkit/VOC2012"
    # CSV below `root` with the columns image,tags. None: voc reads Annotations; in a folder, an
    # image's tag is the sub-folder of `root` that it is in.
    tags: str | None = None
    # Folder of masks <id>.png below `root`. None: voc has SegmentationClass, folder has none.
    masks: str | None = None
    # List of training ids, without .txt, in ImageSets/Segmentation (voc) or `root` (folder). None:
    # train (voc), all tagged images (folder).
    train_list: str | None = None
    val_list: str | None = None  # List to score. None: val (voc), all with a mask (folder).
    # Foreground class names; label c is the c-th name, 0 is background. Empty: VOC's 20 (voc), or
    # all names in the tags, sorted (folder).
    classes: tuple[str, ...] = ()
    # Classes known to come with a context; used only for scoring, to report them separately.
    biased_classes: tuple[str, ...] = ()
    # What to do with images that are missing or cannot be decoded. skip: every stage decodes all
    # images first and leaves these out; manifests and scores name them.
    on_bad_image: Literal["stop", "skip"] = "stop"

    def __post_init__(self):
        for key in ("classes", "biased_classes"):
            names = tuple(class_name(name, f"data.{key}") for name in getattr(self, key))
            check(all(names), f"data.{key} has an empty name")
            setattr(self, key, names)
        check(len(self.classes) <= 253, "data.classes has over 253 names; labels are 8-bit")
        check(len({*self.classes}) == len(self.classes), "data.classes names a class twice")

    def with_classes(self) -> "DataConfig":
        """The same with the class names filled in; warns about doubtful ones.

        Raises:
            UserError: there are no tags to take them from, or a biased class is not among them.
        """
        names, counts = self.classes or VOC_CLASSES, None
        if self.format == "folder" and not self.classes:
            problems: list[str] = []  # reported later, unless there is nothing else
            table = folder_tags(Path(self.root), self.tags, self.masks, problems=problems)
            counts = Counter(name for tags in table.values() for name in tags)
            names = tuple(sorted(counts))
            raise_all([] if names else problems, "correct the tags")
            check(len(names) > 0, f"no image of {self.root} has a tag; see data.tags")
        warn_of_names(names, counts)
        unknown = sorted(set(self.biased_classes) - set(names))
        check(not unknown, f"data.biased_classes names {unknown}, which data.classes lacks")
        return dataclasses.replace(self, classes=names)


@dataclass
class AugmentConfig:
    """Random views of a training image and its label map."""

    scale: tuple[PositiveFloat, PositiveFloat] = (0.5, 1.5)  # Range of the random resize factor.
    # Range of the longer side after the random resize, pixels, instead of `scale`: independent of
    # the size of the photographs.
    long_side: tuple[PositiveInt, PositiveInt] | None = None
    crop: PositiveInt = 512  # Side of the square crop, pixels; smaller images are padded.
    flip: bool = True  # Mirror each view with probability 0.5.
    # Strength of brightness, contrast, saturation and hue jitter (hue: at most 0.5).
    jitter: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (
        *(0.3, 0.3, 0.3, 0.1),
    )

    def __post_init__(self):
        for key in ("scale", "long_side"):
            low, high = getattr(self, key) or (1, 1)
            check(low <= high, f"augment.{key} needs low <= high, got {low} and {high}")
        check(self.jitter[3] <= 0.5, f"augment.jitter: hue must be at most 0.5, got {self.jitter}")

    def unused(self) -> list[str]:
        """The resize that is not chosen."""
        return ["scale"] if self.long_side else []
