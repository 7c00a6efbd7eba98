"""Stage 1: train unsupervised semantic features F on images alone.

    python train_uss.py --config configs/demo.yaml

Reads the images of the training list, neither tags nor masks. Optionally trains the ViT itself from
scratch (uss.self_supervised); then, with uss.method leopart, trains the ViT further on parts of
objects, or, with stego, STEGO's code head on the frozen ViT.
Writes <run_dir>/uss/checkpoint.pth; features are computed from it on the fly, or, with uss.cache,
stored once in <run_dir>/uss/features/<id>.npy.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.config import Config, make_parser, parse
from core.data.features import write_features
from core.data.lists import Split, read_split
from core.data.loader import RawImages, StepSampler, batches_from, make_loader
from core.data.transforms import denormalise, normalise_unit
from core.models.feature_networks import ViT
from core.pictures import principal_components
from core.pipeline import Run, load_semantic_features, uss_identity
from core.run import checkpoint, distributed
from core.run.device import autocast, pick_device, seed_everything, to_device
from core.run.errors import UserError, run_script
from core.run.loop import EMA, Loop, one_cycle
from core.run.stage import Stage
from core.uss import leopart, stego
from core.uss.features import SemanticFeatures, UssConfig, network_features, statistics
from core.uss.self_supervision import PrototypeNetwork, self_supervised_losses


def main() -> None:
    config, _ = parse(make_parser("train_uss.py", __doc__, "uss"))
    if config.uss.features_dir:
        print(f"stage 1, USS: skipped, features come from {config.uss.features_dir}")
        return
    run, split = Run(config), read_split(config.data, "train")
    identity = uss_identity(config, split)
    stage = Stage(run.uss, "stage 1, USS", config, identity, config.data.root, split.skipped)
    if stage.already_done():
        if config.uss.cache:  # set later
            cache_features(config, stage, split, load_semantic_features(config))
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
        train_stego(config, network, split, run.uss / "stego")
    network.eval()
    if config.uss.centre or config.uss.whiten:
        source = network_features(network.raw, split, device, autocast(config, device))
        found = statistics(source, len(split), config.uss.whiten)
        network.mean, network.projection = (None if x is None else x.to(device) for x in found)
    if config.uss.cache:
        cache_features(config, stage, split, network)
    state = {"network": network.state_dict(), "made_from": stage.made_from}
    checkpoint.save(run.uss / "checkpoint.pth", state)
    stage.finish({})
    print(f"features: {run.uss / 'checkpoint.pth'}")
    print("next: python train_wsss.py, with the same --config")


def build_features(settings: UssConfig) -> SemanticFeatures:
    """The network to be trained, or a released one: backbone and head of a STEGO checkpoint."""
    if not settings.weights:
        return SemanticFeatures(settings)
    network = SemanticFeatures(replace(settings, backbone=settings.backbone.without_weights()))
    return checkpoint.load_published(network, Path(settings.weights), own=("mean", "projection"))


def cache_features(config: Config, stage: Stage, split: Split, network: SemanticFeatures) -> None:
    """Keeps the features of all training images on disk."""
    device, folder = pick_device(config), stage.folder / "features"
    stage.sign(folder)
    source = network_features(network.to(device), split, device, autocast(config, device))
    write_features(source, split, folder)


def train_backbone(config: Config, backbone: nn.Module, split: Split, folder: Path) -> None:
    """Self-supervision from scratch; `backbone` ends with the teacher's weights."""
    settings, device = config.uss.self_supervised, pick_device(config)
    amp, iterations = autocast(config, device), settings.iterations
    student = to_device(PrototypeNetwork(backbone, settings.prototypes), device).train()
    ema = EMA(student, settings.ema)
    teacher = ema.network
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    dataset = RawImages(split, settings.teacher_size * 4 // 3)
    batches = batches_from(dataset, settings.batch_size, iterations, config)
    size = [settings.teacher_size] * 2

    def pictures(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images = batch["image"].float() / 255
        with amp:
            feat = teacher.backbone(normalise_unit(F.interpolate(images, size, mode="area")))
        return {"image": batch["image"], "features": torch.stack(principal_components(feat))}

    loop = Loop(
        "self-supervision",
        folder,
        config,
        networks={"network": student, "ema": teacher},
        optimizer=optimizer,
        schedule=one_cycle(iterations),
        batches=batches,
        iterations=iterations,
        ema=ema,
        pictures=pictures,
    )
    for _, batch in loop:
        images = batch["image"].float() / 255
        with amp:
            losses = self_supervised_losses(student, teacher, images, settings)
        loop.step(**losses)
    backbone.load_state_dict(teacher.backbone.state_dict())


def train_leopart(config: Config, backbone: nn.Module, split: Split, folder: Path) -> None:
    """Leopart; `backbone` ends with the teacher's weights."""
    if not isinstance(backbone, ViT) or backbone.joined_attention is None:
        raise UserError(
            "uss.method leopart needs a vision transformer with one layer for queries, keys and "
            "values, such as vit_small_patch16_224.dino; change uss.backbone or uss.method"
        )
    settings, device = config.uss.leopart, pick_device(config)
    amp = autocast(config, device)
    seed_everything(config.seed)  # for the heads, regardless of earlier draws
    student = leopart.LeopartNetwork(backbone, settings).to(device).train()
    student.normalise_prototypes()
    teacher = EMA(student, settings.ema).network
    leopart.add_drop_path(student.backbone, settings.drop_path)
    queue = leopart.Queue(settings.queue, settings.width).to(device)
    iterations = max(1, settings.epochs * len(split) // settings.batch_size)
    optimizer = torch.optim.AdamW(student.parameter_groups(settings.lr, settings.head_lr))
    crops = leopart.MultiCrops(split, settings)
    batches = batches_from(crops, settings.batch_size, iterations, config)

    def progress(t: int) -> float:  # from 0 to 1 along a cosine
        return 0.5 - 0.5 * math.cos(math.pi * t / iterations)

    def schedule(t: int) -> float:
        return 1 - progress(t)

    def pictures(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images = batch["large"][:, 0]
        with amp:
            feat = teacher.backbone(images)
        return {"image": denormalise(images), "features": torch.stack(principal_components(feat))}

    loop = Loop(
        "Leopart",
        folder,
        config,
        networks={"student": student, "teacher": teacher, "queue": queue},
        optimizer=optimizer,
        schedule=schedule,
        batches=batches,
        iterations=iterations,
        pictures=pictures,
    )
    for t, batch in loop:
        if t:
            decay = settings.ema + (1 - settings.ema) * progress(t - 1)
            leopart.follow(teacher, student, decay)
        low, high = settings.weight_decay
        for group in optimizer.param_groups:
            group["weight_decay"] = group["decays"] * (low + (high - low) * progress(t))
        for network in (student, teacher):
            network.normalise_prototypes()
        with amp:
            loss = leopart.crops_loss(student, teacher, queue, batch, settings)
        loop.step(loss)
    leopart.follow(teacher, student, 1 - (1 - settings.ema) * (1 - progress(iterations - 1)))
    backbone.load_state_dict(teacher.backbone.state_dict())


def train_stego(config: Config, network: SemanticFeatures, split: Split, folder: Path) -> None:
    """STEGO: distils the correspondences of the frozen features into the code head."""
    settings, device = config.uss, pick_device(config)
    amp = autocast(config, device)
    if settings.batch_size < 2 * distributed.world():
        raise UserError("uss.batch_size must be at least 2 for each process: pairs of images")
    squares = stego.SquareImages(split, settings.resolution, 5 if settings.five_crops else 1)
    if len(squares) < 2:
        raise UserError(
            "STEGO compares different images, and the training list has one; add images, or set "
            "uss.method to frozen"
        )

    def encode(images: Tensor) -> Tensor:
        with torch.no_grad(), amp:
            return network.backbone(images.to(device)).float()

    path = folder / "neighbours.npy"
    neighbours = stego.neighbours_of(squares, encode, settings.neighbours, path, config.workers)
    networks = {"head": network.head.train()}
    groups = [{"params": list(network.head.parameters()), "lr": settings.lr}]
    if settings.probe_clusters:
        seed_everything(config.seed)  # the same whether or not neighbours were just computed
        probe = stego.ClusterProbe(settings.probe_clusters, settings.code_dim).to(device)
        networks["probe"] = probe
        groups.append({"params": list(probe.parameters()), "lr": 5e-3})  # STEGO's

    def batches(start: int):
        sizes = (len(squares), settings.batch_size, settings.iterations)
        draws = StepSampler(*sizes, config.seed, start)
        return make_loader(stego.NeighbourPairs(squares, neighbours), draws, config.workers)

    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        feat = encode(images)
        return network.head.drop(feat), network.head(feat)

    def pictures(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        codes = principal_components(features(batch["image"])[1])
        return {"image": denormalise(batch["image"]), "code": torch.stack(codes)}

    loop = Loop(
        "STEGO",
        folder,
        config,
        networks=networks,
        optimizer=torch.optim.Adam(groups),
        schedule=lambda t: 1.0,
        batches=batches,
        iterations=settings.iterations,
        pictures=pictures,
    )
    for _, batch in loop:
        anchor = features(batch["image"])
        losses = stego.stego_losses(settings, anchor, features(batch["partner"]))
        if settings.probe_clusters:
            losses["probe"] = probe(anchor[1])
            losses["loss"] = losses["loss"] + losses["probe"]  # trains only its own parameters
        loop.step(**losses)
    network.head.eval()
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    print(
        f"STEGO without labels: {last['negatives_at_zero']:.0%} of random pairs near 0 (should be "
        f"most), neighbours spread by {last['positives_spread']:.2f} (should be wide); higher "
        "shifts push codes apart, lower ones pull them together"
    )


if __name__ == "__main__":
    run_script(main)
