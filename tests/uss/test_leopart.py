import dataclasses

import numpy as np
import pytest
import torch
import yaml
from conftest import CLASSES, run_python

import train_uss
from core.config import make_parser, parse
from core.data.lists import read_split
from core.data.settings import DataConfig
from core.models.backbones import BackboneConfig
from core.models.feature_networks import ViT, feature_network
from core.run import checkpoint
from core.run.errors import UserError
from core.uss import leopart
from core.uss.leopart import (
    LeopartConfig,
    LeopartNetwork,
    MultiCrops,
    Queue,
    add_drop_path,
    crops_loss,
    foreground,
    overlap,
    part_loss,
    roi_align,
)

TINY = BackboneConfig(
    "vit_tiny_patch16_224",
    {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "none",
)
SMALL = LeopartConfig(
    prototypes=6, hidden=16, width=8, queue=16, large=32, small=16, smalls=2, batch_size=4
)


def bilinear(values: np.ndarray, y: float, x: float) -> float:
    """A value between the centres of cells, at (row + 0.5, column + 0.5)."""
    rows, cols = values.shape
    y, x = min(max(y - 0.5, 0), rows - 1), min(max(x - 0.5, 0), cols - 1)
    top, left = min(int(y), rows - 2), min(int(x), cols - 2)
    fy, fx = y - top, x - left
    upper = values[top, left] * (1 - fx) + values[top, left + 1] * fx
    lower = values[top + 1, left] * (1 - fx) + values[top + 1, left + 1] * fx
    return upper * (1 - fy) + lower * fy


def test_roi_align_equals_a_loop_with_as_many_samples_as_the_box_has_cells():
    maps = torch.randn(3, 2, 9, 12)
    boxes = torch.tensor([[0.1, 0.2, 0.7, 0.9], [0.0, 0.0, 1.0, 0.25], [0.5, 0.5, 0.6, 1.0]])
    samples = [(2, 3), (3, 1), (1, 2)]  # along both axes: ceil(length of the box / 4)
    found = roi_align(maps, boxes, cells=4)
    for b, c, i, j in np.ndindex(3, 2, 4, 4):
        top, left, bottom, right = (boxes[b] * torch.tensor([9, 12, 9, 12])).tolist()
        tall, wide = (bottom - top) / 4, (right - left) / 4
        values, (m, n) = maps[b, c].numpy(), samples[b]
        places = [(i + (a + 0.5) / m, j + (d + 0.5) / n) for a in range(m) for d in range(n)]
        mean = np.mean([bilinear(values, top + y * tall, left + x * wide) for y, x in places])
        assert found[b, c, i, j] == pytest.approx(mean, abs=1e-5)


def test_overlap_is_the_same_place_of_the_image_in_both_crops():
    first = torch.tensor([[0.0, 0.0, 0.5, 1.0]])
    second = torch.tensor([[0.25, 0.5, 1.0, 1.0]])
    here, there = overlap(first, second)
    assert here.tolist() == [[0.5, 0.5, 1.0, 1.0]]
    assert torch.allclose(there, torch.tensor([[0.0, 0.0, 1 / 3, 1.0]]))


def test_foreground_is_the_smallest_set_that_holds_the_mass_without_specks():
    attention = torch.full((1, 20, 20), 1e-6)
    attention[0, 3:9, 3:9] = 1.0
    attention[0, 15, 15] = 0.9  # a speck
    mask = foreground(attention, 0.6)[0]
    assert mask[4:8, 4:8].all() and not mask[10:].any() and not mask[:2].any()
    diagonal = torch.zeros(1, 20, 20)
    diagonal[0, range(8, 12), range(8, 12)] = 1.0  # four cells that touch at their corners
    assert foreground(diagonal, 0.4).sum() == 4
    smooth = torch.ones(1, 4, 5)
    assert foreground(smooth, 0.6).sum() in range(12, 14)


def test_crops_overlap_enough_and_are_a_function_of_the_seed(tiny_data):
    split = read_split(DataConfig(root=str(tiny_data), classes=tuple(CLASSES)), "train")
    crops = MultiCrops(split, SMALL)
    for seed in range(20):
        item = crops[3, seed]
        assert item["large"].shape == (2, 3, 32, 32) and item["small"].shape == (2, 3, 16, 16)
        boxes = item["boxes"]
        assert boxes.min() >= 0 and boxes.max() <= 1
        for k, v in [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3)]:
            common = boxes[k, 2:].minimum(boxes[v, 2:]) - boxes[k, :2].maximum(boxes[v, :2])
            assert common.min() > 0 and common.prod() > (0.02 if v == 1 else 0.01)
        again = crops[3, seed]
        assert item.pop("id") == again.pop("id") == split.ids[3]
        assert all(torch.equal(item[key], again[key]) for key in item)


