"""Label complementing of stage 4 (Fig. 6, Eq. 6-7): the teacher fills biased pixels."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.crf.dense import CrfConfig, make_crf
from core.crf.pamr import PAMR
from core.data.labels import BACKGROUND, BIASED, IGNORE
from core.data.transforms import denormalise
from core.run.settings import Decay, HalfOpenUnitInterval, OpenUnitInterval


@dataclass
class ComplementConfig:
    """How the EMA teacher fills biased pixels."""

    ema: Decay = 0.999  # Decay of the teacher, an exponential moving average of all float state.
    # Share of the training that passes before the teacher fills biased pixels.
    warmup: HalfOpenUnitInterval = 0.0
    # What biased pixels count as until then: ignored, or background, which stage 3 takes them for.
    # A teacher that has never learnt them as background gives most of them their class back.
    warmup_label: Literal["ignore", "background"] = "ignore"
    # Prior probability that a biased pixel shows an object, by which the teacher's odds are
    # multiplied: p / (1 - p). 0.5: the teacher alone decides, as in the paper.
    fill_prior: OpenUnitInterval = 0.5
    # Refinement R of the teacher's prediction (Sec. 3.4).
    refine: Literal["none", "crf", "pamr"] = "crf"
    crf: CrfConfig = field(default_factory=CrfConfig)  # Settings of that refinement.


def complement(debiased_label: Tensor, teacher_label: Tensor) -> Tensor:
    """Fills biased pixels with the teacher's label (Fig. 6): (..., H, W) int64."""
    return torch.where(debiased_label == BIASED, teacher_label, debiased_label)


def certainty(debiased_label: Tensor, teacher_probs: Tensor, tags: Tensor) -> Tensor:
    """Certainty W of each pixel's label (Eq. 6).

    1 where the debiased label is kept; where it is biased, the teacher's highest probability among
    the classes that the image shows. Background is not one of them, so a biased pixel that the
    teacher takes for background weighs almost nothing.

    (B, H, W) int64 label, (B, 1 + C, H, W) probabilities, background first, and (B, C) multi-hot
    tags -> (B, H, W) in [0, 1].
    """
    tagged = (teacher_probs[:, 1:] * tags[:, :, None, None]).amax(1)
    return torch.where(debiased_label == BIASED, tagged, 1.0)


def _background_and_classes(label: Tensor) -> tuple[Tensor, Tensor]:
    return label == BACKGROUND, (label != BACKGROUND) & (label != IGNORE) & (label != BIASED)


def labelled_pixels(label: Tensor) -> Tensor:
    """How many pixels are background and how many a class: (..., H, W) int64 -> (2,) int64."""
    return torch.stack([part.sum() for part in _background_and_classes(label)])


def weighted_cross_entropy(
    logits: Tensor,
    label: Tensor,
    certainty: Tensor | None = None,
    balanced: bool = False,
    counts: Tensor | None = None,
) -> Tensor:
    """Certainty-weighted cross entropy (Eq. 7), averaged over the pixels that have a label.

    The paper writes a sum; the average works with the learning rate of plain cross entropy, to
    which it reduces if `certainty` is None.

    Args:
        logits: (B, 1 + C, H, W).
        label: (B, H, W) int64; 255 and -1 have no label.
        certainty: (B, H, W), W.
        balanced: averages background and foreground separately, and adds the two.
        counts: result of `labelled_pixels`, to divide by; None: that of `label`. Parts of a batch
            get the counts of the whole batch, so that their losses sum to the batch's loss.

    Returns:
        () loss; 0 if no pixel has a label.
    """
    label = torch.where(label == BIASED, IGNORE, label)
    loss = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")
    if certainty is not None:
        loss = loss * certainty
    counts = labelled_pixels(label) if counts is None else counts
    if not balanced:
        return (loss * (label != IGNORE)).sum() / counts.sum().clamp(min=1)
    parts = zip(_background_and_classes(label), counts.clamp(min=1), strict=True)
    return sum((loss * part).sum() / count for part, count in parts)


def segmentation_loss(
    logits: Sequence[Tensor],
    label: Tensor,
    certainty: Tensor | None = None,
    balanced: bool = False,
    counts: Tensor | None = None,
    at_cells: bool = False,
) -> Tensor:
    """Sum of `weighted_cross_entropy` over all of a network's training logits.

    Args:
        logits: (B, 1 + C, h, w) of each level; enlarged to the label's size.
        label, certainty, balanced, counts: see `weighted_cross_entropy`.
        at_cells: take the label at the centre of each cell of the logits instead, as in the Caffe
            version of DeepLab v2.
    """

    def at_centres(maps: Tensor, size: Sequence[int]) -> Tensor:
        resized = F.interpolate(maps[:, None].float(), size, mode="nearest-exact")
        return resized[:, 0].to(maps.dtype)

    total = 0
    for level in logits:
        level, here, certain, labelled = level.float(), label, certainty, counts
        if at_cells:
            size = level.shape[-2:]
            here = at_centres(label, size)
            certain = None if certainty is None else at_centres(certainty, size)
            # On average, the labelled share of all cells is that of all pixels.
            labelled = None if counts is None else counts * (here[0].numel() / label[0].numel())
        else:
            level = F.interpolate(level, label.shape[-2:], mode="bilinear")
        total = total + weighted_cross_entropy(level, here, certain, balanced, labelled)
    return total


