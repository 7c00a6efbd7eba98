"""Backbones by timm's names: feature maps of any CNN's stages, patch tokens of a ViT.

Tested with images of odd sizes: ResNet, ResNeXt, RegNet, EfficientNet (Lite), MobileNet v3 and v4,
ConvNeXt and NFNet, dilated to the output stride; Swin, MaxViT, MambaOut, PVT v2, HRNet, DenseNet
and DLA, whose maps are enlarged to it; and, for stage 1 alone, ViT, DINOv2 and DINOv3. Networks
that take images of one size only, or whose maps leave out the border, are refused by name.
"""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.data.transforms import MEAN, STD
from core.models.depthwise import use_fast_gradients
from core.models.wide_resnet import WideResNet38
from core.run import vision
from core.run.checkpoint import load_weights
from core.run.errors import UserError

KNOWN_TO_WORK = "resnet50 and efficientnet_b0 are known to work"


@dataclass
class BackboneConfig:
    """A network by name, and where its weights come from."""

    # timm's architecture name, such as resnet101, efficientnet_b0, convnext_tiny or, for stage 1,
    # vit_base_patch8_224; or wide_resnet38.
    name: str = "resnet50.tv_in1k"
    # Further constructor arguments of that architecture, for other sizes.
    arguments: dict[str, Any] = field(default_factory=dict)
    # A local .pth or .safetensors file; timm: timm downloads its own; none: random weights.
    weights: str = "timm"
    # Dilation of the ResNet layers that no longer reduce the resolution (other networks keep
    # timm's). torchvision: a layer's first block has the dilation of the layer before; delayed: it
    # has none (the author's code); none: no block has any (IRNet).
    dilation: Literal["torchvision", "delayed", "none"] = "torchvision"

    def without_weights(self) -> "BackboneConfig":
        """The same network for a checkpoint that holds all of it."""
        return dataclasses.replace(self, weights="none")


def create_network(config: BackboneConfig, **arguments: Any) -> nn.Module:
    """Builds a network of timm, with timm's own weights, those of a local file, or random ones."""
    try:
        pretrained, options = config.weights == "timm", {**config.arguments, **arguments}
        net = vision.timm.create_model(config.name, pretrained=pretrained, **options)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        hint = ""
        if not vision.timm.is_model(config.name):
            near = ", ".join(vision.timm.list_models(f"*{config.name.split('.')[0]}*")[:4])
            hint = f"; timm knows {near}" if near else "; timm.list_models() lists the names"
        given = f" with {config.arguments}" if config.arguments else ""
        raise UserError(f"backbone {config.name!r}{given}: {error}{hint}") from None
    except Exception as error:  # noqa: BLE001 (hub clients raise classes of their own when offline)
        kind = type(error).__name__
        text = f"backbone {config.name!r} cannot be built ({kind}: {error})"
        if config.weights == "timm":
            remedy = "download them once and set `weights` to the local file"
            text = f"timm could not fetch the weights of {config.name!r} ({kind}); {remedy}"
        raise UserError(text) from None
    if config.weights == "timm":
        take_our_images(net)
    elif config.weights != "none":
        _load_file(net, config)
    return net


@torch.no_grad()
def take_our_images(net: nn.Module) -> None:
    """Changes the first layer of a network of timm with timm's weights, so that images normalised
    with ImageNet's mean and deviation, as all of ours are, give the features that images normalised
    as in its training gave; up to the zeros around the image, which stand for another colour.

    Raises:
        UserError: it does not begin with a plain convolution that has a bias or a batch norm.
    """
    mean, std, ours = (
        torch.tensor(values)
        for values in (net.pretrained_cfg["mean"], net.pretrained_cfg["std"], (MEAN, STD))
    )
    if torch.equal(ours, torch.stack([mean, std])):
        return
    layers = (m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d)))
    first, second = next(layers, None), next(layers, None)
    plain = type(first) in (nn.Conv2d, vision.timm.layers.Conv2dSame) and len(mean) == 3
    if not plain or first.bias is None and not isinstance(second, nn.BatchNorm2d):
        raise UserError(
            f"backbone {net.pretrained_cfg['architecture']!r} was trained on images with the mean "
            f"{(*mean.tolist(),)} instead of {MEAN}, and its first layer cannot be adapted; "
            f"{KNOWN_TO_WORK}"
        )
    # conv(a x + b) = (a conv)(x) + sum(conv b)
    shift = torch.einsum("oikl,i->o", first.weight, (ours[0] - mean) / std)
    first.weight *= (ours[1] / std)[:, None, None]
    if first.bias is not None:
        first.bias += shift
    else:
        second.running_mean -= shift


def blank_network(config: BackboneConfig, **arguments: Any) -> nn.Module:
    """The network on the meta device, which tells the shapes of its maps at no cost."""
    with torch.device("meta"):
        return create_network(config.without_weights(), **arguments).eval()


