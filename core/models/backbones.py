"""Backbones by timm's names, with weights from a local file, from timm, or none when asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core import vision  # noqa: F401 (before timm, which imports torchvision)
from core.checkpoint import load_weights
from core.config import BackboneConfig, UssConfig
from core.errors import UserError
from core.models.wide_resnet import WideResNet38

import timm  # isort: skip


def _create(config: BackboneConfig, **arguments: Any) -> nn.Module:
    arguments = {**config.arguments, **arguments}
    try:
        network = timm.create_model(config.name, pretrained=config.weights == "timm", **arguments)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        near = ", ".join(timm.list_models(f"*{config.name.split('.')[0]}*")[:4])
        hint = f"; timm knows {near}" if near else "; timm.list_models() lists the names"
        raise UserError(f"backbone {config.name!r} with {arguments}: {error}{hint}") from None
    except Exception as error:  # noqa: BLE001 (hub clients raise classes of their own when offline)
        raise UserError(
            f"timm could not fetch the weights of {config.name!r} ({type(error).__name__}); "
            "download them once and set `weights` to the local file"
        ) from None
    if config.weights not in ("timm", "none"):
        load_weights(network, Path(config.weights))
    return network


def _stages(config: BackboneConfig, indices: Sequence[int], output_stride: int) -> nn.Module:
    """A ResNet that gives the stages `indices`, with the configured dilation."""
    net = _create(config, features_only=True, out_indices=indices, output_stride=output_stride)
    for layer in (net[name] for name in ("layer3", "layer4") if name in net):
        undilated = [_strided(layer[0])] if config.dilation == "delayed" else []
        if config.dilation == "none":
            undilated = [m for m in layer.modules() if getattr(m, "kernel_size", 0) == (3, 3)]
        for conv in undilated:
            conv.dilation, conv.padding = (1, 1), (1, 1)
    return net


def _strided(block: nn.Module) -> nn.Conv2d:
    """The convolution that carries a block's stride and its first dilation."""
    return block.conv2 if hasattr(block, "conv3") else block.conv1


class ResNet(nn.Module):
    """A dilated ResNet that gives its first stage (stride 4) and its last (stride 8 or 16).

    Parameter names are torchvision's below `net.`.
    """

    def __init__(self, config: BackboneConfig, output_stride: int):
        super().__init__()
        self.net = _stages(config, (1, 4), output_stride)
        self.low_dim, self.dim = self.net.feature_info.channels()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> (B, low_dim, H/4, W/4) and (B, dim, H/stride, W/stride)."""
        low, high = self.net(images)
        return low, high

    def fix_layers(self, count: int) -> None:
        """Excludes the first `count` of the four layers, and all before them, from training."""
        for name, module in self.net.named_children():
            if not name.startswith("layer") or int(name.removeprefix("layer")) <= count:
                module.requires_grad_(False)


class WideResNet(nn.Module):
    """Wide-ResNet-38 as a backbone; its first convolution is not trained, as in SEAM and PSA."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        try:
            self.net = WideResNet38(**config.arguments)
        except TypeError as error:
            raise UserError(f"backbone {config.name!r}: {error}") from None
        self.net.conv1a.requires_grad_(False)
        self.low_dim, *_, self.dim = self.net.dims
        if config.weights == "timm":
            raise UserError(f"timm has no weights of {config.name}; set `weights` to a local file")
        if config.weights != "none":
            load_weights(self.net, Path(config.weights))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> (B, low_dim, H/4, W/4) and (B, dim, H/8, W/8)."""
        low, *_, high = self.net(images)
        return low, high


def dilated_backbone(config: BackboneConfig, output_stride: int) -> "ResNet | WideResNet":
    """The network below a segmenter."""
    if config.name != "wide_resnet38":
        return ResNet(config, output_stride)
    if output_stride != 8:
        raise UserError(f"wide_resnet38 has output stride 8 alone, not {output_stride}")
    return WideResNet(config)


def tapped_backbone(config: BackboneConfig) -> nn.Module:
    """A network at stride 8 that gives its middle stages, too: `dims` and a list of maps.

    Its normalisation layers have no trainable parameters, and of Wide-ResNet-38 the first layers
    are fixed, as in SEAM.
    """
    if config.name == "wide_resnet38":
        network = WideResNet(config).net
        fixed = (network.conv1a, network.b2, network.b2_1, network.b2_2)
    else:
        network = Stages(config, (2, 3, 4), 8)
        fixed = ()
    for module in (*fixed, *norms(network)):
        module.requires_grad_(False)
    return network


class Stages(nn.Module):
    """Some stages of a ResNet as a list of maps."""

    def __init__(self, config: BackboneConfig, stages: Sequence[int], output_stride: int):
        super().__init__()
        self.net = _stages(config, stages, output_stride)
        self.dims: list[int] = self.net.feature_info.channels()

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.net(images)


class Pyramid(Stages):
    """All five stages of a ResNet at strides 4, 4, 8, 16 and 16 (the first one after pooling)."""

    def __init__(self, config: BackboneConfig):
        super().__init__(config, range(5), 16)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> five maps."""
        first, *rest = self.net(images)
        return [nn.functional.max_pool2d(first, 3, 2, 1), *rest]


