"""Depthwise convolution whose gradient is fast in bf16 on CPUs.

oneDNN is slow at the gradients of depthwise kernels in bf16, and at those of dilated and strided
layers. With gradients computed in float32, and for stride 1 by the forward kernel, a training step
of EfficientNet-Lite0 is 1.9 times as fast (docs/benchmarks.md).
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.run import vision


class _Depthwise(torch.autograd.Function):
    """Depthwise convolution without a bias, in the precision of its input."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, stride, padding, dilation) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.geometry = stride, padding, dilation
        return F.conv2d(images, weight, None, stride, padding, dilation, len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (images, weight), (stride, padding, dilation) = ctx.saved_tensors, ctx.geometry
        grad_images, by_kernel = None, ctx.needs_input_grad[0] and max(stride) == 1
        if by_kernel:  # the gradient of a convolution is one with the kernel turned around
            sizes = zip(weight.shape[-2:], padding, dilation, strict=True)
            inverse = [d * (k - 1) - p for k, p, d in sizes]
            turned = weight.flip(2, 3)
            grad_images = F.conv2d(grad, turned, None, 1, inverse, dilation, len(weight))
        wanted = [ctx.needs_input_grad[0] and not by_kernel, ctx.needs_input_grad[1], False]
        tensors = (t.float() for t in (grad, images, weight))
        geometry = (None, stride, padding, dilation, False, (0, 0), len(weight))
        grads = torch.ops.aten.convolution_backward(*tensors, *geometry, wanted)
        grad_images = grads[0].to(images.dtype) if wanted[0] else grad_images
        return grad_images, grads[1].to(weight.dtype) if wanted[1] else None, None, None, None


def use_fast_gradients(network: nn.Module) -> None:
    """Gives every depthwise convolution without a bias the gradient above, in place."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
            if 1 < module.groups == module.in_channels == module.out_channels:
                if module.bias is None and not isinstance(module.padding, str):
                    module.forward = functools.partial(_forward, module)


def _forward(module: nn.Conv2d, images: Tensor) -> Tensor:
    if not torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled():
        return type(module).forward(module, images)
    geometry = module.stride, module.padding, module.dilation
    layers = vision.timm.layers
    if isinstance(module, layers.Conv2dSame):
        images = layers.pad_same(images, module.kernel_size, module.stride, module.dilation)
    dtype = torch.get_autocast_dtype("cpu")
    return _Depthwise.apply(images.to(dtype), module.weight.to(dtype), *geometry)
