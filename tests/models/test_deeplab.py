import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from core.complement import labelled_pixels, segmentation_loss, weighted_cross_entropy
from core.models.backbones import BackboneConfig, norms
from core.models.deeplab import build_deeplab
from core.models.wide_resnet import WideResNet38
from core.run.errors import UserError
from core.run.loop import make_optimizer
from core.segmenter import EvaluationConfig, SegmentationConfig, probabilities
from core.wsss.cam import CamClassifier

RESNET = BackboneConfig("resnet18", {"channels": [8, 8, 16, 16]}, "none")
WIDE = BackboneConfig("wide_resnet38", {"width": 1 / 32}, "none")
HEADS = {
    "deeplabv1": {"rates": (12,), "aspp_dim": 16},
    "deeplabv2": {"rates": (6, 12, 18, 24)},
    "deeplabv3plus": {"aspp_dim": 16, "low_dim": 8},
}


def settings(network: str, backbone: BackboneConfig = RESNET, **changes) -> SegmentationConfig:
    return SegmentationConfig(network=network, backbone=backbone, **{**HEADS[network], **changes})


@pytest.mark.parametrize("backbone", [RESNET, WIDE], ids=["resnet", "wide"])
@pytest.mark.parametrize(("network", "stride"), [("deeplabv1", 8), ("deeplabv2", 8)])
def test_early_deeplabs_predict_at_stride_8(network, stride, backbone):
    logits = build_deeplab(settings(network, backbone), 5).eval()(torch.zeros(2, 3, 64, 72))
    assert logits.shape == (2, 6, 64 // stride, 72 // stride)


@pytest.mark.parametrize("stride", [8, 16])
def test_decoder_predicts_at_stride_4_whatever_the_backbones(stride):
    network = build_deeplab(settings("deeplabv3plus", output_stride=stride), 5).eval()
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 6, 16, 16)


def test_smaller_copies_are_trained_on_and_their_maximum_is_the_prediction():
    torch.manual_seed(0)
    network = build_deeplab(settings("deeplabv2", train_scales=(0.5, 0.75)), 3).eval()
    images = torch.randn(1, 3, 64, 64)
    levels = network.training_logits(images)
    assert [level.shape[-1] for level in levels] == [8, 4, 6, 8]
    assert torch.equal(levels[-1], network(images))
    assert (levels[-1] >= levels[0]).all()


def test_sides_of_smaller_copies_are_rounded_down():
    network = build_deeplab(settings("deeplabv2", train_scales=(0.75,)), 3).eval()
    seen = []
    network.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    network(torch.randn(1, 3, 43, 65))
    assert [tuple(shape[2:]) for shape in seen] == [(43, 65), (32, 48)]


def test_loss_of_v2_takes_the_label_at_the_centres_of_the_logits_cells():
    torch.manual_seed(0)
    at_cells = build_deeplab(settings("deeplabv2"), 2).head.at_cells
    label = torch.randint(0, 3, (2, 24, 40))
    label[:, :4], certainty = 255, torch.rand(2, 24, 40)
    levels = [torch.randn(2, 3, 3, 5), torch.randn(2, 3, 6, 10)]
    places = [(slice(None), slice(4, None, 8), slice(4, None, 8))]
    places += [(slice(None), slice(2, None, 4), slice(2, None, 4))]
    expected = sum(
        weighted_cross_entropy(level, label[place], certainty[place], True)
        for level, place in zip(levels, places, strict=True)
    )
    assert torch.allclose(
        segmentation_loss(levels, label, certainty, True, at_cells=at_cells), expected
    )
    # The parts of a batch, over the labelled pixels of all of it, sum to the batch.
    counts = labelled_pixels(label)
    whole = segmentation_loss(levels, label, None, False, counts, at_cells)
    parts = [
        segmentation_loss(
            [x[k : k + 1] for x in levels], label[k : k + 1], None, False, counts, at_cells
        )
        for k in range(2)
    ]
    assert torch.allclose(sum(parts), whole)


