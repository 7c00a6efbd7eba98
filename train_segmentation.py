"""Stage 4: train a DeepLab on debiased labels that an EMA teacher completes (Eq. 6-7).

    python train_segmentation.py --config configs/demo.yaml --segmentation.mode mars

Modes: wsss (plain pseudo labels), ignore (biased pixels left out), complement (filled by the
teacher), mars (filled, with the certainty-weighted loss), supervised (ground truth; the upper
bound). Reads the training images, tags and label maps; ground truth only in supervised mode.
Writes <run_dir>/segmentation/<mode>/checkpoint.pth with the student and its EMA.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from core.complement import Complement, labelled_pixels, segmentation_loss, unfilled
from core.config import Config, make_parser, parse
from core.data.checks import check_inputs
from core.data.labels import BACKGROUND, BIASED
from core.data.lists import Split, ground_truth, label_files, read_split
from core.data.loader import LabelledImages, batches_from
from core.data.transforms import denormalise
from core.models.deeplab import build_deeplab
from core.pictures import label_colours
from core.pipeline import Run, check_upstream, segmentation_identity
from core.run import distributed
from core.run.device import autocast, pick_device, seed_everything, to_device
from core.run.errors import run_script
from core.run.loop import EMA, Loop, make_optimizer
from core.run.stage import Stage, check_classes


def main() -> None:
    config, _ = parse(make_parser("train_segmentation.py", __doc__, "segmentation"))
    run, split = Run(config), read_split(config.data, "train")
    labels = label_maps(config, run, split)
    folder = run.segmentation()
    identity = segmentation_identity(config, split, labels)
    title = f"stage 4, segmentation ({folder.name})"
    stage = Stage(folder, title, config, identity, config.data.root, split.skipped)
    if stage.already_done():
        return
    kind = "truth" if config.segmentation.mode == "supervised" else "debiased"
    check_inputs(split, labels, config.data.classes, config.workers, kind)
    train_network(config, stage, split, labels)
    stage.finish({})
    print(f"student and teacher in {folder / 'checkpoint.pth'}")
    print("next: python evaluate.py, with the same --config")


def label_maps(config: Config, run: Run, split: Split) -> tuple[Path, ...]:
    """The label maps that the mode trains on."""
    mode, folder = config.segmentation.mode, run.labels_to_train_on
    if mode == "supervised":
        return ground_truth(config.data, split)
    remedy = "check segmentation.labels_dir"
    if not config.segmentation.labels_dir:
        upstream = ("wsss",) if mode == "wsss" else ("wsss", "uss", "debias")
        check_upstream(config, split, *upstream)
        remedy = f"run {'train_wsss.py' if mode == 'wsss' else 'make_debiased_labels.py'} first"
    check_classes(folder, config.data.classes)
    return label_files(folder, split, remedy)


def train_network(config: Config, stage: Stage, split: Split, labels: tuple[Path, ...]) -> None:
    """Trains student and teacher; both end up in the stage's checkpoint."""
    settings, device = config.segmentation, pick_device(config)
    amp, num_classes = autocast(config, device), len(config.data.classes)
    seed_everything(config.seed)
    student = to_device(build_deeplab(settings, num_classes), device).train()
    if config.sync_norm:
        distributed.share_normalisation(student)
    ema = EMA(student, settings.ema)
    teacher = ema.network
    groups = student.parameter_groups(settings.lr, settings.head_lr)
    iterations = max(1, settings.epochs * len(split) // settings.batch_size)
    kind, decay = settings.optimizer, settings.weight_decay
    optimizer, schedule = make_optimizer(kind, groups, decay, iterations, momentum=0.9)
    dataset = LabelledImages(split, labels, num_classes, settings.augment)
    batches = batches_from(dataset, settings.batch_size, iterations, config, settings.class_balance)
    balanced, at_cells = settings.balanced, student.head.at_cells
    complement, fill_from = None, round(settings.warmup * iterations)
    if settings.mode in ("complement", "mars"):
        complement = Complement(settings, teacher, config.workers, device)
    if config.compile:
        student.backbone.compile()
        student.head.compile()

    def pictures(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with amp:
            logits = teacher(batch["image"])
        label = F.interpolate(logits.float(), batch["label"].shape[-2:], mode="bilinear").argmax(1)
        drawn = {"label": label_colours(batch["label"]), "teacher": label_colours(label)}
        return {"image": denormalise(batch["image"]), **drawn}

    loop = Loop(
        f"segmentation ({stage.folder.name})",
        stage.folder,
        config,
        networks={"network": student, "ema": teacher},
        optimizer=optimizer,
        schedule=schedule,
        batches=batches,
        iterations=iterations,
        ema=ema,
        pictures=pictures,
        made_from=stage.made_from,
    )
    for t, batch in loop:
        images = batch["image"].contiguous(memory_format=torch.channels_last)
        label, tags = batch["label"], batch["tags"]
        filled, counts = unfilled(label), None
        if complement and t < fill_from and settings.warmup_label == "background":
            filled = unfilled(label.masked_fill(label == BIASED, BACKGROUND))
        if complement and t >= fill_from:
            with amp:
                filled = complement.submit(images, label, tags)  # teacher; starts CRF threads
        for rows in loop.parts(len(images)):
            with amp:
                logits = student.training_logits(images[rows])  # overlaps with the CRF threads
            # Waits for the threads, so it comes after the first part's forward pass; then cached.
            target, certainty, figures = filled()  # Fig. 6 and Eq. 6
            if counts is None:  # of the whole batch, not of a part
                counts = distributed.mean(labelled_pixels(target))
            weight = certainty[rows] if settings.mode == "mars" else None  # W of Eq. 7
            loss = segmentation_loss(logits, target[rows], weight, balanced, counts, at_cells)
            loop.backward(loss)
        loop.step(**figures)  # optimiser, then EMA of the teacher; log and checkpoint


if __name__ == "__main__":
    run_script(main)
