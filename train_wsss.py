"""Stage 2: train a classifier on image-level tags and write pseudo labels Y^b.

    python train_wsss.py --config configs/demo.yaml

Reads the images and tags of the training list, never masks. Writes below <run_dir>/wsss/:
    checkpoint.pth    the classifier
    cams/<id>.npz     activation maps of the tagged classes: keys (K,), cam (K, h, w) at a quarter
                      of the image's size (rsepm: at its size)
    seeds/<id>.png    all methods but cam: confident labels, 255 where uncertain
    pairs/            all methods but cam: the affinity network that propagates the maps
    labels/<id>.png   pseudo labels, 0..C
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.config import Config, make_parser, parse
from core.data.labels import IGNORE, read_label
from core.data.lists import Split, read_split
from core.data.loader import LabelledImages, batches_from
from core.data.transforms import denormalise
from core.pictures import heat, label_colours, principal_components
from core.pipeline import Run, wsss_identity
from core.run import checkpoint, distributed
from core.run.device import autocast, pick_device, seed_everything, to_device
from core.run.errors import UserError, run_script
from core.run.loop import EMA, Loop, make_optimizer
from core.run.stage import Stage
from core.wsss.affinity import affinity_loss
from core.wsss.outputs import write_cams, write_labels, write_seeds, write_walked_labels
from core.wsss.settings import METHODS, PAIR_NETWORKS, WsssConfig


def main() -> None:
    parser = make_parser("train_wsss.py", __doc__, "wsss")
    text = "Train only the classifier, write no pseudo labels; for pre-training."
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
    write_cams(config.wsss, config, split, run.wsss, classifier)
    results = {}
    if config.wsss.pairs:
        write_walked_labels(config, split, run.wsss, pair_network(config, run, split))
    else:
        results["threshold"] = write_labels(config.wsss, config, split, run.wsss)
    labels = (read_label(run.wsss / "labels" / f"{i}.png") for i in split.ids)
    foreground = sum(float((label > 0).mean()) for label in labels) / len(split)
    stage.finish({"foreground": foreground, **results})
    print(f"{len(split)} pseudo labels in {run.wsss / 'labels'}, {foreground:.1%} foreground")
    print("next: python make_debiased_labels.py, with the same --config")


def build_classifier(settings: WsssConfig, num_classes: int) -> nn.Module:
    """The configured method's network, with random weights or the backbone's pre-trained ones."""
    backbone = settings.backbone.without_weights() if settings.weights else settings.backbone
    method = METHODS[settings.method]
    if method.walk:  # refuses backbones that lack a stage for the walk before anything is trained
        with torch.device("meta"):
            PAIR_NETWORKS[method.walk](backbone.without_weights(), settings.pairs)
    return method.network(settings, backbone, num_classes)


def train_classifier(config: Config, run: Run, split: Split, made_from: dict) -> nn.Module:
    """Fits the classifier to the tags, or reads the one trained before or released."""
    settings, device = config.wsss, pick_device(config)
    seed_everything(config.seed)
    classifier = build_classifier(settings, len(config.data.classes))
    if settings.weights:
        checkpoint.load_published(classifier, Path(settings.weights))
        state = classifier.state_dict()
        content = {"network": state, "ema": state, "made_from": made_from}
        checkpoint.save(run.wsss / "checkpoint.pth", content)
        return to_device(classifier, device)
    classifier = to_device(classifier, device).train()
    if config.sync_norm:
        distributed.share_normalisation(classifier)
    groups = classifier.parameter_groups(settings.lr, settings.head_lr)
    iterations = max(1, settings.epochs * len(split) // settings.batch_size)
    kind, decay = settings.optimizer, settings.weight_decay
    optimizer, schedule = make_optimizer(kind, groups, decay, iterations)
    dataset = LabelledImages(split, None, len(config.data.classes), settings.augment)
    batches = batches_from(dataset, settings.batch_size, iterations, config, settings.class_balance)
    amp, networks, ema = autocast(config, device), {"network": classifier}, None
    method = METHODS[settings.method]
    if method.teacher:
        if config.accumulate > 1:
            raise UserError(f"{settings.method} needs whole batches; set accumulate to 1 here")
        own = getattr(settings, settings.method)
        ema = EMA(classifier, own.ema)
        networks["ema"] = ema.network
        losses = method.teacher(own, classifier, ema.network, len(split) / settings.batch_size)

    def pictures(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images, tags = batch["image"], batch["tags"]
        shown = ema.network if ema else classifier.eval()
        with amp:
            maps = (shown.activation(images).float() * tags[:, :, None, None]).amax(1)
        if not ema:
            classifier.train()
        return {"image": denormalise(images), "map": heat(maps, images.shape[-2:])}

    loop = Loop(
        "classifier",
        run.wsss,
        config,
        networks=networks,
        optimizer=optimizer,
        schedule=schedule,
        batches=batches,
        iterations=iterations,
        ema=ema,
        pictures=pictures,
        made_from=made_from,
    )
    for t, batch in loop:
        images = batch["image"].contiguous(memory_format=torch.channels_last)
        tags, figures = batch["tags"], {}
        if ema:
            inside = batch["label"] != IGNORE  # not padding
            with amp:
                figures = losses(images, tags, inside, t)
            loop.backward(figures.pop("loss"))
        for rows in () if ema else loop.parts(len(tags)):
            with amp:
                loss = classifier.loss(images[rows], tags[rows])
            loop.backward(loss * (len(tags[rows]) / len(tags)))
        loop.step(**figures)
    return ema.network if ema else classifier.eval()


def pair_network(config: Config, run: Run, split: Split) -> nn.Module:
    """The affinity network that propagates maps: fitted to pairs of confident pixels of the seeds
    (or read, if that was done before), or released."""
    settings, backbone, device = config.wsss.pairs, config.wsss.backbone, pick_device(config)
    kind = PAIR_NETWORKS[METHODS[config.wsss.method].walk]
    if settings.weights:
        network = kind(backbone.without_weights(), settings)
        checkpoint.load_published(network, Path(settings.weights))
        return to_device(network, device)
    write_seeds(config.wsss, config, split, run.wsss)
    seed_everything(config.seed)
    network = kind(backbone, settings)
    cells, needed = settings.augment.crop // network.stride, 2 * settings.radius - 1
    if cells < needed:
        raise UserError(
            f"a crop of {settings.augment.crop} pixels has {cells} cells, pairs of radius "
            f"{settings.radius} need {needed}; raise augment.crop or lower radius"
        )
    network = to_device(network, device).train()
    groups = network.parameter_groups(settings.lr)
    iterations = max(1, settings.epochs * len(split) // settings.batch_size)
    optimizer, schedule = make_optimizer("sgd", groups, settings.weight_decay, iterations)
    seeds = [run.wsss / "seeds" / f"{i}.png" for i in split.ids]
    dataset = LabelledImages(split, seeds, len(config.data.classes), settings.augment)
    batches = batches_from(dataset, settings.batch_size, iterations, config)
    amp = autocast(config, device)

    def pictures(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with amp:
            predictions = network.eval()(batch["image"]).float()
        network.train()
        if predictions.shape[1] == 1:  # a boundary
            drawn = heat(predictions[:, 0].sigmoid(), batch["image"].shape[-2:])
        else:
            drawn = torch.stack(principal_components(predictions))
        seed = label_colours(batch["label"])
        return {"image": denormalise(batch["image"]), "seed": seed, "prediction": drawn}

    loop = Loop(
        "pairs",
        run.wsss / "pairs",
        config,
        networks={"network": network},
        optimizer=optimizer,
        schedule=schedule,
        batches=batches,
        iterations=iterations,
        pictures=pictures,
    )
    for _, batch in loop:
        images = batch["image"].contiguous(memory_format=torch.channels_last)
        with amp:
            predictions = network(images).float()
        label = batch["label"][:, None].float()
        label = F.interpolate(label, predictions.shape[-2:], mode="nearest-exact")[:, 0].long()
        loop.step(affinity_loss(network.affinity(predictions), label, settings.radius))
    return network.eval()


if __name__ == "__main__":
    run_script(main)
