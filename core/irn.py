"""IRNet's second half (Ahn, Cho and Kwak, CVPR 2019): seeds, boundaries, and labels by random walk.

Activation maps say for sure where some pixels of a class and some of the background are. From pairs
of these a network learns where boundaries run, and a random walk that does not cross them spreads
the maps over whole objects.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from core.affinity import affinity_loss, path_affinity, random_walk
from core.config import Config
from core.crf import DenseCRF
from core.datasets import LabelledImages, batches_by_size, batches_from
from core.inference import multi_scale
from core.labels import BACKGROUND, IGNORE, write_label
from core.models.backbones import to_device
from core.models.irn import BoundaryNetwork
from core.pseudo_labels import load_cam, upsampled
from core.runs import Run
from core.splits import Split
from core.training import autocast, pick_device, poly, seed_everything, train


def write_irn_labels(config: Config, run: Run, split: Split) -> None:
    """Pseudo labels of every image from its activation maps, in <run_dir>/wsss/labels."""
    write_seeds(config, run, split)
    network = train_boundaries(config, run, split)
    write_walked(config, run, split, network)


def write_seeds(config: Config, run: Run, split: Split) -> None:
    """Confident labels of every image that has none yet, in <run_dir>/wsss/seeds."""
    settings, folder = config.wsss.irn, run.wsss / "seeds"
    crf = DenseCRF(**settings.crf.settings())
    todo = [k for k, i in enumerate(split.ids) if not (folder / f"{i}.png").exists()]

    def write(index: int) -> None:
        keys, cam = load_cam(run.wsss / "cams" / f"{split.ids[index]}.npz")
        image = split.read_image(index)
        scores = (settings.foreground, settings.background)
        seed = confident_label(image, keys, cam, *scores, crf)
        write_label(folder / f"{split.ids[index]}.png", seed)

    with ThreadPoolExecutor(max(1, config.workers)) as pool:
        bar = {"desc": "seeds", "total": len(split), "initial": len(split) - len(todo)}
        for _ in tqdm(pool.map(write, todo), unit="image", **bar):
            pass


def confident_label(
    image: np.ndarray,
    keys: np.ndarray,
    cam: np.ndarray,
    foreground: float,
    background: float,
    crf: DenseCRF,
) -> np.ndarray:
    """A class where it beats a high background score, background where none beats a low one.

    Args:
        image: (H, W, 3) uint8 RGB.
        keys: (K,) labels of the maps, 1-based.
        cam: (K, h, w) in [0, 1].
        foreground, background: the two scores.
        crf: refines both decisions.

    Returns:
        (H, W) uint8, 255 where neither is sure.
    """
    labels = np.concatenate([[BACKGROUND], keys]).astype(np.uint8)
    maps = upsampled(cam, image.shape[:2])
    sure, possible = (
        labels[_refined_decision(image, maps, score, crf)] for score in (foreground, background)
    )
    unsure = np.where(possible == BACKGROUND, BACKGROUND, IGNORE).astype(np.uint8)
    return np.where(sure == BACKGROUND, unsure, sure)


def _refined_decision(
    image: np.ndarray, maps: np.ndarray, score: float, crf: DenseCRF, certainty: float = 0.7
) -> np.ndarray:
    """(H, W) index of the best of background and maps; the CRF starts from that decision alone."""
    background = np.full((1, *maps.shape[1:]), score, np.float32)
    decision = np.concatenate([background, maps]).argmax(0)
    rest = (1 - certainty) / max(1, len(maps))
    probs = np.full((1 + len(maps), *decision.shape), rest, np.float32)
    np.put_along_axis(probs, decision[None], np.float32(certainty), 0)
    return crf(image, probs).argmax(0)


def train_boundaries(config: Config, run: Run, split: Split) -> BoundaryNetwork:
    """Fits the boundary network to pairs of confident pixels (or reads the one fitted before)."""
    settings, device = config.wsss.irn, pick_device(config)
    seed_everything(config.seed)
    network = to_device(BoundaryNetwork(config.wsss.backbone), device).train()
    optimizer = torch.optim.SGD(network.head(), lr=settings.lr, weight_decay=settings.weight_decay)
    iterations = max(1, settings.epochs * len(split) // settings.batch_size)
    seeds = [run.wsss / "seeds" / f"{i}.png" for i in split.ids]
    dataset = LabelledImages(split, seeds, len(config.data.classes), settings.augment)
    cast = autocast(config, device)

    batches = batches_from(dataset, settings.batch_size, iterations, config)

    def step(batch, t):
        images = batch["image"].to(device, memory_format=torch.channels_last)
        with cast:
            boundary = network(images).float().sigmoid()[:, 0]
        label = batch["label"].to(device)[:, None].float()
        label = F.interpolate(label, boundary.shape[-2:], mode="nearest-exact")[:, 0].long()
        affinity = path_affinity(boundary, settings.radius)
        # IRNet halves this loss, its other half being that of the displacements.
        return {"loss": affinity_loss(affinity, label, settings.radius) / 2}

    train(
        "boundaries",
        {"network": network},
        optimizer,
        poly(iterations),
        batches,
        step,
        iterations,
        run.wsss / "irn",
        config,
    )
    return network.eval()


@torch.inference_mode()
def write_walked(config: Config, run: Run, split: Split, network: BoundaryNetwork) -> None:
    """Random walks of every image that has no label yet."""
    settings, device, folder = config.wsss.irn, pick_device(config), run.wsss / "labels"
    cast = autocast(config, device)
    todo = [k for k, i in enumerate(split.ids) if not (folder / f"{i}.png").exists()]
    bar = tqdm(total=len(split), initial=len(split) - len(todo), desc="walks", unit="image")
    for indices, images in batches_by_size(split, settings.batch_size, todo):
        height, width = images.shape[-2:]
        size = (-(-height // 4), -(-width // 4))
        with cast:
            boundaries = multi_scale(network, images.to(device), size=size).sigmoid()[:, 0]
        for index, boundary in zip(indices, boundaries, strict=True):
            path = folder / f"{split.ids[index]}.png"
            if path.exists():
                continue
            keys, cam = load_cam(run.wsss / "cams" / f"{split.ids[index]}.npz")
            maps = torch.from_numpy(cam).to(device) ** settings.exponent
            walked = random_walk(
                maps, boundary, settings.walk_radius, settings.beta, settings.doublings
            )
            write_label(path, walked_label(walked, keys, (height, width), settings.threshold))
            bar.update()
    bar.close()


def walked_label(
    walked: torch.Tensor, keys: np.ndarray, size: tuple[int, int], threshold: float
) -> np.ndarray:
    """(K, h, w) maps after the walk -> (H, W) uint8 labels, by argmax over a background score.

    All maps are divided by their common maximum, so that a class that the walk has thinned out
    everywhere does not come back.
    """
    if not len(keys):
        return np.zeros(size, np.uint8)
    maps = F.interpolate(walked[None], size, mode="bilinear")[0]
    maps = maps / maps.max().clamp(min=1e-5)
    scores = F.pad(maps, (0, 0, 0, 0, 1, 0), value=threshold)
    labels = np.concatenate([[BACKGROUND], keys]).astype(np.uint8)
    return labels[scores.argmax(0).cpu().numpy()]
