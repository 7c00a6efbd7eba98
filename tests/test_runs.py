import json
import os
from dataclasses import replace

import pytest
import torch

from core.config import Config
from core.debias import DebiasConfig
from core.pipeline import _defaults, settings_of
from core.run import inputs as reading
from core.run.errors import UserError, raise_all, run_script
from core.run.files import atomic_write, read_json, write_json
from core.run.settings import flatten, overlaid, weight_files
from core.run.stage import Identity, Stage, refuse_stale
from core.segmenter import SegmentationConfig


def stage(folder, config=None, tags=("cat", "dog"), classes=("cat", "dog"), files=()):
    config = config or Config()
    inputs = {"tags": dict(zip("ab", tags, strict=False)), "files": {p.name: p for p in files}}
    settings = settings_of(config, "seed", "debias")
    return Stage(
        folder, "test", config, Identity(classes, settings, inputs, defaults=_defaults()), ""
    )


def test_manifest_says_what_was_read_and_how_long_it_took(tmp_path):
    first = stage(tmp_path)
    first.finish({"score": 0.5})
    manifest = read_json(tmp_path / "manifest.json")
    assert manifest["inputs"]["tags"]["count"] == 2 and manifest["finished"]
    assert manifest["settings"]["debias.alpha"] == 0.4 and manifest["classes"] == ["cat", "dog"]
    assert manifest["environment"]["packages"]["torch"]


def test_finished_stage_is_recognised(tmp_path, capsys):
    first = stage(tmp_path)
    first.finish({"score": 0.5})
    del first
    again = stage(tmp_path)
    assert again.already_done() and "finished earlier" in capsys.readouterr().out
    assert again.manifest["results"] == {"score": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": Config(seed=1)}, "seed: 0 there, 1 now"),
        ({"tags": ("cat",)}, "tags: 1 now, 2 there; 0 new and 1 gone, first b"),
        ({"tags": ("cat", "cat")}, "tags: 1 of 2 differ, first b: dog there, cat now"),
        ({"tags": ("cat", "")}, "first b: dog there, none now"),
        ({"classes": ("dog", "cat")}, "classes: label 1 is 'cat' there, 'dog' now"),
        ({"classes": ("cat", "dog", "owl")}, "classes: 2 there, 3 now"),
    ],
)
def test_other_settings_or_inputs_are_refused_and_nothing_is_lost(tmp_path, change, message):
    first = stage(tmp_path)
    first.finish({})
    before = (tmp_path / "manifest.json").read_bytes()
    del first
    with pytest.raises(UserError, match="other settings or inputs") as error:
        stage(tmp_path, **change)
    assert message in str(error.value)
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_setting_newer_than_the_folder_counts_as_its_default(tmp_path):
    stage(tmp_path).finish({})
    manifest = read_json(tmp_path / "manifest.json")
    del manifest["settings"]["debias.scale"]
    write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(UserError, match="debias.scale: 'max' there, 'raw' now"):
        stage(tmp_path, config=Config(debias=DebiasConfig(scale="raw")))
    assert stage(tmp_path).finished


def test_folder_of_a_version_that_noted_no_inputs_is_refused(tmp_path):
    stage(tmp_path).finish({})
    manifest = read_json(tmp_path / "manifest.json")
    del manifest["classes"]
    write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(UserError, match="an earlier version of this code"):
        stage(tmp_path)


def test_stage_that_stopped_before_it_wrote_anything_takes_other_settings(tmp_path):
    stage(tmp_path)
    assert not stage(tmp_path, config=Config(seed=1)).finished
    (tmp_path / "checkpoint.pth").touch()
    with pytest.raises(UserError, match="seed: 1 there, 0 now"):
        stage(tmp_path)


def test_stage_refuses_what_an_earlier_one_made_from_something_else(tmp_path):
    config = Config(run_dir=str(tmp_path))
    identity = Identity(("cat",), {"seed": 0, "debias.alpha": 0.4}, {"tags": {"a": "cat"}})
    refuse_stale(tmp_path, identity, 0, "x.py")  # nobody has said how the folder was made
    Stage(tmp_path, "test", config, identity, "").finish({})
    refuse_stale(tmp_path, identity, 0, "x.py")
    other_seed = replace(identity, settings={**identity.settings, "seed": 4})
    refuse_stale(tmp_path, other_seed, 0, "x.py")  # the reader's own
    changed = replace(identity, settings={"debias.alpha": 0.5})
    with pytest.raises(UserError, match=r"(?s)is stale.*alpha: 0.4 there, 0.5 now.*python x.py"):
        refuse_stale(tmp_path, changed, 0, "x.py")
    with pytest.raises(UserError, match="first a: cat there, dog now"):
        refuse_stale(tmp_path, replace(identity, inputs={"tags": {"a": "dog"}}), 0, "x.py")


