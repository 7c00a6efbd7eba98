"""Imports go one way: floors of rooms, no arrow upwards, no circle."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

FLOORS = (
    ("core.run",),
    ("core.data",),
    ("core.models",),
    ("core.crf",),
    ("core.inference", "core.metrics", "core.pictures"),
    ("core.debias", "core.cut", "core.complement"),
    ("core.segmenter", "core.uss", "core.wsss"),
    ("core.config",),
    ("core.pipeline",),
    ("scripts",),
    ("tools",),
)
"""From the ground up. A module may import from its own floor and from floors below it."""


def modules(root: Path) -> dict[str, Path]:
    """Every module of core, the scripts and the tools, by dotted name."""
    found = {}
    for path in (*root.glob("*.py"), *root.glob("core/**/*.py"), *root.glob("tools/**/*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The project's modules that a file imports anywhere, inside functions, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & {*known}


def floor(name: str) -> int | None:
    """The floor of a module; None where it belongs to no room."""
    if "." not in name and name not in ("core", "tools"):
        name = "scripts"
    rooms = [(room, k) for k, floor in enumerate(FLOORS) for room in floor]
    return next((k for room, k in rooms if f"{name}.".startswith(f"{room}.")), None)


def problems(root: Path) -> list[str]:
    """Modules without a room, arrows upwards, and circles."""
    known = modules(root)
    arrows = {name: imports(path, known) for name, path in known.items()}
    found = [f"{name} is in no room" for name in known if floor(name) is None and name != "core"]
    lazily = ("evaluate", "tools.submit_voc")  # a thin call by choice
    for name, targets in arrows.items():
        here = floor(name)
        for target in targets:
            there = floor(target)
            if None not in (here, there) and there > here and (name, target) != lazily:
                found.append(f"{name} imports {target}, which is above it")
    return found + circles({n: t for n, t in arrows.items() if n.startswith("core")})


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves by way of others."""
    left = dict(arrows)
    while True:
        free = [n for n, targets in left.items() if not (targets & {*left}) - {n}]
        if not free:
            return [f"in a circle: {', '.join(sorted(left))}"] if left else []
        for name in free:
            del left[name]


def test_imports_go_one_way():
    assert not problems(ROOT)


@pytest.fixture
def house(tmp_path) -> Path:
    """A small copy of the rooms."""
    for name, text in {
        "core/run/files.py": "",
        "core/data/lists.py": "from core.run.files import x\n",
        "core/wsss/cam.py": "from core.data import lists\n",
        "core/config.py": "from core.wsss.cam import y\n",
        "train.py": "from core.config import z\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert not problems(tmp_path)
    return tmp_path


def test_planted_upward_arrow_is_found(house):
    (house / "core/run/files.py").write_text("def f():\n    from core.data import lists\n")
    assert "core.run.files imports core.data.lists, which is above it" in problems(house)


def test_planted_circle_is_found(house):
    (house / "core/data/tags.py").write_text("from core.data.lists import x\n")
    (house / "core/data/lists.py").write_text("from core.data.tags import x\n")
    assert problems(house) == [
        "in a circle: " + "core.config, core.data.lists, core.data.tags, core.wsss.cam"
    ]


def test_new_module_without_a_room_is_found(house):
    (house / "core/news.py").write_text("")
    assert problems(house) == ["core.news is in no room"]


def names_of(tree: ast.Module) -> set[str]:
    """What a module defines or imports at its top, inside `if` and `try`, too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(a.asname or a.name).partition(".")[0] for a in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def test_every_name_that_a_file_imports_from_the_project_exists():
    known = modules(ROOT)
    defined = {name: names_of(ast.parse(path.read_text())) for name, path in known.items()}
    missing = []
    for path in (*known.values(), *ROOT.glob("tests/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in known:
                there = defined[node.module]
                if "__getattr__" in there:  # imports on demand
                    continue
                wanted = {a.name for a in node.names if f"{node.module}.{a.name}" not in known}
                missing += [f"{path.name}: {node.module}.{name}" for name in wanted - there]
    assert not missing
