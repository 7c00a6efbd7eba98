"""K-means and similarity at every pixel, against the same on upsampled features."""

import numpy as np
import pytest
import torch
from conftest import sample
from torch.nn import functional as F

from core.bilinear import Upsampled, _assign, cell_kmeans, pixel_centroids, pixel_score
from core.config import DebiasConfig
from core.debias import debiased_score, image_centroids
from core.debias_image import find_clusters, similarity
from tools.bench.common import patch_features, photographs

SIZES = [((3, 4), (20, 31)), ((1, 1), (5, 7)), ((2, 1), (9, 4)), ((8, 8), (8, 8)), ((9, 7), (4, 5))]


def smooth(depth: int, cells: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Features that vary slowly, as those of images do."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.normal(size=(1, depth, 3, 3)).astype(np.float32))
    return F.interpolate(coarse, cells, mode="bicubic")[0].numpy()


def upsampled(feat: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(torch.from_numpy(feat)[None], size, mode="bilinear")[0]


@pytest.mark.parametrize(("cells", "size"), SIZES)
def test_similarity_is_that_of_upsampled_features(cells, size):
    rng = np.random.default_rng(1)
    feat = rng.normal(size=(6, *cells)).astype(np.float32)
    centroids = rng.normal(size=(4, 6)).astype(np.float32)
    centroids[2] = 0
    tags = np.array([True, False, True, True])
    wanted = debiased_score(upsampled(feat, size), torch.from_numpy(centroids), torch.tensor(tags))
    assert np.abs(pixel_score(feat, centroids, tags, size) - wanted.numpy()).max() < 1e-5
    assert not pixel_score(feat, centroids, np.zeros(4, bool), size).any()


@pytest.mark.parametrize(("cells", "size"), SIZES)
def test_sums_over_pixels_are_those_of_upsampled_unit_features(cells, size):
    rng = np.random.default_rng(2)
    feat = rng.normal(size=(6, *cells)).astype(np.float32)
    label = rng.integers(0, 3, size).astype(np.uint8)
    up, cluster = Upsampled(feat, size), np.full(size, -2, np.int16)
    first, count = np.full(256, -1), np.ones(256, np.int64)
    first[:3] = 0, 1, -1  # label 2 is not clustered
    maps = np.zeros((2, *cells), np.float32)
    changed, adjoint, sizes = _assign(label, cluster, first, count, maps, up.scale, *up.axes)
    units = F.normalize(upsampled(feat, size), dim=0).numpy()
    for k in range(2):
        assert np.abs(up.sums(adjoint)[k] - units[:, label == k].sum(1)).max() < 1e-4
        assert sizes[k] == (label == k).sum()
    assert changed == label.size and (cluster == np.where(label < 2, label.astype(int), -1)).all()


def test_feature_of_length_zero_is_similar_to_nothing():
    feat = np.zeros((4, 3, 3), np.float32)
    score = pixel_score(feat, np.ones((1, 4), np.float32), np.array([True]), (9, 9))
    assert (score == 0).all()
    centroids, _ = pixel_centroids(feat, np.ones((9, 9), np.uint8), 2, 2, np.random.default_rng(0))
    assert np.isfinite(centroids[1]).all()


def test_kmeans_on_cells_finds_groups_and_survives_equal_points():
    rng = np.random.default_rng(0)
    axes = np.eye(3, 8, dtype=np.float32)
    points = axes[rng.integers(0, 3, 90)] + 0.05 * rng.normal(size=(90, 8)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    found = cell_kmeans(points, np.ones(90, np.float32), 3, rng)
    assert np.sort((found @ axes.T).max(0))[0] > 0.99
    same = cell_kmeans(np.tile(points[:1], (5, 1)), np.ones(5, np.float32), 2, rng)
    assert same.shape == (2, 8) and np.abs(same - points[:1]).max() < 1e-6


def test_heavy_points_pull_the_centroid():
    points = np.eye(2, dtype=np.float32)
    (centroid,) = cell_kmeans(points, np.array([3, 4], np.float32), 1, np.random.default_rng(0))
    assert np.allclose(centroid, [0.6, 0.8])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_centroids_are_those_of_the_naive_way(k):
    feat = smooth(12, (15, 20))
    label = np.zeros((120, 160), np.uint8)
    label[20:90, 30:110], label[:8] = 3, 255
    label[100:101, 5:8] = 5  # three pixels: one centroid
    fast, cells = pixel_centroids(feat, label, k, k, np.random.default_rng(0))
    generator = torch.Generator().manual_seed(0)
    slow, _ = image_centroids(upsampled(feat, (120, 160)), torch.from_numpy(label), k, k, generator)
    assert list(fast) == list(slow) == [0, 3, 5] and len(fast[5]) == 1
    for value, centroids in slow.items():
        cosine = fast[value] @ centroids.numpy().T
        assert len(fast[value]) == len(centroids) and (cosine.max(1) > 0.999).all()
    assert cells.shape == (15, 20) and (cells[0] == -1).all() and cells.max() < 2 * k + 1


@pytest.mark.parametrize(
    ("label", "present"),
    [
        (np.full((10, 10), 255, np.uint8), []),
        (np.full((1, 1), 2, np.uint8), [2]),
        (np.arange(100, dtype=np.uint8).reshape(10, 10), list(range(100))),
    ],
    ids=["all ignored", "one pixel", "a region for each pixel"],
)
def test_odd_labels(label, present):
    centroids, cells = pixel_centroids(smooth(5, (4, 4)), label, 3, 3, np.random.default_rng(0))
    assert list(centroids) == present and cells.shape == (4, 4)
    lengths = [np.linalg.norm(v) for c in centroids.values() for v in c]
    assert np.allclose(lengths, 1, atol=1e-5) and all(len(v) == 1 for v in centroids.values())


def test_exact_preset_does_as_well_as_the_naive_one_on_photographs():
    """K-means seldom ends in a worse place, never in a much worse; the similarity is the same."""
    losses = []
    for image, mask in photographs(sample("coco_sample").parent)[:6]:
        feat = torch.from_numpy(patch_features(image, 16))
        units = F.normalize(upsampled(feat.numpy(), mask.shape), dim=0)
        tightness = {}
        for preset in ("naive", "exact"):
            settings = DebiasConfig(preset=preset)
            found = find_clusters(feat, mask, settings, 0)[0]
            tightness[preset] = [
                (torch.from_numpy(own) @ units[:, mask == value]).amax(0).mean().item()
                for value, own in found.items()
            ]
            centroids, tags = torch.ones(1, 16), np.array([True])
            tightness[preset, "score"] = similarity(feat, centroids, tags, mask.shape, settings)
        assert (tightness["naive", "score"] - tightness["exact", "score"]).abs().max() < 1e-5
        losses += np.subtract(tightness["naive"], tightness["exact"]).tolist()
    assert len(losses) == 12 and max(losses) < 0.01 and np.mean(np.array(losses) < 1e-3) >= 0.9
