"""Stage 4: train a DeepLab on debiased labels that an EMA teacher completes (Eq. 6-7).

    python train_segmentation.py --config configs/demo.yaml --segmentation.mode mars

Modes: wsss (plain pseudo labels), ignore (biased pixels left out), complement (filled by the
teacher), mars (filled, under the certainty-weighted loss), supervised (ground truth; the upper
bound). Reads the training images, tags and label maps; ground truth in the supervised mode alone.
Writes <run_dir>/segmentation/<mode>/checkpoint.pth with the student and its EMA.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from core.complement import Complement
from core.config import Config, make_parser, parse
from core.data.checks import check_inputs
from core.data.loader import LabelledImages, batches_from
from core.data.splits import Split, ground_truth, label_files, read_split
from core.data.transforms import denormalise
from core.debias import labelled_pixels
from core.models.backbones import to_device
from core.models.deeplab import build_deeplab
from core.pictures import label_colours
from core.run import distributed
from core.run.errors import run_script
from core.run.identity import segmentation_identity
from core.run.loop import (
    EMA,
    autocast,
    in_parts,
    make_optimizer,
    pick_device,
    seed_everything,
    train,
)
from core.run.stage import Run, Stage, check_classes, check_upstream_of


def main() -> None:
    config, _ = parse(make_parser("train_segmentation.py", __doc__))
    run, split = Run(config), read_split(config.data, "train")
    labels = training_labels(config, run, split)
    folder = run.segmentation()
    identity = segmentation_identity(config, split, labels)
    title = f"stage 4, segmentation ({folder.name})"
    stage = Stage(folder, title, config, identity, split.skipped)
    if stage.already_done():
        return
    kind = "truth" if config.segmentation.mode == "supervised" else "debiased"
    check_inputs(split, labels, config.data.classes, config.workers, kind)
    train_network(config, stage, split, labels)
    stage.finish({})
    print(
        f"student and teacher in {folder / 'checkpoint.pth'}\n"
        "next: python evaluate.py, with the same --config"
    )


def training_labels(config: Config, run: Run, split: Split) -> tuple[Path, ...]:
    """The label maps that the mode trains on."""
    mode, folder = config.segmentation.mode, run.training_labels
    if mode == "supervised":
        return ground_truth(config.data, split)
    remedy = "check segmentation.labels_dir"
    if not config.segmentation.labels_dir:
        upstream = ("wsss",) if mode == "wsss" else ("wsss", "uss", "debias")
        check_upstream_of(config, split, *upstream)
        remedy = f"run {'train_wsss.py' if mode == 'wsss' else 'make_debiased_labels.py'} first"
    check_classes(folder, config.data.classes)
    return label_files(folder, split, remedy)


def train_network(config: Config, stage: Stage, split: Split, labels: tuple[Path, ...]) -> None:
    settings, device = config.segmentation, pick_device(config)
    num_classes = len(config.data.classes)
    seed_everything(config.seed)
    network = to_device(build_deeplab(settings, num_classes), device).train()
    if config.sync_norm:
        distributed.share_normalisation(network)
    ema = EMA(network, settings.ema)
    groups = network.parameter_groups(settings.lr, settings.head_lr)
    iterations = max(1, settings.epochs * len(split) // settings.batch_size)
    optimizer, schedule = make_optimizer(
        settings.optimizer, groups, settings.weight_decay, iterations, momentum=0.9
    )
    dataset = LabelledImages(split, labels, num_classes, settings.augment)
    fill = None
    if settings.mode in ("complement", "mars"):
        first = round(settings.warmup * iterations)
        fill = Complement(settings, ema.network, first, config.workers)
    cast = autocast(config, device)
    if config.compile:
        network.backbone.compile()
        network.head.compile()

    batches = batches_from(dataset, settings.batch_size, iterations, config)

    def step(batch: dict[str, Tensor], t: int) -> dict[str, Tensor]:
        images = batch["image"].to(device, memory_format=torch.channels_last)
        label, tags = batch["label"].to(device), batch["tags"].to(device)
        with cast:
            completed = fill.begin(images, label, tags, t) if fill else lambda: (label, None, {})

        @functools.cache
        def counts() -> Tensor:
            return distributed.mean(labelled_pixels(completed()[0]))

        def loss(rows: slice) -> Tensor:
            with cast:
                logits = network.training_logits(images[rows])  # while threads refine labels
                label, certainty, _ = completed()
                certainty = certainty[rows] if settings.mode == "mars" else None
                return network.loss(logits, label[rows], certainty, settings.balanced, counts())

        return {"loss": in_parts(loss, len(images), config.accumulate), **completed()[2]}

    def pictures(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with cast:
            logits = ema.network(batch["image"].to(device))
        label = F.interpolate(logits.float(), batch["label"].shape[-2:], mode="bilinear").argmax(1)
        drawn = {"label": label_colours(batch["label"]), "teacher": label_colours(label)}
        return {"image": denormalise(batch["image"]), **drawn}

    train(
        f"segmentation ({stage.folder.name})",
        {"network": network, "ema": ema.network},
        optimizer,
        schedule,
        batches,
        step,
        iterations,
        stage.folder,
        config,
        ema,
        pictures,
        stage.made_from,
    )


if __name__ == "__main__":
    run_script(main)
