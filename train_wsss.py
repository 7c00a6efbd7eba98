"""Stage 2: train a classifier on image-level tags and write pseudo labels Y^b.

    python train_wsss.py --config configs/demo.yaml

Reads the images and tags of the training list, no mask. Writes below <run_dir>/wsss/:
    checkpoint.pth    the classifier
    cams/<id>.npz     activation maps of the tagged classes: keys (K,), cam (K, h, w) at a quarter
                      of the image's size (rsepm: at its size)
    seeds/<id>.png    methods but cam: confident labels, 255 where nothing is sure
    pairs/            methods but cam: the network of pairs along which the maps are spread
    labels/<id>.png   pseudo labels, 0..C
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from core.config import Config, make_parser, parse
from core.crf.dense import make_crf
from core.data.labels import IGNORE, read_label, write_label
from core.data.lists import Split, read_split
from core.data.loader import LabelledImages, batches_by_size, batches_from
from core.data.transforms import denormalise
from core.inference import multi_scale
from core.models.backbones import BackboneConfig
from core.pictures import heat, label_colours, principal_components
from core.pipeline import Run, wsss_identity
from core.run import checkpoint, distributed
from core.run.device import autocast, pick_device, seed_everything, to_device
from core.run.errors import UserError, run_script
from core.run.loop import EMA, Loop, make_optimizer
from core.run.stage import Stage
from core.run.threads import in_threads
from core.wsss.advcam import AdversarialCam, map_over_devices
from core.wsss.affinity import affinity_loss
from core.wsss.cam import (
    CamClassifier,
    background_score,
    cam_label,
    load_cam,
    normalise_cams,
    save_cam,
)
from core.wsss.irn import BoundaryNetwork
from core.wsss.psa import AffinityNetwork
from core.wsss.rsepm import RecurSeed, RsEpmClassifier
from core.wsss.seam import SeamClassifier
from core.wsss.settings import WsssConfig

PAIR_NETWORKS = {"irn": BoundaryNetwork, "psa": AffinityNetwork}


def main() -> None:
    parser = make_parser("train_wsss.py", __doc__, "wsss")
    text = "Stop before the pseudo labels: pre-training."
    parser.add_argument("--classifier-only", action="store_true", help=text)
    config, options = parse(parser)
    if config.wsss.labels_dir:
        print(f"stage 2, WSSS: skipped, labels come from {config.wsss.labels_dir}")
        return
    run, split = Run(config), read_split(config.data, "train")
    identity = wsss_identity(config, split)
    stage = Stage(run.wsss, "stage 2, WSSS", config, identity, config.data.root, split.skipped)
    if stage.already_done():
        return
    classifier = train_classifier(config, run, split, stage.made_from)
    stage.save()
    if options.classifier_only:
        print(f"classifier: {run.wsss / 'checkpoint.pth'}")
        return
    for name in ("cams", "labels"):
        stage.sign(run.wsss / name)
    write_cams(config, run, split, classifier)
    results = {}
    if config.wsss.pairs:
        write_walked_labels(config, run, split, pair_network(config, run, split))
    else:
        results["threshold"] = write_labels(config, run, split)
    foreground = foreground_share(run, split)
    stage.finish({"foreground": foreground, **results})
    print(
        f"{len(split)} pseudo labels in {run.wsss / 'labels'}, {foreground:.1%} foreground\n"
        "next: python make_debiased_labels.py, with the same --config"
    )


def build_classifier(settings: WsssConfig, num_classes: int) -> nn.Module:
    """The configured method's network, which has `activation` and `parameter_groups`."""
    backbone = settings.backbone.without_weights() if settings.weights else settings.backbone
    if settings.pairs == "irn":  # refuses backbones without boundaries before anything is trained
        with torch.device("meta"):
            BoundaryNetwork(backbone.without_weights(), settings.irn)
    if settings.method == "seam":
        return SeamClassifier(backbone, num_classes, settings.seam)
    if settings.method == "rsepm":
        return RsEpmClassifier(backbone, num_classes, settings.output_stride, settings.rsepm)
    frozen_norm = settings.norm == "frozen"
    options = (settings.output_stride, settings.pooling, frozen_norm, settings.frozen_stages)
    return CamClassifier(backbone, num_classes, *options)


