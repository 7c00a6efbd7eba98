"""Class names that are one name, or only look so."""

import pytest
import yaml

from core.config import Config, make_parser, parse
from core.data.names import class_name, look_alikes, nearest, warn_of_names
from core.data.settings import VOC_CLASSES, DataConfig
from core.data.tags import find_images
from core.run import log
from core.run.errors import UserError


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(log, "printed", {})


@pytest.mark.parametrize(
    "text", ["square\u200b", "\ufeffsquare", "squ\u00adare", " square ", "square\u200d"]
)
def test_invisible_characters_are_taken_out(text):
    assert class_name(text) == "square"
    assert bool(log.printed) == (text != " square ")


def test_spaces_and_accents_have_one_form():
    assert class_name("traffic\u00a0 light") == "traffic light"
    assert class_name("Mo\u0308we") == "Möwe"
    assert class_name("می\u200cخواهم") == "می\u200cخواهم"  # part of the word


@pytest.mark.parametrize(
    "group",
    [
        *(["Disc", "disc"], ["dog", "dogs"], ["bus", "buses"], ["city", "cities"]),
        *(["traffic light", "traffic_light", "Traffic-Light"], ["café", "cafe"], ["ｃar", "car"]),
        *(["disc", "di\u0455c"], ["straße", "strasse"]),
    ],
)
def test_names_that_look_alike_are_grouped(group):
    assert look_alikes([*group, "person", "bird"]) == [group]


def test_shipped_classes_do_not_look_alike(pytestconfig):
    for path in (pytestconfig.rootpath / "configs").glob("*.yaml"):
        data = yaml.safe_load(path.read_text()).get("data", {})
        warn_of_names(data.get("classes") or VOC_CLASSES, None)
    assert not log.printed


def test_warning_names_the_classes_and_counts(capsys):
    warn_of_names(["Disc", "background", "disc"], {"Disc": 1, "background": 2, "disc": 12})
    said = capsys.readouterr().err
    assert "warning: the classes 'Disc' (1 in all) and 'disc' (12 in all) look alike" in said
    assert "'background' is a class" in said and said.count("warning: ") == 2


def test_classes_that_are_several_tags_are_warned_of(capsys):
    warn_of_names(["dog", "face", "face dog", "hot dog"])
    said = capsys.readouterr().err
    assert "the words of 'face dog' are themselves classes" in said and said.count("warning: ") == 1


def test_classes_from_tags_are_warned_of_once(tmp_path, capsys):
    for name in ("Square/a.jpg", "square/b.jpg", "square\u200b/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    data = DataConfig(format="folder", root=str(tmp_path))
    assert data.with_classes().classes == data.with_classes().classes == ("Square", "square")
    assert find_images(tmp_path)["square\u200b/c.jpg"] == ["square"]
    assert capsys.readouterr().err.count("look alike") == 1


def test_nearest_name_is_the_one_that_looks_alike():
    assert nearest("Disc", ["square", "disc"]) == "disc" and nearest("ring", ["disc"]) is None


def parsed(*arguments: str) -> Config:
    return parse(make_parser("test", "test"), list(arguments))[0]


NAMES = ("no", "1", "null", "2020-01-01", "1e3", "012", "off", "dog")


@pytest.mark.parametrize(
    "text",
    [
        "data:\n  classes: [no, 1, null, 2020-01-01, 1e3, 012, off, dog]\n",
        "data:\n  classes:\n  - no # not any\n"
        "  - 1\n  - null\n  - 2020-01-01\n  - 1e3\n  - 012\n  - off\n  - 'dog'\nseed: 1\n",
        "data: {classes: 'no, 1, null, 2020-01-01, 1e3, 012, off, dog'}\n",
        "data:\n  classes: |\n    no\n    1\n    null\n    2020-01-01\n    1e3\n    012\n    off\n"
        "    dog\nseed: 1\n",
        '{"data": {"classes": ["no", "1", "null", "2020-01-01", "1e3", "012", "off", "dog"]}}',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_class_names_in_yaml_are_text(tmp_path, text, encoding):
    (tmp_path / "a.yaml").write_bytes(text.encode(encoding))
    assert parsed(f"--config={tmp_path / 'a.yaml'}").data.classes == NAMES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data:\n  classes: {1: no}\n",
            "line 2: data.classes must be a list; a list is written",
        ),
        ("data:\n  classes: 7\n", "line 2: data.classes must be a list"),
        ("data:\n  classes: [no, '']\n", "data.classes has an empty name"),
        ("data:\n  classes:\n  - no\n  -\n", "line 4: data.classes has an empty name"),
    ],
)
def test_what_is_no_list_of_names_is_refused(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        parsed(f"--config={tmp_path / 'a.yaml'}")


@pytest.mark.parametrize("text", ["no,yes", "[no, yes]", '["no", "yes"]', "no, yes,"])
@pytest.mark.parametrize("apart", [True, False])
def test_class_names_on_the_command_line_are_a_list(text, apart):
    option = ["--data.classes", text] if apart else [f"--data.classes={text}"]
    assert parsed(*option).data.classes == ("no", "yes")


@pytest.mark.parametrize("option", [["--uss.scales", "1,2"], ["--data.classes", "[no,", "yes]"]])
def test_message_says_how_a_list_is_written(option):
    with pytest.raises(SystemExit, match=r"between quotes: '\[a, b\]'"):
        parsed(*option)


def test_biased_classes_are_compared_with_those_of_the_tags(tmp_path):
    for name in ("disc/a.jpg", "square/b.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    data = ("--data.format=folder", f"--data.root={tmp_path}", "--run_dir=elsewhere")
    assert parsed(*data, "--data.biased_classes=disc").data.biased_classes == ("disc",)
    with pytest.raises(UserError, match=r"names \['dog'\], which data.classes lacks"):
        parsed(*data, "--data.biased_classes=dog")
