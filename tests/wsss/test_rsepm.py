from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from core.complement import labelled_pixels
from core.models.backbones import BackboneConfig
from core.run import distributed
from core.run.errors import UserError
from core.run.loop import EMA
from core.wsss.rsepm import (
    RecurSeed,
    RsEpmClassifier,
    RsEpmConfig,
    _decoder_loss,
    certain_label,
    correct_maps,
    edge_strength,
    map_loss,
    mixed,
    self_correlation,
)
from core.wsss.settings import WsssConfig

RESNET = BackboneConfig("resnet18", {"channels": [8, 8, 16, 16]}, "none", "none")
SMALL = RsEpmConfig(width=8, low_width=8, rates=(2, 4), recur_from=1, mix_from=2, edge=0.9)


def test_only_clear_pixels_get_a_label():
    classes = torch.tensor([[[0.55, 0.1, 0.05, 0.5]], [[0.2, 0.6, 0.09, 0.5]]])
    probs = torch.cat([1 - classes.sum(0, keepdim=True), classes])[None]
    assert certain_label(probs, 0.55, 0.10).tolist() == [[[1, 2, 0, 255]]]


def test_edge_is_half_the_largest_change_to_a_neighbour():
    probs = torch.rand(2, 3, 5, 6).softmax(1)
    found = edge_strength(probs)
    for b, y, x in np.ndindex(2, 5, 6):
        around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        inside = [(j, i) for j, i in around if 0 <= j < 5 and 0 <= i < 6]
        change = max((probs[b, :, y, x] - probs[b, :, j, i]).abs().sum() for j, i in inside)
        assert found[b, y, x] == pytest.approx(float(change) / 2)
    certain = F.one_hot(torch.tensor([[[0, 0, 1]]])).permute(0, 3, 1, 2).float()
    assert edge_strength(certain).tolist() == [[[0, 1, 1]]]


def test_self_correlation_equals_its_definition_cell_by_cell():
    config = RsEpmConfig(first_order=0.4, second_order=0.5)
    level = torch.randn(1, 4, 2, 3)
    (found,) = self_correlation([level], config)
    cells = F.normalize(level[0].flatten(1).T.double())
    count = len(cells)

    def columns(matrix):
        return matrix / matrix.sum(0).clamp(min=1e-5)

    first = torch.zeros(count, count, dtype=torch.double)
    for i, j in np.ndindex(count, count):
        cosine = float(cells[i] @ cells[j])
        first[i, j] = cosine if cosine >= 0.4 else 0
    first = columns(first)
    other = first.clone().fill_diagonal_(0)
    second = columns(columns(other) @ columns(other))
    second[second < 0.5 / count] = 0
    assert torch.allclose(found.double(), columns(torch.maximum(first, second)), atol=1e-5)
    both = self_correlation([level, level], config)[0]
    assert torch.allclose(both, 2 * found)


def test_map_spreads_over_cells_that_correlate_and_leaves_those_of_the_background():
    levels = [torch.zeros(1, 2, 1, 6)]
    levels[0][0, 0, 0, :3] = 1  # an object of three cells, of which the map shows one
    levels[0][0, 1, 0, 3:] = 1
    maps = torch.tensor([[[[1.0, 0.2, 0.2, 0.2, 0.0, 0.0]]]])
    config = RsEpmConfig()
    found = correct_maps(self_correlation(levels, config), maps, torch.ones(1, 1, 1, 6), config)
    # Within the object: first order 1/3 everywhere; second order 1/2 with itself, 1/4 with others.
    assert torch.allclose(found, torch.tensor([[[[1.0, 2 / 3, 2 / 3, 0, 0, 0]]]]), atol=1e-4)


def test_distance_of_the_maps_counts_tagged_classes_alone():
    maps = torch.tensor([[[[2.0, 1, -1, 0]], [[5.0, 0, 0, 0]]]])
    target = torch.tensor([[[[1.0, 1, 1, 0]], [[0.0, 0, 0, 0]]]])
    everywhere = torch.ones(1, 1, 1, 4)
    loss = map_loss(maps, target, torch.tensor([[1.0, 0]]), everywhere)
    assert float(loss) == pytest.approx(1.5 / 4, abs=1e-4)
    assert map_loss(maps, target, torch.zeros(1, 2), everywhere) == 0
    padded = torch.tensor([[[[1.0, 1, 0, 0]]]])
    loss = map_loss(maps, target, torch.tensor([[1.0, 0]]), padded)
    assert float(loss) == pytest.approx(0.5 / 2, abs=1e-4)


def test_certain_objects_are_pasted_with_their_pixels_labels_and_tags():
    images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 4, 8)
    label = torch.full((2, 2, 4), 255)
    label[0, 0, :2] = 1
    label[1, 0, :1], label[1, 1] = 2, 0
    tags = torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    found = mixed(images, label, tags)
    # Of the first image class 1 covers class 2 in the second; class 3 had no certain pixel there.
    assert found[1][1].tolist() == [[1, 1, 255, 255], [0, 0, 0, 0]]
    assert found[2][1].tolist() == [1, 0, 1]
    assert found[0][1][0].tolist() == [[0.0] * 4 + [1.0] * 4] * 2 + [[1.0] * 8] * 2
    # And class 2 of the second image half of class 1 in the first.
    assert found[1][0].tolist() == [[2, 1, 255, 255], [255] * 4]
    assert found[2][0].tolist() == [1, 1, 0]
    assert images[0].max() == 0 and tags[1].tolist() == [0, 1, 1]  # the arguments are left alone


