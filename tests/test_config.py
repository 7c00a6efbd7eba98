import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from core.config import Config, make_parser, parse
from core.run.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def differences(written: dict, found: dict, prefix: str = "") -> list[str]:
    """Keys of a file whose values are not those of the settings made from it."""
    keys = []
    for key, value in written.items():
        if isinstance(value, dict):
            keys += differences(value, found[key], f"{prefix}{key}.")
        elif isinstance(value, list):
            keys += [prefix + key] if value != [*found[key]] else []
        elif value != found[key] and not (isinstance(value, str) and float(value) == found[key]):
            keys.append(prefix + key)  # YAML reads 1e-4 as text
    return keys


def parsed(*arguments: str) -> Config:
    return parse(make_parser("test", "test"), list(arguments))[0]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configurations_are_valid(path):
    classes = ["--data.classes=[a]"] if path.stem == "folder" else []  # those of the user's tags
    config = parsed(f"--config={path}", *classes)
    written, found = yaml.safe_load(path.read_text()), dataclasses.asdict(config)
    assert not differences(written, found)


def test_command_line_overrides_the_file():
    config = parsed(f"--config={ROOT / 'configs/demo.yaml'}", "--debias.alpha=0.2")
    assert config.debias.alpha == 0.2 and config.data.classes[0] == "boat"


def test_paper_values_are_the_defaults():
    debias = parsed().debias
    assert (debias.k_fg, debias.k_bg, debias.alpha, debias.distance) == (2, 2, 0.40, "mean")


def test_typo_is_answered_with_the_nearest_key(tmp_path):
    with pytest.raises(SystemExit, match="debias.alpha"):
        parsed("--debias.alhpa=0.2")
    (tmp_path / "x.yaml").write_text("debias: {k_fgg: 3}\n")
    with pytest.raises(SystemExit, match="debias.k_fg"):
        parsed(f"--config={tmp_path / 'x.yaml'}")


def test_value_of_the_wrong_type_is_one_message():
    with pytest.raises(SystemExit, match="debias.alpha"):
        parsed("--debias.alpha=many")


@pytest.mark.parametrize(
    "argument",
    [
        *("--debias.alpha=0", "--debias.alpha=1.5", "--debias.k_fg=0", "--wsss.threshold=1"),
        *("--segmentation.ema=1", "--data.biased_classes=[unicorn]"),
        *("--uss.scales=[0]", "--segmentation.warmup=1", "--debias.threshold=0"),
        *("--debias.crf.iterations=-1", "--segmentation.crf.srgb_bilateral=0"),
        *("--segmentation.augment.scale=[2, 1]", "--wsss.augment.crop=0", "--wsss.epochs=0"),
        *("--segmentation.augment.jitter=[0, 0, 0, 1]", "--segmentation.head_dropout=[0, 1]"),
        *("--segmentation.epochs=0", "--wsss.irn.epochs=0", "--uss.leopart.drop_path=1"),
    ],
)
def test_value_outside_its_range_is_refused(argument):
    key = ".".join(argument.split("=")[0].lstrip("-").split(".")[-2:])
    with pytest.raises((SystemExit, UserError)) as error:
        parsed(argument)
    text = str(error.value)
    assert re.search(
        rf"\b{re.escape(key)}\b.*(must|needs|names|at least|at most|above|restriction)", text, re.S
    )
    assert "Traceback" not in text and len(text) < 300


@pytest.mark.parametrize("key", ["wsss.scales", "debias.alpha", "data.root"])
def test_empty_value_is_refused(tmp_path, key):
    section, name = key.split(".")
    (tmp_path / "a.yaml").write_text(f"{section}:\n  {name}:\n")
    with pytest.raises(UserError, match=f"{key} is empty"):
        parsed(f"--config={tmp_path / 'a.yaml'}")
    (tmp_path / "a.yaml").write_text("wsss:\n  weights:\n")  # may be null
    assert parsed(f"--config={tmp_path / 'a.yaml'}").wsss.weights is None
