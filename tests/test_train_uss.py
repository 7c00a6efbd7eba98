"""Stage 1 with STEGO."""

import json
from pathlib import Path

import numpy as np
import torch
import yaml
from conftest import run_python

from core.models.backbones import BackboneConfig
from core.run import checkpoint
from core.uss.features import SemanticFeatures, UssConfig


def test_stego_on_five_crops_reports_its_health(experiment):
    done = run_python("train_uss.py", "--config", experiment, "--uss.five_crops=true")
    assert done.returncode == 0, done.stderr
    assert "of random pairs near 0" in done.stdout
    folder = experiment.parent / "run/uss/stego"
    neighbours = np.load(folder / "neighbours.npy")
    assert neighbours.shape == (80, 3) and (neighbours != np.arange(80)[:, None]).all()
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    assert {"intra", "inter", "negative", "probe", "positives_spread"} <= set(last)
    assert 0 <= last["negatives_at_zero"] <= 1 and -1 <= last["probe"] <= 1


def test_monitor_does_not_change_the_codes(experiment):
    heads = []
    for clusters in (0, 5):
        run_dir = experiment.parent / f"run{clusters}"
        options = (f"--run_dir={run_dir}", f"--uss.probe_clusters={clusters}", "--uss.dropout=0")
        done = run_python("train_uss.py", "--config", experiment, *options)
        assert done.returncode == 0, done.stderr
        heads.append(checkpoint.load(run_dir / "uss/checkpoint.pth")["network"])
    assert all(torch.equal(heads[0][k], heads[1][k]) for k in heads[0] if k.startswith("head."))


def test_released_checkpoint_is_used_instead_of_training(experiment):
    settings = yaml.safe_load(experiment.read_text())["uss"]
    config = UssConfig(backbone=BackboneConfig(**settings["backbone"]), code_dim=8)
    network = SemanticFeatures(config)
    names = {"backbone.net.": "net.model.", "head.": "net."}
    state = {}
    for key, value in network.state_dict().items():
        for ours, theirs in names.items():
            if key.startswith(ours):
                state[theirs + key.removeprefix(ours)] = value
    weights = experiment.parent / "released.ckpt"
    torch.save({"state_dict": state, "hyper_parameters": {"lr": 1}}, weights)
    done = run_python("train_uss.py", "--config", experiment, f"--uss.weights={weights}")
    assert done.returncode == 0, done.stderr
    saved = checkpoint.load(experiment.parent / "run/uss/checkpoint.pth")["network"]
    assert all(torch.equal(saved[k], v) for k, v in network.state_dict().items() if k != "mean")
    assert not (experiment.parent / "run/uss/stego").exists()


def test_single_image_has_no_pairs_for_stego(experiment):
    config = yaml.safe_load(experiment.read_text())
    lists = Path(config["data"]["root"]) / "ImageSets/Segmentation"
    (lists / "one.txt").write_text((lists / "train.txt").read_text().splitlines()[0])
    done = run_python("train_uss.py", "--config", experiment, "--data.train_list=one")
    assert done.returncode == 1 and "the training list has one; add images" in done.stderr
    options = ("--data.train_list=one", "--uss.five_crops=true")  # five squares, which differ
    done = run_python("train_uss.py", "--config", experiment, *options)
    assert done.returncode == 0, done.stderr
