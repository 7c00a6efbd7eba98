"""What --help shows, and the answers to a key that does not exist."""

import pytest
from conftest import run_python

SECTIONS = {
    "train_uss.py": {"uss"},
    "train_wsss.py": {"wsss"},
    "make_debiased_labels.py": {"uss", "wsss", "debias"},
    "train_segmentation.py": {"segmentation"},
    "evaluate.py": {"segmentation", "evaluation"},
}


def help_of(script: str, *arguments) -> dict[str, str]:
    """Settings that --help lists, and their values."""
    done = run_python(script, *arguments, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {script}"), done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 300 and max(map(len, lines)) <= 100
    listed = [line.split(maxsplit=1) for line in lines if line.startswith("  --")]
    return {key.removeprefix("--"): rest for key, rest in (x for x in listed if len(x) == 2)}


@pytest.mark.parametrize("script", SECTIONS)
def test_help_is_short_and_shows_what_the_script_uses(script):
    shown = help_of(script)
    assert {"run_dir", "seed", "data.root", "data.classes"} <= {*shown}
    sections = {key.split(".")[0] for key in shown if "." in key} - {"data"}
    assert sections == SECTIONS[script]


def test_help_shows_keys_of_the_chosen_method_with_their_values():
    seam = help_of("train_wsss.py", "--wsss.method", "seam", "--wsss.psa.radius=7")
    assert seam["wsss.method"].startswith('"seam"') and seam["wsss.psa.radius"].startswith("7 ")
    assert "the heads have" in seam["wsss.psa.lr"]  # not what other networks of pairs say
    assert "wsss.seam.second_scale" in seam and "wsss.pooling" not in seam
    assert not [key for key in seam if key.startswith(("wsss.irn.", "wsss.rsepm.", "wsss.crf."))]
    cam = help_of("train_wsss.py")
    assert "wsss.threshold" in cam and "wsss.crf.iterations" in cam
    assert not [key for key in cam if key.startswith(("wsss.psa.", "wsss.irn.", "wsss.seam."))]


def test_help_reads_the_configuration():
    shown = help_of("train_segmentation.py", "--config=configs/demo.yaml")
    assert shown["segmentation.ema"].startswith("0.99 ") and "boat" in shown["data.classes"]


def test_help_explains_the_script_s_own_options():
    shown = help_of("evaluate.py")
    assert shown["split"].startswith("train or val")
    assert {"predictions", "masks", "num_classes", "submission", "allow-missing"} <= {*shown}


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("wsss.treshold", "did you mean `wsss.threshold`?"),
        ("debias.alhpa", "did you mean `debias.alpha`?"),
        ("uss.stage", "it is `uss.backbone_stage` now"),
        ("wsss.fixed_layers", "it is `wsss.frozen_stages` now"),
    ],
)
def test_key_that_does_not_exist_is_answered_with_one_that_does(tmp_path, key, answer):
    (tmp_path / "x.yaml").write_text("{}: {{{}: 3}}\n".format(*key.split(".")))
    for arguments in ([f"--{key}=3"], [f"--{key}", "3"], ["--config", tmp_path / "x.yaml"]):
        done = run_python("train_wsss.py", *arguments)
        assert done.returncode == 1 and not done.stdout
        assert done.stderr.startswith(f"error: there is no setting `{key}`; {answer}")
        assert len(done.stderr.splitlines()) == 1


def test_settings_are_read_without_numba():
    """It takes a moment to import, and may be absent where pydensecrf is used."""
    code = "import sys, core.config; sys.exit('numba' in sys.modules)"
    assert run_python("-c", code).returncode == 0
