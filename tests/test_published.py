"""Checkpoints with the names and shapes of the released ones load completely or not at all."""

import os
from pathlib import Path

import pytest
import torch

from core.models.backbones import BackboneConfig, norms
from core.models.wide_resnet import WideResNet38
from core.run.checkpoint import load, load_published, save
from core.run.errors import UserError
from core.run.vision import timm
from core.uss.features import SemanticFeatures, UssConfig
from core.wsss.cam import CamClassifier
from core.wsss.irn import BoundaryNetwork, IrnConfig
from core.wsss.psa import AffinityNetwork, PsaConfig
from core.wsss.rsepm import RsEpmClassifier, RsEpmConfig
from core.wsss.seam import SeamClassifier, SeamConfig

from torchvision.models import resnet50  # isort: skip (after core.run.vision)

RESNET = BackboneConfig("resnet50", {}, "none", "none")
WIDE = BackboneConfig("wide_resnet38", {}, "none")
DINO = "vit_small_patch8_224.dino"
CONV = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")


def names_of(network) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = network().state_dict()
    counters = "num_batches_tracked"  # older files have none
    return {k: tuple(v.shape) for k, v in state.items() if not k.endswith(counters)}


def below(prefix: str, names: dict) -> dict:
    return {prefix + k: v for k, v in names.items()}


def without_head(names: dict) -> dict:
    return {k: v for k, v in names.items() if not k.startswith("fc.")}


def conv_block(prefix: str, inputs: int, outputs: int, kernel: int) -> dict:
    shapes = [(outputs, inputs, kernel, kernel), *4 * [(outputs,)]]
    return dict(zip((f"{prefix}.{name}" for name in CONV), shapes, strict=True))


def irn_aliases(stages: int) -> dict:
    """IRNet's modules stand in its state dict several times."""
    names = without_head(names_of(resnet50))
    layers = [{k: v for k, v in names.items() if k.startswith(f"layer{i}.")} for i in range(1, 5)]
    found = {}
    for i, layer in enumerate(layers, stages - 3):
        found |= {f"stage{i}." + k.split(".", 1)[1]: v for k, v in layer.items()}
        found |= {f"backbone.{i}." + k.split(".", 1)[1]: v for k, v in layer.items()}
    return below("resnet50.", names) | found


def edge_names() -> dict:
    found = {"fc_edge6.weight": (1, 160, 1, 1), "fc_edge6.bias": (1,)}
    for k, channels in enumerate((64, 256, 512, 1024, 2048), 1):
        found[f"fc_edge{k}.0.weight"] = (32, channels, 1, 1)
        found |= {f"fc_edge{k}.1.{name}": (32,) for name in ("weight", "bias")}
    return found


def rsepm_names() -> dict:
    found = below("model.", without_head(names_of(resnet50)))
    found |= {"classifier.weight": (20, 2048, 1, 1), "decoder.classifier.4.weight": (21, 256, 3, 3)}
    found |= conv_block("aspp.aspp1", 2048, 256, 1)
    for k in (2, 3, 4):
        found |= conv_block(f"aspp.aspp{k}", 2048, 256, 3)
    found |= conv_block("aspp.global_avg_pool.1", 2048, 256, 1)
    found |= conv_block("aspp.block.0", 1280, 256, 1)
    found |= conv_block("decoder.low_block", 256, 256, 1)
    found |= conv_block("decoder.classifier.0", 512, 256, 3)
    return found | conv_block("decoder.classifier.2", 256, 256, 3)


SEAM_HEADS = {"fc8.weight": (21, 4096), "f8_3.weight": (64, 512), "f8_4.weight": (128, 1024)}
PSA_HEADS = {"f8_3.weight": (64, 512), "f8_4.weight": (128, 1024), "f8_5.weight": (256, 4096)}


def stego_names() -> dict:
    vit = names_of(lambda: timm.create_model("vit_small_patch8_224", num_classes=0))
    found = below("net.model.", vit) | one_by_one({"net.cluster1.0.weight": (70, 384)})
    found |= one_by_one({"net.cluster2.0.weight": (384, 384), "net.cluster2.2.weight": (70, 384)})
    biases = {"net.cluster1.0": 70, "net.cluster2.0": 384, "net.cluster2.2": 70}
    found |= {f"{name}.bias": (width,) for name, width in biases.items()}
    return found | {
        "cluster_probe.clusters": (27, 70),
        "linear_probe.weight": (27, 70, 1, 1),
        "decoder.bias": (384,),
    }


def one_by_one(heads: dict) -> dict:
    return {k: (*v, 1, 1) for k, v in heads.items()}


def wide_names() -> dict:
    return names_of(WideResNet38)


def test_every_normalisation_of_the_wide_network_sees_a_batch_once():
    network = WideResNet38(width=1 / 32).train()
    taps = network(torch.randn(2, 3, 32, 32))
    assert [t.shape[1] for t in taps] == network.dims
    assert [t.shape[-1] for t in taps] == [8, 4, 4, 4]
    assert {int(m.num_batches_tracked) for m in norms(network)} == {1}