@pytest.mark.parametrize("name", sorted(HEADS))
def test_biases_of_early_heads_learn_twice_as_fast_and_do_not_decay(name):
    network = build_deeplab(settings(name), 3)
    groups = network.parameter_groups(0.1, 1.0)
    optimizer, _ = make_optimizer("sgd", groups, 0.5, 10)
    found = {
        parameter: (name, group["lr"], group["weight_decay"])
        for name, parameter in network.head.named_parameters()
        for group in optimizer.param_groups
        if any(parameter is p for p in group["params"])
    }
    assert len(found) == len([*network.head.parameters()])
    fast = {name for name, lr, decay in found.values() if (lr, decay) == (2.0, 0.0)}
    assert all((lr, decay) == (1.0, 0.5) for name, lr, decay in found.values() if name not in fast)
    assert (
        fast
        == {
            "deeplabv1": {"layers.3.bias"},
            "deeplabv2": {f"branches.{k}.bias" for k in range(4)},
            "deeplabv3plus": set(),
        }[name]
    )


def test_statistics_of_v1s_head_move_by_the_configured_share():
    network = build_deeplab(settings("deeplabv1", head_momentum=3e-4), 3).train()
    moved = {m.momentum for m in norms(network.head)}
    assert moved == {3e-4} and {m.momentum for m in norms(network.backbone)} == {0.1}


@pytest.mark.parametrize("name", ["deeplabv1", "deeplabv2"])
def test_views_are_averaged_as_logits_in_v1_and_as_probabilities_in_v2(name):
    torch.manual_seed(0)
    network, images = build_deeplab(settings(name), 3).eval(), torch.randn(1, 3, 64, 64) * 3
    with torch.inference_mode():
        found = probabilities(network, images, EvaluationConfig(scales=(1.0,), flip=True))
        logits = torch.stack([network(images), network(images.flip(-1)).flip(-1)]) * 1.0
        large = [F.interpolate(x, (64, 64), mode="bilinear") for x in logits]
    ours = torch.stack(large).mean(0).softmax(1)
    if name == "deeplabv2":
        ours = F.interpolate(logits.softmax(2).mean(0), (64, 64), mode="bilinear")
    assert torch.allclose(found, ours, atol=1e-5)


def test_frozen_normalisation_stays_frozen_when_training_begins():
    network = build_deeplab(settings("deeplabv3plus", norm="frozen"), 3).train()
    norms = [m for m in network.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms)
    assert not any(p.requires_grad for m in norms for p in m.parameters())
    assert all(p.requires_grad for group in network.parameter_groups(1, 1) for p in group["params"])
    assert network.head.decoder.low_block.bn.training


@pytest.mark.parametrize(
    ("choice", "first", "rest"),
    [("torchvision", (2, 2), (4, 4)), ("delayed", (1, 1), (4, 4)), ("none", (1, 1), (1, 1))],
)
def test_last_layer_has_the_chosen_dilation_at_the_same_stride(choice, first, rest):
    backbone = BackboneConfig("resnet50", {}, "none", choice)
    with torch.device("meta"):
        network = build_deeplab(settings("deeplabv2", backbone), 3)
    layer = network.backbone.net["layer4"]
    assert layer[0].conv2.dilation == first and layer[1].conv2.dilation == rest
    assert network(torch.zeros(1, 3, 64, 64, device="meta")).shape == (1, 4, 8, 8)


