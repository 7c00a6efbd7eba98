"""Networks that unsupervised features come from: a ViT's patch tokens, or stages of a CNN."""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.models.backbones import (
    KNOWN_TO_WORK,
    Backbone,
    BackboneConfig,
    blank_network,
    create_network,
    is_resnet,
    map_strides,
)
from core.run.errors import UserError


class ViT(nn.Module):
    """The patch tokens of a vision transformer as a feature map.

    Images whose sides are multiples of the patch may have any size: position embeddings are
    interpolated (bicubic, to the explicit size). `tokens` is "last", the last block's tokens after
    the final norm, or "keys", the keys of its attention.
    """

    def __init__(self, config: BackboneConfig, tokens: str = "last"):
        super().__init__()
        self.net = create_network(config, num_classes=0, dynamic_img_size=True)
        self.patch: int = self.net.patch_embed.patch_size[0]
        self.dim: int = self.net.embed_dim
        self._keys: Tensor | None = None
        if tokens == "keys":
            keys = self.joined_attention or self.net.blocks[-1].attn.k_proj
            keys.register_forward_hook(self._keep_keys)
        self.tokens = tokens

    @property
    def joined_attention(self) -> nn.Module | None:
        """The last block's layer for queries, keys and values; None where each has its own."""
        return getattr(self.net.blocks[-1].attn, "qkv", None)

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


class StageFeatures(Backbone):
    """Stages of a network as a feature map: a ResNet's at stride 8 (the first one's is 4), for
    which it is dilated, and other networks' at the stages' own strides, 4 to 32.

    Several stages are joined, each with unit vectors, on the grid of the first one named.
    """

    def __init__(self, config: BackboneConfig, stages: Sequence[int]):
        dilated = config.name == "wide_resnet38" or is_resnet(config)
        ascending = sorted({*stages})
        super().__init__(config, ascending, 8 if dilated else 32)
        self._first = ascending.index(stages[0])
        self.dim = sum(self.dims)
        self.patch = 8 if dilated else max(*self.strides, self._multiple)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), sides multiples of `patch` -> (B, D, H/stride, W/stride)."""
        maps = super().forward(images)
        if len(maps) == 1:
            return maps[0]
        size = maps[self._first].shape[-2:]
        units = (F.normalize(m.float(), dim=1) for m in maps)
        return torch.cat([F.interpolate(m, size, mode="bilinear") for m in units], 1)


def feature_network(
    backbone: BackboneConfig, stages: int | Sequence[int] = 4, tokens: str = "last"
) -> ViT | StageFeatures:
    """The network that unsupervised features come from.

    Args:
        stages: stage of a network with feature maps, 1 to 4, or several, see `StageFeatures`.
        tokens: tokens of a ViT, see `ViT`.

    Raises:
        UserError: it has neither maps of several strides nor patch tokens at any image size.
    """
    stages = [stages] if isinstance(stages, int) else stages
    if backbone.name == "wide_resnet38":
        return StageFeatures(backbone, stages)
    blank_network(backbone)  # refuses unknown names and wrong arguments
    strides = []
    with contextlib.suppress(UserError):  # some networks give no maps
        strides = map_strides(backbone)
    if len({*strides}) > 1:
        return StageFeatures(backbone, stages)
    if not _is_vit(backbone, tokens):
        raise UserError(
            f"backbone {backbone.name!r} has neither maps of several strides nor patch tokens at "
            f"any image size (uss.tokens: {tokens}); vit_small_patch16_224, {KNOWN_TO_WORK}"
        )
    return ViT(backbone, tokens)


def _is_vit(config: BackboneConfig, tokens: str) -> bool:
    with contextlib.suppress(Exception), torch.device("meta"):  # a network fails in any way
        vit = ViT(config.without_weights(), tokens).eval()
        return vit(torch.zeros(1, 3, 2 * vit.patch, 3 * vit.patch)).shape == (1, vit.dim, 2, 3)
    return False
