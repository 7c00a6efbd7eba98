import json

import pytest
import torch
from conftest import run_python
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core.run import checkpoint
from core.run.log import Board
from core.run.settings import Runtime

TRAININGS = {
    "train_uss.py": ("uss/stego", {"image", "code"}, ()),
    "train_wsss.py": ("wsss", {"image", "map"}, ()),
    "train_segmentation.py": (
        "segmentation/supervised",
        {"image", "label", "teacher"},
        ("--segmentation.mode=supervised",),
    ),
}


@pytest.mark.parametrize("script", TRAININGS)
def test_tensorboard_and_json_lines_leave_the_weights_as_they_are(script, experiment):
    folder, pictures, options = TRAININGS[script]
    run, told = experiment.parent / "run", experiment.parent / "told"
    plain = run_python(script, "--config", experiment, *options)
    assert plain.returncode == 0, plain.stderr
    wanted = checkpoint.load(run / folder / "checkpoint.pth")
    ways = ("--log=jsonl", "--tensorboard=true", f"--run_dir={told}", *options)
    done = run_python(script, "--config", experiment, *ways)
    assert done.returncode == 0, done.stderr

    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [e["event"] for e in events if e["event"] != "progress"] == ["stage", "finished"]
    progress = [e for e in events if e["event"] == "progress"]
    assert progress[-1]["iteration"] == progress[-1]["of"] == wanted["iteration"]
    assert plain.stdout.splitlines()[-1] in done.stderr  # words for people

    found = EventAccumulator(str(told / folder / "tensorboard")).Reload()
    losses = found.Scalars("loss")
    assert [e.value for e in losses] == pytest.approx([e["loss"] for e in progress], abs=1e-4)
    assert {tag.split("/")[0] for tag in found.Tags()["images"]} == pictures
    again = checkpoint.load(told / folder / "checkpoint.pth")
    for key in ("network", "head"):
        for name, value in wanted.get(key, {}).items():
            assert torch.equal(value, again[key][name]), name


def test_events_after_the_last_checkpoint_are_dropped(tmp_path):
    for start, value in ((0, 1.0), (2, 5.0)):
        board = Board(tmp_path, Runtime(tensorboard=True), start)
        for k in range(start, 4):
            board.scalars(k + 1, {"loss": value + k})
        board.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in found] == [(1, 1.0), (2, 2.0), (3, 7.0), (4, 8.0)]


def test_without_being_asked_nothing_is_written(tmp_path):
    Board(tmp_path, Runtime(), 0).scalars(1, {"loss": 0.0})
    assert not list(tmp_path.iterdir())
