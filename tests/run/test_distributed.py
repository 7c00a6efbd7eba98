"""Stages on two processes, as torchrun starts them, against one."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
import yaml
from conftest import ROOT, tiny_config
from torch import nn

from core.run import checkpoint, distributed, vision
from core.uss.leopart import Queue

STAGES = ("train_uss.py", "train_wsss.py", "make_debiased_labels.py", "train_segmentation.py")


def run(script: str, path: Path, processes: int, *options: str) -> subprocess.CompletedProcess:
    done = forked.run(script, "--config", str(path), *options, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def experiment(data: Path, folder: Path, norm: str = "frozen") -> Path:
    """Without what differs by nature: dropout, statistics of a part of the batch, and Adam, which
    makes a step of full length of a gradient that is 0 but for rounding."""
    settings = tiny_config(data, folder / "run")
    settings["uss"]["method"] = "frozen"
    settings["wsss"] |= {"norm": norm, "optimizer": "sgd", "lr": 0.01}
    settings["segmentation"] |= {"norm": norm, "dropout": 0.0, "warmup": 0.0, "lr": 0.01}
    if norm == "frozen":
        settings["segmentation"]["network"] = "deeplabv2"  # no statistics in its head
    settings["sync_norm"] = norm == "train"
    settings["segmentation"] |= {"epochs": 3, "optimizer": "sgd"}
    folder.mkdir()
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob(pattern))}


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["frozen", "train"])
def test_two_processes_give_the_results_of_one(tiny_data, tmp_path, norm):
    one = experiment(tiny_data, tmp_path / "one", norm)
    two = experiment(tiny_data, tmp_path / "two", norm)
    for script in STAGES:
        run(script, one, 1)
    done = {script: run(script, two, 2) for script in STAGES[:2]}
    assert done["train_wsss.py"].stdout.count("pseudo labels in") == 1  # one of them speaks
    for name in ("wsss", "segmentation/mars"):
        if name != "wsss":  # from equal labels on
            for part in ("wsss/labels", "wsss/cams"):
                for path in (one.parent / "run" / part).iterdir():
                    (two.parent / "run" / part / path.name).write_bytes(path.read_bytes())
            run("make_debiased_labels.py", two, 2)
            wanted = files(one.parent / "run/debias", "labels/*.png")
            assert files(two.parent / "run/debias", "labels/*.png") == wanted and len(wanted) == 16
            run("train_segmentation.py", two, 2)
        whole, shared = (
            checkpoint.load(path.parent / f"run/{name}/checkpoint.pth") for path in (one, two)
        )
        assert whole["iteration"] == shared["iteration"] > 3
        for key, value in whole["network"].items():
            assert torch.allclose(value, shared["network"][key], atol=1e-4, rtol=1e-3), key


@pytest.mark.slow
def test_two_processes_killed_and_resumed_end_with_the_same_weights(tiny_data, tmp_path):
    paths = [experiment(tiny_data, tmp_path / name) for name in ("whole", "killed")]
    options = ("--segmentation.mode=supervised", "--segmentation.epochs=8")
    run("train_segmentation.py", paths[0], 2, *options)
    folder = paths[1].parent / "run/segmentation/supervised"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen(
        [*launcher, "train_segmentation.py", "--config", str(paths[1]), *options],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and not (folder / "checkpoint.pth").exists():
        time.sleep(0.02)
    assert process.poll() is None, "ended before it was killed"
    os.killpg(process.pid, signal.SIGKILL)
    for child in Path("/proc").glob("[0-9]*"):  # torchrun gives its processes groups of their own
        try:
            if str(paths[1]).encode() in (child / "cmdline").read_bytes():
                os.kill(int(child.name), signal.SIGKILL)
        except OSError:
            continue
    process.wait()
    assert checkpoint.load(folder / "checkpoint.pth")["iteration"] < 32
    run("train_segmentation.py", paths[1], 2, *options)
    whole, resumed = (
        checkpoint.load(p.parent / "run/segmentation/supervised/checkpoint.pth") for p in paths
    )
    for key in ("network", "ema"):
        assert all(torch.equal(v, resumed[key][k]) for k, v in whole[key].items())


def test_shares_are_runs_that_cover_the_list(tmp_path, monkeypatch):
    paths = [tmp_path / f"{k}.png" for k in range(7)]
    paths[3].touch()
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        shares.append(distributed.my_share(paths))
    assert shares == [[0, 1], [2], [4, 5, 6]]


def test_one_process_averages_nothing():
    value = torch.tensor(3.0)
    assert distributed.mean(value) is value and distributed.world() == 1


@pytest.fixture
def twin(monkeypatch):
    """As if another process held the very same tensors."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "all_reduce", lambda x: 2 * x)
    maximum = distributed.dist.ReduceOp.MAX
    monkeypatch.setattr(
        distributed.dist, "all_reduce", lambda x, op=None: x if op == maximum else x.mul_(2)
    )


