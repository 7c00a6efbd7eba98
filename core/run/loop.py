"""One resumable training loop, and what goes around it: optimisers, schedules, moving averages.

loop = Loop("classifier", folder, runtime, networks=networks, optimizer=optimizer, ...)
for t, batch in loop:
    loss = network.loss(batch)
    loop.step(loss)
"""

import copy
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from core.run import checkpoint, distributed
from core.run.device import on_device
from core.run.errors import UserError
from core.run.log import Board, emit
from core.run.settings import Runtime

Schedule = Callable[[int], float]  # step -> factor on the initial learning rates


def poly(iterations: int, power: float = 0.9) -> Schedule:
    """Factor on the learning rate at step t: (1 - t / T)^power."""
    return lambda step: (1 - step / iterations) ** power


def one_cycle(iterations: int, warmup: float = 0.1) -> Schedule:
    """Factor at step t: a linear rise over the first `warmup` share, then half a cosine to 0."""
    rise = max(1, round(iterations * warmup))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, iterations - rise)))

    return factor


def make_optimizer(
    kind: str, groups: list[dict], weight_decay: float, iterations: int, momentum: float = 0
) -> tuple[torch.optim.Optimizer, Schedule]:
    """SGD with a polynomial schedule ("sgd") or AdamW with a one-cycle one ("adamw").

    `groups` are parameters and their learning rates; `weight_decay` is that of all groups,
    `momentum` that of SGD.
    """
    settings = {"weight_decay": weight_decay, "fused": True}
    if kind == "sgd":
        return torch.optim.SGD(groups, momentum=momentum, **settings), poly(iterations)
    return torch.optim.AdamW(groups, **settings), one_cycle(iterations)


