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
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from core.config import Config, make_parser, parse
from core.data.labels import IGNORE, read_label, write_label
from core.data.loader import LabelledImages, batches_by_size, batches_from
from core.data.splits import Split, read_split
from core.data.transforms import denormalise
from core.inference import multi_scale
from core.models.backbones import to_device
from core.pictures import heat
from core.run import checkpoint, distributed
from core.run.errors import UserError, run_script
from core.run.identity import wsss_identity
from core.run.loop import (
    EMA,
    autocast,
    in_parts,
    make_optimizer,
    pick_device,
    seed_everything,
    train,
)
from core.run.stage import Run, Stage
from core.run.threads import in_threads
from core.wsss.advcam import AdversarialCam, map_over_devices
from core.wsss.cam import CamClassifier
from core.wsss.classifiers import Classifier, build_classifier
from core.wsss.irn import irn_spreading
from core.wsss.psa import psa_spreading
from core.wsss.pseudo_labels import (
    background_score,
    cam_label,
    label_crf,
    load_cam,
    normalise_cams,
    save_cam,
)
from core.wsss.published import load_published
from core.wsss.rsepm import RecurSeed
from core.wsss.spreading import write_spread_labels


def main() -> None:
    parser = make_parser("train_wsss.py", __doc__)
    parser.add_argument(
        "--classifier-only",
        action="store_true",
        help="Stop before the pseudo labels: pre-training.",
    )
    config, options = parse(parser)
    if config.wsss.labels_dir:
        print(f"stage 2, WSSS: skipped, labels are those of {config.wsss.labels_dir}")
        return
    run, split = Run(config), read_split(config.data, "train")
    stage = Stage(run.wsss, "stage 2, WSSS", config, wsss_identity(config, split), split.skipped)
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
    if config.wsss.method == "cam":
        results["threshold"] = write_labels(config, run, split)
    else:
        spreading = psa_spreading if config.wsss.method == "seam" else irn_spreading
        write_spread_labels(config, run, split, spreading(config.wsss))
    foreground = foreground_share(run, split)
    stage.finish({"foreground": foreground, **results})
    print(
        f"{len(split)} pseudo labels in {run.wsss / 'labels'}, {foreground:.1%} foreground\n"
        "next: python make_debiased_labels.py, with the same --config"
    )