def test_loss_asks_the_same_of_the_same_place_and_of_foreground_alone():
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.5]]])
    assigned = torch.zeros(1, 2, 8, 8)
    assigned[:, 0, :, :4], assigned[:, 1, :, 4:] = 1, 1  # left half, right half of the image
    left = torch.zeros(1, 2, 8, 8)
    left[:, 0] = 1
    everywhere = torch.ones(1, 8, 8, dtype=torch.bool)
    agreeing = [assigned.clone(), left.clone()]
    loss = part_loss([assigned, left], agreeing, [everywhere, everywhere], boxes)
    assert float(loss) < 0.2  # nearly 0; at the border between the halves samples mix
    wrong = part_loss([assigned, left], [assigned, 1 - left], [everywhere] * 2, boxes)
    assert float(wrong) > 4
    nowhere = torch.zeros(1, 8, 8, dtype=torch.bool)
    assert part_loss([assigned, left], [assigned, 1 - left], [nowhere] * 2, boxes) == 0


def test_attention_is_that_of_the_class_token():
    network = LeopartNetwork(ViT(TINY), SMALL).eval()
    images = torch.randn(2, 3, 32, 40)
    with torch.no_grad():
        embeddings, attention = network.with_attention(images)
        block, inputs = network.backbone.net.blocks[-1], []
        block.attn.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        assert torch.allclose(network.embeddings(images), embeddings)
        q, k, _ = block.attn.qkv(inputs[0]).chunk(3, -1)
        weights = [
            (q[:, :1, h : h + 8] @ k[..., h : h + 8].transpose(1, 2) / 8**0.5).softmax(-1)
            for h in (0, 8)
        ]
    assert attention.shape == (2, 4, 5) and embeddings.shape == (2, 8, 4, 5)
    expected = torch.stack(weights).mean(0)[:, 0, 1:].view(2, 4, 5)
    assert torch.allclose(attention, expected, atol=1e-6)


def test_queue_keeps_the_newest_and_counts_when_it_is_full():
    queue = Queue(4, 2)
    queue.push(0, torch.ones(3, 2), most=10)
    assert not queue.full(0)
    queue.push(0, torch.full((2, 2), 2.0), most=10)
    assert queue.rows[0, :, 0].tolist() == [2, 2, 1, 1]
    assert queue.full(0) and not queue.full(1)
    queue.push(1, torch.ones(9, 2), most=3)
    assert not queue.full(1)
    queue.push(0, torch.empty(0, 2), most=10)
    assert queue.rows[0, :, 0].tolist() == [2, 2, 1, 1]


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_student_learns_and_teacher_does_not(half):
    torch.manual_seed(0)
    student = LeopartNetwork(ViT(TINY), SMALL).train()
    teacher = LeopartNetwork(ViT(TINY), SMALL).eval().requires_grad_(False)
    queue = Queue(16, 8)
    batch = {
        "large": torch.randn(4, 2, 3, 32, 32),
        "small": torch.randn(4, 2, 3, 16, 16),
        "boxes": torch.tensor(
            [[[0.0, 0, 1, 1], [0, 0, 0.8, 0.8], [0.2, 0.2, 0.6, 0.6], [0, 0, 0.5, 0.5]]]
        ).repeat(4, 1, 1),
    }
    for _ in range(3):  # the queue fills and takes part
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = crops_loss(student, teacher, queue, batch, SMALL)
    assert queue.full(0) and queue.full(1) and loss.isfinite()
    loss.backward()
    grads = [p.grad for p in student.prototypes.parameters()]
    assert all(g is not None and g.abs().sum() > 0 for g in grads)


