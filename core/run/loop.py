"""What every training shares: device, precision, seeds, schedules, EMA and one resumable loop."""

import copy
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from core.config import Config
from core.run import checkpoint, distributed
from core.run.errors import UserError
from core.run.log import Board, emit


def pick_device(config: Config) -> torch.device:
    """The configured device; `auto` is the first GPU where there is one."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):  # mps has no float64, and other parts lack there, too
        raise UserError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r} was asked for, but this PyTorch sees no GPU; use auto")
    if (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise UserError(f"device {name!r}: there are {torch.cuda.device_count()} GPUs, from 0 on")
    if device.index is not None and distributed.world() > 1:
        raise UserError(f"several processes cannot share {name}; leave device at auto")
    return device


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """bf16 autocast where the configuration asks for it, or where `auto` finds it worth while."""
    if device.type == "cuda":  # older GPUs only emulate it
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = _cpu_multiplies_bf16()
    enabled = config.precision == "bf16" or (config.precision == "auto" and fast)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _cpu_multiplies_bf16() -> bool:
    return bool(
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001
    )


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def poly(iterations: int, power: float = 0.9) -> Callable[[int], float]:
    """Factor on the learning rate at step t: (1 - t / T)^power."""
    return lambda step: (1 - step / iterations) ** power


def one_cycle(iterations: int, warmup: float = 0.1) -> Callable[[int], float]:
    """Factor at step t: a linear rise over the first `warmup` share, then half a cosine to 0."""
    rise = max(1, round(iterations * warmup))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, iterations - rise)))

    return factor


def make_optimizer(
    kind: str, groups: list[dict], weight_decay: float, iterations: int, momentum: float = 0
) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    """An optimiser that takes one pass over each weight, and its schedule.

    Args:
        kind: "sgd", with a polynomial schedule; "adamw", with a one-cycle one.
        groups: parameters and their learning rates.
        weight_decay: of all of them.
        iterations: steps in all.
        momentum: of sgd.
    """
    settings = {"weight_decay": weight_decay, "fused": True}
    if kind == "sgd":
        return torch.optim.SGD(groups, momentum=momentum, **settings), poly(iterations)
    return torch.optim.AdamW(groups, **settings), one_cycle(iterations)


def in_parts(loss: Callable[[slice], Tensor], count: int, parts: int) -> Tensor:
    """The loss of a batch as a sum over parts of it, of which one is in memory at a time.

    All parts but the last are back-propagated here (gradient accumulation). Without layers that
    look at a whole batch, the gradient is that of one part up to rounding; batch normalisation in
    training mode takes the statistics of each part.

    Args:
        loss: of some images of the batch; over all of them, it sums to that of the batch.
        count: B, images.
        parts: how many, at most one per image.
    """
    total: Tensor | float = 0
    edges = [count * k // parts for k in range(parts + 1)] if parts < count else range(count + 1)
    for first, end in itertools.pairwise(edges):
        if first:
            total.backward()
            total = total.detach()
        total = total + loss(slice(first, end))
    return total


class EMA:
    """An exponential moving average of a network, all float state included; in evaluation mode.

    The average starts as a copy, and its decay rises as min(decay, (1 + t) / (10 + t)), so that a
    short training does not end beside its own start.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        ours, theirs = self.network.state_dict(), network.state_dict()
        floats = [k for k, v in ours.items() if v.is_floating_point()]
        torch._foreach_lerp_([ours[k] for k in floats], [theirs[k] for k in floats], 1 - decay)
        for k in ours.keys() - set(floats):
            ours[k].copy_(theirs[k])


NAN_ADVICE = "Set precision: fp32 to go on from there, or a lower learning rate and another run_dir"


class PendingLosses:
    """Losses that nobody has looked at yet: a look waits for the GPU, so not every step has one."""

    def __init__(self, name: str, path: Path):
        self._name, self._path = name, path
        self._recent: list[tuple[int, Tensor, Sequence[str]]] = []

    def append(self, t: int, loss: Tensor, ids: Sequence[str]) -> None:
        self._recent.append((t, loss, ids))

    def refuse_non_finite(self) -> None:
        """Forgets all losses so far; asked before anything is saved.

        Raises:
            UserError: one is not finite.
        """
        recent, self._recent = self._recent, []
        losses = torch.stack([loss for _, loss, _ in recent]) if recent else torch.zeros(0)
        for k in (~losses.isfinite()).nonzero().flatten().tolist()[:1]:
            t, _, ids = recent[k]
            shown = f" (images {', '.join(ids)})" if ids else ""
            raise UserError(
                f"{self._name}: the loss is not finite at iteration {t + 1}{shown}; {self._path} "
                f"keeps an earlier state. {NAN_ADVICE}"
            )


def refuse_non_finite_weights(
    name: str, networks: Mapping[str, nn.Module], t: int, path: Path
) -> None:
    """A gradient may fail where the loss does not, and in another process's part of the batch.

    Raises:
        UserError: a weight is not finite.
    """
    weights = [p.detach() for network in networks.values() for p in network.parameters()]
    if not torch.stack([w.isfinite().all() for w in weights]).all():
        raise UserError(
            f"{name}: the weights are not finite after iteration {t + 1}; {path} keeps an earlier "
            f"state. {NAN_ADVICE}"
        )


