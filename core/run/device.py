"""Where and in which precision networks run."""

import os
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.run import distributed
from core.run.errors import UserError
from core.run.settings import Runtime, check


def pick_device(runtime: Runtime) -> torch.device:
    """The configured device; `auto` is the first GPU, or the CPU without one.

    Raises:
        UserError: the device is unknown, not supported or not there.
    """
    name = runtime.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N") from None
    kind, index, count = device.type, device.index, torch.cuda.device_count()
    known = kind in ("cpu", "cuda")  # mps lacks float64, among other things
    check(known, f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    visible = kind == "cpu" or torch.cuda.is_available()
    check(visible, f"device {name!r} was requested, but this PyTorch sees no GPU; use auto")
    check((index or 0) < max(1, count), f"device {name!r}: there are {count} GPUs, counted from 0")
    alone = index is None or distributed.world() == 1
    check(alone, f"several processes cannot share {name}; leave device at auto")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    enough = kind == "cpu" or local <= count
    check(enough, f"{local} processes on a machine with {count} GPUs; start at most {count}")
    return device


def autocast(runtime: Runtime, device: torch.device) -> torch.autocast:
    """bf16 autocast if requested, or if `precision` is auto and the hardware computes in bf16."""
    if device.type == "cuda":  # older GPUs only emulate it
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    enabled = runtime.precision == "bf16" or (runtime.precision == "auto" and fast)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def to_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Moves a network; convolutions run channels-last, which is the faster layout here."""
    return network.to(device, memory_format=torch.channels_last)


def on_device(batches: Iterable[dict[str, Any]], device: torch.device) -> Iterator[dict[str, Any]]:
    """The batches with their tensors on a device.

    On a GPU, pinned batches are copied on a stream of their own: while the GPU still computes the
    step before, and without the CPU waiting for either.
    """
    if device.type != "cuda":
        yield from batches
        return
    copies = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(copies):
            moved = {
                key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for key, value in batch.items()
            }
        steps = torch.cuda.current_stream(device)
        steps.wait_stream(copies)
        for value in moved.values():
            if isinstance(value, Tensor):
                value.record_stream(steps)  # its memory is not reused before that stream is done
        yield moved


def seed_everything(seed: int) -> None:
    """Seeds the generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
