import pytest

from core.run.errors import UserError
from core.run.files import atomic_write, read_json, write_json


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


def test_a_folder_where_a_file_is_written_is_told_and_kept(tmp_path):
    (tmp_path / "scores.json").mkdir()
    with pytest.raises(UserError, match=r"scores\.json is a folder"):
        write_json(tmp_path / "scores.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["scores.json"]
