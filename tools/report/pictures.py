"""The page's pictures: labels and predictions of some images, as overlays."""

import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from core.config import Config
from core.data.labels import BACKGROUND, BIASED_ON_DISK, IGNORE, palette, read_label
from core.data.lists import Split, ground_truth, label_files, read_split
from core.debias import debiased_score
from core.pipeline import Run, feature_source, load_segmenter
from core.run.device import autocast, pick_device
from core.run.errors import UserError
from core.run.files import read_arrays
from core.segmenter import predict
from tools.common.pages import data_url
from tools.common.titles import MODES
from tools.report.record import COMPARED, Commands

SIDE = 384  # pixels, longest side of a picture on the page
IMAGES_PER_CLASS, MOST_IMAGES = 2, 40
HATCH = (90, 0, 90)  # second colour of biased pixels
OUTLINE = (255, 255, 255)

Column = tuple[str, Callable[[Split, Sequence[int]], Sequence[Path | np.ndarray]]]
"""The command that makes a column's files, and a function that reads it for some images."""


@dataclass
class Gallery:
    strips: list[dict] = field(default_factory=list)  # one per image, for the template
    classes: list[str] = field(default_factory=list)  # classes that the images show
    notes: list[tuple[str, str, str]] = field(default_factory=list)  # what, why, command
    cut: bool = False  # more classes than MOST_IMAGES allows

    def attempt(self, what: str, command: str, read: Callable, *arguments: Any) -> Any:
        """The result of `read`; or None, with a note on what is missing, why, and what makes it."""
        try:
            return read(*arguments)
        except UserError as error:
            self.notes.append((what, str(error).splitlines()[0], command))
            return None


def choose(split: Split, per_class: int = IMAGES_PER_CLASS) -> dict[int, tuple[list[int], bool]]:
    """The first images of the list for every class.

    Returns:
        By index: the classes, 0-based, that it was chosen for; whether it is the first of a class.
    """
    chosen: dict[int, tuple[list[int], bool]] = {}
    for rank in range(per_class):
        for c in range(split.tags.shape[1]):
            having = np.flatnonzero(split.tags[:, c])
            if rank < len(having):
                chosen.setdefault(int(having[rank]), ([], rank == 0))[0].append(c)
    return chosen


def part(split: Split, indices: Sequence[int]) -> Split:
    ids, images = ([values[k] for k in indices] for values in (split.ids, split.images))
    return Split(tuple(ids), tuple(images), split.tags[list(indices)])


def training_gallery(config: Config, commands: Commands) -> Gallery:
    """The labels of training images: truth, pseudo, similarity, debiased, predictions."""
    run = Run(config)
    stage_3 = commands("make_debiased_labels.py")
    columns = {
        "Ground truth": ("", lambda s, k: ground_truth(config.data, part(s, k))),
        "Pseudo label": (
            commands("train_wsss.py"),
            lambda s, k: label_files(run.wsss_labels, part(s, k), "run stage 2"),
        ),
        "Similarity": (stage_3, lambda s, k: similarity(config, s, k)),
        "Debiased label": (
            stage_3,
            lambda s, k: label_files(run.debias / "labels", part(s, k), "run stage 3"),
        ),
    }
    plain = "wsss_best" if _weights(run, "wsss_best").is_file() else "wsss"
    for mode, title in ((plain, "Network, plain labels"), ("mars", "Network, MARS")):
        columns[title] = (
            commands.score(mode),
            lambda s, k, mode=mode: predictions(config, _weights(run, mode), part(s, k)),
        )
    return make_gallery(config, "train", columns)


def validation_gallery(config: Config, commands: Commands) -> Gallery:
    """Predictions of the trained networks on validation images."""
    run = Run(config)
    columns = {"Ground truth": ("", lambda s, k: ground_truth(config.data, part(s, k)))}
    for mode in MODES:
        folder = run.evaluation(mode) / "predictions"
        if mode not in COMPARED and not folder.is_dir():
            continue
        columns[MODES[mode][0]] = (
            commands.score(mode),
            lambda s, k, folder=folder: label_files(folder, part(s, k), "score this network"),
        )
    return make_gallery(config, "val", columns)


def _weights(run: Run, mode: str) -> Path:
    return run.segmentation(mode) / "checkpoint.pth"


