"""Stage 1: train unsupervised semantic features F on images alone.

    python train_uss.py --config configs/demo.yaml

Reads the images of the training list, neither tags nor masks. Optionally trains the ViT itself from
scratch (uss.self_supervised), then, with uss.method stego, STEGO's code head on the frozen ViT.
Writes <run_dir>/uss/checkpoint.pth; features are computed from it on the fly, not stored.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from core import checkpoint
from core.config import Config, make_parser, parse
from core.datasets import Draws, make_loader
from core.errors import run_script
from core.features import SemanticFeatures, mean_feature, network_features
from core.runs import Run, Stage
from core.self_supervision import train_backbone
from core.splits import Split, read_split
from core.stego import correspondence_loss, derangement, sample_points
from core.training import autocast, pick_device, seed_everything, train
from core.transforms import normalise


def main() -> None:
    config, _ = parse(make_parser("train_uss.py", __doc__))
    if config.uss.features_dir:
        print(f"stage 1, USS: skipped, features are those of {config.uss.features_dir}")
        return
    run, split = Run(config), read_split(config.data, "train")
    inputs = {"ids": split.ids}
    stage = Stage(run.uss, "stage 1, USS", config, ("seed", "data", "uss"), inputs)
    if stage.already_done():
        return
    seed_everything(config.seed)
    device = pick_device(config)
    network = SemanticFeatures(config.uss).to(device)
    if config.uss.self_supervised.iterations:
        train_backbone(config, network.backbone, split, run.uss / "self_supervised")
        stage.save()
    network.backbone.requires_grad_(False).eval()  # frozen: its statistics, too
    if config.uss.method == "stego":
        train_head(config, network, split, run)
    if config.uss.centre:
        source = network_features(network.eval(), split, device, autocast(config, device))
        network.mean.copy_(mean_feature(source, len(split)))
    checkpoint.save(run.uss / "checkpoint.pth", {"network": network.state_dict()})
    stage.finish({})
    print(
        f"features: {run.uss / 'checkpoint.pth'}\n"
        "next: python train_wsss.py, with the same --config"
    )


class SquareImages(torch.utils.data.Dataset):
    """Centre squares at one resolution, as STEGO trains on: no augmentation."""

    def __init__(self, split: Split, resolution: int):
        self.split, self.resolution = split, resolution

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
        image = torch.from_numpy(self.split.read_image(draw[0])).permute(2, 0, 1)
        side = min(image.shape[-2:])
        top, left = ((n - side) // 2 for n in image.shape[-2:])
        square = image[:, top : top + side, left : left + side]
        if side != self.resolution:
            size = (self.resolution, self.resolution)
            square = F.interpolate(square[None].float(), size, mode="nearest")[0].to(torch.uint8)
        return {"image": normalise(square), "index": torch.tensor(draw[0])}


@torch.inference_mode()
def nearest_neighbours(
    config: Config, network: SemanticFeatures, split: Split, count: int
) -> np.ndarray:
    """(N, count) int64: the images whose mean patch feature is most similar, without itself."""
    device = pick_device(config)
    cast, squares = autocast(config, device), SquareImages(split, config.uss.resolution)
    means = []
    for start in tqdm(range(0, len(split), 32), desc="nearest neighbours", unit="batch"):
        items = [squares[k, 0]["image"] for k in range(start, min(start + 32, len(split)))]
        with cast:
            feat = network.backbone(torch.stack(items).to(device))
        means.append(F.normalize(feat.float().mean((2, 3)), dim=1).cpu())
    means = torch.cat(means)
    near = []
    for start in range(0, len(means), 1024):
        similarity = means[start : start + 1024] @ means.T
        rows = torch.arange(len(similarity))
        similarity[rows, rows + start] = -2
        near.append(similarity.topk(min(count, len(means) - 1)).indices)
    return torch.cat(near).numpy()


def train_head(config: Config, network: SemanticFeatures, split: Split, run: Run) -> None:
    """STEGO: distils the frozen features' correspondences into the code head."""
    settings, device = config.uss, pick_device(config)
    neighbours = nearest_neighbours(config, network, split, settings.neighbours)
    squares, cast = SquareImages(split, settings.resolution), autocast(config, device)
    optimizer = torch.optim.Adam(network.head.parameters(), lr=settings.lr)
    network.head.train()

    def batches(start: int) -> Iterator[dict[str, Tensor]]:
        draws = Draws(len(split), settings.batch_size, settings.iterations, config.seed, start)
        partners = PartnerDraws(draws, neighbours)
        return zip_batches(
            make_loader(squares, draws, config.workers),
            make_loader(squares, partners, config.workers),
        )

    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), cast:
            feat = network.backbone(images.to(device)).float()
        return network.head.drop(feat), network.head(feat)

    def step(batch: dict[str, Tensor], t: int) -> dict[str, Tensor]:
        return stego_losses(config, features(batch["image"]), features(batch["partner"]))

    train(
        "STEGO",
        {"head": network.head},
        optimizer,
        lambda t: 1.0,
        batches,
        step,
        settings.iterations,
        run.uss / "stego",
        config,
    )
    network.head.eval()


def stego_losses(
    config: Config, anchor: tuple[Tensor, Tensor], partner: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """STEGO's three terms on (features, codes) of a batch and of a neighbour of each image.

    Returns:
        Each term, the mean similarity of codes in it, and "loss", their weighted sum.
    """
    settings = config.uss
    feat, code = anchor
    shape = (len(feat), settings.samples, settings.samples, 2)
    here, there = (torch.rand(shape, device=feat.device) * 2 - 1 for _ in range(2))

    def sampled(pair: tuple[Tensor, Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
        return sample_points(pair[0], points), sample_points(pair[1], points)

    own, near = sampled(anchor, here), sampled(partner, there)

    def term(other: tuple[Tensor, Tensor], shift: float) -> Tensor:
        return correspondence_loss((own[0], other[0]), (own[1], other[1]), shift)

    negatives = []
    for _ in range(5):
        order = derangement(len(feat)).to(feat.device)
        negatives.append(term(sampled((feat[order], code[order]), there), settings.shift_negative))
    figures = {
        "intra": term(own, settings.shift_intra),
        "inter": term(near, settings.shift_inter),
        "negative": torch.stack(negatives).mean(),
    }
    weights = (settings.weight_intra, settings.weight_inter, settings.weight_negative)
    loss = sum(w * v for w, v in zip(weights, figures.values(), strict=True))
    return {"loss": loss, **figures}


class PartnerDraws:
    """For each draw of a batch, one of the nearest neighbours of its image."""

    def __init__(self, draws: Draws, neighbours: np.ndarray):
        self.draws, self.neighbours = draws, neighbours

    def __len__(self) -> int:
        return len(self.draws)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.draws:
            yield [(int(self.neighbours[i][s % self.neighbours.shape[1]]), s) for i, s in batch]


def zip_batches(first, second) -> Iterator[dict[str, Tensor]]:
    for a, b in zip(first, second, strict=True):
        yield {"image": a["image"], "partner": b["image"]}


if __name__ == "__main__":
    run_script(main)