def train_classifier(
    config: Config, run: Run, split: Split, made_from: dict[str, Any]
) -> Classifier:
    """Fits the multi-label classifier to the tags (or reads the one fitted before, or released)."""
    settings, device = config.wsss, pick_device(config)
    seed_everything(config.seed)
    classifier = build_classifier(settings, len(config.data.classes))
    if settings.weights:
        state = load_published(classifier, settings.weights).state_dict()
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
    cast, networks, ema = autocast(config, device), {"network": classifier}, None
    if settings.method == "rsepm":
        if config.accumulate > 1:
            raise UserError("rsepm pastes objects across the whole batch; set accumulate to 1 here")
        ema = EMA(classifier, settings.rsepm.ema)
        networks["ema"] = ema.network
        recur_seed = RecurSeed(
            settings.rsepm, classifier, ema.network, len(split) / settings.batch_size
        )

    def step(batch: dict[str, Tensor], t: int) -> dict[str, Tensor]:
        images = batch["image"].to(device, memory_format=torch.channels_last)
        tags = batch["tags"].to(device)
        if ema is not None:
            inside = batch["label"].to(device) != IGNORE  # not padding
            with cast:
                return recur_seed(images, tags, inside, t)

        def loss(rows: slice) -> Tensor:
            share = len(tags[rows]) / len(tags)
            with cast:
                return classifier.loss(images[rows], tags[rows]) * share

        return {"loss": in_parts(loss, len(tags), config.accumulate)}

    batches = batches_from(dataset, settings.batch_size, iterations, config)

    def pictures(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images, tags = batch["image"].to(device), batch["tags"].to(device)
        shown = ema.network if ema else classifier.eval()
        with cast:
            maps = (shown.activation(images).float() * tags[:, :, None, None]).amax(1)
        if not ema:
            classifier.train()
        return {"image": denormalise(images), "map": heat(maps, images.shape[-2:])}

    train(
        "classifier",
        networks,
        optimizer,
        schedule,
        batches,
        step,
        iterations,
        run.wsss,
        config,
        ema,
        pictures,
        made_from,
    )
    return ema.network if ema else classifier.eval()


def write_cams(config: Config, run: Run, split: Split, classifier: Classifier) -> None:
    """Writes the maps of the tagged classes of every image that has none yet."""
    folder = run.wsss / "cams"
    todo = distributed.my_share([folder / f"{i}.npz" for i in split.ids])
    bar = tqdm(total=len(split), initial=len(split) - len(todo), desc="maps", unit="image")
    compute = climbed if config.wsss.method == "advcam" else activations
    for index, maps in compute(config, split, classifier, todo):
        tagged = split.tags[index].nonzero()[0]
        if config.wsss.method == "seam":  # its refined maps are nowhere quite 0
            maps = maps - maps.min((1, 2), keepdims=True)
        save_cam(folder / f"{split.ids[index]}.npz", tagged + 1, normalise_cams(maps))
        bar.update()
    bar.close()
    distributed.barrier()


def activations(
    config: Config, split: Split, classifier: CamClassifier, todo: Sequence[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Activation maps of the tagged classes over several scales, in batches: (K, H/4, W/4), or
    (K, H, W) with rsepm, whose code resizes them to the image's size by the nearest cell."""
    settings, device, wanted = config.wsss, pick_device(config), set(todo)
    cast, whole = autocast(config, device), settings.method == "rsepm"
    mode = "nearest" if whole else "bilinear"
    for indices, images in batches_by_size(split, settings.batch_size, todo):
        with cast:
            maps = multi_scale(
                classifier.activation, images.to(device), settings.scales, settings.flip, mode=mode
            )
        if not whole:
            quarter = [-(-n // 4) for n in images.shape[-2:]]
            maps = F.interpolate(maps, quarter, mode="bilinear")
        pairs = zip(indices, maps.cpu().numpy(), strict=True)
        yield from ((k, m[split.tags[k]]) for k, m in pairs if k in wanted)


def climbed(
    config: Config, split: Split, classifier: CamClassifier, todo: Sequence[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """AdvCAM's maps of the tagged classes, (K, H/4, W/4): images are shared out among all GPUs, or
    among `workers` processes."""
    device = pick_device(config)
    if device.type == "cpu":
        devices = [device] * max(1, config.workers)
    else:
        alone = config.device in ("auto", "cuda") and distributed.world() == 1
        count = torch.cuda.device_count() if alone else 1
        devices = [torch.device("cuda", k) for k in range(count)] if count > 1 else [device]
    climb = AdversarialCam(classifier, split, config.wsss.advcam)
    yield from map_over_devices(climb, todo, devices)


def write_labels(config: Config, run: Run, split: Split) -> float:
    """Writes the pseudo label of every image that has none; returns the score of the background."""
    settings, crf = config.wsss, label_crf(config.wsss)
    paths = [run.wsss / "labels" / f"{i}.png" for i in split.ids]
    todo = distributed.my_share(paths)
    maps = [run.wsss / "cams" / f"{i}.npz" for i in split.ids]
    threshold = background_score(settings, maps)

    def write(index: int) -> None:
        keys, cam = load_cam(maps[index])
        image = split.read_image(index)
        label = cam_label(image, keys, cam, threshold, crf, settings.sharpness)
        write_label(paths[index], label)

    done = len(split) - len(todo)
    for _ in in_threads(write, todo, config.workers, "pseudo labels", len(split), done):
        pass
    distributed.barrier()
    return threshold


def foreground_share(run: Run, split: Split) -> float:
    """Mean over the images of the share of pixels with a class."""
    labels = (read_label(run.wsss / "labels" / f"{i}.png") for i in split.ids)
    return sum(float((label > 0).mean()) for label in labels) / len(split)


if __name__ == "__main__":
    run_script(main)
