"""Several processes of one stage, started by torchrun; one process needs none of this.

The first process writes checkpoints, manifests and messages. Training averages gradients, and the
statistics that layers keep, over the processes, so that all of them have the same weights. Stages
that work image by image divide the images among the processes.
"""

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.nn.functional import all_reduce


def rank() -> int:
    """Which of the processes this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start() -> None:
    """Joins the processes."""
    backend, local = "gloo", int(os.environ.get("LOCAL_RANK", "0"))
    if local < torch.cuda.device_count():  # else `pick_device` says that a GPU is missing
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"  # `device: cpu` is possible on such a machine, too
    # One process may refine labels for hours while the others wait.
    dist.init_process_group(backend, timeout=timedelta(days=7))


def barrier() -> None:
    """Waits until every process is here."""
    if world() > 1:
        dist.barrier()


def my_share(paths: Sequence[Path]) -> list[int]:
    """This process's share of the files that are still to be made: places in `paths`.

    Shares are contiguous parts of the list, so that batches of neighbours stay together.
    """
    own = range(len(paths) * rank() // world(), len(paths) * (rank() + 1) // world())
    return [k for k in own if not paths[k].exists()]


def mean(value: Tensor) -> Tensor:
    """The mean of a number over all processes; without a gradient."""
    if world() == 1:
        return value
    total = value.detach().to(torch.float64).clone()
    dist.all_reduce(total)
    return (total / world()).to(value.dtype if value.is_floating_point() else torch.float32)


@torch.no_grad()
def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Replaces each gradient by its mean over all processes."""
    if world() == 1:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    present = present.to(parameters[0].device)
    # A parameter without a gradient here may have one in another process.
    dist.all_reduce(present, dist.ReduceOp.MAX)
    used = [p for p, has in zip(parameters, present.tolist(), strict=True) if has]
    for p in used:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    _average([p.grad for p in used])


@torch.no_grad()
def average_statistics(networks: Iterable[nn.Module]) -> None:
    """Replaces the running means and variances of batch normalisation by their means."""
    if world() > 1:
        layers = [m for network in networks for m in network.modules()]
        layers = [m for m in layers if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        _average([b for m in layers for b in (m.running_mean, m.running_var)])


@torch.no_grad()
def gather(rows: Tensor) -> Tensor:
    """(N, D) of each process -> (world N', D) on all of them, N' the least N."""
    if world() == 1:
        return rows
    count = torch.tensor(len(rows), device=rows.device)
    dist.all_reduce(count, dist.ReduceOp.MIN)
    rows = rows[: int(count)].contiguous()
    parts = [torch.empty_like(rows) for _ in range(world())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with the statistics of all processes; torch's own needs GPUs."""

    def forward(self, x: Tensor) -> Tensor:
        shared = self.training and world() > 1
        x = self._shared(x) if shared else super().forward(x)
        # timm's layers may end with an activation.
        return self.act(self.drop(x)) if hasattr(self, "act") else x

    def _shared(self, x: Tensor) -> Tensor:
        x, kind = x.float(), x.dtype
        dims, here = (0, 2, 3), x.numel() // x.shape[1]
        count = here * world()  # each process has as many images
        average = all_reduce(x.sum(dims)) / count
        centred = x - average[:, None, None]
        variance = all_reduce(centred.square().sum(dims)) / count
        with torch.no_grad():
            self.running_mean.lerp_(average, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight / (variance + self.eps).sqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(kind)


def share_normalisation(network: nn.Module) -> None:
    """Makes each batch normalisation of `network` see the batches of all processes."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SharedBatchNorm2d


def _average(tensors: list[Tensor]) -> None:
    for dtype in dict.fromkeys(t.dtype for t in tensors):  # alike on all processes
        alike = [t for t in tensors if t.dtype == dtype]
        joined = torch.cat([t.flatten() for t in alike])
        dist.all_reduce(joined)
        joined /= world()
        for tensor, part in zip(alike, joined.split([t.numel() for t in alike]), strict=True):
            tensor.copy_(part.view_as(tensor))
