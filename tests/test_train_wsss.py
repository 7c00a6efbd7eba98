"""Stage 2 with the methods that spread activation maps."""

import dataclasses
import time

import forked
import pytest
import torch
import yaml
from conftest import run_python, tiny_config

from core.data.labels import read_label
from core.run.checkpoint import load
from core.wsss.settings import METHODS, PAIR_NETWORKS, WsssConfig
from tools.common import titles


def test_every_method_has_its_sections_and_a_title():
    fields = {item.name for item in dataclasses.fields(WsssConfig)}
    assert {*titles.METHODS} == {*METHODS}
    assert {*PAIR_NETWORKS}.union(*(method.unused for method in METHODS.values())) <= fields
    assert {method.walk for method in METHODS.values()} == {None, *PAIR_NETWORKS}
    assert {name for name, method in METHODS.items() if method.teacher} <= fields


@pytest.fixture(params=["irn", "advcam", "seam", "rsepm"])
def walked_experiment(request, tiny_data, tmp_path):
    settings = tiny_config(tiny_data, tmp_path / "run")
    settings["wsss"]["method"] = request.param
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_crop_too_small_for_the_pairs_is_refused(walked_experiment):
    radius = ("--wsss.irn.radius=9", "--wsss.psa.radius=5")
    done = run_python("train_wsss.py", "--config", walked_experiment, *radius)
    assert done.returncode == 1 and "raise augment.crop" in done.stderr
    assert "Traceback" not in done.stderr


def test_labels_by_random_walk_are_made_from_tags_alone(walked_experiment, tiny_data):
    done = run_python("train_wsss.py", "--config", walked_experiment)
    assert done.returncode == 0, done.stderr
    folder = walked_experiment.parent / "run" / "wsss"
    labels = sorted((folder / "labels").glob("*.png"))
    assert len(labels) == 16 == len(list((folder / "seeds").glob("*.png")))
    assert max(read_label(path, 8, (128, 128)).max() for path in labels) > 0
    before = {path: path.read_bytes() for path in labels}
    labels[0].unlink()
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"finished": true', '"finished": false'))
    done = run_python("train_wsss.py", "--config", walked_experiment)
    assert done.returncode == 0, done.stderr
    assert {path: path.read_bytes() for path in labels} == before


@pytest.mark.parametrize("walked_experiment", ["rsepm"], indirect=True)
def test_killed_self_teaching_ends_with_the_same_teacher(walked_experiment):
    options = (f"--config={walked_experiment}", "--classifier-only")
    found = []
    for name in ("whole", "killed"):
        run = walked_experiment.parent / name
        command = ("train_wsss.py", *options, f"--run_dir={run}")
        path = run / "wsss/checkpoint.pth"
        if name == "killed":
            process = forked.start(*command)
            while process.poll() is None and not path.exists():  # after two of four iterations
                time.sleep(0.002)
            process.kill()
        assert forked.start(*command).poll(wait=True) == 0
        found.append(load(path))
    for key in ("network", "ema"):
        assert all(torch.equal(v, found[1][key][k]) for k, v in found[0][key].items())
    state = found[0]
    assert any(not torch.equal(v, state["ema"][k]) for k, v in state["network"].items())