def test_file_of_another_content_is_noticed_whatever_its_size(tmp_path):
    label = tmp_path / "a.png"
    label.write_bytes(b"one")
    stage(tmp_path / "run", files=[label]).finish({})
    assert stage(tmp_path / "run", files=[label]).already_done()
    label.write_bytes(b"two")
    with pytest.raises(UserError, match="files: 1 of 1 have another content, first a.png"):
        stage(tmp_path / "run", files=[label])
    label.write_bytes(b"one")
    assert stage(tmp_path / "run", files=[label]).finished


def test_file_that_did_not_change_is_read_once(tmp_path, monkeypatch):
    label = tmp_path / "a.png"
    label.write_bytes(b"one")
    os.utime(label, ns=(0, 0))
    monkeypatch.setattr(reading, "TICK", -(10**12))  # as if some time had gone by
    stage(tmp_path / "run", files=[label]).finish({})
    monkeypatch.setattr(reading, "_digest", lambda path: pytest.fail(f"{path} is read again"))
    assert stage(tmp_path / "run", files=[label]).finished


def test_file_written_in_the_tick_in_which_it_was_read_is_read_again(tmp_path):
    label = tmp_path / "a.png"
    label.write_bytes(b"one")
    stage(tmp_path / "run", files=[label]).finish({})
    assert not reading.known_stamps(tmp_path / "run")["files"]


def test_lost_list_of_inputs_costs_detail_and_nothing_else(tmp_path):
    stage(tmp_path).finish({})
    (tmp_path / "inputs.json").unlink()
    with pytest.raises(UserError, match="tags: another content"):
        stage(tmp_path, tags=("cat", "owl"))
    assert stage(tmp_path).finished


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({}, {"data": {"root": "elsewhere", "masks": "masks"}}),
        ({}, {"uss": {"cache": True}}),
        ({}, {"uss": {"leopart": {"epochs": 3}}}),
        ({"uss": {"method": "frozen"}}, {"uss": {"iterations": 3, "lr": 1e-3}}),
        ({}, {"uss": {"preset": "cityscapes_vitb8", "self_supervised": {"lr": 1.0}}}),
        ({}, {"wsss": {"irn": {"epochs": 5}, "rsepm": {"ema": 0.9}}}),
        ({"wsss": {"method": "seam"}}, {"wsss": {"irn": {"beta": 1.0}, "threshold": 0.5}}),
        ({"wsss": {"object_share": 0.2}}, {"wsss": {"threshold": 0.5}}),
        ({}, {"debias": {"nearest": 3, "gamma": 2.0, "output_dir": "x"}}),
        ({"debias": {"refine": "none"}}, {"debias": {"crf": {"iterations": 1}}}),
        ({"segmentation": {"mode": "wsss"}}, {"segmentation": {"refine": "pamr", "name": "x"}}),
        ({"segmentation": {"network": "deeplabv2"}}, {"segmentation": {"aspp_dim": 9}}),
        ({"evaluation": {"refine": "none"}}, {"evaluation": {"crf": {"iterations": 1}}}),
        ({}, {"workers": 9, "checkpoint_every": 7, "log": "jsonl"}),
    ],
)
def test_settings_without_influence_do_not_count(settings, change):
    before, after = (configured(settings), configured(settings, change))
    assert before != after
    for keys in SECTIONS:
        assert settings_of(before, *keys) == settings_of(after, *keys)


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({}, {"uss": {"iterations": 3}}),
        ({"uss": {"method": "leopart"}}, {"uss": {"leopart": {"epochs": 3}}}),
        ({}, {"uss": {"weight_intra": 0.3}}),
        ({"wsss": {"method": "irn"}}, {"wsss": {"irn": {"epochs": 5}}}),
        ({"wsss": {"method": "seam"}}, {"wsss": {"psa": {"beta": 1.0}}}),
        ({}, {"wsss": {"crf": {"iterations": 5}}}),
        ({"debias": {"distance": "nearest"}}, {"debias": {"nearest": 3}}),
        ({"debias": {"unary": "logistic"}}, {"debias": {"slope": 3.0}}),
        ({}, {"segmentation": {"crf": {"iterations": 5}}}),
        ({}, {"segmentation": {"backbone": {"arguments": {"stem_width": 8}}}}),
        ({}, {"segmentation": {"backbone": {"weights": "none"}}}),
        ({}, {"evaluation": {"scales": [1.0]}}),
        ({}, {"seed": 4}),
    ],
)
def test_settings_with_influence_count(settings, change):
    before, after = (configured(settings), configured(settings, change))
    differ = [settings_of(c, *keys) for keys in SECTIONS for c in (before, after)]
    assert any(a != b for a, b in zip(differ[::2], differ[1::2], strict=True))


