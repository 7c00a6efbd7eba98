"""Archives whose damage the standard library meets with errors of other kinds."""

import io
import tarfile
import zipfile

import pytest

from core.run.errors import UserError
from tools.data.archives import unpack
from tools.submit_voc import check_submission


def zipped(name: str) -> bytes:
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr(name, b"content")
        return buffer.getvalue()


@pytest.mark.parametrize("which", [0, 1], ids=["local", "central"])
def test_name_that_is_no_text_is_damage(tmp_path, which):
    content = bytearray(zipped("fotograf\u00edas.jpg"))  # not ASCII, so marked as UTF-8
    place = content.index("\u00ed".encode())
    if which:
        place = content.index("\u00ed".encode(), place + 1)
    content[place] = 0xFF
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(UserError, match="a.zip is damaged"):
        unpack(tmp_path / "a.zip", tmp_path / "out", lambda name: name)


def test_length_beyond_all_numbers_is_damage(tmp_path):
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as file:
            file.addfile(tarfile.TarInfo("\u00ed" * 60))  # its name stands in a record
        content = buffer.getvalue()
    place = content.index(b" path=")
    start = content.rindex(b"\0", 0, place) + 1
    digits = b"9" * 30
    content = content[:start] + digits + content[start + len(digits) :]
    (tmp_path / "a.tar").write_bytes(content[:start] + digits + b" path=" + content[place + 30 :])
    with pytest.raises(UserError, match="a.tar is damaged"):
        check_submission(tmp_path / "a.tar", "comp6_test_cls", ["a"])
