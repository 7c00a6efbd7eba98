import pytest
import torch

from core.config import Config, DataConfig
from core.errors import UserError, refuse_together, run_script
from core.files import read_json, write_json, written_whole
from core.runs import Stage, check_upstream


def stage(folder, config=None, ids=("a", "b")):
    return Stage(folder, "test", config or Config(), ("seed", "data"), {"ids": ids})


def test_manifest_says_what_was_read_and_how_long_it_took(tmp_path):
    first = stage(tmp_path)
    first.finish({"score": 0.5})
    manifest = read_json(tmp_path / "manifest.json")
    assert manifest["inputs"]["ids"]["count"] == 2 and manifest["finished"]
    assert manifest["settings"]["data.root"] == Config().data.root
    assert manifest["environment"]["packages"]["torch"]


def test_finished_stage_is_recognised(tmp_path, capsys):
    first = stage(tmp_path)
    first.finish({"score": 0.5})
    del first
    again = stage(tmp_path)
    assert again.already_done() and "finished earlier" in capsys.readouterr().out
    assert again.manifest["results"] == {"score": 0.5}


@pytest.mark.parametrize("change", [{"config": Config(seed=1)}, {"ids": ("a",)}])
def test_other_settings_or_inputs_are_refused_and_nothing_is_lost(tmp_path, change):
    first = stage(tmp_path)
    first.finish({})
    before = (tmp_path / "manifest.json").read_bytes()
    del first
    with pytest.raises(UserError, match="other settings or inputs"):
        stage(tmp_path, **change)
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_setting_newer_than_the_folder_counts_as_its_default(tmp_path):
    stage(tmp_path).finish({})
    manifest = read_json(tmp_path / "manifest.json")
    del manifest["settings"]["data.on_bad_image"]
    write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(UserError, match="data.on_bad_image: 'stop' there, 'skip' now"):
        stage(tmp_path, config=Config(data=DataConfig(on_bad_image="skip")))
    assert stage(tmp_path).finished


def test_stage_that_stopped_before_it_wrote_anything_takes_other_settings(tmp_path):
    stage(tmp_path)
    assert not stage(tmp_path, config=Config(seed=1)).finished
    (tmp_path / "checkpoint.pth").touch()
    with pytest.raises(UserError, match="seed: 1 there, 0 now"):
        stage(tmp_path)


def test_stage_refuses_what_an_earlier_one_made_with_other_settings(tmp_path):
    config = Config(run_dir=str(tmp_path))
    check_upstream(tmp_path, "data", config)  # nobody has said how the folder was made
    stage(tmp_path, config).finish({})
    check_upstream(tmp_path, "data", config)
    config.seed, config.data.masks = 4, "masks"  # not of this section; for scores alone
    check_upstream(tmp_path, "data", config)
    config.data.train_list = "other"
    with pytest.raises(UserError, match="data.train_list: None there, 'other' now"):
        check_upstream(tmp_path, "data", config)


def test_masks_may_come_later(tmp_path):
    stage(tmp_path).finish({})
    data = DataConfig(masks="masks", val_list="mine", biased_classes=("boat",))
    assert stage(tmp_path, config=Config(data=data)).finished


def test_label_maps_of_another_content_are_noticed(tmp_path):
    label = tmp_path / "a.png"
    label.write_bytes(b"one")
    inputs = {"labels": (label,)}
    Stage(tmp_path / "run", "test", Config(), ("seed",), inputs).finish({})
    assert Stage(tmp_path / "run", "test", Config(), ("seed",), inputs).already_done()
    label.write_bytes(b"two")
    with pytest.raises(UserError, match="input: labels"):
        Stage(tmp_path / "run", "test", Config(), ("seed",), inputs)


def test_second_process_is_refused_while_the_first_works(tmp_path):
    first = stage(tmp_path)
    with pytest.raises(UserError, match="another process"):
        stage(tmp_path)
    del first


def test_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyError), written_whole(path) as aside:
        aside.write_text("half")
        raise KeyError
    assert read_json(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_broken_and_missing_json_are_told(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="is missing"):
        read_json(tmp_path / "y.json")


def test_problems_are_counted_and_the_first_are_shown():
    refuse_together([], "nothing")
    with pytest.raises(UserError, match=r"(?s)12 problems.*p7.*and 4 more.*mend"):
        refuse_together([f"p{k}" for k in range(12)], "mend")


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
        (UserError("Caught in a process.\ncore.errors.UserError: dark"), "^error: dark$"),
        (KeyboardInterrupt(), "goes on from here"),
    ],
)
def test_scripts_end_in_one_message(error, message):
    def main():
        raise error

    with pytest.raises(SystemExit, match=message):
        run_script(main)


def test_errors_of_the_code_keep_their_traceback_for_developers():
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_script(main)