def test_half_of_an_images_classes_is_pasted():
    label = torch.zeros(2, 1, 5, dtype=torch.int64)
    label[0] = torch.tensor([[1, 2, 3, 4, 255]])
    pasted = {mixed(torch.zeros(2, 3, 1, 5), label, torch.zeros(2, 4))[1][1] for _ in range(20)}
    assert {int((p > 0).sum()) for p in pasted} == {2}
    assert len({tuple(p.flatten().tolist()) for p in pasted}) > 1


def test_nothing_certain_leaves_images_alone():
    images, tags = torch.randn(2, 3, 4, 4), torch.eye(2)
    label = torch.full((2, 2, 2), 255)
    found = mixed(images, label, tags)
    assert all(map(torch.equal, found, (images, label, tags)))


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_phases_add_their_losses_and_leave_the_teacher_alone(half):
    torch.manual_seed(0)
    config = replace(SMALL, cam_weight=0.5, decoder_weight=3.0)
    network = RsEpmClassifier(RESNET, 3, 16, config).train()
    teacher = EMA(network, 0.9).network
    losses = RecurSeed(config, network, teacher, epoch=10)
    images, tags = torch.randn(4, 3, 64, 64), torch.eye(3)[[0, 1, 2, 0]]
    inside = torch.ones(4, 64, 64, dtype=torch.bool)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        found = [losses(images, tags, inside, step) for step in (9, 10, 19, 20)]
        found[-1]["loss"].backward()
    recur = {"loss", "classes", "cam", "decoder"}
    assert [set(f) for f in found] == [{"loss"}, recur, recur, recur | {"mixed"}]
    for figures in found[1:]:
        parts = figures["classes"] + 0.5 * figures["cam"] + 3 * figures["decoder"]
        parts = parts + figures.get("mixed", 0)
        assert torch.isclose(figures["loss"], parts)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_nothing_is_learnt_in_padding():
    """What stands in padding has no influence on the decoder's and the maps' losses there."""
    torch.manual_seed(0)
    network = RsEpmClassifier(RESNET, 3, 16, SMALL).eval()
    torch.nn.init.uniform_(network.classifier.weight)  # maps above 0
    losses = RecurSeed(SMALL, network, EMA(network, 0.9).network, epoch=10)
    images, tags = torch.randn(2, 3, 64, 64), torch.eye(3)[:2]
    nowhere = torch.zeros(2, 64, 64, dtype=torch.bool)
    figures = losses(images, tags, nowhere, 15)
    assert figures["cam"] == 0 and figures["decoder"] == 0
    half = nowhere.clone()
    half[:, :, :32] = True
    target, _ = losses._targets(images, tags, half[:, None].float(), 15)
    assert (target[..., 4:] == 0).all() and target[0, 0, :, :4].max() > 0.99


@pytest.mark.parametrize(
    ("values", "message"),
    [({"epochs": 15}, "more than 15 epochs"), ({"epochs": 20, "batch_size": 1}, "above 1")],
)
def test_training_that_cannot_end_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        WsssConfig(method="rsepm", **values)
    WsssConfig(method="rsepm", weights="released.pth", **values)


def test_class_without_certain_pixels_is_not_taught_as_background():
    """A decoder that has not found a tagged class must not make its images background."""
    network = RsEpmClassifier(RESNET, 2, 16, SMALL)
    decoder = network.decoder.classifier[-1]
    losses = RecurSeed(SMALL, network, EMA(network, 0.9).network, epoch=1)
    with torch.no_grad():
        losses.teacher.decoder.classifier[-1].weight.zero_()
    assert decoder.weight.abs().sum() > 0
    inside = torch.ones(2, 1, 64, 64)
    _, probs = losses._targets(torch.randn(2, 3, 64, 64), torch.eye(2), inside, 100)
    assert (probs[0, 1].max() > 0.4) and (probs[1, 2].max() > 0.4)
    assert (probs[0, 2] == 0).all() and (probs[1, 1] == 0).all()
    assert torch.allclose(probs.sum(1), torch.ones_like(probs[:, 0]), atol=1e-4)


def test_maps_are_the_decoders_probabilities_at_stride_4():
    network = RsEpmClassifier(RESNET, 3, 16, SMALL).eval()
    images = torch.randn(2, 3, 64, 72)
    maps = network.activation(images)
    assert maps.shape == (2, 3, 16, 18) and (maps > 0).all() and (maps.sum(1) < 1).all()
    scores, logits = network(images)
    assert scores.shape == (2, 3, 4, 5) and logits.shape == (2, 4, 16, 18)
    groups = network.parameter_groups(0.1, 1.0)
    assert sum(len(group["params"]) for group in groups) == len([*network.parameters()])


def test_losses_of_processes_average_to_that_of_their_images_together(monkeypatch):
    torch.manual_seed(0)
    logits, maps, target = (
        torch.randn(2, 4, 9, 10),
        torch.randn(2, 3, 9, 10),
        torch.rand(2, 3, 9, 10),
    )
    label, tags = torch.zeros(2, 9, 10, dtype=torch.long), torch.tensor([[1.0, 0, 0], [1, 1, 1]])
    label[0, 0, 0], label[1] = 1, 2

    def losses(rows: slice) -> Tensor:
        inside = torch.ones(2, 1, 9, 10)[rows]
        return torch.stack(
            [
                _decoder_loss(logits[rows], label[rows]),
                map_loss(maps[rows], target[rows], tags[rows], inside),
            ]
        )

    together = losses(slice(2))
    totals = {(): tags.sum(), (2,): labelled_pixels(label)}
    monkeypatch.setattr(distributed, "mean", lambda value: totals[(*value.shape,)] / 2)
    torch.testing.assert_close((losses(slice(1)) + losses(slice(1, 2))) / 2, together)