@pytest.mark.parametrize(
    ("fixed", "trained"),  # IRNet's, AdvCAM's, and the default
    [
        (2, {"layer3", "layer4"}),
        (0, {"layer1", "layer2", "layer3", "layer4"}),
        (None, {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}),
    ],
)
def test_classifier_leaves_its_first_layers_and_its_normalisation_alone(fixed, trained):
    network = CamClassifier(RESNET, 3, frozen_norm=True, frozen_stages=fixed).train()
    network.loss(torch.randn(2, 3, 64, 64), torch.ones(2, 3)).backward()
    moved = {n for n, p in network.backbone.net.named_parameters() if p.grad is not None}
    assert {name.split(".")[0] for name in moved} == trained
    assert not any(m.training for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_balanced_loss_adds_the_means_of_background_and_classes():
    logits, label = torch.randn(1, 3, 2, 4), torch.tensor([[[0, 0, 0, 1], [0, 2, 255, -1]]])
    losses = F.cross_entropy(logits, label.clamp(0, 2), reduction="none")[0]
    background = (losses[0, :3].sum() + losses[1, 0]) / 4
    classes = (losses[0, 3] + losses[1, 1]) / 2
    found = weighted_cross_entropy(logits, label, balanced=True)
    assert torch.allclose(found, background + classes)


def wide_names() -> dict[str, tuple[int, ...]]:
    """Convolutions of the public file, from the table of the network's blocks."""
    shapes = {"conv1a": (64, 3, 3, 3)}
    basic = [("b2", 64, 128, 128, 3), ("b3", 128, 256, 256, 3), ("b4", 256, 512, 512, 6)]
    for name, inputs, mid, out, blocks in [*basic, ("b5", 512, 512, 1024, 3)]:
        shapes[f"{name}.conv_branch1"] = (out, inputs, 1, 1)
        for k in range(blocks):
            block = f"{name}_{k}" if k else name
            shapes[f"{block}.conv_branch2a"] = (mid, out if k else inputs, 3, 3)
            shapes[f"{block}.conv_branch2b1"] = (out, mid, 3, 3)
    for name, inputs, mid, wide, out in [
        ("b6", 1024, 512, 1024, 2048),
        ("b7", 2048, 1024, 2048, 4096),
    ]:
        shapes[f"{name}.conv_branch1"] = (out, inputs, 1, 1)
        shapes[f"{name}.conv_branch2a"] = (mid, inputs, 1, 1)
        shapes[f"{name}.conv_branch2b1"] = (wide, mid, 3, 3)
        shapes[f"{name}.conv_branch2b2"] = (out, wide, 1, 1)
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def test_wide_resnet_has_the_public_names_and_shapes():
    with torch.device("meta"):
        state = WideResNet38().state_dict()
    convolutions = {k: tuple(v.shape) for k, v in state.items() if v.ndim == 4}
    assert convolutions == wide_names()
    assert {k.rsplit(".", 1)[0].rsplit(".", 1)[-1] for k, v in state.items() if v.ndim == 1} == {
        *("bn_branch2a", "bn_branch2b1", "bn_branch2b2", "bn7")
    }


def test_weights_of_wide_resnet_load_completely_or_not_at_all(tmp_path):
    state = {
        k: torch.randn_like(v)
        for k, v in WideResNet38(1 / 32).state_dict().items()
        if v.is_floating_point()
    }
    path = tmp_path / "wide.safetensors"
    save_file({**state, "linear1000.weight": torch.zeros(3)}, path)
    backbone = BackboneConfig("wide_resnet38", {"width": 1 / 32}, str(path))
    network = build_deeplab(settings("deeplabv1", backbone), 3)
    for name, value in state.items():
        assert torch.equal(network.backbone.net.state_dict()[name], value), name
    del state["b6.conv_branch2b2.weight"]
    save_file(state, path)
    with pytest.raises(UserError, match="b6.conv_branch2b2.weight"):
        build_deeplab(settings("deeplabv1", backbone), 3)


def test_wide_resnet_is_not_fetched_and_has_one_stride():
    with pytest.raises(UserError, match="local file"):
        build_deeplab(settings("deeplabv1", BackboneConfig("wide_resnet38")), 3)
    with pytest.raises(UserError, match="output stride 8 only"):
        build_deeplab(settings("deeplabv1", WIDE, output_stride=16), 3)