def make_gallery(config: Config, which: str, columns: Mapping[str, Column]) -> Gallery:
    """A strip for each chosen image of a list, with a panel for each available column."""
    gallery = Gallery()
    split = gallery.attempt("Pictures", "", read_split, config.data, which)
    if split is None:
        return gallery
    chosen = choose(split)
    indices = list(chosen)[:MOST_IMAGES]
    gallery.cut = len(chosen) > len(indices)
    gallery.classes = [c for k, c in enumerate(config.data.classes) if split.tags[indices, k].any()]
    contents = {
        caption: gallery.attempt(caption, command, read, split, indices)
        for caption, (command, read) in columns.items()
    }
    names = np.array(config.data.classes)
    for k, index in enumerate(indices):
        image_id, photo = split.ids[index], shrink(split.read_image(index), cv2.INTER_AREA)
        classes, first = chosen[index]
        panels = [
            panel(caption, content[k], config.data.classes)
            for caption, content in contents.items()
            if content is not None
        ]
        strip = {"id": image_id, "chosen_for": names[classes].tolist(), "first": first}
        strip |= {"tags": names[split.tags[index]].tolist(), "panels": panels}
        strip["photo"] = data_uri(Image.fromarray(photo), "JPEG", quality=88)
        strip["ratio"] = f"{photo.shape[1]} / {photo.shape[0]}"
        gallery.strips.append(strip)
    return gallery


def panel(caption: str, content: Path | np.ndarray, names: Sequence[str]) -> dict[str, str]:
    """One picture of a strip: a uint8 label map as an overlay, or a float32 similarity as a map."""
    if isinstance(content, Path):
        content = read_label(content, len(names))
    if content.dtype == np.uint8:
        kind, picture, alt = "overlay", transparent(content), describe(content, names)
    else:
        kind, picture, alt = "map", viridis(content), f"{content.min():.2f} to {content.max():.2f}"
    return {"caption": caption, "kind": kind, "src": data_uri(picture), "alt": f"{caption}: {alt}"}


def describe(label: np.ndarray, names: Sequence[str]) -> str:
    """Alternative text: the share of the image that each label covers."""
    titles = dict(enumerate(names, 1)) | {BIASED_ON_DISK: "biased", IGNORE: "ignored"}
    shares = np.bincount(label.ravel(), minlength=256) / label.size
    shown = [f"{title} {shares[v]:.0%}" for v, title in titles.items() if shares[v] > 0]
    return ", ".join(shown) or "background only"


def similarity(config: Config, split: Split, indices: Sequence[int]) -> list[np.ndarray]:
    """Eq. 4 for a few images: (h, w) float32 in [0, 1] each, in the page's picture size."""
    path = Run(config).debias / "centroids.npz"
    arrays = read_arrays(path, ("centroids",), "run make_debiased_labels.py")
    centroids = torch.from_numpy(arrays["centroids"])
    device = pick_device(config)
    source = feature_source(config, split, device, autocast(config, device))
    maps = []
    for index, feat in source(indices):
        if centroids.shape != (len(config.data.classes), len(feat)):
            raise UserError(
                f"{path} holds centroids {tuple(centroids.shape)}, expected one row of "
                f"{len(feat)} for each of {len(config.data.classes)} classes"
            )
        score = debiased_score(feat, centroids, torch.from_numpy(split.tags[index]))
        size = shrink(split.read_image(index), cv2.INTER_AREA).shape[:2]
        maps.append(F.interpolate(score[None, None], size, mode="bilinear")[0, 0].numpy())
    return maps


def predictions(config: Config, weights: Path, split: Split) -> list[np.ndarray]:
    """(H, W) labels that a trained network predicts for a few images, as evaluate.py does."""
    with tempfile.TemporaryDirectory() as folder:
        network, _ = load_segmenter(weights, config)
        predict(network, split, Path(folder), config.evaluation, config)
        return [read_label(Path(folder) / f"{i}.png") for i in split.ids]


def shrink(image: np.ndarray, interpolation: int) -> np.ndarray:
    """Scales an image or label map down to at most SIDE pixels on its longest side."""
    height, width = image.shape[:2]
    scale = min(1, SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return image if scale == 1 else cv2.resize(image, size, interpolation=interpolation)


def transparent(label: np.ndarray) -> Image.Image:
    """(H, W) uint8 labels -> outlined colours; background is transparent, biased is hatched."""
    label = shrink(label, cv2.INTER_NEAREST)
    colours = palette()[label]
    y, x = np.indices(label.shape)
    stripe = max(3, max(label.shape) // 64)  # pixels; visible in small pictures, too
    colours[(label == BIASED_ON_DISK) & ((x + y) // stripe % 2 == 1)] = HATCH
    near = np.stack([np.roll(np.pad(label, 1, "edge"), s, a) for a in (0, 1) for s in (-1, 1)])
    colours[(near[:, 1:-1, 1:-1] != label).any(0) & (label < BIASED_ON_DISK)] = OUTLINE
    alpha = np.where(label == BACKGROUND, 0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([colours, alpha]))


def viridis(score: np.ndarray) -> Image.Image:
    """(H, W) in [0, 1] -> viridis."""
    colours = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_VIRIDIS)
    levels = (score.clip(0, 1) * 63 + 0.5).astype(np.uint8) * 4  # 64 steps compress well
    image = Image.fromarray(levels)
    image.putpalette(np.ascontiguousarray(colours[:, 0, ::-1]).tobytes())
    return image


def data_uri(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True, **options)
    return data_url(buffer.getvalue(), kind.lower())
