"""What stage 2 writes for each image: activation maps, seeds, and labels with or without a walk.

Every function skips the images whose files exist and shares the others out among processes.
`folder` is <run_dir>/wsss.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from core.crf.dense import make_crf
from core.data.labels import write_label
from core.data.lists import Split
from core.data.loader import batches_by_size
from core.inference import multi_scale
from core.run import distributed
from core.run.device import autocast, pick_device
from core.run.settings import Runtime
from core.run.threads import make_missing
from core.wsss.advcam import AdversarialCam, map_over_devices
from core.wsss.cam import background_score, cam_label, load_cam, save_cam
from core.wsss.settings import METHODS, PAIR_NETWORKS, WsssConfig


def write_cams(
    config: WsssConfig, runtime: Runtime, split: Split, folder: Path, classifier: nn.Module
) -> None:
    """Writes cams/<id>.npz, the normalised maps of the tagged classes."""
    method, paths = METHODS[config.method], [folder / "cams" / f"{i}.npz" for i in split.ids]
    todo = distributed.my_share(paths)
    compute = adversarial_maps if method.climbs else activations
    found = compute(config, runtime, split, classifier, todo)
    done = len(split) - len(todo)
    for index, maps in tqdm(found, "maps", len(split), initial=done, unit="image"):
        tagged = split.tags[index].nonzero()[0]
        save_cam(paths[index], tagged + 1, method.normalise(maps))
    distributed.barrier()


def activations(
    config: WsssConfig, runtime: Runtime, split: Split, classifier: nn.Module, todo: Sequence[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Activation maps of the tagged classes, averaged over scales, in batches: (K, H/4, W/4), or
    (K, H, W) with a method of `full_size`."""
    device, wanted = pick_device(runtime), set(todo)
    amp, full_size = autocast(runtime, device), METHODS[config.method].full_size
    mode = "nearest" if full_size else "bilinear"
    for indices, images in batches_by_size(split, todo, device, max(config.scales)):
        with amp:
            maps = multi_scale(classifier.activation, images, config.scales, config.flip, mode=mode)
        if not full_size:
            quarter = [-(-n // 4) for n in images.shape[-2:]]
            maps = F.interpolate(maps, quarter, mode="bilinear")
        pairs = zip(indices, maps.cpu().numpy(), strict=True)
        yield from ((k, m[split.tags[k]]) for k, m in pairs if k in wanted)


def adversarial_maps(
    config: WsssConfig, runtime: Runtime, split: Split, classifier: nn.Module, todo: Sequence[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """AdvCAM's maps of the tagged classes, (K, H/4, W/4), computed on all GPUs, or by `workers`
    processes on the CPU."""
    device = pick_device(runtime)
    if device.type == "cpu":
        devices = [device] * max(1, runtime.workers)
    else:
        alone = runtime.device in ("auto", "cuda") and distributed.world() == 1
        count = torch.cuda.device_count() if alone else 1
        devices = [torch.device("cuda", k) for k in range(count)] if count > 1 else [device]
    return map_over_devices(AdversarialCam(classifier, split, config.advcam), todo, devices)


def write_labels(config: WsssConfig, runtime: Runtime, split: Split, folder: Path) -> float:
    """Writes labels/<id>.png from the maps alone; returns the background's score."""
    crf = make_crf(config.crf, pick_device(runtime)) if config.refine == "crf" else None
    maps, share = [folder / "cams" / f"{i}.npz" for i in split.ids], config.object_share
    threshold = config.threshold if share is None else background_score(share, maps)
    label = functools.partial(cam_label, threshold=threshold, crf=crf, sharpness=config.sharpness)
    _write(label, folder / "labels", "pseudo labels", runtime, split)
    return threshold


def write_seeds(config: WsssConfig, runtime: Runtime, split: Split, folder: Path) -> None:
    """Writes seeds/<id>.png, the confident labels that the network of pairs learns from."""
    settings, network = config.pairs, PAIR_NETWORKS[METHODS[config.method].walk]
    crf = make_crf(settings.crf, pick_device(runtime))
    seed = functools.partial(network.seed, config=settings, crf=crf)
    _write(seed, folder / "seeds", "seeds", runtime, split)


def _write(
    label: Callable[..., np.ndarray], folder: Path, title: str, runtime: Runtime, split: Split
) -> None:
    """Writes <id>.png into `folder`: what `label` makes of an image, its keys and its maps."""
    paths = [folder / f"{i}.png" for i in split.ids]

    def write(index: int) -> None:
        maps = load_cam(folder.parent / "cams" / f"{split.ids[index]}.npz")
        write_label(paths[index], label(split.read_image(index), *maps))

    make_missing(paths, write, runtime.workers, title)


@torch.inference_mode()
def write_walked_labels(runtime: Runtime, split: Split, folder: Path, network: nn.Module) -> None:
    """Writes labels/<id>.png by a random walk of the maps along the pairs of `network`."""
    device, paths = pick_device(runtime), [folder / "labels" / f"{i}.png" for i in split.ids]
    amp, todo = autocast(runtime, device), distributed.my_share(paths)
    wanted = set(todo)
    bar = tqdm(total=len(split), initial=len(split) - len(todo), desc="walks", unit="image")
    for indices, images in batches_by_size(split, todo, device):
        size = images.shape[-2:]
        cells = tuple(-(-n // network.stride) for n in size)
        with amp:
            predictions = multi_scale(network, images, flip=network.flip, size=cells)
        for index, prediction in zip(indices, predictions, strict=True):
            if index in wanted:
                keys, cam = load_cam(folder / "cams" / f"{split.ids[index]}.npz")
                maps = torch.from_numpy(cam).to(device)
                write_label(paths[index], network.label(prediction, keys, maps, tuple(size)))
                bar.update()
    bar.close()
    distributed.barrier()