def test_shared_normalisation_is_that_of_the_whole_batch(twin):
    images = torch.randn(3, 5, 4, 6) * 3 + 1
    ours, theirs = nn.Sequential(nn.BatchNorm2d(5)), nn.BatchNorm2d(5)
    with torch.no_grad():
        for norm in (ours[0], theirs):
            norm.weight.copy_(torch.arange(1.0, 6))
            norm.bias.copy_(torch.arange(5.0))
    distributed.share_normalisation(ours)
    wanted = theirs(torch.cat([images, images]))[:3]
    assert torch.allclose(ours(images), wanted, atol=1e-5)
    for key, value in theirs.state_dict().items():
        assert torch.allclose(ours[0].state_dict()[key], value, atol=1e-5), key
    assert torch.allclose(ours.eval()(images), theirs.eval()(images), atol=1e-5)
    assert ours.train()(images.bfloat16()).dtype == torch.bfloat16


def gathered_in(rank: int, file: str, results) -> None:
    """One of two processes, which have embeddings of their own, and not as many."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    distributed.dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    queue = Queue(6, 3)
    for t in range(3):
        torch.manual_seed(10 * t + rank)
        own = torch.nn.functional.normalize(torch.randn(2 + rank, 3), dim=1)
        queue.push(0, own, most=2)
        distributed.average_statistics([queue, nn.BatchNorm1d(3)])
    results[rank] = queue.rows[0].tolist()
    distributed.dist.destroy_process_group()


def test_queue_of_embeddings_is_that_of_all_processes(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        arguments = ((rank, str(tmp_path / "meeting"), results) for rank in range(2))
        processes = [context.Process(target=gathered_in, args=a) for a in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert results[0] == results[1]
        rows = torch.tensor(results[0])
    assert torch.allclose(rows.norm(dim=1), torch.ones(6)) and len(rows.unique(dim=0)) == 6


def test_averages_over_twins_change_nothing(twin):
    used, unused = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4))
    used.grad = torch.randn(2, 3)
    before = used.grad.clone()
    distributed.average_gradients(torch.optim.SGD([used, unused]))
    assert torch.equal(used.grad, before) and unused.grad is None
    norm = nn.BatchNorm1d(3)
    norm.running_mean += 2
    distributed.average_statistics([norm])
    assert norm.running_mean.tolist() == [2, 2, 2] and norm.num_batches_tracked == 0
    assert distributed.mean(torch.tensor(3)) == 3


def test_shared_normalisation_keeps_the_activation_behind_it(monkeypatch):
    """timm joins the two in one layer, in EfficientNet and others."""
    network = nn.Sequential(
        vision.timm.layers.BatchNormAct2d(4, act_layer=nn.ReLU), nn.BatchNorm2d(4)
    ).eval()
    images = torch.randn(2, 4, 5, 5)
    before = network(images)
    distributed.share_normalisation(network)
    assert all(isinstance(m, distributed.SharedBatchNorm2d) for m in network)
    assert torch.equal(network(images), before)
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", lambda value: value * 2)
    assert network[0].train()(images).min() == 0


def test_tensors_of_several_types_are_averaged_in_the_order_in_which_they_come(monkeypatch):
    """Processes that exchanged them in orders of their own would wait for each other for ever."""
    seen = []
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda tensor: seen.append(tensor.dtype))
    types = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for order in itertools.permutations(types):
        seen.clear()
        distributed._average([torch.ones(2, dtype=kind) for kind in order])
        assert tuple(seen) == order
