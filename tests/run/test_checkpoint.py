import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from core.models.backbones import Backbone, BackboneConfig
from core.models.feature_networks import ViT
from core.run import checkpoint
from core.run.errors import UserError

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL = {"channels": [8, 8, 16, 24]}


def small_resnet(weights: str = "none") -> Backbone:
    return Backbone(BackboneConfig("resnet18", SMALL, weights), (1, 4), output_stride=8)


@pytest.mark.parametrize("nest", ["plain", "state_dict", "module", "teacher"])
def test_weights_load_from_any_common_nesting(tmp_path, nest):
    source = small_resnet()
    state = {**source.net.state_dict(), "fc.weight": torch.zeros(1000, 16)}
    content = {
        "plain": state,
        "state_dict": {"state_dict": state},
        "module": {f"module.{k}": v for k, v in state.items()},
        "teacher": {"teacher": {f"backbone.{k}": v for k, v in state.items()}},
    }[nest]
    checkpoint.save(tmp_path / "x.pth", content)
    loaded = small_resnet(str(tmp_path / "x.pth"))
    assert all(
        torch.equal(v, loaded.net.state_dict()[k]) for k, v in state.items() if k[:2] != "fc"
    )


def test_teacher_of_a_lightning_checkpoint_is_taken(tmp_path):
    """Leopart's files hold the student below `model.` and the teacher below `teacher.`."""
    state = ViT(BackboneConfig("vit_tiny_patch16_224", TINY, "none")).net.state_dict()
    content = {f"model.{k}": torch.zeros_like(v) for k, v in state.items()}
    content |= {f"teacher.{k}": v for k, v in state.items()}
    content["teacher.prototypes.weight"] = torch.ones(3, 2)
    torch.save({"state_dict": content, "hyper_parameters": nn.ReLU()}, tmp_path / "leopart.ckpt")
    weights = str(tmp_path / "leopart.ckpt")
    network = ViT(BackboneConfig("vit_tiny_patch16_224", TINY, weights)).net
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


def test_half_precision_safetensors_load(tmp_path):
    source = small_resnet()
    halves = {k: v.half() for k, v in source.net.state_dict().items() if v.is_floating_point()}
    save_file(halves, tmp_path / "x.safetensors")
    loaded = small_resnet(str(tmp_path / "x.safetensors")).net.state_dict()
    assert loaded["conv1.weight"].dtype == torch.float32


def test_names_of_torchvision_resnets_are_kept():
    names = set(Backbone(BackboneConfig("resnet50", {}, "none"), (4,), 16).net.state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.downsample.0.weight"} <= names
    assert "layer4.2.conv3.weight" in names and not any(n.startswith("fc") for n in names)


def test_of_two_networks_the_one_that_the_authors_evaluate_is_taken(tmp_path):
    weights = {"cls_token": torch.zeros(3), "norm.weight": torch.zeros(3)}
    student, teacher = ({k: v + n for k, v in weights.items()} for n in (1, 2))
    heads = {"prototypes.weight": torch.ones(4, 2), "projection_head.0.weight": torch.ones(2, 3)}
    leopart = {f"teacher.{k}": v for k, v in {**teacher, **heads}.items()}
    leopart |= {f"model.{k}": v for k, v in {**student, **heads}.items()}
    dino = {
        "student": {f"module.backbone.{k}": v for k, v in student.items()},
        "teacher": {f"backbone.{k}": v for k, v in teacher.items()},
    }
    flat = {f"{name}.{k}": v for name, state in dino.items() for k, v in state.items()}
    cases = [({"state_dict": leopart}, 1), (leopart, 1), (dino, 2), (flat, 2)]
    for content, value in cases:
        found = checkpoint.find_state_dict(content)
        assert {k: found[k].tolist() for k in weights} == dict.fromkeys(weights, [value] * 3)


def test_file_of_another_architecture_is_refused(tmp_path):
    checkpoint.save(tmp_path / "x.pth", {"some.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="another architecture"):
        small_resnet(str(tmp_path / "x.pth"))


def test_file_of_another_width_is_refused(tmp_path):
    checkpoint.save(tmp_path / "x.pth", small_resnet().net.state_dict())
    wide = BackboneConfig(
        "resnet18", {**SMALL, "channels": [8, 8, 16, 32]}, str(tmp_path / "x.pth")
    )
    with pytest.raises(UserError, match="has shape"):
        Backbone(wide, (4,), 8)


def test_missing_weights_are_an_error_never_random_ones(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        small_resnet(str(tmp_path / "gone.pth"))


def test_truncated_checkpoint_is_one_message(tmp_path):
    checkpoint.save(tmp_path / "x.pth", {"a": torch.zeros(1000)})
    data = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(data[:900])
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(tmp_path / "x.pth")


def test_file_of_another_kind_is_named_without_torchs_advice(tmp_path):
    (tmp_path / "tags.csv").write_text("image,tags\na,boat\n")
    for load in (checkpoint.load, checkpoint.load_foreign):
        with pytest.raises(UserError, match="tags.csv cannot be read: it is not a checkpoint"):
            load(tmp_path / "tags.csv")


def test_pickled_objects_are_not_loaded(tmp_path):
    torch.save({"network": nn.Linear(1, 1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="more than tensors"):
        checkpoint.load(tmp_path / "x.pth")


def test_unknown_backbone_names_its_neighbours():
    with pytest.raises(UserError, match="resnet18"):
        Backbone(BackboneConfig("resnet18x", {}, "none"), (4,), 8)


def test_vit_gives_a_map_at_any_multiple_of_its_patch():
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    vit = ViT(BackboneConfig("vit_tiny_patch16_224", arguments, "none")).eval()
    assert vit(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 4, 4)
    assert vit(torch.zeros(2, 3, 40, 64)).shape == (2, 16, 5, 8)


@pytest.mark.parametrize(
    ("name", "patch"),
    [
        ("vit_small_patch8_224.dino", 8),
        ("vit_small_patch14_reg4_dinov2.lvd142m", 14),
        ("vit_small_patch16_dinov3.lvd1689m", 16),
        ("vit_base_patch16_224.mae", 16),
    ],
)
@pytest.mark.parametrize("tokens", ["last", "keys"])
def test_self_supervised_vits_give_maps_at_any_size(name, patch, tokens):
    vit = ViT(BackboneConfig(name, TINY, "none"), tokens).eval()
    assert vit.patch == patch
    with torch.no_grad():
        images = torch.randn(2, 3, 3 * patch, 5 * patch)
        maps = vit(images)
        assert maps.shape == (2, 32, 3, 5) and maps.isfinite().all()
        assert torch.allclose(vit(images), maps)


def test_keys_are_those_of_the_last_attention():
    vit = ViT(BackboneConfig("vit_tiny_patch16_224", TINY, "none"), "keys").eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        found = vit(images)
        block, inputs = vit.net.blocks[-1], []
        block.attn.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        vit(images)
        weight, bias = block.attn.qkv.weight[32:64], block.attn.qkv.bias[32:64]
        keys = torch.nn.functional.linear(inputs[0][:, 1:], weight, bias)
    assert torch.allclose(found.flatten(2).transpose(1, 2), keys, atol=1e-5)
