"""IRNet's confident labels, boundaries and walk."""

import numpy as np
import torch

from core.crf.dense import DenseCRF
from core.models.backbones import BackboneConfig
from core.wsss.irn import BoundaryNetwork, IrnConfig, label_of_walked_maps, seed_by_thresholds, walk

RESNET = BackboneConfig("resnet18", {"channels": [8, 8, 16, 16]}, "none")


def test_only_clear_pixels_are_confident():
    image = np.full((1, 4, 3), 128, np.uint8)
    cam = np.array([[[0.9, 0.2, 0.02, 0.5]], [[0.1, 0.1, 0.01, 0.6]]], np.float32)
    crf = DenseCRF(iterations=0)  # leaves each decision as it is
    label = seed_by_thresholds(image, np.array([3, 7]), cam, IrnConfig(), crf)
    assert label.tolist() == [[3, 255, 0, 7]]


def test_image_without_tags_is_background():
    image, cam = np.zeros((8, 12, 3), np.uint8), np.zeros((0, 2, 3), np.float32)
    assert not seed_by_thresholds(image, np.zeros(0), cam, IrnConfig(), DenseCRF()).any()
    assert not label_of_walked_maps(torch.zeros(0, 2, 3), np.zeros(0), (8, 12), 0.25).any()


def test_label_after_the_walk_compares_all_classes_with_the_background():
    walked = torch.tensor([[[8.0, 1.0, 1.0]], [[2.0, 4.0, 1.0]]])
    label = label_of_walked_maps(walked, np.array([2, 5]), (4, 12), 0.25)
    assert label[:, 1::4].tolist() == [[2, 5, 0]] * 4  # within its cell, to the left of the centre


def test_maps_of_any_size_are_averaged_over_the_boundaries_cells():
    config, boundary = IrnConfig(doublings=0), torch.rand(3, 5)
    maps = torch.rand(2, 3, 5)
    whole = maps.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.allclose(walk(boundary, whole, config), walk(boundary, maps, config))
    assert walk(boundary, whole[:0], config).shape == (0, 3, 5)


def test_cells_after_the_walk_are_4_pixels_wide_though_the_last_ones_reach_beyond_the_image():
    walked = torch.zeros(1, 8, 8)
    walked[0, :, :4] = 1  # up to pixel 16, half of it from pixel 13.5 to 17.5
    narrow, wide = (
        label_of_walked_maps(walked, np.array([3]), (29, width), 0.5)[:, :29] for width in (29, 32)
    )
    assert (narrow == wide).all() and (narrow[:, :16] == 3).all() and not narrow[:, 16:].any()


def test_boundaries_come_at_stride_4_from_a_frozen_backbone():
    network = BoundaryNetwork(RESNET, IrnConfig()).train()
    logits = network(torch.randn(2, 3, 50, 72))
    assert logits.shape == (2, 1, 13, 18) and not network.backbone.training
    logits.sum().backward()
    assert all(p.grad is None for p in network.backbone.parameters())
    (group,) = network.parameter_groups(0.1)
    assert len(group["params"]) == 17 and all(p.grad is not None for p in group["params"])


def test_head_has_the_public_names_and_shapes():
    with torch.device("meta"):
        network = BoundaryNetwork(BackboneConfig("resnet50", {}, "none"), IrnConfig())
    shapes = {k: tuple(v.shape) for k, v in network.state_dict().items() if "fc_edge" in k}
    inputs = (64, 256, 512, 1024, 2048)
    expected = {"fc_edge6.weight": (1, 160, 1, 1), "fc_edge6.bias": (1,)}
    for k, channels in enumerate(inputs, 1):
        expected[f"fc_edge{k}.0.weight"] = (32, channels, 1, 1)
        expected |= {f"fc_edge{k}.1.{name}": (32,) for name in ("weight", "bias")}
    assert shapes == expected
