"""A step of MARS against plain cross entropy; gradients of depthwise convolutions."""

import functools
import statistics
from collections.abc import Callable

import cv2
import numpy as np
import torch

from core.complement import Complement, Filled, segmentation_loss, unfilled
from core.config import Config
from core.data.labels import BIASED
from core.data.transforms import normalise
from core.models.backbones import BackboneConfig
from core.models.deeplab import build_deeplab
from core.run.device import autocast, to_device
from core.run.loop import EMA, make_optimizer
from core.segmenter import SegmentationConfig
from core.wsss.cam import CamClassifier
from tools.bench.common import drawing, interleaved, ratio, timed


def benchmark_train() -> None:
    """Steps of DeepLab v3+ with ResNet-50 on four crops of 256 pixels, all with biased pixels."""
    settings = SegmentationConfig(
        backbone=BackboneConfig("resnet50", weights="none"),
        output_stride=16,
        rates=(6, 12, 18),
        refine="crf",
    )
    ways = {"fp32": "fp32", "bf16": "bf16", "fp32, not channels_last": "fp32"}
    for name, precision in ways.items():
        steps = Steps(Config(precision=precision, segmentation=settings), "not" not in name)
        times = interleaved({"plain": steps.plain, "mars": steps.mars}, 7)
        plain, mars = (statistics.median(times[name]) for name in ("plain", "mars"))
        parts = [f"{key} {statistics.median(t):.3f} s" for key, t in steps.parts.items()]
        print(
            f"{name}: plain cross entropy {plain:.2f} s, MARS {mars:.2f} s, "
            f"ratio {ratio(times['plain'], times['mars']):.2f}; {', '.join(parts)}",
            flush=True,
        )


def benchmark_depthwise() -> None:
    """A classifier step of EfficientNet-Lite0 on 16 crops of 224 pixels in bf16, with PyTorch's own
    gradient of depthwise convolutions and with ours."""
    images = torch.randn(16, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    tags = (torch.rand(16, 20) < 0.1).float()
    ways = {}
    for name in ("own", "fast"):
        torch.manual_seed(0)
        backbone = BackboneConfig("tf_efficientnet_lite0", weights="none")
        network = to_device(CamClassifier(backbone, 20, 16), torch.device("cpu")).train()
        if name == "own":
            for module in network.modules():
                vars(module).pop("forward", None)
        ways[name] = functools.partial(_classifier_step, network, images, tags)
    times = interleaved(ways, 7)
    own, fast = (statistics.median(times[name]) for name in ways)
    print(
        f"PyTorch's {own:.2f} s, ours {fast:.2f} s, {ratio(times['fast'], times['own']):.2f} times"
    )


def _classifier_step(network: CamClassifier, images: torch.Tensor, tags: torch.Tensor) -> None:
    network.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = network.loss(images, tags)
    loss.backward()


class Steps:
    """The steps of `train_segmentation.py` for `wsss` and `mars`, on one network."""

    def __init__(self, config: Config, channels_last: bool):
        self.memory = torch.channels_last if channels_last else torch.contiguous_format
        pixels = np.stack([cv2.resize(drawing(k)[0], (256, 256)) for k in range(4)])
        self.images = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        self.images = self.images.contiguous(memory_format=self.memory)
        self.label = torch.zeros(4, 256, 256, dtype=torch.int64)
        for k, distance in enumerate(np.linspace(0.6, 1.2, 4)):  # the object within its context
            y, x = np.mgrid[-1:1:256j, -1:1:256j]
            self.label[k, np.hypot(y, x + 0.2 * k) < distance] = BIASED
            self.label[k, np.hypot(y, x) < 0.4] = 5
        self.tags = torch.zeros(4, 20)
        self.tags[:, 4], self.tags[2:, 14] = 1, 1  # two labels or three
        self.cast = autocast(config, torch.device("cpu"))
        torch.manual_seed(0)
        network = to_device(build_deeplab(config.segmentation, 20), torch.device("cpu"))
        self.network = network.to(memory_format=self.memory).train()
        self.ema = EMA(self.network, 0.999)
        self.fill = Complement(config.segmentation, self.ema.network, 4, torch.device("cpu"))
        groups = self.network.parameter_groups(1e-4, 1e-4)
        self.optimizer, _ = make_optimizer("sgd", groups, 4e-5, 100, momentum=0.9)
        self.parts: dict[str, list[float]] = {"teacher": [], "waiting for the CRF": [], "EMA": []}

    def plain(self) -> None:
        self.learn(unfilled(self.label))

    def mars(self) -> None:
        arguments = self.images, self.label, self.tags
        with self.cast:
            filled: Filled = timed(self.parts["teacher"], self.fill.submit, *arguments)
        self.learn(functools.partial(timed, self.parts["waiting for the CRF"], filled))
        timed(self.parts["EMA"], self.ema.update, self.network, 50)

    def learn(self, finish: Callable[[], tuple]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self.cast:
            logits = self.network.training_logits(self.images)
            label, certainty, _ = finish()
            loss = segmentation_loss(logits, label, certainty)
        loss.backward()
        self.optimizer.step()