def _accepted(config: BackboneConfig, **arguments: Any) -> dict[str, Any]:
    """These arguments where the network takes them, else none."""
    with contextlib.suppress(UserError):
        blank_network(config, features_only=True, **arguments)
        return arguments
    return {}


def map_strides(config: BackboneConfig) -> list[int]:
    """Strides of all maps that timm gives of a network, without dilation."""
    maps = blank_network(config, features_only=True).feature_info.info
    return [level["reduction"] for level in maps]


def _load_file(net: nn.Module, config: BackboneConfig) -> None:
    """Loads the configured file into a network of timm. One that gives feature maps has renamed its
    parts: `stages.0` of the file is `stages_0`, or has `model.` before it."""
    in_file = blank_network(config).state_dict()
    names = {}
    for key in net.state_dict():
        plain = key.removeprefix("model.").removeprefix("body.")
        part = plain.split(".")[0]
        nested = (f"{plain[:k]}.{plain[k + 1 :]}" for k in range(len(part)) if part[k] == "_")
        names[key] = next((name for name in (plain, *nested) if name in in_file), key)
    load_weights(net, Path(config.weights), names)


class Backbone(nn.Module):
    """Feature maps of a network's stages.

    Stage k, 0 to 4, ends with the last map of stride 2^(k + 1): a ResNet's stem and four layers.
    Parameter names are the architecture's own (a ResNet's: torchvision's) below `net.`.

    Args:
        stages: the stages whose maps are wanted, ascending.
        output_stride: largest stride of a map. Deeper stages are dilated where timm's network can
            be; where it cannot, their maps are enlarged (bilinear).

    Raises:
        UserError: the network has no map of a stage, or cannot see images of any size.
    """

    def __init__(self, config: BackboneConfig, stages: Sequence[int], output_stride: int = 32):
        super().__init__()
        self.config, self._output_stride = config, output_stride
        self.strides = [min(2 ** (stage + 1), output_stride) for stage in stages]
        if config.name == "wide_resnet38":
            self.net, self.dims = _wide_resnet(config, stages, output_stride)
            self._multiple, self._channels_last = 1, False
            self._taps = [stage - 1 for stage in stages]
            return
        options = {"features_only": True, "out_indices": _indices(config, stages)}
        options |= _accepted(config, strict_img_size=False)
        if output_stride < 32:
            options |= _accepted(config, output_stride=output_stride)
        blank = blank_network(config, **options)
        self.dims: list[int] = blank.feature_info.channels()
        self._taps = range(len(stages))
        self._channels_last = getattr(blank, "output_fmt", "NCHW") == "NHWC"
        self._multiple = self._multiple_of_sides(blank)
        self.net = create_network(config, **options)
        _set_dilation(self.net, config)
        use_fast_gradients(self.net)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> of each stage (B, D, H/stride, W/stride), rounded up.

        For networks that need it, images are first enlarged to the next multiple of their largest
        stride or window.
        """
        size = images.shape[-2:]
        multiple = [-(-n // self._multiple) * self._multiple for n in size]
        maps = self._maps(self.net, _resized(images, multiple))
        grids = ([-(-n // stride) for n in size] for stride in self.strides)
        return [_resized(level, grid) for level, grid in zip(maps, grids, strict=True)]

    def _maps(self, net: nn.Module, images: Tensor) -> list[Tensor]:
        maps = net(images)
        maps = [maps[k] for k in self._taps]
        return [m.permute(0, 3, 1, 2) for m in maps] if self._channels_last else maps

    def _multiple_of_sides(self, blank: nn.Module) -> int:
        """The number of which the sides of images must be multiples: 1, the network's largest
        stride, or the side that it was made for."""
        made_for = self.config.arguments.get("img_size", blank.pretrained_cfg["input_size"][-1])
        made_for = made_for if isinstance(made_for, int) else math.lcm(*made_for)
        strides = blank.feature_info.reduction()
        for multiple in (1, max(strides), made_for):
            sizes = [(multiple, multiple), (3 * multiple, 2 * multiple)]
            sizes += [(37, 51)] if multiple == 1 else []
            with contextlib.suppress(Exception):  # a network fails in any way
                if all(self._covers(blank, size, strides) for size in sizes):
                    return multiple
        raise UserError(
            f"backbone {self.config.name!r} takes only images of one size, or its maps do not "
            f"cover the image; {KNOWN_TO_WORK}"
        )

    def _covers(self, blank: nn.Module, size: tuple[int, int], strides: Sequence[int]) -> bool:
        """Whether the maps of an image of this size have as many cells as their strides say."""
        maps = self._maps(blank, torch.zeros(1, 3, *size, device="meta"))
        pairs = zip(self.dims, strides, strict=True)
        expected = [(1, dim, *(-(-n // stride) for n in size)) for dim, stride in pairs]
        return [tuple(m.shape) for m in maps] == expected

    def freeze_stages(self, count: int) -> None:
        """Excludes the stem and the first `count` of the stages 1 to 4 from training."""
        with torch.device("meta"):
            blank = Backbone(self.config.without_weights(), (count,), self._output_stride).eval()
            blank(torch.zeros(1, 3, 64, 64))[0].sum().backward()
        for name, parameter in blank.named_parameters():
            if parameter.grad is not None:  # the stage's map depends on it
                self.get_parameter(name).requires_grad_(False)


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(B, D, H, W) -> (B, D, *size), bilinear; the tensor itself if it has that size."""
    if list(maps.shape[-2:]) == list(size):
        return maps
    return F.interpolate(maps, size, mode="bilinear")


