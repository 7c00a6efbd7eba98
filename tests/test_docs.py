"""README and docs name what exists: files, links, headings, settings, options, configurations."""

import ast
import dataclasses
import functools
import re
from pathlib import Path

import pytest
from conftest import ROOT

from core.config import KEYS, Config

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("data/*/README.md")])
SCRIPTS = [
    path
    for pattern in ("*.py", "tools/**/*.py", "tools/*.sh", "tests/faults/*.py")
    for path in ROOT.glob(pattern)
]
FOREIGN = {"logdir", "nproc_per_node", "shm-size"}  # of tensorboard, torchrun and docker
SUFFIXES = "py|sh|yaml|ipynb|toml|txt|safetensors"
PLACES = "core|tools|configs|docs|notebooks|tests|data/demo"


SECTIONS = {f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)}


def known(key: str) -> bool:
    """Whether a key exists; an architecture's own arguments are free."""
    return key in KEYS or ".arguments." in key


def anchors(page: Path) -> set[str]:
    """Headings as GitHub links to them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def broken_links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (heading and heading not in anchors(target)):
            broken.append(link)
    return broken


def unknown_settings(text: str) -> list[str]:
    """Dotted settings, in backticks or as options, that core.config lacks."""
    spans = re.findall(r"`([^`\n]+)`", text)
    named = [m for s in spans for m in re.findall(r"^([a-z]\w*(?:\.\w+)+)\b(?!/)", s)]
    options = re.findall(r"--([a-z]\w*(?:\.\w+)+)", text)
    ours = {key for key in named if key.split(".")[0] in SECTIONS} | {*options}
    ours = {key for key in ours if not key.endswith(tuple(f".{s}" for s in SUFFIXES.split("|")))}
    return sorted(key for key in ours if not known(key))


def missing_files(text: str) -> list[str]:
    """Paths of the repository, and scripts that a command runs, that are not there."""
    named = re.findall(rf"(?<![\w/.])((?:{PLACES})/[\w/.-]*\.(?:{SUFFIXES}))\b", text)
    run = re.findall(r"(?:python|bash) ((?:tools/)?(?:\w+/)?\w+\.(?:py|sh))\b", text)
    return sorted({path for path in [*named, *run] if not (ROOT / path).exists()})


@functools.cache
def options_of(script: Path) -> set[str]:
    """Options that a script declares; a shell script's are its own and those of what it runs."""
    text = script.read_text()
    if script.suffix == ".sh":
        names = re.findall(r"(?<![\w/.])[\w/\[\]*-]+\.(?:py|sh)", text)
        run = {path for name in names for path in ROOT.glob(name.lstrip("/"))} - {script}
        found = {*re.findall(r"--([a-z][\w-]+)\)", text)}
        return found.union(*(options_of(path) for path in run))
    calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
    calls = [c for c in calls if getattr(c.func, "attr", "") in ("add_argument", "addoption")]
    words = [a.value for c in calls for a in c.args if isinstance(a, ast.Constant)]
    found = {word[2:] for word in words if str(word).startswith("--")} | {"help"}
    return found | ({*KEYS, "config"} if "make_parser(" in text else set())


def unknown_options(text: str) -> list[str]:
    """Options that the script of a command lacks, and others that nothing knows."""
    option = r"(?<![\w-])--([a-z][\w-]+)(?![\w.-])"
    text = re.sub(r"\\\n\s*", "", text)
    command = r"((?:tools/(?:\w+/)?|tests/faults/)?\w+\.(?:py|sh)) ([^`\n|;&#]*)"
    unknown = set()
    for name, rest in re.findall(command, text):
        if (ROOT / name).is_file():
            unknown |= {*re.findall(option, rest)} - options_of(ROOT / name)
    every = set().union(FOREIGN, KEYS, *map(options_of, SCRIPTS))
    return sorted(unknown | ({*re.findall(option, text)} - every))


def test_tools_that_code_and_messages_name_exist():
    invented = {"tools/none.py", "tools/some.py"}  # of tests
    folders = ("", ".github/**/", "configs/", "core/**/", "docs/", "tests/**/", "tools/**/")
    paths = [p for folder in folders for p in ROOT.glob(f"{folder}*.*")]
    paths = [p for p in paths if p.suffix in (".py", ".sh", ".md", ".yaml", ".yml", ".toml")]
    assert len(paths) > 200
    for path in paths:
        tools = {n for n in missing_files(path.read_text()) if n.startswith("tools/")}
        assert not tools - invented, path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_page_names_what_exists(page):
    text = page.read_text()
    assert not broken_links(page)
    assert not unknown_settings(text)
    assert not missing_files(text)
    assert not unknown_options(text)


def test_what_does_not_exist_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A (b), c\n[x](nothing.md) [y](page.md#a-b-c) [z](page.md#d)\n")
    assert broken_links(page) == ["nothing.md", "page.md#d"]
    text = "`wsss.treshold` `wsss.threshold: 0.3` `wsss/labels` --debias.alfa 1 --debias.alpha 1"
    assert unknown_settings(text) == ["debias.alfa", "wsss.treshold"]
    text = "`tools/none.py`, python train_none.py, `tools/run_all.sh`, `core/debias.py`"
    assert missing_files(text) == ["tools/none.py", "train_none.py"]
    assert unknown_options("--allow-missing --alow-missing") == ["alow-missing"]
    text = (
        "`python train_uss.py --config x --corpus` `bash tools/demo.sh --quick --supervised-masks`"
    )
    assert unknown_options(text) == ["corpus", "supervised-masks"]


def test_every_configuration_has_a_card():
    cards = (ROOT / "docs/configs.md").read_text()
    every = {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert every == {*re.findall(r"configs/\w+\.yaml", cards)}


def test_every_stage_has_a_section():
    text = (ROOT / "docs/stages.md").read_text()
    stages = [path.name for path in ROOT.glob("*.py")]
    assert len(stages) == 5
    assert all(re.search(rf"^## \d\. .*`{name}`$", text, re.M) for name in stages)


def test_every_page_and_notebook_is_linked_from_the_readme():
    linked = {*re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text())}
    every = [*ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.ipynb")]
    assert not {str(path.relative_to(ROOT)) for path in every} - linked


def test_pictures_are_small_and_used():
    text = "".join(page.read_text() for page in PAGES)
    pictures = [*(ROOT / "docs").glob("*.png")]
    assert sum(path.stat().st_size for path in pictures) < 700_000
    assert all(f"{path.name})" in text for path in pictures)


def lines_of(path: Path) -> set[str]:
    lines = (line.strip() for line in path.read_text().splitlines())
    return {line for line in lines if line and not line.startswith("#")}


def test_an_image_of_docker_holds_nothing_that_git_ignores():
    """Data sets of many gigabytes, weights and results would be sent to Docker otherwise."""
    patterns = {line.strip("/") for line in lines_of(ROOT / ".gitignore")}
    wanted = {p if "/" in p else f"**/{p}" for p in patterns}
    assert wanted <= lines_of(ROOT / ".dockerignore")
