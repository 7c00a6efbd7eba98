"""A step of MARS against plain cross entropy."""

import statistics

import cv2
import numpy as np
import torch

from core.config import (
    BackboneConfig,
    Config,
    SegmentationConfig,
)
from core.labels import BIASED
from core.models.backbones import to_device
from core.models.deeplab import segmenter
from core.training import EMA, autocast
from core.transforms import normalise
from tools.benchmarks.common import drawing, interleaved, ratio, timed
from train_segmentation import TeacherFill


def benchmark_train() -> None:
    """Steps of DeepLab v3+ with ResNet-50 on four crops of 256 pixels, all with biased pixels."""
    settings = SegmentationConfig(
        backbone=BackboneConfig("resnet50", weights="none"),
        output_stride=16,
        rates=(6, 12, 18),
        warmup=0.0,
        refine="crf",
    )
    for precision in ("fp32", "bf16"):
        steps = Steps(Config(precision=precision, segmentation=settings, workers=1))
        times = interleaved({"plain": steps.plain, "mars": steps.mars}, 7)
        plain, mars = (statistics.median(times[name]) for name in ("plain", "mars"))
        print(
            f"{precision}: plain cross entropy {plain:.2f} s, MARS {mars:.2f} s, "
            f"{ratio(times['plain'], times['mars']):.2f} times as long; its teacher, CRF included, "
            f"{statistics.median(steps.filling):.2f} s",
            flush=True,
        )


class Steps:
    """Two ways to train one network."""

    def __init__(self, config: Config):
        pixels = np.stack([cv2.resize(drawing(k)[0], (256, 256)) for k in range(4)])
        images = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.label = torch.zeros(4, 256, 256, dtype=torch.int64)
        self.label[:, 60:200, 60:200], self.label[:, 150:230, 40:220] = 5, BIASED
        self.tags = torch.zeros(4, 20)
        self.tags[:, [4, 14]] = 1
        self.cast = autocast(config, torch.device("cpu"))
        torch.manual_seed(0)
        self.network = to_device(segmenter(config.segmentation, 20), torch.device("cpu")).train()
        self.ema = EMA(self.network, 0.999)
        self.fill = TeacherFill(config, self.ema, 100)
        self.optimizer = torch.optim.SGD(self.network.parameter_groups(1e-4, 1e-4), momentum=0.9)
        self.filling: list[float] = []

    def plain(self) -> None:
        self.learn(self.label, None)

    def mars(self) -> None:
        with self.cast:
            filled = timed(self.filling, self.fill, self.images, self.label, self.tags, 50)
        self.learn(*filled[:2])
        self.ema.update(self.network, 50)

    def learn(self, label: torch.Tensor, certainty: torch.Tensor | None) -> None:
        with self.cast:
            loss = self.network.loss(self.images, label, certainty)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
