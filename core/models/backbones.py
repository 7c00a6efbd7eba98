"""Backbones by timm's names, with weights from a local file, from timm, or none when asked for."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core import vision  # noqa: F401 (before timm, which imports torchvision)
from core.checkpoint import load_weights
from core.config import BackboneConfig
from core.errors import UserError

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


class ResNet(nn.Module):
    """A dilated ResNet that gives its first stage (stride 4) and its last (stride 8 or 16).

    Parameter names are torchvision's below `net.`.
    """

    def __init__(self, config: BackboneConfig, output_stride: int):
        super().__init__()
        self.net = _create(
            config, features_only=True, out_indices=(1, 4), output_stride=output_stride
        )
        self.low_dim, self.dim = self.net.feature_info.channels()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> (B, low_dim, H/4, W/4) and (B, dim, H/stride, W/stride)."""
        low, high = self.net(images)
        return low, high


class ViT(nn.Module):
    """The patch tokens of a vision transformer as a feature map.

    Images whose sides are multiples of the patch may have any size: position embeddings are
    interpolated (bicubic, to the explicit size).
    """

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.net = _create(config, num_classes=0, dynamic_img_size=True)
        self.patch: int = self.net.patch_embed.patch_size[0]
        self.dim: int = self.net.embed_dim

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D, H/patch, W/patch), last block, after the final norm."""
        tokens = self.net.forward_features(images)[:, self.net.num_prefix_tokens :]
        rows, cols = (n // self.patch for n in images.shape[-2:])
        return tokens.transpose(1, 2).unflatten(2, (rows, cols))


class DenseResNet(nn.Module):
    """One stage of a ResNet at stride 8 as a feature map."""

    patch = 8

    def __init__(self, config: BackboneConfig, stage: int):
        super().__init__()
        self.net = _create(config, features_only=True, out_indices=(stage,), output_stride=8)
        self.dim: int = self.net.feature_info.channels()[0]

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D, H/8, W/8)."""
        return self.net(images)[0]


def feature_network(config: BackboneConfig, stage: int) -> "ViT | DenseResNet":
    """The network below unsupervised features: of a ResNet `stage`, of a ViT the last tokens."""
    return DenseResNet(config, stage) if "resnet" in config.name else ViT(config)


def freeze_norms(network: nn.Module) -> None:
    """Makes every batch normalisation use its running statistics (call after each `.train()`)."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def to_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Moves a network; convolutions run channels-last, which is the faster layout here."""
    return network.to(device, memory_format=torch.channels_last)
