"""Networks of timm as the backbone of stages 1, 2 and 4, with random weights."""

import copy

import pytest
import torch
from torch import Tensor, nn

from core.data.transforms import MEAN, STD, normalise_unit
from core.models.backbones import Backbone, BackboneConfig, take_our_images
from core.models.deeplab import build_deeplab
from core.models.feature_networks import feature_network
from core.run import checkpoint, vision
from core.run.errors import UserError
from core.segmenter import SegmentationConfig
from core.uss.features import SemanticFeatures, UssConfig
from core.wsss.irn import BoundaryNetwork, IrnConfig
from core.wsss.psa import AffinityNetwork, PsaConfig
from core.wsss.settings import WsssConfig
from train_wsss import build_classifier

DILATED = {
    "test_resnet": {},
    "resnext50_32x4d": {"layers": [1, 1, 1, 1]},
    "regnetx_002": {},
    "test_efficientnet": {},
    "tf_efficientnet_lite0": {},
    "mobilenetv3_small_050": {},
    "mobilenetv4_conv_small_035": {},
    "test_convnext": {},
    "test_nfnet": {},
    "test_byobnet": {},
}
ENLARGED = {
    "swin_tiny_patch4_window7_224": {"embed_dim": 12, "depths": [1, 1, 1, 1]},
    "swinv2_tiny_window8_256": {"embed_dim": 12, "depths": [1, 1, 1, 1]},
    "test_maxvit": {},
    "test_mambaout": {},
    "pvt_v2_b0": {},
    "hrnet_w18_small": {},
    "densenet121": {"growth_rate": 8, "block_config": [1, 1, 1, 1]},
    "dla34": {},
}
NETWORKS = {**DILATED, **ENLARGED}
HEADS = {
    "deeplabv1": {"rates": (4,)},
    "deeplabv2": {"rates": (2, 4)},
    "deeplabv3plus": {"rates": (2, 4), "low_dim": 8},
}


def config(name: str, **changes) -> BackboneConfig:
    return BackboneConfig(name, NETWORKS.get(name, {}), **{"weights": "none", **changes})


@pytest.fixture(scope="module", params=NETWORKS)
def backbone(request) -> Backbone:
    """A backbone of the maps that DeepLab takes."""
    return Backbone(config(request.param), (1, 4), 8).eval()


def learns(network: nn.Module, output: Tensor) -> bool:
    """Whether most parameters take part in the output; some networks have layers behind it."""
    output.square().mean().backward()
    trained = [p for p in network.parameters() if p.requires_grad]
    return sum(p.grad is not None for p in trained) > 0.6 * len(trained)


