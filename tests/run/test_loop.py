import contextlib
import copy
import json
import math

import pytest
import torch
from torch import nn

from core.run import checkpoint, distributed
from core.run.errors import UserError
from core.run.loop import EMA, Loop, make_optimizer, one_cycle, poly
from core.run.settings import Runtime


def fit(folder, stop_at=None, iterations=10, sick_at=None, weak_at=None):
    """A tiny training with dropout; optionally dies after step `stop_at`."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 1))
    ema = EMA(network, 0.9)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)

    def batches(start):
        for t in range(start, iterations):
            if t == stop_at:
                raise KeyboardInterrupt
            images = torch.randn(6, 4, generator=torch.Generator().manual_seed(t))
            yield {"x": images * (math.nan if t == sick_at else 1), "id": [f"image{t}"]}

    loop = Loop(
        "test",
        folder,
        Runtime(checkpoint_every=3),
        networks={"network": network, "ema": ema.network},
        optimizer=optimizer,
        schedule=one_cycle(iterations),
        batches=batches,
        iterations=iterations,
        ema=ema,
    )
    for t, batch in loop:
        odd = {"odd": torch.tensor(float(t))} if t % 2 else {}
        loss = network(batch["x"]).square().mean()
        if t == weak_at:  # its root has no gradient at 0
            loss = loss + network[0].weight.sum().mul(0).sqrt()
        loop.step(loss, **odd)
    return checkpoint.load(folder / "checkpoint.pth")


def test_killed_and_resumed_training_ends_with_the_same_weights(tmp_path):
    whole = fit(tmp_path / "a")
    for stop in (2, 8):  # before the first checkpoint, and after it
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "b", stop_at=stop)
    resumed = fit(tmp_path / "b")
    for key in ("network", "ema"):
        for name, value in whole[key].items():
            assert torch.equal(value, resumed[key][name]), name
    assert whole["log"] == resumed["log"]


@pytest.mark.parametrize("cut", [0, 100, -100, "flip"])
def test_broken_last_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, cut):
    whole = fit(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", stop_at=8)  # saved after 3 and 6
    path = tmp_path / "b/checkpoint.pth"
    content = bytearray(path.read_bytes())
    if cut == "flip":
        content[content.index(whole["network"]["3.bias"].numpy().tobytes()[:1]) + 900] ^= 4
    path.write_bytes(content if cut == "flip" else content[:cut])
    resumed = fit(tmp_path / "b")
    assert "resuming from the one before" in capsys.readouterr().out
    assert all(torch.equal(v, resumed["ema"][k]) for k, v in whole["ema"].items())


def test_broken_checkpoint_without_another_is_told(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, stop_at=4)
    (tmp_path / "checkpoint.pth").write_bytes(b"PK")
    with pytest.raises(UserError, match="cannot be read.*To train from the start, remove"):
        fit(tmp_path)


def test_share_of_waiting_for_data_is_told(tmp_path, capsys):
    fit(tmp_path)
    told = capsys.readouterr().out
    assert "test: 10 iterations" in told and "% of it waiting for data" in told


@pytest.mark.parametrize("accumulate", [1, 2, 3, 5, 9])
def test_gradient_of_a_batch_in_parts_is_that_of_the_batch(tmp_path, accumulate):
    network = nn.Linear(4, 1)
    images, seen, found = torch.randn(5, 4), [], []
    whole = network(images).square().mean()
    wanted = torch.autograd.grad(whole, [*network.parameters()])
    optimizer = torch.optim.SGD(network.parameters(), lr=0)
    optimizer.register_step_pre_hook(
        lambda *_: found.extend(p.grad.clone() for p in network.parameters())
    )
    loop = Loop(
        "test",
        tmp_path,
        Runtime(accumulate=accumulate),
        networks={"network": network},
        optimizer=optimizer,
        schedule=poly(1),
        batches=lambda start: [{"x": images}],
        iterations=1,
    )
    for _, batch in loop:
        for rows in loop.parts(5):
            seen.append(len(batch["x"][rows]))
            loop.backward(network(batch["x"][rows]).square().sum() / 5)
        loop.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted, strict=True))
    assert sum(seen) == 5 and len(seen) == min(accumulate, 5)
    (entry,) = json.loads(checkpoint.load(tmp_path / "checkpoint.pth")["log"])
    assert entry["loss"] == pytest.approx(whole.item(), abs=1e-5)  # of the batch, not of a part


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_optimiser_has_its_schedule_and_resumes_exactly(kind):
    def steps(weight, optimizer, count):
        for k in range(count):
            weight.grad = torch.full((3,), float(k))
            optimizer.step()

    def made(weight):
        return make_optimizer(kind, [{"params": [weight], "lr": 0.1}], 0.01, 10, momentum=0.9)

    weight = nn.Parameter(torch.ones(3))
    optimizer, schedule = made(weight)
    assert schedule(5) == {"sgd": poly, "adamw": one_cycle}[kind](10)(5)
    steps(weight, optimizer, 3)
    again = nn.Parameter(weight.detach().clone())
    resumed, _ = made(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(weight, optimizer, 3)
    steps(again, resumed, 3)
    assert torch.equal(weight, again)


def test_log_has_one_json_object_per_line(tmp_path):
    fit(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["iteration"] for entry in lines] == list(range(1, 11))


def test_log_grows_with_the_training_and_has_no_line_twice_after_a_stop(tmp_path):
    fit(tmp_path / "a")
    whole = (tmp_path / "a/log.jsonl").read_text()
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", stop_at=8)  # a checkpoint is written after 6 of the 8 iterations
    assert (tmp_path / "b/log.jsonl").read_text().splitlines() == whole.splitlines()[:8]
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", stop_at=6)
    assert (tmp_path / "b/log.jsonl").read_text().splitlines() == whole.splitlines()[:6]
    fit(tmp_path / "b")
    assert (tmp_path / "b/log.jsonl").read_text() == whole
    fit(tmp_path / "b")  # there is nothing left to do
    assert (tmp_path / "b/log.jsonl").read_text() == whole
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "c", stop_at=0)
    assert not (tmp_path / "c").exists()


def test_figures_are_averaged_over_the_steps_that_have_them(tmp_path):
    state = fit(tmp_path, iterations=200)  # an entry for two steps
    assert [entry["odd"] for entry in json.loads(state["log"])] == list(range(1, 200, 2))


@pytest.mark.parametrize(("sick_at", "iterations"), [(0, 10), (4, 10), (11, 1000)])
def test_loss_that_is_not_finite_stops_and_names_the_images(tmp_path, sick_at, iterations):
    told = rf"not finite at iteration {sick_at + 1} \(images image{sick_at}\); "
    told += "nothing was saved yet" if sick_at < 3 else ".*checkpoint.pth keeps an earlier state"
    with pytest.raises(UserError, match=told):
        fit(tmp_path, sick_at=sick_at, iterations=iterations)
    path = tmp_path / "checkpoint.pth"  # of every third step
    assert path.exists() == (sick_at >= 3)
    if path.exists():
        state = checkpoint.load(path)
        assert state["iteration"] == sick_at // 3 * 3
        assert all(v.isfinite().all() for v in state["network"].values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    with pytest.raises(UserError, match="weights are not finite after iteration 6"):
        fit(tmp_path, weak_at=5)  # a checkpoint's step: no loss has shown it yet
    state = checkpoint.load(tmp_path / "checkpoint.pth")
    assert state["iteration"] == 3
    assert all(v.isfinite().all() for v in state["network"].values())


def test_processes_draw_their_own_dropout(tmp_path, monkeypatch):
    """And a single one what it drew before there were several."""
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for name in ("barrier", "average_gradients", "average_statistics"):
        monkeypatch.setattr(distributed, name, lambda *_: None)
    seed = Runtime().seed
    for world, rank in ((1, 0), (2, 0), (2, 1)):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("RANK", str(rank))
        with contextlib.suppress(UserError):  # but the first process writes no checkpoint
            fit(tmp_path / f"{world}{rank}", iterations=3)
        drawn, seeds[:] = seeds[1:], []
        assert drawn == [((seed + 1) * 1_000_003 + t) * world + rank for t in range(3)]


def test_schedules_begin_and_end_where_they_should():
    assert poly(100)(0) == 1 and poly(100)(99) == pytest.approx(0.01**0.9)
    factor = one_cycle(100)
    assert factor(0) == pytest.approx(0.1) and factor(9) == 1 and factor(99) < 0.001


def test_average_follows_the_network_slowly_and_buffers_too():
    network = nn.BatchNorm1d(2)
    ema = EMA(network, 0.9)
    nn.init.constant_(network.weight, 3)
    network.running_mean.fill_(1)
    network.num_batches_tracked += 5
    ema.update(network, step=1000)
    assert torch.allclose(ema.network.weight, torch.full((2,), 1.2))
    assert torch.allclose(ema.network.running_mean, torch.full((2,), 0.1))
    assert ema.network.num_batches_tracked == 5 and not ema.network.training
