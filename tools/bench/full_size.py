"""Runs training steps and inference of the full-size networks with random weights and images.

    python tools/bench/full_size.py                     # all cases, each in its own process
    python tools/bench/full_size.py seam deeplabv2_r50  # some cases
    python tools/bench/full_size.py --batch 2 --steps 1 # if memory or time is short

Prints a Markdown table with seconds per step, images per second and peak memory, on the GPU if
there is one; `torchvision_r101` is its DeepLab v3, for comparison. The settings come from the
configuration files; no weights or data are needed. Then the dense CRF: milliseconds for a drawn
picture of 500 x 375 pixels, by number of labels. --output FILE puts both into a page of
documentation, below its line "<!-- measured -->".
"""

import functools
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.complement import segmentation_loss
from core.config import Config, make_parser, parse
from core.crf.dense import DenseCRF
from core.inference import multi_scale
from core.models.backbones import BackboneConfig
from core.models.deeplab import build_deeplab
from core.models.feature_networks import ViT
from core.run.device import autocast, pick_device, to_device
from core.run.errors import run_script
from core.run.files import atomic_write, read_text, user_path
from core.run.loop import EMA
from core.uss.features import SemanticFeatures
from core.uss.leopart import LeopartConfig, LeopartNetwork, Queue, crops_loss
from core.wsss.advcam import adversarial_cam
from core.wsss.affinity import affinity_loss
from core.wsss.rsepm import RecurSeed
from core.wsss.settings import METHODS, PAIR_NETWORKS
from tools.bench.common import drawing
from tools.bench.crf import resized, rough_probabilities
from tools.common import ROOT, tool_parser
from train_wsss import build_classifier

PHOTOGRAPH = (375, 500)  # VOC's usual size

