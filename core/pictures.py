"""Features, labels and activation maps in colours."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from core.data.labels import palette, to_disk
from core.data.transforms import drawn_from


def principal_components(feats: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """The first three principal components over all of `feats` as red, green and blue.

    (D, h, w) features of each image -> (3, h, w) uint8; `seed` is for the approximate solver."""
    feats = [feat.cpu() for feat in feats]  # whose generator is seeded
    cells = torch.cat([feat.flatten(1).T for feat in feats]).float()
    mean = cells.mean(0)
    with drawn_from(seed):
        axes = torch.pca_lowrank(cells - mean, q=min(6, *cells.shape))[2][:, :3]
    low, high = ((cells - mean) @ axes).quantile(cells.new_tensor([0.02, 0.98]), dim=0)
    drawn = []
    for feat in feats:
        points = (feat.flatten(1).T.float() - mean) @ axes
        colours = ((points - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
        drawn.append((colours * 255).round().byte().T.reshape(-1, *feat.shape[1:]))
    return drawn


def label_colours(label: Tensor) -> Tensor:
    """(B, H, W) int64 label maps, -1 where biased -> (B, 3, H, W) uint8."""
    return torch.from_numpy(palette()[to_disk(label.cpu().numpy())]).permute(0, 3, 1, 2)


def heat(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(B, h, w) not negative -> (B, 3, H, W) uint8, grey; each image's largest value is white."""
    maps = maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-6)
    large = F.interpolate(maps[:, None].float(), tuple(size), mode="bilinear")
    return (large.clamp(0, 1) * 255).round().byte().expand(-1, 3, -1, -1)
