"""Text files in the encodings that people's programs write."""

import pytest

from core.data.lists import read_list
from core.run.errors import UserError
from core.run.files import read_text

TEXT = "Möwe\nKüste 日本\n"


@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le-mark", "utf-16-be-mark"],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_is_read_in_any_encoding_with_a_mark(tmp_path, encoding, end):
    content = TEXT.replace("\n", end)
    if encoding.endswith("-mark"):
        content, encoding = "\ufeff" + content, encoding.removesuffix("-mark")
    (tmp_path / "a.txt").write_bytes(content.encode(encoding))
    assert read_text(tmp_path / "a.txt", "the list") == TEXT
    assert read_list(tmp_path / "a.txt", "") == TEXT.split("\n")[:2]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_seen_by_its_zero_bytes(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("2007_01\n2007_02\n".encode(encoding))
    assert read_list(tmp_path / "a.txt", "") == ["2007_01", "2007_02"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nKüste\n".encode("cp1252"), "neither UTF-8 nor UTF-16, in line 2.*save it as UTF-8"),
        (b"\xff\xfea", "neither UTF-8 nor UTF-16"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "neither UTF-8"),
        (b"PK\3\4\0\0\0\0abc\0", "is not text"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"the list .*a.txt is .*{message}|{message}") as caught:
        read_text(tmp_path / "a.txt", "the list")
    assert "a.txt" in str(caught.value)


def test_folder_instead_of_a_file_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_text(tmp_path, "the list")
