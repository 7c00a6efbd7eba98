"""Unsupervised semantic features F of images, from a trained network or from anybody's files."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from core.config import Config, UssConfig
from core.data.finder import FEATURES, Files
from core.data.loader import batches_by_size
from core.data.splits import Split
from core.models.backbones import feature_network
from core.run import checkpoint, distributed
from core.run.errors import UserError
from core.run.files import atomic_write
from core.run.stage import Run
from core.uss.stego_head import StegoHead

FeatureSource = Callable[[Sequence[int]], Iterator[tuple[int, Tensor]]]
"""Indices of images, ascending -> pairs of an index and its (D, h, w) float32 features."""
FORM = "expected finite floats (D, h, w), one array of numpy.save"


class SemanticFeatures(nn.Module):
    """A frozen network, STEGO's head where trained, and the mean feature where taken out."""

    def __init__(self, config: UssConfig):
        super().__init__()
        self.config = config
        self.backbone = feature_network(config)
        self.head = None
        if config.method == "stego":
            self.head = StegoHead(self.backbone.dim, config.code_dim, config.dropout)
        width = config.code_dim if self.head else self.backbone.dim
        self.register_buffer("mean", torch.zeros(width))

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), sides multiples of the patch -> (B, D, H/patch, W/patch)."""
        feat = self.backbone(images)
        return self.head(feat) if self.head else feat

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images of any size -> (B, D, h, w) features.

        The image is resized by each of `scales`, then up to the next multiple of the patch; (h, w)
        is the grid of the first.
        """
        first, *further = (self._at(images, scale) for scale in self.config.scales)
        maps = [first, *(F.interpolate(m, first.shape[-2:], mode="bilinear") for m in further)]
        return sum(maps) / len(maps) - self.mean[:, None, None]

    def _at(self, images: Tensor, scale: float) -> Tensor:
        patch = self.backbone.patch
        size = [-(-max(1, round(n * scale)) // patch) * patch for n in images.shape[-2:]]
        if size != list(images.shape[-2:]):
            images = F.interpolate(images, size, mode="bicubic")
        feat = self.encode(images).float()
        if self.config.flip:
            feat = (feat + self.encode(images.flip(-1)).float().flip(-1)) / 2
        return feat


def load_semantic_features(run: Run) -> SemanticFeatures:
    """The network that stage 1 trained."""
    config = run.config.uss
    blank = dataclasses.replace(config, backbone=config.backbone.without_weights())
    path = run.uss / "checkpoint.pth"
    return checkpoint.restore(SemanticFeatures(blank), path, "network", "uss", run.config)


def network_features(
    network: nn.Module, split: Split, device: torch.device, autocast: torch.autocast
) -> FeatureSource:
    """Features computed on the fly, in batches of consecutive images of one size."""

    @torch.inference_mode()
    def source(indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        wanted = set(indices)
        for batch, images in batches_by_size(split, 16, wanted):
            with autocast:
                feats = network(images.to(device)).float().cpu()
            yield from ((k, f) for k, f in zip(batch, feats, strict=True) if k in wanted)

    return source


def feature_files(
    folder: Path,
    split: Split,
    remedy: str = "uss.features_dir needs one <id>.npy of shape (D, h, w) for each training image",
) -> tuple[Path, ...]:
    """The `<id>.npy` of every image of `split` in `folder`.

    Raises:
        UserError: files are missing, or there are several for one id.
    """
    return Files(folder, FEATURES).every(split.ids, remedy)


def read_features(path: Path) -> Tensor:
    """(D, h, w) float32 of an .npy file of any float type.

    Raises:
        UserError: the file is missing, broken, pickled, of another form or not finite.
    """
    array = _load(path)
    if not np.isfinite(array).all():
        raise UserError(f"features {path} are not finite; {FORM}")
    return torch.from_numpy(array.astype(np.float32))


def feature_shape(path: Path) -> tuple[int, ...]:
    """(D, h, w) of an .npy file, of which no more than the head is read; see `read_features`."""
    return _load(path, mmap_mode="r").shape


def _load(path: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode, allow_pickle=False)
    except Exception as error:  # noqa: BLE001 (a broken file fails in any way)
        raise UserError(f"features {path} cannot be read ({error}); {FORM}") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise UserError(
            f"features {path} are an archive, such as .npz or a checkpoint, whatever the name "
            f"says; {FORM}"
        )
    if array.ndim != 3 or array.dtype.kind != "f" or not array.size:
        raise UserError(f"features {path} are {array.shape} {array.dtype}; {FORM}")
    return array


def write_features(source: FeatureSource, split: Split, folder: Path) -> None:
    """Writes `<id>.npy`, (D, h, w) float16, of every image of `split` that has none in `folder`."""
    paths = [folder / f"{i}.npy" for i in split.ids]
    todo = distributed.my_share(paths)
    bar = tqdm(source(todo), "features", len(paths), initial=len(paths) - len(todo), unit="image")
    for index, feat in bar:
        with atomic_write(paths[index]) as tmp, tmp.open("wb") as file:
            np.save(file, feat.numpy().astype(np.float16))
    distributed.barrier()


def file_features(paths: Sequence[Path]) -> FeatureSource:
    """Features read from files, which must all be as wide as the first."""
    width = None

    def source(indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        nonlocal width
        width = width or len(read_features(paths[0]))
        for k in indices:
            feat = read_features(paths[k])
            if len(feat) != width:
                raise UserError(
                    f"features {paths[k]} are {len(feat)} wide, those of {paths[0].name} {width}"
                )
            yield k, feat

    return source


def mean_feature(source: FeatureSource, count: int) -> Tensor:
    """(D,) the mean over all images of each image's mean feature."""
    total = sum(feat.double().mean((1, 2)) for _, feat in source(range(count)))
    return (total / count).float()


def centred(source: FeatureSource, mean: Tensor) -> FeatureSource:
    """The same features with the (D,) mean taken out."""

    def shifted(indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        for index, feat in source(indices):
            yield index, feat - mean[:, None, None]

    return shifted


def feature_source(
    config: Config, split: Split, device: torch.device, autocast: torch.autocast
) -> FeatureSource:
    """The configured features: somebody's files, stage 1's files, or its network."""
    if config.uss.features_dir:
        source = file_features(feature_files(Path(config.uss.features_dir), split))
        return centred(source, mean_feature(source, len(split))) if config.uss.centre else source
    if config.uss.cache:
        cached = Run(config).uss / "features"
        return file_features(feature_files(cached, split, "run train_uss.py"))
    network = load_semantic_features(Run(config)).to(device)
    return network_features(network, split, device, autocast)