Case = tuple[int, int, nn.Module, Callable[[Tensor], Tensor], Callable[[Tensor], object]]
"""Batch size, crop in pixels, network, loss of a batch, inference on one photograph."""


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("cases", nargs="*", help=f"any of: {', '.join(CASES)}")
    parser.add_argument("--batch", type=int, help="images per step; default: configured")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after a warm-up")
    parser.add_argument(
        "--output", type=user_path, metavar="FILE", help="page to put the tables in"
    )
    options = parser.parse_args()
    unknown = sorted(set(options.cases) - set(CASES))
    if unknown:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    if options.batch is not None and options.batch < 2:
        parser.error("--batch must be at least 2: some layers normalise one value per image")
    if len(options.cases) == 1 and not options.output:
        print(measure(options.cases[0], options.batch, options.steps), flush=True)
        return
    lines = [
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, torch "
        f"{torch.__version__} (`{shlex.join(['python', *sys.argv])}`)\n",
        "| case | crop | batch | s/step | images/s | photograph, s | peak, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    print(*lines, sep="\n", flush=True)
    extra = [f"--steps={options.steps}"] + ([f"--batch={options.batch}"] if options.batch else [])
    for case in options.cases or CASES:
        command = [sys.executable, __file__, case, *extra]
        row = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        print(row, flush=True)
        lines.append(row)
    table = measure_crf(options.steps)
    print(f"\n{table}")
    if options.output:
        above = read_text(options.output, "the page").split(MARK)[0]
        page = "\n".join([above + MARK, *lines, "", table, ""])
        with atomic_write(options.output) as tmp:
            tmp.write_text(page, "utf-8")


def measure_crf(repeats: int) -> str:
    """Table of milliseconds per picture for each backend that runs here."""
    image, mask = resized(*drawing(0), (500, 375))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = ["| dense CRF | 2 labels | 3 | 5 | 21 |", "|---|---|---|---|---|"]
    for backend, where in (("torch", device), ("numba", "cpu")):
        crf, cells = DenseCRF(backend, where), []
        for labels in (2, 3, 5, 21):
            probs = rough_probabilities(mask, labels)
            cells.append(f"{1000 * timed(functools.partial(crf, image, probs), repeats):.0f} ms")
        rows.append(f"| {backend} on {where} | {' | '.join(cells)} |")
    return "\n".join(rows)


def configuration(name: str) -> Config:
    config, _ = parse(make_parser("full_size.py", ""), [f"--config={ROOT / 'configs' / name}"])
    return config


def classifier_case(name: str) -> Case:
    config = configuration(name)
    wsss = replace(config.wsss, backbone=config.wsss.backbone.without_weights())
    count = len(config.data.classes)
    network = build_classifier(wsss, count)

    @functools.cache
    def recur_seed() -> RecurSeed:  # the teacher is a copy on the network's device
        return RecurSeed(wsss.rsepm, network, EMA(network, wsss.rsepm.ema).network, 1)

    def loss(images: Tensor) -> Tensor:
        tags = torch.zeros(len(images), count, device=images.device)
        tags[:, 0] = 1
        if wsss.method == "rsepm":
            inside = torch.ones_like(images[:, 0], dtype=torch.bool)
            last = round(wsss.rsepm.mix_from)  # the phase in which all losses count
            return recur_seed()(images, tags, inside, last)["loss"]
        return network.loss(images, tags)

    def infer(image: Tensor) -> Tensor:
        return multi_scale(network.activation, image, wsss.scales)

    return wsss.batch_size, wsss.augment.crop, network, loss, infer


def climb_case(name: str) -> Case:
    config = configuration(name)
    batch, crop, network, loss, _ = classifier_case(name)

    def infer(image: Tensor) -> Tensor:
        image = F.interpolate(image, scale_factor=2.0)
        network.requires_grad_(False)
        views = torch.cat([image, image.flip(-1)])
        return adversarial_cam(network, views, 0, 1, config.wsss.advcam)

    return batch, crop, network, loss, infer


def pairs_case(name: str) -> Case:
    config = configuration(name)
    settings, kind = config.wsss.pairs, PAIR_NETWORKS[METHODS[config.wsss.method].walk]
    network = kind(config.wsss.backbone.without_weights(), settings)

    def loss(images: Tensor) -> Tensor:
        predictions = network(images).float()
        size = (len(images), *predictions.shape[-2:])
        label = torch.randint(0, 3, size, device=images.device)
        return affinity_loss(network.affinity(predictions), label, settings.radius)

    def infer(image: Tensor) -> object:
        height, width = image.shape[-2:]
        cells = (-(-height // network.stride), -(-width // network.stride))
        prediction = multi_scale(network, image, size=cells)[0]
        maps = torch.rand(2, -(-height // 4), -(-width // 4), device=image.device)
        return network.label(prediction, torch.tensor([1, 2]).numpy(), maps, (height, width))

    return settings.batch_size, settings.augment.crop, network, loss, infer


def segmenter_case(name: str) -> Case:
    config = configuration(name)
    section = config.segmentation
    settings = replace(section, backbone=section.backbone.without_weights())
    network = build_deeplab(settings, len(config.data.classes))

    def loss(images: Tensor) -> Tensor:
        label = torch.randint(0, 3, (len(images), *images.shape[-2:]), device=images.device)
        logits = network.training_logits(images)
        return segmentation_loss(
            logits, label, None, settings.balanced, at_cells=network.head.at_cells
        )

    def infer(image: Tensor) -> Tensor:
        return multi_scale(lambda x: network(x).softmax(1), image, config.evaluation.scales)

    return settings.batch_size, settings.augment.crop, network, loss, infer


def torchvision_case(name: str) -> Case:
    """Its DeepLab v3 with ResNet-101, whose output stride is 8; crop and batch of the file."""
    from torchvision.models.segmentation import deeplabv3_resnet101

    section = configuration(name).segmentation
    network = deeplabv3_resnet101(weights=None, weights_backbone=None, num_classes=21)

    def loss(images: Tensor) -> Tensor:
        label = torch.randint(0, 3, (len(images), *images.shape[-2:]), device=images.device)
        return F.cross_entropy(network(images)["out"].float(), label)

    def infer(image: Tensor) -> Tensor:
        scales = configuration(name).evaluation.scales
        return multi_scale(lambda x: network(x)["out"].softmax(1), image, scales)

    return section.batch_size, section.augment.crop, network, loss, infer


def features_case(name: str) -> Case:
    config = configuration(name)
    uss = replace(config.uss, backbone=config.uss.backbone.without_weights())
    network = SemanticFeatures(uss)
    network.backbone.requires_grad_(False)

    def loss(images: Tensor) -> Tensor:
        return network.encode(images).float().square().mean()

    def infer(image: Tensor) -> Tensor:
        return network(image)

    return uss.batch_size, uss.resolution, network, loss, infer


def leopart_case(name: str) -> Case:
    settings = LeopartConfig()
    network = LeopartNetwork(
        ViT(BackboneConfig("vit_small_patch16_224.dino", {}, "none")), settings
    )
    places = [[0, 0, 0.8, 0.8], [0.2, 0.2, 1, 1], *([[0.3, 0.3, 0.7, 0.7]] * settings.smalls)]

    @functools.cache
    def teacher() -> LeopartNetwork:  # a copy on the network's device
        return EMA(network, settings.ema).network

    queue = Queue(settings.queue, settings.width)

    def loss(images: Tensor) -> Tensor:
        small = F.interpolate(images, (settings.small, settings.small))
        batch = {
            "large": images[:, None].repeat(1, 2, 1, 1, 1),
            "small": small[:, None].repeat(1, settings.smalls, 1, 1, 1),
            "boxes": torch.tensor(places, device=images.device).repeat(len(images), 1, 1),
        }
        return crops_loss(network, teacher(), queue.to(images.device), batch, settings)

    def infer(image: Tensor) -> Tensor:
        return network.backbone(F.interpolate(image, (384, 512)))

    return settings.batch_size, settings.large, network, loss, infer


CASES: dict[str, tuple[Callable[[str], Case], str]] = {
    "stego": (features_case, "voc.yaml"),
    "leopart": (leopart_case, "voc.yaml"),
    "cam": (classifier_case, "voc_irn.yaml"),
    "irn": (pairs_case, "voc_irn.yaml"),
    "advcam": (climb_case, "voc_advcam.yaml"),
    "rsepm": (classifier_case, "voc_rsepm.yaml"),
    "seam": (classifier_case, "voc_seam.yaml"),
    "psa": (pairs_case, "voc_seam.yaml"),
    "deeplabv1_wr38": (segmenter_case, "voc_seam.yaml"),
    "deeplabv2_r50": (segmenter_case, "voc_irn.yaml"),
    "deeplabv2_r101": (segmenter_case, "voc_advcam.yaml"),
    "deeplabv3plus_r101": (segmenter_case, "voc.yaml"),
    "torchvision_r101": (torchvision_case, "voc.yaml"),
}
MARK = "<!-- measured -->\n"


def measure(case: str, batch: int | None, steps: int) -> str:
    """One row of the table."""
    build, name = CASES[case]
    config = Config()
    device, cast = pick_device(config), autocast(config, pick_device(config))
    own_batch, crop, network, loss, infer = build(name)
    batch = batch or own_batch
    network = to_device(network, device).train()
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-4)
    images = torch.randn(batch, 3, crop, crop, device=device)
    images = images.to(memory_format=torch.channels_last)

    def step() -> None:
        with cast:
            value = loss(images)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()

    seconds = timed(step, steps)
    network.eval()
    photograph = torch.randn(1, 3, *PHOTOGRAPH, device=device)

    def predict() -> None:
        with cast:
            infer(photograph)

    inference = timed(predict, steps)
    return (
        f"| {case} | {crop} | {batch} | {seconds:.2f} | {batch / seconds:.1f} | {inference:.2f} | "
        f"{peak_gigabytes():.1f} |"
    )


def timed(work: Callable[[], None], repeats: int) -> float:
    """Median seconds of `work` over `repeats` calls, after a warm-up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def peak_gigabytes() -> float:
    """Peak memory of the GPU if there is one, else of this process, GB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    run_script(main)
