"""The EMA teacher of stage 4, which completes debiased labels while the student looks (Fig. 6)."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.config import SegmentationConfig
from core.crf.dense import make_crf
from core.crf.pamr import PAMR
from core.data.labels import BACKGROUND, BIASED
from core.data.transforms import denormalise
from core.debias import certain_mask, complement

Completed = tuple[Tensor, Tensor, dict[str, Tensor]]
"""(B, H, W) int64 label Y^co, (B, H, W) float32 certainty W, and figures to log."""


class Complement:
    """Fills biased pixels with the refined prediction of a teacher.

    Crops without biased pixels cost nothing; the others are refined over the labels that their
    image may show.

    Args:
        settings: the refinement.
        teacher: images -> (B, 1 + C, h, w) logits, in evaluation mode.
        first: step of the training from which on biased pixels are filled; they are ignored before.
        threads: that refine crops by the dense CRF.
    """

    def __init__(self, settings: SegmentationConfig, teacher: nn.Module, first: int, threads: int):
        self.teacher, self.first, self.refine = teacher, first, settings.refine
        if self.refine == "crf":
            self._crf = make_crf(settings.crf.settings())
            self._pool = ThreadPoolExecutor(max(1, threads))
        elif self.refine == "pamr":
            self._pamr = PAMR()

    @torch.no_grad()
    def begin(
        self, images: Tensor, label: Tensor, tags: Tensor, step: int
    ) -> Callable[[], Completed]:
        """Asks the teacher, and leaves the CRF to threads: meanwhile the student can look.

        Args:
            images: (B, 3, H, W) normalised crops.
            label: (B, H, W) int64 with -1 where biased.
            tags: (B, C) multi-hot.
            step: of the training.

        Returns:
            A function that waits for the threads and gives what was completed; it may be called
            again.
        """
        rows = (label == BIASED).flatten(1).any(1).nonzero()[:, 0]
        if step < self.first or not len(rows):
            return lambda: (label, torch.ones_like(label, dtype=torch.float32), {})
        whole, images, tags = label, images[rows], tags[rows]
        images = images.contiguous(memory_format=torch.channels_last)
        logits = F.interpolate(self.teacher(images).float(), whole.shape[-2:], mode="bilinear")
        probs = logits.softmax(1)
        allowed = F.pad(tags, (1, 0), value=1.0)  # background and the tagged classes
        refined = self._begin_refining(images, probs * allowed[:, :, None, None])

        @functools.cache
        @torch.no_grad()
        def finish() -> Completed:
            biased, certainty = whole == BIASED, torch.ones_like(whole, dtype=torch.float32)
            completed = whole.clone()
            completed[rows] = complement(whole[rows], refined().argmax(1))
            certainty[rows] = certain_mask(whole[rows], probs, tags)
            figures = {
                "biased": biased.float().mean(),
                "filled_object": (completed[biased] != BACKGROUND).float().mean(),
                "certainty": certainty[biased].mean(),
            }
            return completed, certainty, figures

        return finish

    def _begin_refining(self, images: Tensor, probs: Tensor) -> Callable[[], Tensor]:
        """(B, 3, H, W) and (B, 1 + C, H, W) -> a function that gives the latter refined."""
        if self.refine == "pamr":
            present = probs.amax((0, 2, 3)) > 0  # the others stay at 0
            probs[:, present] = self._pamr(images, probs[:, present])
        if self.refine != "crf":
            return lambda: probs
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
