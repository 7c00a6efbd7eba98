"""Stage 4: train a DeepLab on debiased labels that an EMA teacher completes (Eq. 6-7).

    python train_segmentation.py --config configs/demo.yaml --segmentation.mode mars

Modes: wsss (plain pseudo labels), ignore (biased pixels left out), complement (filled by the
teacher), mars (filled, under the certainty-weighted loss), supervised (ground truth; the upper
bound). Reads the training images, tags and label maps; ground truth in the supervised mode alone.
Writes <run_dir>/segmentation/<mode>/checkpoint.pth with the student and its EMA.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from core.config import Config, SegmentationConfig, make_parser, parse
from core.crf import announced
from core.datasets import LabelledImages, batches_from
from core.debias import certain_mask, complement
from core.errors import run_script
from core.labels import BACKGROUND, BIASED
from core.models.backbones import to_device
from core.models.deeplab import segmenter
from core.pamr import PAMR
from core.runs import Run, Stage
from core.splits import Split, ground_truth, label_files, read_split
from core.training import EMA, autocast, make_optimizer, pick_device, seed_everything, train
from core.transforms import denormalise


def main() -> None:
    config, _ = parse(make_parser("train_segmentation.py", __doc__))
    run, split = Run(config), read_split(config.data, "train")
    labels = training_labels(config, run, split)
    upstream = {"supervised": (), "wsss": ("wsss",)}
    identity = upstream.get(config.segmentation.mode, ("wsss", "uss", "debias"))
    identity, inputs = ("seed", "data", "segmentation", *identity), {"labels": labels}
    folder = run.segmentation()
    stage = Stage(
        folder, f"stage 4, segmentation ({folder.name})", config, identity, inputs, split.skipped
    )
    if stage.already_done():
        return
    train_network(config, folder, split, labels)
    stage.finish({})
    print(
        f"student and teacher in {folder / 'checkpoint.pth'}\n"
        "next: python evaluate.py, with the same --config"
    )


def training_labels(config: Config, run: Run, split: Split) -> tuple[Path, ...]:
    """The label maps that the mode trains on."""
    mode, folder = config.segmentation.mode, config.segmentation.labels_dir
    if mode == "supervised":
        return ground_truth(config.data, split)
    if folder:
        return label_files(Path(folder), split, "check segmentation.labels_dir")
    if mode == "wsss":
        return label_files(run.wsss_labels, split, "run train_wsss.py first")
    return label_files(run.debias / "labels", split, "run make_debiased_labels.py first")


def train_network(config: Config, folder: Path, split: Split, labels: tuple[Path, ...]) -> None:
    settings, device = config.segmentation, pick_device(config)
    num_classes = len(config.data.classes)
    seed_everything(config.seed)
    network = to_device(segmenter(settings, num_classes), device).train()
    ema = EMA(network, settings.ema)
    groups = network.parameter_groups(settings.lr, settings.head_lr)
    iterations = max(1, settings.epochs * len(split) // settings.batch_size)
    optimizer, schedule = make_optimizer(
        settings.optimizer, groups, settings.weight_decay, iterations, momentum=0.9
    )
    dataset = LabelledImages(split, labels, num_classes, settings.augment)
    fill = TeacherFill(config, ema, iterations)
    cast = autocast(config, device)

    batches = batches_from(dataset, settings.batch_size, iterations, config)

    def step(batch: dict[str, Tensor], t: int) -> dict[str, Tensor]:
        images = batch["image"].to(device, memory_format=torch.channels_last)
        label, certainty = batch["label"].to(device), None
        figures = {}
        if settings.mode in ("complement", "mars"):
            with cast:
                label, certainty, figures = fill(images, label, batch["tags"].to(device), t)
        if settings.mode != "mars":
            certainty = None
        with cast:
            loss = network.loss(images, label, certainty, settings.balanced)
        return {"loss": loss, **figures}

    train(
        f"segmentation ({folder.name})",
        {"network": network, "ema": ema.network},
        optimizer,
        schedule,
        batches,
        step,
        iterations,
        folder,
        config,
        ema,
    )


class TeacherFill:
    """Fills biased pixels with the refined prediction of the EMA teacher (Fig. 6)."""

    def __init__(self, config: Config, ema: EMA, iterations: int):
        self.settings: SegmentationConfig = config.segmentation
        self.teacher = ema.network
        self.begin = round(self.settings.warmup * iterations)
        if self.settings.refine == "crf":
            self._crf = announced(self.settings.crf.settings())
            self._pool = ThreadPoolExecutor(max(1, config.workers))
        elif self.settings.refine == "pamr":
            self._pamr = PAMR()

    @torch.no_grad()
    def __call__(
        self, images: Tensor, label: Tensor, tags: Tensor, step: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Completes a batch of debiased labels.

        Args:
            images: (B, 3, H, W) normalised crops.
            label: (B, H, W) int64 with -1 where biased.
            tags: (B, C) multi-hot.
            step: of the training.

        Returns:
            (B, H, W) completed label Y^co, (B, H, W) certainty W, and figures to log.
        """
        biased = label == BIASED
        if step < self.begin or not biased.any():
            return label, torch.ones_like(label, dtype=torch.float32), {}
        rows = biased.flatten(1).any(1)  # the other images need no teacher
        images, tags = images[rows], tags[rows]
        logits = F.interpolate(self.teacher(images).float(), label.shape[-2:], mode="bilinear")
        probs = logits.softmax(1)
        allowed = F.pad(tags, (1, 0), value=1.0)[:, :, None, None]  # background and the tags
        completed, certainty = label.clone(), torch.ones_like(label, dtype=torch.float32)
        teacher_label = self._refine(images, probs * allowed).argmax(1)
        completed[rows] = complement(label[rows], teacher_label)
        certainty[rows] = certain_mask(label[rows], probs, tags)
        figures = {
            "biased": biased.float().mean(),
            "filled_object": (completed[biased] != BACKGROUND).float().mean(),
            "certainty": certainty[biased].mean(),
        }
        return completed, certainty, figures

    def _refine(self, images: Tensor, probs: Tensor) -> Tensor:
        if self.settings.refine == "pamr":
            return self._pamr(images, probs)
        if self.settings.refine == "crf":
            pixels = denormalise(images).permute(0, 2, 3, 1).cpu().numpy()
            refined = self._pool.map(self._crf_present, pixels, probs.cpu().numpy())
            return torch.from_numpy(np.stack(list(refined))).to(probs.device)
        return probs

    def _crf_present(self, pixels: np.ndarray, probs: np.ndarray) -> np.ndarray:
        """CRF over the labels that have any probability; the others stay at 0."""
        present = probs.max((1, 2)) > 0
        refined = np.zeros_like(probs)
        refined[present] = self._crf(np.ascontiguousarray(pixels), probs[present])
        return refined


if __name__ == "__main__":
    run_script(main)
