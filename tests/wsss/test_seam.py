import pytest
import torch

from core.models.backbones import BackboneConfig
from core.wsss.seam import (
    SeamClassifier,
    SeamConfig,
    background_from_classes,
    classification_loss,
    consistency_losses,
    normalised,
    only_the_best_class,
    pixel_correlation,
)

RESNET = BackboneConfig("resnet18", {"channels": [8, 8, 16, 16]}, "none")
WIDE = BackboneConfig("wide_resnet38", {"width": 1 / 32}, "none")
TAGS = torch.tensor([[1.0, 0.0]])


def test_maps_are_stretched_and_classes_not_tagged_vanish():
    maps = torch.tensor([[[[-1.0, 0.0, 4.0]], [[1.0, 2.0, 3.0]], [[5.0, 6.0, 7.0]]]])
    expected = torch.tensor([[[[0.0, 0, 1]], [[0, 0.5, 1]], [[0, 0, 0]]]])
    assert torch.allclose(normalised(maps, TAGS), expected, atol=1e-4)


def test_background_is_what_the_best_class_leaves():
    maps = torch.tensor([[[[9.0, 9.0]], [[0.2, 0.7]], [[0.6, 0.1]]]])
    filled = background_from_classes(maps)
    assert torch.allclose(filled[0, 0], torch.tensor([[0.4, 0.3]]))
    best = only_the_best_class(filled)
    assert torch.equal(best[0, 1:], torch.tensor([[[0.0, 0.7]], [[0.6, 0.0]]]))
    assert torch.equal(best[:, 0], filled[:, 0])


def test_cells_with_like_features_share_their_maps():
    features = torch.tensor([[[[1.0, 1, 0]], [[0, 0, 1.0]]]])  # the first two cells are alike
    maps = torch.tensor([[[[0.0, 1.0, 0.3]]]])
    found = pixel_correlation(maps, features)
    assert torch.allclose(found, torch.tensor([[[[0.5, 0.5, 0.3]]]]), atol=1e-4)


def test_correlation_equals_its_double_loop():
    torch.manual_seed(0)
    maps, features = torch.rand(1, 2, 3, 4), torch.randn(1, 5, 3, 4)
    unit = features[0].flatten(1) / features[0].flatten(1).norm(dim=0)
    expected = torch.zeros(2, 12)
    for j in range(12):
        weights = [max(0.0, float(unit[:, i] @ unit[:, j])) for i in range(12)]
        for c in range(2):
            values = maps[0, c].flatten()
            expected[c, j] = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert torch.allclose(pixel_correlation(maps, features)[0].flatten(1), expected, atol=1e-4)


def test_views_that_agree_have_no_consistency_loss():
    plain = torch.zeros(1, 3, 2, 2)
    plain[0, 1] = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    refined = background_from_classes(plain)
    equivariance, cross = consistency_losses((plain, refined), (plain, refined), TAGS)
    assert equivariance.item() == pytest.approx(0, abs=1e-4)
    assert cross.item() == pytest.approx(0, abs=1e-4)


def test_views_that_differ_are_told_by_how_much():
    first, second = torch.zeros(1, 3, 1, 5), torch.zeros(1, 3, 1, 5)
    first[0, 1, 0] = torch.tensor([0.0, 0, 0, 0, 1])
    second[0, 1, 0] = torch.tensor([1.0, 0, 0, 0, 0])
    views = [(m, background_from_classes(m)) for m in (first, second)]
    equivariance, cross = consistency_losses(*views, TAGS)
    assert equivariance.item() == pytest.approx(2 / 10, abs=1e-4)  # two of 2 x 5 values
    # 15 values, four of which differ by 1: the largest fifth, three, differ by 1 in each direction.
    assert cross.item() == pytest.approx(2.0, abs=1e-3)


def test_classification_loss_pushes_down_the_low_end_of_refined_maps():
    maps = torch.zeros(1, 3, 2, 4)
    base = classification_loss(maps, maps, TAGS)
    refined = torch.zeros(1, 3, 2, 4)
    refined[0, 1] = torch.arange(1.0, 9).view(2, 4)
    refined[0, 2] = 100  # not tagged
    assert classification_loss(maps, refined, TAGS) - base == pytest.approx(1.5)  # of 1 and 2


@pytest.mark.parametrize("backbone", [RESNET, WIDE], ids=["resnet", "wide"])
def test_network_trains_on_tags_and_gives_maps(backbone):
    torch.manual_seed(0)
    network = SeamClassifier(backbone, 2, SeamConfig()).train()
    images = torch.randn(2, 3, 64, 72)
    network.loss(images, torch.tensor([[1.0, 0], [0, 1]])).backward()
    groups = network.parameter_groups(0.1, 1.0)
    assert len(groups[1]["params"]) == 4
    assert all(p.grad is not None for group in groups for p in group["params"])
    maps = network.eval().activation(images)
    assert maps.shape == (2, 2, 64, 72) and (maps >= 0).all()
    norms = [m for m in network.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and not any(p.requires_grad for m in norms for p in m.parameters())


def test_heads_of_the_published_size_have_the_public_names_and_shapes():
    wide = BackboneConfig("wide_resnet38", {}, "none")
    with torch.device("meta"):
        state = SeamClassifier(wide, 20, SeamConfig()).state_dict()
    shapes = {k: tuple(v.shape[:2]) for k, v in state.items() if not k.startswith("backbone")}
    assert shapes == {
        "fc8.weight": (21, 4096),
        "f8_3.weight": (64, 512),
        "f8_4.weight": (128, 1024),
        "f9.weight": (192, 195),
    }
