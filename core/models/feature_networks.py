"""Networks below unsupervised features: a ViT's patch tokens, or one stage of a CNN."""

import contextlib

import torch
from torch import Tensor, nn

from core.models.backbones import (
    FIXES,
    Backbone,
    BackboneConfig,
    blank_network,
    create_network,
    is_resnet,
    load_local,
    map_strides,
)
from core.run.errors import UserError


class ViT(nn.Module):
    """The patch tokens of a vision transformer as a feature map.

    Images whose sides are multiples of the patch may have any size: position embeddings are
    interpolated (bicubic, to the explicit size).

    Args:
        config: the architecture and its weights.
        tokens: "last", the last block's tokens after the final norm, or "keys", the keys of its
            attention.
    """

    def __init__(self, config: BackboneConfig, tokens: str = "last"):
        super().__init__()
        self.net = create_network(config, num_classes=0, dynamic_img_size=True)
        load_local(self.net, config)
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
    """One stage of a network as a feature map: a ResNet's at stride 8 (the first one's is 4), for
    which it is dilated, and other networks' at the stage's own stride, 4 to 32."""

    def __init__(self, config: BackboneConfig, stage: int):
        wide = config.name == "wide_resnet38"
        dilated = wide or is_resnet(config)
        super().__init__(config, (stage,), 8 if dilated else 32)
        (self.dim,) = self.dims
        self.patch = 8 if dilated else max(*self.strides, self._multiple)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), sides multiples of `patch` -> (B, D, H/stride, W/stride)."""
        return super().forward(images)[0]


def feature_network(
    backbone: BackboneConfig, stage: int = 4, tokens: str = "last"
) -> ViT | StageFeatures:
    """The network below unsupervised features.

    Args:
        backbone: architecture and weights.
        stage: stage of a network with feature maps, 1 to 4.
        tokens: tokens of a ViT, see `ViT`.

    Raises:
        UserError: it has neither maps of several strides nor patch tokens at any image size.
    """
    if backbone.name == "wide_resnet38":
        return StageFeatures(backbone, stage)
    blank_network(backbone)  # refuses unknown names and wrong arguments
    strides = []
    with contextlib.suppress(UserError):  # some networks give no maps
        strides = map_strides(backbone)
    if len({*strides}) > 1:
        return StageFeatures(backbone, stage)
    _refuse_unless_vit(backbone, tokens)
    return ViT(backbone, tokens)


def _refuse_unless_vit(config: BackboneConfig, tokens: str) -> None:
    with contextlib.suppress(Exception), torch.device("meta"):  # a network fails in any way
        vit = ViT(config.without_weights(), tokens).eval()
        if vit(torch.zeros(1, 3, 2 * vit.patch, 3 * vit.patch)).shape == (1, vit.dim, 2, 3):
            return
    raise UserError(
        f"backbone {config.name!r} has neither maps of several strides nor patch tokens at any "
        f"image size (uss.tokens: {tokens}); vit_small_patch16_224, {FIXES}"
    )