SECTIONS = (
    ("seed", "uss"),
    ("seed", "wsss"),
    ("seed", "debias"),
    ("seed", "segmentation"),
    ("evaluation",),
)


def configured(*settings) -> Config:
    """A configuration of nested settings; later ones are laid over earlier ones."""
    flat = {}
    for tree in settings:
        flat |= flatten(tree)
    return overlaid(Config(), flat)


def test_weights_count_by_content_and_only_where_they_are_used(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"w")
    weights = {"backbone": {"weights": str(tmp_path / "w.pth")}}
    config = configured({"uss": weights})
    assert weight_files(config.uss, "uss.") == {"uss.backbone.weights": tmp_path / "w.pth"}
    assert "uss.backbone.weights" not in settings_of(config, "uss")
    config = configured({"wsss": {"irn": {"weights": "nowhere.pth"}}})  # of another method
    assert not weight_files(config.wsss, "wsss.")
    with pytest.raises(UserError, match="wsss.irn.weights: there is no file nowhere.pth"):
        config = configured({"wsss": {"method": "irn", "irn": {"weights": "nowhere.pth"}}})
        weight_files(config.wsss, "wsss.")


def test_network_can_be_rebuilt_from_what_its_checkpoint_says():
    change = {"network": "deeplabv2", "rates": [2, 4], "backbone": {"arguments": {"stem_width": 8}}}
    config = configured({"segmentation": change})
    flat = settings_of(config, "seed", "segmentation")
    again = overlaid(SegmentationConfig(), json.loads(json.dumps(flat)), "segmentation.")
    assert again.rates == (2, 4) and again.backbone.arguments == {"stem_width": 8}
    assert again == replace(config.segmentation)


def test_second_process_is_refused_while_the_first_works(tmp_path):
    first = stage(tmp_path)
    with pytest.raises(UserError, match="another process"):
        stage(tmp_path)
    del first


def test_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyError), atomic_write(path) as tmp:
        tmp.write_text("half")
        raise KeyError
    assert read_json(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_broken_and_missing_json_are_told(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="is missing"):
        read_json(tmp_path / "y.json")


def test_problems_are_counted_and_the_first_are_shown():
    raise_all([], "nothing")
    with pytest.raises(UserError, match=r"(?s)12 problems.*p7.*and 4 more.*mend"):
        raise_all([f"p{k}" for k in range(12)], "mend")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("the lamp is off"), "the lamp is off"),
        (OSError(28, "No space left on device", "/x/y"), "No space left"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (RuntimeError("Too many open files. Communication with the workers is"), "ulimit -n"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "/dev/shm"),
        (RuntimeError("unable to open shared memory object </torch_1>"), "--shm-size"),
        (ConnectionResetError(104, "Connection reset by peer"), "/dev/shm"),
        (MemoryError(), "accumulate"),
        (torch.OutOfMemoryError("CUDA out of memory."), "evaluation.window"),
        (OSError("Caught OSError in a process.\nTraceback:\nOSError: I/O"), "error: OSError: I/O"),
        (UserError("Caught in a process.\ncore.run.errors.UserError: dark"), "^error: dark$"),
        (KeyboardInterrupt(), "resumes from here"),
    ],
)
def test_scripts_end_in_one_message(error, message):
    def main():
        raise error

    with pytest.raises(SystemExit, match=message):
        run_script(main)