def write_log(path: Path, entries: Sequence[Mapping[str, Any]], anew: bool = False) -> None:
    """Adds one line of JSON for each entry to a file, or begins it anew; a file of no lines is not
    made. Of several processes the first one writes."""
    if distributed.rank():
        return
    if anew:
        path.unlink(missing_ok=True)
    if entries:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries))


def train(
    name: str,
    networks: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float],
    batches: Callable[[int], Iterable[dict[str, Tensor]]],
    step: Callable[[dict[str, Tensor], int], dict[str, Tensor]],
    iterations: int,
    folder: Path,
    config: Config,
    ema: EMA | None = None,
    pictures: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None = None,
    made_from: dict[str, Any] | None = None,
) -> None:
    """Runs a training to its end, from its last checkpoint where there is one.

    A run that was killed and started again ends with the weights of an uninterrupted one: batch t
    and the random state at step t are functions of (seed, t), and everything else is in the
    checkpoint.

    Args:
        name: for the progress bar.
        networks: everything with weights or buffers to save, by name.
        optimizer: its groups' learning rates are multiplied by `schedule`.
        schedule: step -> factor on the initial learning rates.
        batches: first step -> batches from there on; their "id" names the images.
        step: (batch, t) -> losses and figures to log; the key "loss" is minimised. It may add to
            gradients itself, as `in_parts` does.
        iterations: steps in all.
        folder: gets `checkpoint.pth` and `log.jsonl`, to which lines are added as training goes.
        config: seed, `checkpoint_every`.
        ema: updated after each step; its network must be among `networks`.
        pictures: batch -> what TensorBoard shows of it ten times, (B, 3, H, W) uint8 by name; must
            leave the networks as they are.
        made_from: what the checkpoint says of itself (`Stage.made_from`).

    Raises:
        UserError: the loss or a weight is not finite; the last checkpoints are kept.
    """
    path, log_path = folder / "checkpoint.pth", folder / "log.jsonl"
    start, log = 0, []
    state = checkpoint.resume(path)
    if state is not None:
        start, log = state["iteration"], json.loads(state["log"])
        for key, network in networks.items():
            network.load_state_dict(state[key])
        optimizer.load_state_dict(state["optimizer"])
    write_log(log_path, log, anew=True)  # what a killed run wrote after its checkpoint comes again
    sums: dict[str, Tensor] = state["sums"] if start else {}
    unseen = PendingLosses(name, path)
    rates = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
    every = max(1, iterations // 100)
    bar = tqdm(total=iterations, initial=start, desc=name, unit="it", mininterval=1)
    board = Board(folder, config, start)
    began, waited = time.monotonic(), 0.0
    loaded = iter(batches(start)) if start < iterations else iter(())
    for t in range(start, iterations):
        asked = time.monotonic()
        batch = next(loaded)
        waited += time.monotonic() - asked
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(t)
        # Dropout and the like: as if never interrupted, and different in each process.
        draw = (config.seed + 1) * 1_000_003 + t
        torch.manual_seed(draw * distributed.world() + distributed.rank())
        optimizer.zero_grad(set_to_none=True)
        figures = step(batch, t)
        figures["loss"].backward()
        distributed.average_gradients(optimizer)
        optimizer.step()
        distributed.average_statistics(networks.values())
        if ema is not None:
            ema.update(networks["network"], t)
        unseen.append(t, figures["loss"].detach(), batch.get("id", ()))
        for key, value in figures.items():  # sum and count: not every step has every figure
            counted = torch.stack([value.detach(), torch.ones_like(value)])
            earlier = sums.get(key)  # of a checkpoint: on the CPU
            sums[key] = counted if earlier is None else counted + earlier.to(counted.device)
        last = t + 1 == iterations
        if (t + 1) % every == 0 or last:
            unseen.refuse_non_finite()
            entry = {key: float(total / count) for key, (total, count) in sums.items()}
            log.append({"iteration": t + 1, **{k: round(v, 6) for k, v in entry.items()}})
            write_log(log_path, log[-1:])
            emit(config, "progress", training=name, of=iterations, **log[-1])
            board.scalars(t + 1, entry)
            sums = {}
            bar.set_postfix(loss=f"{entry['loss']:.3f}")
        if pictures and ((t + 1) % max(1, iterations // 10) == 0 or last):
            with torch.inference_mode():
                board.pictures(t + 1, lambda batch=batch: pictures(batch))
        bar.update()
        if last or (t + 1) % config.checkpoint_every == 0:
            unseen.refuse_non_finite()
            refuse_non_finite_weights(name, networks, t, path)
            state = {key: network.state_dict() for key, network in networks.items()}
            state |= {
                "optimizer": optimizer.state_dict(),
                "iteration": t + 1,
                "log": json.dumps(log),
            }
            state["sums"] = sums
            state["made_from"] = made_from
            checkpoint.save(path, state, keep=True)
    bar.close()
    board.close()
    if start < iterations:
        seconds = time.monotonic() - began
        rate, share = seconds / (iterations - start), f"{waited / seconds:.0%}"
        print(f"{name}: {iterations} iterations, {rate:.3f} s each, {share} of it waiting for data")
    distributed.barrier()
