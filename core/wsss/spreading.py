"""Pseudo labels by learnt affinities: seeds, a network of pairs, and a random walk of the maps.

The activation maps say for sure where some pixels of a class and some of the background are. From
pairs of these a network learns which neighbours belong together, and a random walk along such pairs
spreads the maps over whole objects. IRNet and PSA differ in what the network predicts; see the
`Spreading` that each of them gives.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from core.config import Config, PairConfig
from core.data.labels import write_label
from core.data.loader import LabelledImages, batches_by_size, batches_from
from core.data.splits import Split
from core.data.transforms import denormalise
from core.inference import multi_scale
from core.models.backbones import to_device
from core.pictures import heat, label_colours, principal_components
from core.run import distributed
from core.run.errors import UserError
from core.run.loop import autocast, make_optimizer, pick_device, seed_everything, train
from core.run.stage import Run
from core.run.threads import in_threads
from core.wsss.affinity import affinity_loss
from core.wsss.pseudo_labels import load_cam
from core.wsss.published import load_published


@dataclass(frozen=True)
class Spreading:
    """What a method of spreading consists of."""

    settings: PairConfig
    seed: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    """(image, keys, cam) -> (H, W) uint8 confident label, 255 where nothing is sure."""
    network: Callable[[], nn.Module]
    """Builds the network: images -> (B, D, H/stride, W/stride) predictions."""
    affinity: Callable[[Tensor], Tensor]
    """(B, D, h, w) predictions -> (B, P, ...) affinities of the pairs within settings.radius."""
    label: Callable[[Tensor, np.ndarray, Tensor, tuple[int, int]], np.ndarray]
    """((D, h, w) predictions, keys, cam, (H, W)) -> (H, W) uint8 label after the walk."""
    flip: bool
    """Average predictions with those of the mirrored image before the walk."""
    stride: int
    """Pixels per cell of the predictions."""


def write_spread_labels(config: Config, run: Run, split: Split, method: Spreading) -> None:
    """Pseudo labels of every image from its activation maps, in <run_dir>/wsss/labels."""
    if method.settings.weights:
        network = load_published(method.network(), method.settings.weights)
        network = to_device(network, pick_device(config))
    else:
        write_seeds(config, run, split, method)
        network = train_pairs(config, run, split, method)
    write_walked(config, run, split, method, network)


def write_seeds(config: Config, run: Run, split: Split, method: Spreading) -> None:
    """Confident labels of every image that has none yet, in <run_dir>/wsss/seeds."""
    folder = run.wsss / "seeds"
    todo = distributed.my_share([folder / f"{i}.png" for i in split.ids])

    def write(index: int) -> None:
        keys, cam = load_cam(run.wsss / "cams" / f"{split.ids[index]}.npz")
        seed = method.seed(split.read_image(index), keys, cam)
        write_label(folder / f"{split.ids[index]}.png", seed)

    done = len(split) - len(todo)
    for _ in in_threads(write, todo, config.workers, "seeds", len(split), done):
        pass
    distributed.barrier()


def train_pairs(config: Config, run: Run, split: Split, method: Spreading) -> nn.Module:
    """Fits the network to pairs of confident pixels (or reads the one fitted before)."""
    settings, device = method.settings, pick_device(config)
    cells, needed = settings.augment.crop // method.stride, 2 * settings.radius - 1
    if cells < needed:
        raise UserError(
            f"a crop of {settings.augment.crop} pixels has {cells} cells, pairs of radius "
            f"{settings.radius} need {needed}; raise augment.crop or lower radius"
        )
    seed_everything(config.seed)
    network = to_device(method.network(), device).train()
    groups = network.parameter_groups(settings.lr)
    iterations = max(1, settings.epochs * len(split) // settings.batch_size)
    optimizer, schedule = make_optimizer("sgd", groups, settings.weight_decay, iterations)
    seeds = [run.wsss / "seeds" / f"{i}.png" for i in split.ids]
    dataset = LabelledImages(split, seeds, len(config.data.classes), settings.augment)
    cast = autocast(config, device)

    def step(batch: dict[str, Tensor], t: int) -> dict[str, Tensor]:
        images = batch["image"].to(device, memory_format=torch.channels_last)
        with cast:
            predictions = network(images).float()
        label = batch["label"].to(device)[:, None].float()
        label = F.interpolate(label, predictions.shape[-2:], mode="nearest-exact")[:, 0].long()
        return {"loss": affinity_loss(method.affinity(predictions), label, settings.radius)}

    def pictures(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with cast:
            predictions = network.eval()(batch["image"].to(device)).float()
        network.train()
        size = batch["image"].shape[-2:]
        if predictions.shape[1] == 1:  # a boundary
            drawn = heat(predictions[:, 0].sigmoid(), size)
        else:
            drawn = torch.stack(principal_components(predictions))
        seed = label_colours(batch["label"])
        return {"image": denormalise(batch["image"]), "seed": seed, "prediction": drawn}

    batches = batches_from(dataset, settings.batch_size, iterations, config)
    train(
        "pairs",
        {"network": network},
        optimizer,
        schedule,
        batches,
        step,
        iterations,
        run.wsss / "pairs",
        config,
        pictures=pictures,
    )
    return network.eval()


@torch.inference_mode()
def write_walked(
    config: Config, run: Run, split: Split, method: Spreading, network: nn.Module
) -> None:
    """Random walks of every image that has no label yet."""
    device, folder = pick_device(config), run.wsss / "labels"
    cast = autocast(config, device)
    todo = distributed.my_share([folder / f"{i}.png" for i in split.ids])
    wanted = set(todo)
    bar = tqdm(total=len(split), initial=len(split) - len(todo), desc="walks", unit="image")
    for indices, images in batches_by_size(split, method.settings.batch_size, todo):
        size = images.shape[-2:]
        cells = tuple(-(-n // method.stride) for n in size)
        with cast:
            predictions = multi_scale(network, images.to(device), flip=method.flip, size=cells)
        for index, prediction in zip(indices, predictions, strict=True):
            if index in wanted:
                keys, cam = load_cam(run.wsss / "cams" / f"{split.ids[index]}.npz")
                maps = torch.from_numpy(cam).to(device)
                label = method.label(prediction, keys, maps, tuple(size))
                write_label(folder / f"{split.ids[index]}.png", label)
                bar.update()
    bar.close()
    distributed.barrier()
