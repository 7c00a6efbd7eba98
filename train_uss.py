"""Stage 1: train unsupervised semantic features F on images alone.

    python train_uss.py --config configs/demo.yaml

Reads the images of the training list, neither tags nor masks. Optionally trains the ViT itself from
scratch (uss.self_supervised); then, with uss.method leopart, trains the ViT further on parts of
objects, or, with stego, STEGO's code head on the frozen ViT.
Writes <run_dir>/uss/checkpoint.pth; features are computed from it on the fly, or, with uss.cache,
stored once in <run_dir>/uss/features/<id>.npy.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from core.config import Config, UssConfig, make_parser, parse
from core.data.loader import StepSampler, make_loader
from core.data.splits import Split, read_split
from core.data.transforms import denormalise, normalise
from core.pictures import principal_components
from core.run import checkpoint, distributed, vision
from core.run.errors import UserError, run_script
from core.run.files import atomic_write
from core.run.identity import uss_identity
from core.run.loop import autocast, pick_device, seed_everything, train
from core.run.stage import Run, Stage
from core.uss.features import (
    SemanticFeatures,
    load_semantic_features,
    mean_feature,
    network_features,
    write_features,
)
from core.uss.leopart import train_leopart
from core.uss.self_supervision import train_backbone
from core.uss.stego import ClusterProbe, correspondence_loss, derangement, health, sample_points
from core.wsss.published import load_published


def main() -> None:
    config, _ = parse(make_parser("train_uss.py", __doc__))
    if config.uss.features_dir:
        print(f"stage 1, USS: skipped, features are those of {config.uss.features_dir}")
        return
    run, split = Run(config), read_split(config.data, "train")
    stage = Stage(run.uss, "stage 1, USS", config, uss_identity(config, split), split.skipped)
    if stage.already_done():
        if config.uss.cache:  # asked for later
            cache_features(config, stage, split, load_semantic_features(run))
        return
    seed_everything(config.seed)
    device = pick_device(config)
    network = build_features(config.uss).to(device)
    if config.uss.self_supervised.iterations:
        train_backbone(config, network.backbone, split, run.uss / "self_supervised")
        stage.save()
    if config.uss.method == "leopart":
        train_leopart(config, network.backbone, split, run.uss / "leopart")
        stage.save()
    network.backbone.requires_grad_(False).eval()  # frozen: its statistics, too
    if config.uss.method == "stego" and not config.uss.weights:
        train_head(config, network, split, run)
    source = network_features(network.eval(), split, device, autocast(config, device))
    if config.uss.centre:
        network.mean.copy_(mean_feature(source, len(split)))
    if config.uss.cache:
        cache_features(config, stage, split, network)
    state = {"network": network.state_dict(), "made_from": stage.made_from}
    checkpoint.save(run.uss / "checkpoint.pth", state)
    stage.finish({})
    print(
        f"features: {run.uss / 'checkpoint.pth'}\n"
        "next: python train_wsss.py, with the same --config"
    )


def cache_features(config: Config, stage: Stage, split: Split, network: SemanticFeatures) -> None:
    """Keeps the features of all training images on disk."""
    device, folder = pick_device(config), stage.folder / "features"
    stage.sign(folder)
    source = network_features(network.to(device), split, device, autocast(config, device))
    write_features(source, split, folder)


def build_features(settings: UssConfig) -> SemanticFeatures:
    """The network to be trained, or a released one: backbone and head of a STEGO checkpoint."""
    if not settings.weights:
        return SemanticFeatures(settings)
    blank = replace(settings, backbone=settings.backbone.without_weights())
    return load_published(SemanticFeatures(blank), settings.weights)


class SquareImages(torch.utils.data.Dataset):
    """Squares at one resolution, as STEGO trains on, without augmentation: of each image the centre
    or, with `crops` 5, that of its four corners and of its middle, each half its sides long."""

    def __init__(self, split: Split, resolution: int, crops: int):
        self.split, self.resolution, self.crops = split, resolution, crops

    def __len__(self) -> int:
        return len(self.split) * self.crops

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor | str]:
        """{"image": (3, resolution, resolution) float32, normalised, "id"}."""
        index, crop = divmod(draw[0], self.crops)
        image = torch.from_numpy(self.split.read_image(index)).permute(2, 0, 1)
        if self.crops == 5:
            image = vision.v2.functional.five_crop(
                image, [max(1, n // 2) for n in image.shape[-2:]]
            )[crop]
        side = min(image.shape[-2:])
        square = vision.v2.functional.center_crop(image, [side, side])
        if side != self.resolution:
            size = (self.resolution, self.resolution)
            square = F.interpolate(square[None].float(), size, mode="nearest")[0].to(torch.uint8)
        return {"image": normalise(square), "id": self.split.ids[index]}


def nearest_neighbours(
    config: Config, network: SemanticFeatures, squares: SquareImages, path: Path
) -> np.ndarray:
    """(N, uss.neighbours) int64: the squares whose mean patch feature is most similar, without
    itself; kept in a file for a training that goes on after a kill."""
    if distributed.rank() == 0 and not path.exists():
        find_neighbours(config, network, squares, path)
    distributed.barrier()
    return np.load(path, allow_pickle=False)


@torch.inference_mode()
def find_neighbours(
    config: Config, network: SemanticFeatures, squares: SquareImages, path: Path
) -> None:
    """Writes what `nearest_neighbours` gives."""
    device, count = pick_device(config), config.uss.neighbours
    cast, means = autocast(config, device), []
    order = [
        [(k, 0) for k in range(s, min(s + 32, len(squares)))] for s in range(0, len(squares), 32)
    ]
    for batch in tqdm(make_loader(squares, order, config.workers), desc="nearest neighbours"):
        with cast:
            feat = network.backbone(batch["image"].to(device))
        means.append(F.normalize(feat.float().mean((2, 3)), dim=1).cpu())
    means = torch.cat(means)
    near = []
    for start in range(0, len(means), 1024):
        similarity = means[start : start + 1024] @ means.T
        rows = torch.arange(len(similarity))
        similarity[rows, rows + start] = -2
        near.append(similarity.topk(min(count, len(means) - 1)).indices)
    with atomic_write(path) as tmp, tmp.open("wb") as file:
        np.save(file, torch.cat(near).numpy())


def train_head(config: Config, network: SemanticFeatures, split: Split, run: Run) -> None:
    """STEGO: distils the frozen features' correspondences into the code head."""
    settings, device = config.uss, pick_device(config)
    if settings.batch_size < 2 * distributed.world():
        raise UserError("uss.batch_size must be at least 2 for each process: pairs of images")
    squares = SquareImages(split, settings.resolution, 5 if settings.five_crops else 1)
    if len(squares) < 2:
        raise UserError(
            "STEGO compares different images, and the training list has one; add images, or set "
            "uss.method to frozen"
        )
    folder, cast = run.uss / "stego", autocast(config, device)
    neighbours = nearest_neighbours(config, network, squares, folder / "neighbours.npy")
    networks = {"head": network.head.train()}
    groups = [{"params": list(network.head.parameters()), "lr": settings.lr}]
    if settings.probe_clusters:
        seed_everything(config.seed)  # whether or not the neighbours were found just now
        probe = ClusterProbe(settings.probe_clusters, settings.code_dim).to(device)
        networks["probe"] = probe
        groups.append({"params": list(probe.parameters()), "lr": 5e-3})  # STEGO's

    def batches(start: int) -> Iterator[dict[str, Tensor]]:
        draws = StepSampler(
            len(squares), settings.batch_size, settings.iterations, config.seed, start
        )
        partners = PartnerSampler(draws, neighbours)
        return zip_batches(
            make_loader(squares, draws, config.workers),
            make_loader(squares, partners, config.workers),
        )

    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), cast:
            feat = network.backbone(images.to(device)).float()
        return network.head.drop(feat), network.head(feat)

    def step(batch: dict[str, Tensor], t: int) -> dict[str, Tensor]:
        anchor = features(batch["image"])
        figures = stego_losses(config, anchor, features(batch["partner"]))
        if settings.probe_clusters:
            figures["probe"] = probe(anchor[1])
            figures["loss"] = figures["loss"] + figures["probe"]  # of parameters of its own
        return figures

    def pictures(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        codes = principal_components(features(batch["image"])[1])
        return {"image": denormalise(batch["image"]), "code": torch.stack(codes)}

    train(
        "STEGO",
        networks,
        torch.optim.Adam(groups),
        lambda t: 1.0,
        batches,
        step,
        settings.iterations,
        folder,
        config,
        pictures=pictures,
    )
    network.head.eval()
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    print(
        f"STEGO without labels: {last['negatives_at_zero']:.0%} of random pairs near 0 (most "
        f"should be), neighbours spread by {last['positives_spread']:.2f} (the wider, the better); "
        "higher shifts push codes apart, lower ones pull them together"
    )


def stego_losses(
    config: Config, anchor: tuple[Tensor, Tensor], partner: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """STEGO's three terms on (features, codes) of a batch and of a neighbour of each image.

    Returns:
        Each term, "loss", their weighted sum, and the figures of `core.uss.stego.health`.
    """
    settings = config.uss
    feat, code = anchor
    shape = (len(feat), settings.samples, settings.samples, 2)
    here, there = (torch.rand(shape, device=feat.device) * 2 - 1 for _ in range(2))

    def sampled(pair: tuple[Tensor, Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
        return sample_points(pair[0], points), sample_points(pair[1], points)

    own, near = sampled(anchor, here), sampled(partner, there)

    def term(other: tuple[Tensor, Tensor], shift: float) -> tuple[Tensor, Tensor]:
        return correspondence_loss((own[0], other[0]), (own[1], other[1]), shift)

    orders = [derangement(len(feat)).to(feat.device) for _ in range(5)]
    others = [sampled((feat[order], code[order]), there) for order in orders]
    negatives, unlike = zip(*(term(o, settings.shift_negative) for o in others), strict=True)
    inter, alike = term(near, settings.shift_inter)
    figures = {
        "intra": term(own, settings.shift_intra)[0],
        "inter": inter,
        "negative": torch.stack(negatives).mean(),
    }
    weights = (settings.weight_intra, settings.weight_inter, settings.weight_negative)
    loss = sum(w * v for w, v in zip(weights, figures.values(), strict=True))
    return {"loss": loss, **figures, **health(unlike[0], alike)}


class PartnerSampler:
    """For each draw of a batch, one of the nearest neighbours of its image."""

    def __init__(self, draws: StepSampler, neighbours: np.ndarray):
        self.draws, self.neighbours = draws, neighbours

    def __len__(self) -> int:
        return len(self.draws)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.draws:
            yield [(int(self.neighbours[i][s % self.neighbours.shape[1]]), s) for i, s in batch]


def zip_batches(first, second) -> Iterator[dict[str, Tensor]]:
    for a, b in zip(first, second, strict=True):
        yield {**a, "partner": b["image"]}


if __name__ == "__main__":
    run_script(main)