def _indices(config: BackboneConfig, stages: Sequence[int]) -> list[int]:
    """Places of stages among all maps of a network."""
    last = {stride: k for k, stride in enumerate(map_strides(config))}
    needed = [2 ** (stage + 1) for stage in stages]
    missing = [stride for stride in needed if stride not in last]
    if missing:
        raise UserError(
            f"backbone {config.name!r} has maps of stride {', '.join(map(str, last))}; here "
            f"stride {', '.join(map(str, missing))} is needed, too; {KNOWN_TO_WORK}"
        )
    return [last[stride] for stride in needed]


def _set_dilation(net: nn.Module, config: BackboneConfig) -> None:
    """Changes timm's dilation of a ResNet, torchvision's, to the configured one."""
    if config.dilation == "torchvision":
        return
    if not is_resnet(config):
        text = f"backbone {config.name!r}: dilation {config.dilation} is for ResNets"
        raise UserError(f"{text}; delete the line, or set it to torchvision")
    for layer in (net[name] for name in ("layer3", "layer4") if name in net):
        first = layer[0]  # its strided convolution has the first dilation
        undilated = [first.conv2 if hasattr(first, "conv3") else first.conv1]
        if config.dilation == "none":
            undilated = [m for m in layer.modules() if getattr(m, "kernel_size", 0) == (3, 3)]
        for conv in undilated:
            conv.dilation, conv.padding = (1, 1), (1, 1)


def is_resnet(config: BackboneConfig) -> bool:
    net, resnet = blank_network(config), vision.timm.models.resnet
    blocks = (resnet.BasicBlock, resnet.Bottleneck)
    return isinstance(net, resnet.ResNet) and isinstance(net.layer1[0], blocks)


def _wide_resnet(
    config: BackboneConfig, stages: Sequence[int], output_stride: int
) -> tuple[WideResNet38, list[int]]:
    """The network and the widths of its stages; its first convolution is not trained, as in SEAM
    and PSA."""
    if 0 in stages:
        missing = "wide_resnet38 has no map of stride 2, which is needed here"
        raise UserError(f"{missing}; {KNOWN_TO_WORK}")
    if output_stride != 8:
        raise UserError(f"wide_resnet38 has output stride 8 only, not {output_stride}")
    try:
        net = WideResNet38(**config.arguments)
    except TypeError as error:
        raise UserError(f"backbone {config.name!r}: {error}") from None
    net.conv1a.requires_grad_(False)
    if config.weights == "timm":
        raise UserError(f"timm has no weights of {config.name}; set `weights` to a local file")
    if config.weights != "none":
        load_weights(net, Path(config.weights))
    return net, [net.dims[stage - 1] for stage in stages]


class OnBackbone(nn.Module):
    """A network whose first part is `backbone`; the rest is its head."""

    frozen_norm = False  # whether the backbone's batch normalisation is frozen in training

    def train(self, mode: bool = True) -> "OnBackbone":
        super().train(mode)
        for module in norms(self.backbone) if self.frozen_norm else ():
            module.eval()
        return self

    def parameter_groups(self, lr: float, head_lr: float) -> list[dict]:
        """The trainable parameters of the backbone and of the head, each with its learning rate."""
        named = [(k, p) for k, p in self.named_parameters() if p.requires_grad]
        head = [p for k, p in named if not k.startswith("backbone.")]
        backbone = [p for k, p in named if k.startswith("backbone.")]
        return [{"params": backbone, "lr": lr}, {"params": head, "lr": head_lr}]


def tapped_backbone(config: BackboneConfig) -> nn.Module:
    """A network at stride 8 that gives its middle stages, too: `dims` and a list of maps. Its
    normalisation and the first layers of Wide-ResNet-38 are not trained, as in SEAM."""
    network, fixed = Backbone(config, (2, 3, 4), 8), ()
    if isinstance(network.net, WideResNet38):  # named as in the released files
        network = network.net
        fixed = (network.b2, network.b2_1, network.b2_2)
    for module in (*fixed, *norms(network)):
        module.requires_grad_(False)
    return network


def norms(network: nn.Module) -> list[nn.Module]:
    """Every batch normalisation of a network."""
    return [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