Filled = Callable[[], tuple[Tensor, Tensor, dict[str, Tensor]]]
"""Waits for the threads and gives (B, H, W) int64 label Y^co, (B, H, W) float32 certainty W, and
figures to log; further calls give the same tensors."""


class Complement:
    """Fills biased pixels with the refined prediction of a teacher.

    The teacher gives (B, 1 + C, h, w) logits, in evaluation mode. Crops without biased pixels cost
    nothing; the others are refined over the labels that their image may show, by the dense CRF on
    `device` if it is a GPU, otherwise by `threads` threads on the CPU.
    """

    def __init__(
        self, config: ComplementConfig, teacher: nn.Module, threads: int, device: torch.device
    ):
        self.teacher, self.refine, self.prior = teacher, config.refine, config.fill_prior
        if self.refine == "crf":
            self._crf = make_crf(config.crf, device)
            self._pool = ThreadPoolExecutor(max(1, threads))
        elif self.refine == "pamr":
            self._pamr = PAMR()

    @torch.no_grad()
    def submit(self, images: Tensor, label: Tensor, tags: Tensor) -> Filled:
        """Starts the teacher's pass and its refinement; the student's forward pass runs meanwhile.

        It takes (B, 3, H, W) normalised crops, their (B, H, W) int64 label maps, -1 where biased,
        and (B, C) multi-hot tags.
        """
        biased = label == BIASED
        rows = biased.flatten(1).any(1).nonzero()[:, 0]
        if not len(rows):
            return unfilled(label)
        images, tags = images[rows].contiguous(memory_format=torch.channels_last), tags[rows]
        logits = F.interpolate(self.teacher(images).float(), label.shape[-2:], mode="bilinear")
        probs = logits.softmax(1)
        allowed = probs * F.pad(tags, (1, 0), value=1.0)[:, :, None, None]  # with background
        if self.prior != 0.5:
            odds = torch.where(biased[rows], self.prior / (1 - self.prior), 1.0)
            allowed[:, 1:] *= odds[:, None]
            allowed /= allowed.sum(1, keepdim=True)
        refined = self._submit_refinement(images, allowed)

        @functools.cache
        @torch.no_grad()
        def finish() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            completed, weight = label.clone(), torch.ones_like(label, dtype=torch.float32)
            # Labels come from the refined probabilities; Eq. 6 takes the teacher's own, unrefined.
            completed[rows] = complement(label[rows], refined().argmax(1))
            weight[rows] = certainty(label[rows], probs, tags)
            count = biased.sum()  # no pixels are selected: the CPU would wait for that
            figures = {
                "biased": count / biased.numel(),
                "filled_object": ((completed != BACKGROUND) & biased).sum() / count,
                "certainty": (weight * biased).sum() / count,
            }
            return completed, weight, figures

        return finish

    def _submit_refinement(self, images: Tensor, probs: Tensor) -> Callable[[], Tensor]:
        """(B, 3, H, W) and (B, 1 + C, H, W) -> a function that returns the latter refined."""
        if self.refine == "pamr":
            present = probs.amax((0, 2, 3)) > 0  # the others stay at 0
            probs[:, present] = self._pamr(images, probs[:, present])
        if self.refine != "crf":
            return lambda: probs
        if self._crf.backend == "torch":
            # Here, because it imports numba, which takes a moment and may be absent.
            from core.crf.batched import refine

            refined = refine(denormalise(images), probs, self._crf, probs.amax((2, 3)) > 0)
            return lambda: refined
        pixels = denormalise(images).permute(0, 2, 3, 1).cpu().numpy()
        pairs = zip(pixels, probs.cpu().numpy(), strict=True)
        crops = [self._pool.submit(self._refined, *pair) for pair in pairs]
        return lambda: torch.from_numpy(np.stack([c.result() for c in crops])).to(probs.device)

    def _refined(self, pixels: np.ndarray, probs: np.ndarray) -> np.ndarray:
        """CRF of one crop over the labels that have any probability; the others stay at 0."""
        present = probs.max((1, 2)) > 0
        refined = np.zeros_like(probs)
        refined[present] = self._crf(np.ascontiguousarray(pixels), probs[present])
        return refined


def unfilled(label: Tensor) -> Filled:
    """Leaves biased pixels unfilled, so that the loss ignores them; certainty is 1 everywhere."""
    return lambda: (label, torch.ones_like(label, dtype=torch.float32), {})