@pytest.mark.parametrize("size", [(33, 50), (64, 96), (97, 3)])
def test_maps_have_their_strides_whatever_the_image_size(backbone, size):
    with torch.no_grad():
        low, deep = backbone(torch.randn(1, 3, *size))
    assert low.shape == (1, backbone.dims[0], *(-(-n // 4) for n in size))
    assert deep.shape == (1, backbone.dims[1], *(-(-n // 8) for n in size))
    assert low.isfinite().all() and deep.isfinite().all()


@pytest.mark.parametrize(
    "name", ["test_convnext", "swin_tiny_patch4_window7_224", "test_mambaout", "densenet121"]
)
def test_rows_and_columns_of_maps_are_those_of_the_image(name):
    """Some networks have channels last. A bright quarter changes the map there most."""
    torch.manual_seed(0)
    network = Backbone(config(name), (1,), 8).eval()
    image = torch.zeros(1, 3, 64, 128)
    bright = image.clone()
    bright[..., :32] = 2
    with torch.no_grad():
        change = (network(bright)[0] - network(image)[0]).abs().mean((0, 1, 2))
    assert change[:8].mean() > 1.5 * change[16:].mean()


@pytest.mark.parametrize("head", HEADS)
def test_every_head_learns_on_every_network(backbone, head):
    settings = SegmentationConfig(
        network=head, backbone=backbone.config, aspp_dim=8, **HEADS[head], output_stride=16
    )
    network = build_deeplab(settings, 3).train()
    logits = network(torch.randn(2, 3, 45, 70))
    assert logits.shape[:2] == (2, 4) and learns(network, logits)


@pytest.mark.parametrize("name", NETWORKS)
def test_classifier_learns_and_gives_maps(name):
    network = build_classifier(WsssConfig(backbone=config(name)), 3).train()
    assert learns(network, network(torch.randn(2, 3, 45, 70)))
    assert network.eval().activation(torch.randn(1, 3, 45, 70)).shape == (1, 3, 3, 5)


@pytest.mark.parametrize("name", NETWORKS)
def test_stage_1_takes_the_maps_of_every_network(name):
    network = SemanticFeatures(
        UssConfig(backbone=config(name), backbone_stage=3, method="frozen")
    ).eval()
    with torch.no_grad():
        features = network(torch.randn(1, 3, 45, 70))
    patch = network.backbone.patch
    stride = 8 if name in ("test_resnet", "resnext50_32x4d") else 16
    size = [-(-n // patch) * patch // stride for n in (45, 70)]
    assert features.shape == (1, network.backbone.dim, *size) and features.isfinite().all()


@pytest.mark.parametrize(
    "name",
    ["test_efficientnet", "test_convnext", "swin_tiny_patch4_window7_224", "hrnet_w18_small"],
)
def test_methods_of_their_own_take_other_networks(name):
    images, tags = torch.randn(2, 3, 48, 65), torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    seam = build_classifier(WsssConfig(method="seam", backbone=config(name)), 3).train()
    seam.loss(images, tags).backward()
    assert AffinityNetwork(config(name), PsaConfig()).eval()(images).shape == (2, 448, 6, 9)
    rsepm = WsssConfig(method="rsepm", epochs=20, backbone=config(name))
    if name in ("test_efficientnet", "hrnet_w18_small"):
        assert BoundaryNetwork(config(name), IrnConfig()).eval()(images).shape == (2, 1, 12, 17)
        assert build_classifier(rsepm, 3).eval().activation(images).shape == (2, 3, 12, 17)
    else:
        with pytest.raises(UserError, match="stride 2 is needed"):
            build_classifier(rsepm, 3)


def test_lite_networks_give_the_112_channels_of_stride_16():
    network = feature_network(config("tf_efficientnet_lite0"), 3)
    assert (network.dim, network.patch) == (112, 16)


@pytest.mark.parametrize(("stage", "stride"), [(1, 4), (2, 8), (3, 8), (4, 8)])
def test_stages_of_a_resnet_have_stride_8(stage, stride):
    backbone = BackboneConfig("resnet18", {"channels": [8, 8, 16, 24]}, "none")
    network = feature_network(backbone, stage).eval()
    assert network.patch == 8 and network.dim == (8, 8, 16, 24)[stage - 1]
    assert network(torch.zeros(1, 3, 64, 40)).shape == (1, network.dim, 64 // stride, 40 // stride)


def test_wide_resnet_gives_features_and_a_classifier():
    wide = BackboneConfig("wide_resnet38", {"width": 1 / 32}, "none")
    features = SemanticFeatures(UssConfig(backbone=wide, backbone_stage=4, method="frozen")).eval()
    assert features(torch.zeros(1, 3, 41, 64)).shape == (1, 128, 6, 8)
    network = build_classifier(WsssConfig(backbone=wide, output_stride=8, frozen_stages=1), 3)
    assert network(torch.zeros(1, 3, 41, 64)).shape == (1, 3)
    fixed = {
        n.split(".")[0] for n, p in network.backbone.net.named_parameters() if not p.requires_grad
    }
    assert {"conv1a", "b2", "b3"} <= fixed and "b5" not in fixed
    with pytest.raises(UserError, match="wide_resnet38 has no map of stride 2"):
        BoundaryNetwork(wide, IrnConfig())


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext", "hrnet_w18_small"])
def test_fixed_stages_are_those_that_their_map_depends_on(name):
    network = Backbone(config(name), (4,), 16).train()
    network.freeze_stages(2)
    before, after = (Backbone(network.config, (k,)).train() for k in (2, 4))
    before.load_state_dict(
        {k: v for k, v in network.state_dict().items() if k in before.state_dict()}, strict=False
    )
    network(torch.randn(2, 3, 64, 64))[0].sum().backward()
    moved = {n for n, p in network.named_parameters() if p.grad is not None}
    before(torch.randn(2, 3, 64, 64))[0].sum().backward()
    needed = {n for n, p in before.named_parameters() if p.grad is not None}
    assert moved and needed and not moved & needed


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("test_coatnet", "only images of one size"),
        ("inception_v3", "do not cover the image"),
        ("vit_tiny_patch16_224", "maps of stride 16"),
        ("mixer_s16_224", "maps of stride 16"),
        ("levit_128s", "maps of stride 16, 32, 64"),
        ("convnext_tinyy", "convnext_tiny"),
    ],
)
def test_networks_that_cannot_segment_are_refused_by_name(name, told):
    with pytest.raises(UserError, match=rf"'{name}'.*{told}"):
        build_deeplab(SegmentationConfig(backbone=BackboneConfig(name, weights="none")), 3)


@pytest.mark.parametrize("name", ["mixer_s16_224", "cait_xxs24_224", "beit_base_patch16_224"])
def test_networks_without_features_are_refused_by_name(name):
    with pytest.raises(UserError, match=f"'{name}' has neither maps.*vit_small_patch16_224"):
        feature_network(BackboneConfig(name, weights="none"))


def test_network_without_boundaries_is_refused_before_anything_is_trained():
    settings = WsssConfig(method="irn", backbone=config("test_convnext"))
    with pytest.raises(
        UserError, match="'test_convnext' has maps of stride 4, 8, 16, 32; .*stride 2"
    ):
        build_classifier(settings, 3)


def test_arguments_that_nobody_gave_are_not_named():
    wrong = BackboneConfig("test_convnext", {"windows": 8}, "none")
    for build in (
        lambda: feature_network(wrong),
        lambda: Backbone(wrong, (4,)),
    ):
        with pytest.raises(UserError, match="unexpected keyword argument 'windows'") as error:
            build()
        assert "dynamic" not in str(error.value) and "features_only" not in str(error.value)


@pytest.mark.parametrize("failure", [IndexError("tuple index out of range"), KeyError("x")])
def test_random_weights_are_never_said_to_be_fetched(monkeypatch, failure):
    def broken(*arguments, **options):
        raise failure

    monkeypatch.setattr(vision.timm, "create_model", broken)
    with pytest.raises(UserError, match="test_resnet' cannot be built") as error:
        Backbone(config("test_resnet"), (4,))
    assert "fetch" not in str(error.value)


@pytest.mark.parametrize("dilation", ["delayed", "none"])
def test_dilation_is_for_resnets(dilation):
    with pytest.raises(UserError, match="'test_convnext': dilation"):
        Backbone(config("test_convnext", dilation=dilation), (4,), 8)


@pytest.mark.parametrize(
    "name",
    [
        "test_convnext",
        "test_efficientnet",
        "swin_tiny_patch4_window7_224",
        "densenet121",
        "xception41",
    ],
)
def test_a_file_of_the_whole_network_loads_into_its_maps(tmp_path, name):
    """timm renames the parts of a network that gives maps; the file has the usual names."""
    whole = vision.timm.create_model(name, **NETWORKS.get(name, {}))
    checkpoint.save(tmp_path / "x.pth", whole.state_dict())
    loaded = Backbone(config(name, weights=str(tmp_path / "x.pth")), (1, 4), 8)
    values = {float(v.double().sum()) for v in whole.state_dict().values()}
    assert all(float(v.double().sum()) in values for v in loaded.net.state_dict().values())


def test_maps_gathered_by_hooks_are_those_of_the_copy():
    """The average of the weights is a copy of the network."""
    network = Backbone(config("xception41"), (4,), 16).eval()
    other = copy.deepcopy(network)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    images = torch.randn(1, 3, 33, 48)
    with torch.no_grad():
        assert network(images)[0].std() > 0 and other(images)[0].std() == 0


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "vit_tiny_patch16_224"])
def test_weights_trained_on_other_means_take_our_images(name):
    torch.manual_seed(0)
    net = vision.timm.create_model(name).eval()
    assert net.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    if name.startswith("vit"):
        first = net.patch_embed.proj
    else:
        net.bn1.running_mean.normal_()
        first = nn.Sequential(net.conv_stem, net.bn1)
    images = torch.rand(2, 3, 224, 224)
    with torch.inference_mode():
        wanted = first((images - 0.5) / 0.5)
        take_our_images(net)
        found = first(normalise_unit(images))
    inner = (..., slice(1, -1), slice(1, -1))  # zeros around the image stand for another colour
    torch.testing.assert_close(found[inner], wanted[inner], atol=1e-4, rtol=1e-4)


def test_weights_trained_on_our_means_stay_as_they_are():
    net = vision.timm.create_model("test_resnet")
    before = copy.deepcopy(net.state_dict())
    net.pretrained_cfg = {**net.pretrained_cfg, "mean": MEAN, "std": STD}
    take_our_images(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_first_layer_that_cannot_be_adapted_is_refused():
    net = vision.timm.create_model("resnetv2_50x1_bit")  # standardises weights
    with pytest.raises(UserError, match="trained on images with the mean"):
        take_our_images(net)
