import pytest
import torch
from torch import nn

from core.models.backbones import Backbone, BackboneConfig
from core.models.depthwise import use_fast_gradients
from core.run.loop import EMA
from core.run.vision import timm

BF16 = torch.autocast("cpu", torch.bfloat16)


def gradients(layer, images, amp):
    images = images.clone().requires_grad_()
    layer.zero_grad()
    with amp:
        layer(images).float().square().sum().backward()
    return images.grad, layer.weight.grad


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (5, 1, 2), (3, 2, 1)])
def test_gradients_are_those_of_pytorch_in_float32(kernel, stride, dilation, same):
    kind, padding = nn.Conv2d, dilation * (kernel // 2)
    if same:
        kind, padding = timm.layers.Conv2dSame, 0
    torch.manual_seed(0)
    options = {"padding": padding, "dilation": dilation, "groups": 24, "bias": False}
    layer, images = kind(24, 24, kernel, stride, **options), torch.randn(2, 24, 15, 12)
    layer.weight.data = layer.weight.data.bfloat16().float()
    images = images.bfloat16().float()
    expected = gradients(layer, images, torch.autocast("cpu", enabled=False))
    plain = type(layer).forward
    use_fast_gradients(layer)
    assert layer.forward.func is not plain
    for fast, exact in zip(gradients(layer, images, BF16), expected, strict=True):
        assert fast.dtype == torch.float32
        assert (fast - exact).norm() < 0.01 * exact.norm()
    with torch.no_grad(), BF16:
        assert torch.equal(layer(images), plain(layer, images))


def test_other_layers_are_left_alone():
    layers = [nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 8, 3, groups=8)]
    use_fast_gradients(nn.Sequential(*layers))  # the last one has a bias
    assert all("forward" not in vars(layer) for layer in layers)


def test_moving_average_computes_with_its_own_weights():
    student = Backbone(BackboneConfig(name="tf_efficientnet_lite0", weights="none"), (2,)).train()
    ema, images = EMA(student, 0.5), torch.randn(1, 3, 64, 64)
    with BF16:
        before = ema.network(images)[0].float()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(0)
        assert torch.equal(ema.network(images)[0].float(), before)
        ema.network.requires_grad_(True)
        assert ema.network(images)[0].float().std() > 0
