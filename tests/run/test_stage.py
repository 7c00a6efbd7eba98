import os
from dataclasses import replace

import pytest

from core.config import Config
from core.debias import DebiasConfig
from core.pipeline import _defaults, settings_of
from core.run import inputs
from core.run.errors import UserError
from core.run.files import read_json, write_json
from core.run.stage import Identity, Stage, stale_lines


def stage(folder, config=None, tags=("cat", "dog"), classes=("cat", "dog"), files=()):
    config = config or Config()
    read = {"tags": dict(zip("ab", tags, strict=False)), "files": {p.name: p for p in files}}
    settings = settings_of(config, "seed", "debias")
    return Stage(
        folder, "test", config, Identity(classes, settings, read, defaults=_defaults()), ""
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
    del manifest["settings"]["debias.cut"]
    write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(UserError, match="debias.cut: 'auto' there, 'fixed' now"):
        stage(tmp_path, config=Config(debias=DebiasConfig(cut="fixed")))
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


def test_what_an_earlier_stage_made_from_something_else_is_told(tmp_path):
    config = Config(run_dir=str(tmp_path))
    identity = Identity(("cat",), {"seed": 0, "debias.alpha": 0.4}, {"tags": {"a": "cat"}})
    assert not stale_lines(tmp_path, identity, 0)  # nobody has said how the folder was made
    Stage(tmp_path, "test", config, identity, "").finish({})
    assert not stale_lines(tmp_path, identity, 0)
    other_seed = replace(identity, settings={**identity.settings, "seed": 4})
    assert not stale_lines(tmp_path, other_seed, 0)  # the reader's own
    changed = replace(identity, settings={"debias.alpha": 0.5})
    assert stale_lines(tmp_path, changed, 0) == ["debias.alpha: 0.4 there, 0.5 now"]
    (line,) = stale_lines(tmp_path, replace(identity, inputs={"tags": {"a": "dog"}}), 0)
    assert line.endswith("first a: cat there, dog now")


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
    monkeypatch.setattr(inputs, "TICK", -(10**12))  # as if some time had gone by
    stage(tmp_path / "run", files=[label]).finish({})
    monkeypatch.setattr(inputs, "_digest", lambda path: pytest.fail(f"{path} is read again"))
    assert stage(tmp_path / "run", files=[label]).finished


def test_file_written_in_the_tick_in_which_it_was_read_is_read_again(tmp_path):
    label = tmp_path / "a.png"
    label.write_bytes(b"one")
    stage(tmp_path / "run", files=[label]).finish({})
    assert not inputs.known_stamps(tmp_path / "run")["files"]


def test_lost_list_of_inputs_costs_detail_and_nothing_else(tmp_path):
    stage(tmp_path).finish({})
    (tmp_path / "inputs.json").unlink()
    with pytest.raises(UserError, match="tags: another content"):
        stage(tmp_path, tags=("cat", "owl"))
    assert stage(tmp_path).finished


def test_second_process_is_refused_while_the_first_works(tmp_path):
    first = stage(tmp_path)
    with pytest.raises(UserError, match="another process"):
        stage(tmp_path)
    del first
