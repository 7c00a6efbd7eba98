"""Every tool finds the clone from its own place, and every command of a shell script exists."""

import re

import pytest
from conftest import ROOT, run_python

TOOLS = [p for p in sorted((ROOT / "tools").rglob("*.py")) if "if __name__ ==" in p.read_text()]


@pytest.mark.parametrize("path", TOOLS, ids=lambda p: p.name)
def test_tool_puts_the_clone_into_its_path(path):
    depth = len(path.relative_to(ROOT).parts) - 1
    line = f"sys.path.insert(0, str(Path(__file__).resolve().parents[{depth}]))\n"
    assert line in path.read_text()


def test_tools_start_from_any_folder(tmp_path):
    for name in ("data/prepare_voc.py", "submit_voc.py"):
        done = run_python(ROOT / "tools" / name, "--help", cwd=tmp_path)
        assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.sh")), ids=lambda p: p.name)
def test_shell_script_runs_what_exists(path):
    named = re.findall(r"(?<![\w/.-])(?:tools/)?(?:\w+/)?\w+\.(?:py|sh)\b", path.read_text())
    assert not [name for name in named if not (ROOT / name).is_file()]