class EMA:
    """An exponential moving average of a network, all float state included; in evaluation mode.

    The average starts as a copy, and its decay rises as min(decay, (1 + t) / (10 + t)), so that a
    short training does not end close to its initial weights.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Moves the average towards `network` after step `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        ours, theirs = self.network.state_dict(), network.state_dict()
        floats = [k for k, v in ours.items() if v.is_floating_point()]
        torch._foreach_lerp_([ours[k] for k in floats], [theirs[k] for k in floats], 1 - decay)
        for k in ours.keys() - set(floats):
            ours[k].copy_(theirs[k])


@dataclass
class Loop:
    """A training that, resumed after a kill, ends with the weights of an uninterrupted one (on a
    GPU, up to the rounding of operations that are not deterministic there).

    Iterating gives (t, batch) from the last checkpoint on, the batch on the parameters' device;
    the body computes a loss and calls `step` once. Batch t and the random state of step t are
    functions of (seed, t); everything else is in the checkpoint.

    Raises:
        UserError: the loss or a weight is not finite; the last checkpoints are kept.
    """

    name: str  # for the progress bar
    folder: Path  # of `checkpoint.pth` and of `log.jsonl`, to which lines are added
    runtime: Runtime  # seed, `checkpoint_every`, `accumulate` and logs
    _: KW_ONLY
    networks: Mapping[str, nn.Module]  # everything with weights or buffers to save
    optimizer: torch.optim.Optimizer  # its groups' learning rates are multiplied by `schedule`
    schedule: Schedule
    batches: Callable[[int], Iterable[dict]]  # all from a step on; their "id" names the images
    iterations: int
    ema: EMA | None = None  # of networks["network"]; its own network must be in `networks`, too
    # Batch -> what TensorBoard shows of it ten times, (B, 3, H, W) uint8 by name; must leave the
    # networks as they are.
    pictures: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None = None
    made_from: dict[str, Any] | None = None  # what the checkpoint says of itself; see `Stage`

    def __post_init__(self):
        self.path = self.folder / "checkpoint.pth"
        self.start, self._log = 0, []
        # Sum and number of the values of each figure since the last record.
        self._sums: dict[str, Tensor] = {}
        # (step, loss, ids) to be checked: that waits for the GPU, so it is not done at each step.
        self._unchecked: list[tuple[int, Tensor, Sequence[str]]] = []
        state = checkpoint.resume(self.path)
        if state is not None:
            self.start, self._log = state["iteration"], json.loads(state["log"])
            self._sums = state["sums"]
            for key, network in self.networks.items():
                network.load_state_dict(state[key])
            self.optimizer.load_state_dict(state["optimizer"])
        self._write_log(self._log, anew=True)  # a killed run's later lines are written again

    def __iter__(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        groups, world = self.optimizer.param_groups, distributed.world()
        rates = [group.setdefault("initial_lr", group["lr"]) for group in groups]
        self._board = Board(self.folder, self.runtime, self.start)
        self._bar = tqdm(
            desc=self.name, total=self.iterations, initial=self.start, unit="it", mininterval=1
        )
        began, waited = time.monotonic(), 0.0
        torch.backends.cudnn.benchmark = True  # crops are of one size, or of a few
        batches = self.batches(self.start) if self.start < self.iterations else ()
        loaded = on_device(batches, next(p.device for g in groups for p in g["params"]))
        for t in range(self.start, self.iterations):
            asked = time.monotonic()
            batch = next(loaded)
            waited += time.monotonic() - asked
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * self.schedule(t)
            # Dropout and the like: as if never interrupted, and different in each process.
            draw = (self.runtime.seed + 1) * 1_000_003 + t
            torch.manual_seed(draw * world + distributed.rank())
            self.optimizer.zero_grad(set_to_none=True)
            self._t, self._batch, self._loss = t, batch, 0
            yield t, batch
        torch.backends.cudnn.benchmark = False  # photographs are of many sizes
        self._bar.close()
        self._board.close()
        if self.start < self.iterations:
            seconds, count = time.monotonic() - began, self.iterations - self.start
            print(
                f"{self.name}: {self.iterations} iterations, {seconds / count:.3f} s each, "
                f"{waited / seconds:.0%} of it waiting for data"
            )
        distributed.barrier()

    def parts(self, count: int) -> Iterator[slice]:
        """Slices of a batch of `count` images, one of which is in memory at a time.

        Give the loss of each part to `backward` (gradient accumulation). Without layers that look
        at a whole batch, the gradient is that of the whole batch up to rounding; batch
        normalisation in training mode uses the statistics of each part.
        """
        parts = min(self.runtime.accumulate, count)
        edges = [count * k // parts for k in range(parts + 1)]
        yield from itertools.starmap(slice, itertools.pairwise(edges))

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of one part of the batch's loss."""
        loss.backward()
        self._loss = self._loss + loss.detach()

    def step(self, loss: Tensor | None = None, **figures: Tensor) -> None:
        """Ends an iteration: gradients, optimiser, moving average, log and checkpoint.

        `loss` is the () loss to minimise, or None if its parts went through `backward`; `figures`
        are () values to log.
        """
        if loss is not None:
            self.backward(loss)
        t = self._t
        distributed.average_gradients(self.optimizer)
        self.optimizer.step()
        distributed.average_statistics(self.networks.values())
        if self.ema is not None:
            self.ema.update(self.networks["network"], t)
        self._unchecked.append((t, self._loss, self._batch.get("id", ())))
        for key, value in {"loss": self._loss, **figures}.items():  # not every step has every one
            counted = torch.stack([value.detach(), torch.ones_like(value)])
            earlier = self._sums.get(key)  # a checkpoint's is on the CPU
            self._sums[key] = counted if earlier is None else counted + earlier.to(counted.device)

        def due(every: int) -> bool:
            return (t + 1) % max(1, every) == 0 or t + 1 == self.iterations

        if due(self.iterations // 100):
            self._record(t)
        if self.pictures and self._board.enabled and due(self.iterations // 10):
            with torch.inference_mode():
                self._board.pictures(t + 1, self.pictures(self._batch))
        self._bar.update()
        if due(self.runtime.checkpoint_every):
            self._save(t)

    def _record(self, t: int) -> None:
        """Logs the means since the last record."""
        self._check_losses()
        entry = {key: float(total / count) for key, (total, count) in self._sums.items()}
        self._log.append({"iteration": t + 1, **{k: round(v, 6) for k, v in entry.items()}})
        self._write_log(self._log[-1:])
        emit(self.runtime, "progress", training=self.name, of=self.iterations, **self._log[-1])
        self._board.scalars(t + 1, entry)
        self._sums = {}
        self._bar.set_postfix(loss=f"{entry['loss']:.3f}")

    def _write_log(self, entries: Sequence[Mapping[str, Any]], anew: bool = False) -> None:
        """Adds a line of JSON per entry, to a new file if `anew`; in the first process only."""
        path = self.folder / "log.jsonl"
        if distributed.rank():
            return
        if anew:
            path.unlink(missing_ok=True)
        if entries:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write("".join(json.dumps(entry) + "\n" for entry in entries))

    def _check_losses(self) -> None:
        """Refuses losses that are not finite; called before anything is saved."""
        recent, self._unchecked = self._unchecked, []
        losses = torch.stack([loss for _, loss, _ in recent]) if recent else torch.zeros(0)
        for k in (~losses.isfinite()).nonzero().flatten().tolist()[:1]:
            t, _, ids = recent[k]
            shown = f" (images {', '.join(ids)})" if ids else ""
            self._refuse(f"loss is not finite at iteration {t + 1}{shown}")

    def _refuse(self, what: str) -> NoReturn:
        saved = self.start > 0 or self.path.is_file()
        state = f"{self.path} keeps an earlier state" if saved else "nothing was saved yet"
        resume = "to resume from there" if saved else "to begin again"
        raise UserError(
            f"{self.name}: the {what}; {state}. Set precision: fp32 {resume}, or a lower learning "
            "rate and a new run_dir"
        )

    def _save(self, t: int) -> None:
        """Saves a checkpoint of finite weights.

        The gradients may not be finite although the loss is, or only those of another process.
        """
        self._check_losses()
        weights = [p.detach() for network in self.networks.values() for p in network.parameters()]
        if not torch.stack([w.isfinite().all() for w in weights]).all():
            self._refuse(f"weights are not finite after iteration {t + 1}")
        state = {key: network.state_dict() for key, network in self.networks.items()}
        state |= {"optimizer": self.optimizer.state_dict(), "iteration": t + 1}
        state |= {"log": json.dumps(self._log), "sums": self._sums, "made_from": self.made_from}
        checkpoint.save(self.path, state, keep=True)
