import math

import numpy as np
import pytest
import torch

from core.wsss.affinity import (
    affinity_loss,
    feature_affinity,
    pair_ends,
    pair_offsets,
    path,
    path_affinity,
    random_walk,
)
from core.wsss.irn import IrnConfig, walk


@pytest.mark.parametrize(("radius", "count"), [(2, 4), (5, 34), (10, 152)])
def test_number_of_pairs_is_that_of_the_paper(radius, count):
    offsets = pair_offsets(radius)
    assert len(set(offsets)) == len(offsets) == count
    assert all(dy > 0 or dx > 0 for dy, dx in offsets)


def test_sources_of_a_crop_of_512():
    affinity = path_affinity(torch.zeros(128, 128), 10)
    assert affinity.shape == (152, 119, 110) and affinity[0].numel() == 13_090


def test_path_holds_both_ends_and_the_cells_along_the_line():
    assert path((0, 3)) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert path((1, -1)) == [(0, -1), (0, 0), (1, -1), (1, 0)]
    for offset in pair_offsets(10):
        cells = path(offset)
        assert (0, 0) in cells and offset in cells
        for y, x in cells:
            distance = abs(offset[0] * x - offset[1] * y) / math.hypot(*offset)
            assert distance < 1


def test_boundary_between_two_cells_parts_them():
    boundary = torch.zeros(9, 17)
    boundary[:, 8] = 0.75
    affinity = path_affinity(boundary, 5)
    across = pair_offsets(5).index((0, 4))
    row = affinity[across, 0]  # from columns 4..12 to four further on
    assert row.tolist() == [0.25] * 5 + [1.0] * 4


def naive_affinity(boundary, first, second):
    dy, dx = second[0] - first[0], second[1] - first[1]
    cells = [boundary[first[0] + y, first[1] + x] for y, x in path((dy, dx))]
    return 1 - max(float(c) for c in cells)


def dense_transition(boundary, radius, beta):
    """The matrix of the paper, cell by cell."""
    height, width = boundary.shape
    matrix = np.eye(height * width)
    for y in range(height):
        for x in range(width):
            for dy, dx in pair_offsets(radius):
                if y + dy < height and 0 <= x + dx < width:
                    a = naive_affinity(boundary, (y, x), (y + dy, x + dx)) ** beta
                    i, j = y * width + x, (y + dy) * width + x + dx
                    matrix[i, j] = matrix[j, i] = a
    return matrix / matrix.sum(0)


@pytest.mark.parametrize("size", [(7, 9), (3, 12), (1, 1), (12, 3)])
def test_walk_equals_the_power_of_the_dense_matrix(size):
    generator = torch.Generator().manual_seed(0)
    boundary = torch.rand(size, generator=generator, dtype=torch.float64) ** 3
    maps = torch.rand(2, *size, generator=generator, dtype=torch.float64)
    transition = np.linalg.matrix_power(dense_transition(boundary.numpy(), 4, 3), 2**5)
    start = (maps * (1 - boundary)).flatten(1).numpy()
    expected = torch.from_numpy(start @ transition).view(2, *size)
    settings = IrnConfig(walk_radius=4, beta=3, doublings=5)
    assert torch.allclose(walk(boundary, maps, settings), expected, atol=1e-10)
    single = walk(boundary.float(), maps.float(), settings)
    assert torch.allclose(single.double(), expected, atol=1e-5)


def test_walk_without_any_affinity_stays_where_it_is():
    maps, boundary = torch.rand(3, 6, 8), torch.full((6, 8), 0.9999)
    walked = walk(boundary, maps, IrnConfig(beta=50))
    assert torch.allclose(walked, maps * (1 - boundary), atol=1e-6)


def test_walk_does_not_cross_a_closed_boundary():
    maps, boundary = torch.zeros(1, 20, 20), torch.zeros(20, 20)
    maps[0, 4, 4] = 1
    boundary[:, 9:11] = 1
    walked = walk(boundary, maps, IrnConfig())[0]
    assert walked[:, :9].min() > 0 and walked[:, 11:].max() == 0


def test_walk_among_equal_cells_without_borders_evens_out():
    affinity = torch.ones(4, 6, 7)
    walked = random_walk(torch.rand(1, 6, 7), affinity, radius=2, beta=1, doublings=10)
    assert walked.max() - walked.min() < 1e-5


def test_alike_features_are_near():
    features = torch.zeros(1, 4, 2, 3)
    features[0, :, :, 2] = 2.0
    right = feature_affinity(features, 2)[0, pair_offsets(2).index((0, 1)), 0]
    assert torch.allclose(right, torch.tensor([math.exp(-2.0)]))


def test_labels_of_pairs_stand_at_both_ends():
    label = torch.arange(5 * 9).view(5, 9)
    here, there = pair_ends(label, 3)
    k = pair_offsets(3).index((1, -1))
    assert here.shape == (3, 5) and here[0, 0] == label[0, 2]
    assert there[k][0, 0] == label[1, 1]


def test_loss_weighs_background_class_and_different_pairs():
    label = torch.tensor([[0, 0, 0, 1, 1, 1, 255, 255, 255]] * 2)
    affinity = torch.full((4, 1, 7), 0.5)
    expected = -math.log(0.5 + 1e-5)
    assert affinity_loss(affinity, label, 2).item() == pytest.approx(expected, rel=1e-4)
    nothing = affinity_loss(affinity, torch.full_like(label, 255), 2)
    assert nothing.item() == 0
    biased = affinity_loss(affinity, torch.where(label == 255, -1, label), 2)
    assert biased.item() == pytest.approx(expected, rel=1e-4)


def test_map_smaller_than_the_radius_is_refused():
    with pytest.raises(ValueError, match="no pairs"):
        path_affinity(torch.zeros(4, 8), 5)