CASES = {
    "irnet and advcam, classifier": (
        lambda: CamClassifier(RESNET, 20),
        lambda: {**irn_aliases(4), "classifier.weight": (20, 2048, 1, 1)},
    ),
    "irnet, boundaries": (
        lambda: BoundaryNetwork(RESNET, IrnConfig(weights="x")),
        lambda: {
            **irn_aliases(5),
            **edge_names(),
            **below("edge_layers.", {"0.0.weight": (32, 64, 1, 1)}),
            "fc_dp1.0.weight": (64, 64, 1, 1),
            "mean_shift.running_mean": (2,),
            "path_indices0": (34, 3, 10),
            "disp_target": (1, 2, 34, 1),
        },
    ),
    "seam": (
        lambda: SeamClassifier(WIDE, 20, SeamConfig()),
        lambda: wide_names() | one_by_one({**SEAM_HEADS, "f9.weight": (192, 195)}),
    ),
    "seam, affinities": (
        lambda: AffinityNetwork(WIDE, PsaConfig(weights="x")),
        lambda: wide_names() | one_by_one({**PSA_HEADS, "f9.weight": (448, 448)}),
    ),
    "stego": (
        lambda: SemanticFeatures(UssConfig(backbone=BackboneConfig(DINO, {}, "none"))),
        stego_names,
    ),
    "rs+epm": (lambda: RsEpmClassifier(RESNET, 20, 16, RsEpmConfig()), rsepm_names),
}


def load_released(network, path):
    own = ("mean",) if isinstance(network, SemanticFeatures) else ()
    return load_published(network, Path(path), own)


def write(path, names: dict) -> str:
    """A file of the real shapes that takes no room: every tensor is one number, repeated."""
    number = torch.tensor(0.5)
    save(path, {k: number.expand(v) for k, v in names.items()})
    return str(path)


@pytest.mark.parametrize("case", CASES)
def test_released_names_and_shapes_load_completely(tmp_path, case):
    build, names = CASES[case]
    network = load_released(build(), write(tmp_path / "released.pth", names()))
    assert not network.training
    state = {k: v for k, v in network.state_dict().items() if v.is_floating_point()}
    assert state and all((v == 0.5).all() for k, v in state.items() if k != "mean")


def test_every_missing_extra_or_misshapen_tensor_is_listed(tmp_path):
    build, names = CASES["rs+epm"]
    changed = names()
    for name in ("aspp.aspp2.conv.weight", "model.layer1.0.conv1.weight"):
        del changed[name]
    changed |= {"model.layer9.weight": (1,), "head.weight": (1,), "classifier.weight": (80, 9)}
    with pytest.raises(UserError) as error:
        load_released(build(), write(tmp_path / "other.pth", changed))
    lines = str(error.value).splitlines()
    assert "other.pth is not a checkpoint of RsEpmClassifier" in lines[0]
    assert lines[1].startswith("  missing:") and "aspp.aspp2.conv.weight" in lines[1]
    assert "backbone.net.layer1.0.conv1.weight" in lines[1]
    assert "head.weight" in lines[2] and "backbone.net.layer9.weight" in lines[2]
    assert lines[3] == "  of another shape: classifier.weight (80, 9), expected (20, 2048, 1, 1)"


def test_network_without_other_names_loads_its_own(tmp_path):
    path = write(tmp_path / "own.pth", {"weight": (2, 3), "bias": (2,)})
    assert (load_released(torch.nn.Linear(3, 2), path).weight == 0.5).all()


def test_parallel_and_nested_checkpoints_load(tmp_path):
    build, names = CASES["rs+epm"]
    state = {f"module.{k}": torch.tensor(0.25).expand(v) for k, v in names().items()}
    save(tmp_path / "nested.pth", {"state_dict": state})
    network = load_released(build(), str(tmp_path / "nested.pth"))
    assert (network.classifier.weight == 0.25).all()


class Settings:
    """An object of a library that is not installed here."""

    def __init__(self, values):
        self.values = values

    def __reduce__(self):
        return (os.system, (f"touch {self.values}",))


def test_lightning_checkpoint_gives_its_tensors_and_runs_nothing(tmp_path):
    build, names = CASES["stego"]
    state = {k: torch.tensor(0.5).expand(v) for k, v in names().items()}
    content = {"state_dict": state, "hyper_parameters": Settings(tmp_path / "harm"), "epoch": 3}
    torch.save(content, tmp_path / "stego.ckpt")
    with pytest.raises(UserError, match="more than tensors"):
        load(tmp_path / "stego.ckpt")
    network = load_released(build(), str(tmp_path / "stego.ckpt"))
    assert (network.head.cluster1[0].weight == 0.5).all()
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "is missing"),
        ("truncated", "cannot be read"),
        ("not a file of torch", "cannot be read"),
        ("a program", "TorchScript"),
        ("a tensor", "but a Tensor"),
    ],
)
def test_broken_checkpoint_is_one_message(tmp_path, kind, message):
    path, build = tmp_path / "x.pth", CASES["rs+epm"][0]
    if kind == "a program":
        torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    elif kind == "a tensor":
        torch.save(torch.zeros(3), path)
    elif kind != "missing":
        save(path, {"a": torch.zeros(1000)})
        data = path.read_bytes()
        path.write_bytes(data[:1500] if kind == "truncated" else b"\x00" + data)
    with pytest.raises(UserError, match=f"x.pth.*{message}"):
        load_released(build(), str(path))
