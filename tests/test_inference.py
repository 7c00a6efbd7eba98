import pytest
import torch
from torch.nn import functional as F

from core.inference import multi_scale, windowed


def test_multi_scale_of_a_pointwise_network_is_that_network():
    images = torch.full((2, 3, 12, 10), 0.5)
    assert torch.allclose(multi_scale(lambda x: x * 2, images, (1.0, 0.5, 1.5)), images * 2)


def test_flip_is_undone_before_averaging():
    images = torch.arange(6.0).view(1, 1, 1, 6)
    assert torch.allclose(multi_scale(lambda x: x, images, (1.0,), flip=True), images)


def test_nearest_maps_keep_the_values_of_their_cells():
    images = torch.rand(1, 3, 8, 12)

    def network(view):
        return F.avg_pool2d(view, 4)

    found = multi_scale(network, images, (1.0,), flip=False, mode="nearest")
    expected = network(images).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [(40, 40), (41, 100), (32, 33), (100, 20)])
def test_windows_of_a_pointwise_network_change_nothing(size):
    images, seen = torch.rand(2, 3, *size), []

    def network(view):
        seen.append(view.shape[-2:])
        return view * 2

    assert torch.allclose(windowed(network, 32)(images), images * 2, atol=1e-6)
    assert len(seen) > 1 and all(max(view) <= 32 for view in seen)


def test_images_that_fit_are_seen_whole_at_the_networks_stride():
    def network(view):
        return F.avg_pool2d(view, 4)

    images = torch.rand(1, 3, 32, 24)
    assert torch.equal(windowed(network, 32)(images), network(images))


def test_neighbouring_windows_overlap_by_a_third():
    places = []

    def network(view):
        places.append(int(view[0, 0, 0, 0]))
        return view

    images = torch.arange(1000.0).expand(1, 1, 30, 1000)
    windowed(network, 90)(images)
    steps = [b - a for a, b in zip(places, places[1:], strict=False)]
    assert places[0] == 0 and places[-1] == 910 and max(steps) <= 60