def test_student_leaves_blocks_out_and_the_teacher_does_not():
    backbone = ViT(dataclasses.replace(TINY, arguments=TINY.arguments | {"depth": 3})).train()
    images, rates = torch.randn(64, 3, 32, 32), []
    whole = backbone(images)
    add_drop_path(backbone, 0.5)
    for block in backbone.net.blocks:
        assert block.drop_path1.drop_prob == block.drop_path2.drop_prob
        rates.append(block.drop_path1.drop_prob)
    assert rates == [0, 0.25, 0.5]
    assert not torch.allclose(backbone(images), whole, atol=1e-3)
    assert torch.equal(backbone.eval()(images), whole)


def test_only_matrices_decay():
    groups = LeopartNetwork(ViT(TINY), SMALL).parameter_groups(SMALL.lr, SMALL.head_lr)
    assert [(g["lr"], g["decays"]) for g in groups] == [(1e-5, 1), (1e-5, 0), (1e-4, 1), (1e-4, 0)]
    assert all((p.ndim > 1) == bool(g["decays"]) for g in groups for p in g["params"])


@pytest.fixture
def leopart_experiment(experiment):
    settings = yaml.safe_load(experiment.read_text())
    settings["uss"]["method"] = "leopart"
    experiment.write_text(yaml.safe_dump(settings))
    return experiment


def test_stage_1_trains_it_and_takes_the_teachers_backbone(leopart_experiment):
    done = run_python("train_uss.py", "--config", leopart_experiment)
    assert done.returncode == 0, done.stderr
    folder = leopart_experiment.parent / "run/uss"
    network = checkpoint.load(folder / "checkpoint.pth")["network"]
    state = checkpoint.load(folder / "leopart/checkpoint.pth")
    teacher, student = state["teacher"], state["student"]
    names = [k for k in network if k.startswith("backbone.") and network[k].ndim > 1]
    assert names and all(torch.allclose(network[k], teacher[k], atol=1e-4) for k in names)
    assert any(not torch.equal(student[k], teacher[k]) for k in names)
    assert len((folder / "leopart/log.jsonl").read_text().splitlines()) == 4


def test_training_goes_on_after_a_stop_with_the_same_weights(leopart_experiment, monkeypatch):
    path = ["--config", str(leopart_experiment)]
    config, _ = parse(make_parser("test", ""), path)
    split = read_split(config.data, "train")
    found, loss, calls = [], leopart.crops_loss, []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 4:  # a checkpoint is written after two of the four iterations
            raise KeyboardInterrupt
        return loss(*arguments)

    for name in ("whole", "stopped", "stopped"):
        torch.manual_seed(0)
        backbone = ViT(config.uss.backbone)
        if name == "stopped" and not calls:
            monkeypatch.setattr(leopart, "crops_loss", stopped)
            with pytest.raises(KeyboardInterrupt):
                train_uss.train_leopart(config, backbone, split, leopart_experiment.parent / name)
            monkeypatch.undo()
            continue
        train_uss.train_leopart(config, backbone, split, leopart_experiment.parent / name)
        found.append(backbone.state_dict())
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_leopart_asks_for_a_transformer(leopart_experiment):
    options = ["--config", str(leopart_experiment), "--uss.backbone.name", "test_convnext"]
    config, _ = parse(make_parser("test", ""), [*options, "--uss.backbone.arguments", "{}"])
    split = read_split(config.data, "train")
    backbone = feature_network(config.uss.backbone)
    with pytest.raises(UserError, match="leopart needs a vision transformer"):
        train_uss.train_leopart(config, backbone, split, leopart_experiment.parent / "leopart")