class ViT(nn.Module):
    """The patch tokens of a vision transformer as a feature map.

    Images whose sides are multiples of the patch may have any size: position embeddings are
    interpolated (bicubic, to the explicit size).

    Args:
        config: the architecture and its weights.
        tokens: "last", those of the last block after the final norm, or "keys", the keys of its
            attention.
    """

    def __init__(self, config: BackboneConfig, tokens: str = "last"):
        super().__init__()
        self.net = _create(config, num_classes=0, dynamic_img_size=True)
        self.patch: int = self.net.patch_embed.patch_size[0]
        self.dim: int = self.net.embed_dim
        self._keys: Tensor | None = None
        if tokens == "keys":
            attention = self.net.blocks[-1].attn
            joined = getattr(attention, "qkv", None)  # some networks have one layer for each
            (joined or attention.k_proj).register_forward_hook(self._keep_keys)
        self.tokens = tokens

    def _keep_keys(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        start = self.dim if output.shape[-1] == 3 * self.dim else 0  # queries, keys, values
        self._keys = output[..., start : start + self.dim]

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D, H/patch, W/patch)."""
        tokens = self.net.forward_features(images)
        if self.tokens == "keys":
            tokens, self._keys = self._keys, None
        tokens = tokens[:, self.net.num_prefix_tokens :]
        rows, cols = (n // self.patch for n in images.shape[-2:])
        return tokens.transpose(1, 2).unflatten(2, (rows, cols))


class DenseResNet(Stages):
    """One stage of a ResNet at stride 8 as a feature map."""

    patch = 8

    def __init__(self, config: BackboneConfig, stage: int):
        super().__init__(config, (stage,), 8)
        (self.dim,) = self.dims

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D, H/8, W/8)."""
        return super().forward(images)[0]


def feature_network(config: UssConfig) -> "ViT | DenseResNet":
    """The network below unsupervised features: of a ResNet `stage`, of a ViT its `tokens`."""
    if "resnet" in config.backbone.name:
        return DenseResNet(config.backbone, config.stage)
    return ViT(config.backbone, config.tokens)


def norms(network: nn.Module) -> list[nn.Module]:
    """Every batch normalisation of a network."""
    return [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def freeze_norms(network: nn.Module) -> None:
    """Makes every batch normalisation use its running statistics (call after each `.train()`)."""
    for module in norms(network):
        module.eval()


def to_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Moves a network; convolutions run channels-last, which is the faster layout here."""
    return network.to(device, memory_format=torch.channels_last)