def train_classifier(
    config: Config, run: Run, split: Split, made_from: dict[str, Any]
) -> nn.Module:
    """Fits the classifier to the tags, or reads the one trained before or released."""
    settings, device = config.wsss, pick_device(config)
    seed_everything(config.seed)
    classifier = build_classifier(settings, len(config.data.classes))
    if settings.weights:
        checkpoint.load_published(classifier, Path(settings.weights), classifier.RELEASED)
        state = classifier.state_dict()
        content = {"network": state, "ema": state, "made_from": made_from}
        checkpoint.save(run.wsss / "checkpoint.pth", content)
        return to_device(classifier, device)
    classifier = to_device(classifier, device).train()
    if config.sync_norm:
        distributed.share_normalisation(classifier)
    groups = classifier.parameter_groups(settings.lr, settings.head_lr)
    iterations = max(1, settings.epochs * len(split) // settings.batch_size)
    optimizer, schedule = make_optimizer(
        settings.optimizer, groups, settings.weight_decay, iterations
    )
    dataset = LabelledImages(split, None, len(config.data.classes), settings.augment)
    batches = batches_from(dataset, settings.batch_size, iterations, config)
    amp, networks, ema = autocast(config, device), {"network": classifier}, None
    if settings.method == "rsepm":
        if config.accumulate > 1:
            raise UserError("rsepm pastes objects across the whole batch; set accumulate to 1 here")
        ema = EMA(classifier, settings.rsepm.ema)
        networks["ema"] = ema.network
        epoch = len(split) / settings.batch_size
        recur_seed = RecurSeed(settings.rsepm, classifier, ema.network, epoch)

    def pictures(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images, tags = batch["image"].to(device), batch["tags"].to(device)
        shown = ema.network if ema else classifier.eval()
        with amp:
            maps = (shown.activation(images).float() * tags[:, :, None, None]).amax(1)
        if not ema:
            classifier.train()
        return {"image": denormalise(images), "map": heat(maps, images.shape[-2:])}

    loop = Loop(
        *("classifier", run.wsss, config, networks, optimizer, schedule, batches, iterations),
        *(ema, pictures, made_from),
    )
    for t, batch in loop:
        images = batch["image"].to(device, memory_format=torch.channels_last)
        tags, figures = batch["tags"].to(device), {}
        if ema:
            inside = batch["label"].to(device) != IGNORE  # not padding
            with amp:
                figures = recur_seed(images, tags, inside, t)
            loop.backward(figures.pop("loss"))
        for rows in () if ema else loop.parts(len(tags)):
            with amp:
                loss = classifier.loss(images[rows], tags[rows])
            loop.backward(loss * (len(tags[rows]) / len(tags)))
        loop.step(**figures)
    return ema.network if ema else classifier.eval()


def write_cams(config: Config, run: Run, split: Split, classifier: nn.Module) -> None:
    """Writes the maps of the tagged classes of every image that has none yet."""
    folder = run.wsss / "cams"
    todo = distributed.my_share([folder / f"{i}.npz" for i in split.ids])
    bar = tqdm(total=len(split), initial=len(split) - len(todo), desc="maps", unit="image")
    compute = adversarial_maps if config.wsss.method == "advcam" else activations
    for index, maps in compute(config, split, classifier, todo):
        tagged = split.tags[index].nonzero()[0]
        if config.wsss.method == "seam":  # its refined maps are nowhere quite 0
            maps = maps - maps.min((1, 2), keepdims=True)
        save_cam(folder / f"{split.ids[index]}.npz", tagged + 1, normalise_cams(maps))
        bar.update()
    bar.close()
    distributed.barrier()


def activations(
    config: Config, split: Split, classifier: nn.Module, todo: Sequence[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Activation maps of the tagged classes over several scales, in batches: (K, H/4, W/4), or
    (K, H, W) with rsepm, whose code resizes them to the image's size by the nearest cell."""
    settings, device, wanted = config.wsss, pick_device(config), set(todo)
    amp, whole = autocast(config, device), settings.method == "rsepm"
    mode = "nearest" if whole else "bilinear"
    for indices, images in batches_by_size(split, settings.batch_size, todo):
        with amp:
            maps = multi_scale(
                classifier.activation, images.to(device), settings.scales, settings.flip, mode=mode
            )
        if not whole:
            quarter = [-(-n // 4) for n in images.shape[-2:]]
            maps = F.interpolate(maps, quarter, mode="bilinear")
        pairs = zip(indices, maps.cpu().numpy(), strict=True)
        yield from ((k, m[split.tags[k]]) for k, m in pairs if k in wanted)


def adversarial_maps(
    config: Config, split: Split, classifier: CamClassifier, todo: Sequence[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """AdvCAM's maps of the tagged classes, (K, H/4, W/4), shared out among all GPUs, or among
    `workers` processes."""
    device = pick_device(config)
    if device.type == "cpu":
        devices = [device] * max(1, config.workers)
    else:
        alone = config.device in ("auto", "cuda") and distributed.world() == 1
        count = torch.cuda.device_count() if alone else 1
        devices = [torch.device("cuda", k) for k in range(count)] if count > 1 else [device]
    maps = AdversarialCam(classifier, split, config.wsss.advcam)
    yield from map_over_devices(maps, todo, devices)


def write_labels(config: Config, run: Run, split: Split) -> float:
    """Writes the pseudo label of every image that has none; returns the background's score."""
    settings = config.wsss
    crf = make_crf(settings.crf) if settings.refine == "crf" else None
    paths = [run.wsss / "labels" / f"{i}.png" for i in split.ids]
    todo = distributed.my_share(paths)
    maps = [run.wsss / "cams" / f"{i}.npz" for i in split.ids]
    share = settings.object_share
    threshold = settings.threshold if share is None else background_score(share, maps)

    def write(index: int) -> None:
        image = split.read_image(index)
        label = cam_label(image, *load_cam(maps[index]), threshold, crf, settings.sharpness)
        write_label(paths[index], label)

    done = len(split) - len(todo)
    for _ in in_threads(write, todo, config.workers, "pseudo labels", len(split), done):
        pass
    distributed.barrier()
    return threshold


def pair_network(config: Config, run: Run, split: Split) -> nn.Module:
    """The network of pairs along which maps are spread: trained on seeds, or released."""
    settings = getattr(config.wsss, config.wsss.pairs)
    kind, backbone = PAIR_NETWORKS[config.wsss.pairs], config.wsss.backbone
    if settings.weights:
        network = kind(backbone.without_weights(), settings)
        checkpoint.load_published(network, Path(settings.weights), kind.RELEASED)
        return to_device(network, pick_device(config))
    write_seeds(config, run, split)
    return train_pairs(config, run, split, kind, backbone)


def write_seeds(config: Config, run: Run, split: Split) -> None:
    """Writes the confident label of every image that has none yet."""
    folder, settings = run.wsss / "seeds", getattr(config.wsss, config.wsss.pairs)
    confident_label, crf = PAIR_NETWORKS[config.wsss.pairs].seed, make_crf(settings.crf)
    todo = distributed.my_share([folder / f"{i}.png" for i in split.ids])

    def write(index: int) -> None:
        keys, cam = load_cam(run.wsss / "cams" / f"{split.ids[index]}.npz")
        seed = confident_label(split.read_image(index), keys, cam, settings, crf)
        write_label(folder / f"{split.ids[index]}.png", seed)

    done = len(split) - len(todo)
    for _ in in_threads(write, todo, config.workers, "seeds", len(split), done):
        pass
    distributed.barrier()


def train_pairs(
    config: Config, run: Run, split: Split, kind: type[nn.Module], backbone: BackboneConfig
) -> nn.Module:
    """Fits the network to pairs of confident pixels, or reads the one trained before."""
    settings, device = getattr(config.wsss, config.wsss.pairs), pick_device(config)
    cells, needed = settings.augment.crop // kind.stride, 2 * settings.radius - 1
    if cells < needed:
        raise UserError(
            f"a crop of {settings.augment.crop} pixels has {cells} cells, pairs of radius "
            f"{settings.radius} need {needed}; raise augment.crop or lower radius"
        )
    seed_everything(config.seed)
    network = to_device(kind(backbone, settings), device).train()
    groups = network.parameter_groups(settings.lr)
    iterations = max(1, settings.epochs * len(split) // settings.batch_size)
    optimizer, schedule = make_optimizer("sgd", groups, settings.weight_decay, iterations)
    seeds = [run.wsss / "seeds" / f"{i}.png" for i in split.ids]
    dataset = LabelledImages(split, seeds, len(config.data.classes), settings.augment)
    batches = batches_from(dataset, settings.batch_size, iterations, config)
    amp = autocast(config, device)

    def pictures(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with amp:
            predictions = network.eval()(batch["image"].to(device)).float()
        network.train()
        if predictions.shape[1] == 1:  # a boundary
            drawn = heat(predictions[:, 0].sigmoid(), batch["image"].shape[-2:])
        else:
            drawn = torch.stack(principal_components(predictions))
        seed = label_colours(batch["label"])
        return {"image": denormalise(batch["image"]), "seed": seed, "prediction": drawn}

    networks, folder = {"network": network}, run.wsss / "pairs"
    loop = Loop(
        *("pairs", folder, config, networks, optimizer, schedule, batches, iterations),
        pictures=pictures,
    )
    for _, batch in loop:
        images = batch["image"].to(device, memory_format=torch.channels_last)
        with amp:
            predictions = network(images).float()
        label = batch["label"].to(device)[:, None].float()
        label = F.interpolate(label, predictions.shape[-2:], mode="nearest-exact")[:, 0].long()
        loop.step(affinity_loss(network.affinity(predictions), label, settings.radius))
    return network.eval()


@torch.inference_mode()
def write_walked_labels(config: Config, run: Run, split: Split, network: nn.Module) -> None:
    """Writes the label of every image that has none yet, by a random walk of its maps."""
    device, folder = pick_device(config), run.wsss / "labels"
    amp, batch_size = autocast(config, device), network.config.batch_size
    todo = distributed.my_share([folder / f"{i}.png" for i in split.ids])
    wanted = set(todo)
    bar = tqdm(total=len(split), initial=len(split) - len(todo), desc="walks", unit="image")
    for indices, images in batches_by_size(split, batch_size, todo):
        size = images.shape[-2:]
        cells = tuple(-(-n // network.stride) for n in size)
        with amp:
            predictions = multi_scale(network, images.to(device), flip=network.flip, size=cells)
        for index, prediction in zip(indices, predictions, strict=True):
            if index in wanted:
                keys, cam = load_cam(run.wsss / "cams" / f"{split.ids[index]}.npz")
                maps = torch.from_numpy(cam).to(device)
                label = network.label(prediction, keys, maps, tuple(size))
                write_label(folder / f"{split.ids[index]}.png", label)
                bar.update()
    bar.close()
    distributed.barrier()


def foreground_share(run: Run, split: Split) -> float:
    """Mean over the images of the share of pixels with a class."""
    labels = (read_label(run.wsss / "labels" / f"{i}.png") for i in split.ids)
    return sum(float((label > 0).mean()) for label in labels) / len(split)


if __name__ == "__main__":
    run_script(main)
