import dataclasses
import re

import pytest
import yaml
from conftest import ROOT, run_python

from core.config import Config, make_parser, parse
from core.run.errors import UserError


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
    of_tags = path.stem in ("folder", "laptop")  # the user's
    classes = ["--data.classes=[a]"] if of_tags else []
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


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("debias: {alpha: 0.3}\nseed: 1\ndebias: {k_fg: 3}\n", "debias is in lines 1 and 3"),
        ("data:\n  root: a\n  format: voc\n  root: b\n", "data.root is in lines 2 and 4"),
    ],
)
def test_repeated_key_is_refused_with_its_lines(tmp_path, text, told):
    """YAML would take the last one."""
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=told):
        parse(make_parser("test", "test"), ["--config", str(path)])


def test_value_of_the_wrong_type_is_one_message():
    with pytest.raises(SystemExit, match="debias.alpha"):
        parsed("--debias.alpha=many")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data: 3", "data is a section"),
        ("data:\n", "data is a section"),
        ("data: [a]", "data is a section"),
        ("wsss: {crf: high}", "wsss.crf is a section"),
        ("- a", "lines must be `key: value`"),
        ("just text", "lines must be `key: value`"),
    ],
)
def test_value_in_place_of_a_section_is_refused(tmp_path, capsys, text, told):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SystemExit) as error:
        parsed(f"--config={tmp_path / 'a.yaml'}")
    assert told in str(error.value) and "a.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("debias.alpha=0", 0), ("debias.alpha=1.5", 1.5), ("debias.k_fg=0", 0)),
        *(("debias.threshold=0", 0), ("debias.crf.iterations=-1", -1), ("uss.scales=[0]", 0)),
        *(("uss.leopart.drop_path=1", 1), ("wsss.threshold=1", 1), ("wsss.epochs=0", 0)),
        *(("wsss.augment.crop=0", 0), ("wsss.irn.epochs=0", 0), ("segmentation.ema=1", 1)),
        *(("segmentation.crf.srgb_bilateral=0", 0), ("segmentation.warmup=1", 1)),
        *(("segmentation.epochs=0", 0), ("segmentation.head_dropout=[0, 1]", 1)),
    ],
)
def test_value_outside_its_range_is_refused(tmp_path, argument, value):
    key, _, text = argument.partition("=")
    tree = yaml.safe_load(text)
    for name in reversed(key.split(".")):
        tree = {name: tree}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tree))
    for words in (f"--{argument}", f"--config={tmp_path / 'a.yaml'}"):
        with pytest.raises(SystemExit) as error:
            parsed(words)
        message = str(error.value)
        assert message.startswith(f"error: {key}: ") and len(message.splitlines()) == 1
        assert f": {value} does not conform to restriction v" in message


@pytest.mark.parametrize(
    "argument",
    [
        *("--data.biased_classes=[unicorn]", "--segmentation.augment.scale=[2, 1]"),
        "--segmentation.augment.jitter=[0, 0, 0, 1]",
    ],
)
def test_values_that_do_not_fit_together_are_refused(argument):
    key = ".".join(argument.split("=")[0].lstrip("-").split(".")[-2:])
    with pytest.raises(UserError, match=rf"\b{re.escape(key)}:? .*(must|needs|names)"):
        parsed(argument)


@pytest.mark.parametrize("key", ["wsss.scales", "data.classes", "segmentation.rates"])
def test_number_in_place_of_a_list_is_answered_with_how_to_write_one(tmp_path, key):
    section, name = key.split(".")
    (tmp_path / "a.yaml").write_text(f"{section}:\n  {name}: 3\n")
    with pytest.raises((SystemExit, UserError), match=rf"(?s){key}.*'\[a, b\]'"):
        parsed(f"--config={tmp_path / 'a.yaml'}")


def test_class_names_are_text_whatever_yaml_makes_of_them(tmp_path):
    names = ("no", "1", "null", "1e3", "2024-01-01", "a: b")
    (tmp_path / "a.yaml").write_text(
        "data:\n  classes: [no, 1, null, 1e3, 2024-01-01, 'a: b']\n  biased_classes: [null, no]\n"
    )
    data = parsed(f"--config={tmp_path / 'a.yaml'}").data
    assert data.classes == names and data.biased_classes == ("null", "no")
    for words in ("--data.classes=[no, 1, null]", "--data.classes=no,1,null"):
        assert parsed(words).data.classes == names[:3]
    assert parsed("--data.classes", "[no, 1, null]").data.classes == names[:3]


@pytest.mark.parametrize("argument", ["--wsss.epochs=0", "--segmentation.augment.scale=[2,1]"])
def test_script_ends_in_one_message_about_a_value(argument):
    done = run_python("train_segmentation.py", argument)
    assert done.returncode == 1 and not done.stdout and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("error") == 1


@pytest.mark.parametrize("key", ["wsss.scales", "debias.alpha", "data.root"])
def test_empty_value_is_refused(tmp_path, key):
    section, name = key.split(".")
    (tmp_path / "a.yaml").write_text(f"{section}:\n  {name}:\n")
    with pytest.raises(UserError, match=f"{key} is empty"):
        parsed(f"--config={tmp_path / 'a.yaml'}")
    if key == "data.root":
        with pytest.raises(UserError, match=f"{key} is empty"):
            parsed(f"--{key}= ")
    (tmp_path / "a.yaml").write_text("wsss:\n  weights:\n")  # may be null
    assert parsed(f"--config={tmp_path / 'a.yaml'}").wsss.weights is None
