"""The settings of one experiment, read from one YAML file and the command line.

All five scripts read the same file, and every key can be overridden as `--section.key value`. Each
method's settings are at the top of its own file; this one combines and parses them. Sources:
"Sec." and "Eq." are the MARS paper's (ICCV 2023); "default" marks a choice of ours where the paper
is silent. The default of a new key must do what the code did before, because older results count as
made with that default (core/run/stage.py).
"""

import dataclasses
import difflib
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_args

import jsonargparse
import yaml

from core.data.settings import DataConfig
from core.debias import DebiasConfig
from core.run.errors import UserError, report_in
from core.run.files import is_utf8, read_text, user_path
from core.run.settings import Runtime, check, comments, flatten, keys_in_use, settings_below
from core.segmenter import EvaluationConfig, SegmentationConfig
from core.uss.features import UssConfig
from core.wsss.settings import WsssConfig


@dataclass
class Config(Runtime):
    """Settings of the whole experiment."""

    data: DataConfig = field(default_factory=DataConfig)  # Data set.
    uss: UssConfig = field(default_factory=UssConfig)  # Stage 1.
    wsss: WsssConfig = field(default_factory=WsssConfig)  # Stage 2.
    debias: DebiasConfig = field(default_factory=DebiasConfig)  # Stage 3.
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)  # Stage 4.
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)  # Stage 5.

    def __post_init__(self):
        for key, folder in (("run_dir", self.run_dir), ("data.root", self.data.root)):
            check(folder.strip() != "", f"{key} is empty; name a folder")
        folders = (self.run_dir, self.wsss.labels_dir, self.debias.output_dir)
        folders += (self.segmentation.labels_dir,)
        root = Path(self.data.root).resolve()
        why = "is inside data.root; its pictures would be read as images. Choose another folder"
        for folder in [Path(f).resolve() for f in folders if f]:
            inside = self.data.format == "folder" and root in (folder, *folder.parents)
            check(not inside, f"{folder} {why}")


KEYS = {key: (section, item) for key, section, item in settings_below(Config)}
NAME_LISTS = ("data.classes", "data.biased_classes")
A_LIST = "a list is written in brackets, on the command line between quotes: '[a, b]'"
# Keys of earlier versions.
RENAMED = {"uss.stage": "uss.backbone_stage", "wsss.fixed_layers": "wsss.frozen_stages"}


class _Parser(jsonargparse.ArgumentParser):
    """Reads class names as text, refuses unknown keys by name, and prints the keys in use."""

    sections: tuple[str, ...] = ()  # what --help shows

    def parse_args(self, args: Sequence[str] | None = None, *rest, **options):
        words = [*(sys.argv[1:] if args is None else args)]
        if {"-h", "--help"} & {*words}:
            print(self._help([w for w in words if w not in ("-h", "--help")]), end="")
            sys.exit()
        for k, word in enumerate(words):
            key, equals, value = word.removeprefix("--").partition("=")
            if word.startswith("--"):
                self._refuse_unknown(key)
            if key in NAME_LISTS and equals:
                words[k] = f"--{key}={_json_names(value)}"
            elif key in NAME_LISTS and k + 1 < len(words):
                words[k + 1] = _json_names(words[k + 1])
        return super().parse_args(words, *rest, **options)

    def parse_path(self, path, *rest, **options):
        text = read_text(user_path(str(path)), "the configuration")
        try:
            root = yaml.compose(text, yaml.SafeLoader)
            _refuse_repeated(root, str(path))
            _make_names(root, str(path))
            content = yaml.SafeLoader("").construct_document(root) if root else {}
            text = json.dumps(content)
        except (yaml.YAMLError, TypeError, ValueError) as error:
            self.error(f"{path} is not a valid configuration: {error}")
        if not isinstance(content, Mapping):
            self.error(f"{path} is not a valid configuration: its lines must be `key: value`")
        for key in flatten(content):
            self._refuse_unknown(key)
            if key in KEYS and dataclasses.is_dataclass(KEYS[key][1].type):
                self.error(f"{path}: {key} is a section; give its settings below it, or delete it")
        return self.parse_string(text, path, *rest, **options)

    def _refuse_unknown(self, shown: str) -> None:
        key = shown if "." in shown else shown.replace("-", "_")
        known = {action.dest for action in self._actions}
        tables = (k for k in known if k.endswith(".arguments"))
        if key in known or any(key.startswith(f"{table}.") for table in tables):
            return
        near = difflib.get_close_matches(key, known, 1, 0.5)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        hint = f"; it is `{RENAMED[key]}` now" if key in RENAMED else hint
        self.error(f"there is no setting `{shown}`{hint} (--help lists the settings)")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = re.sub(r'Parser key "([\w.]+)":\s*', r"\1: ", message)
        hint = f"\n{A_LIST}" if "tuple" in message or "nrecognized" in message else ""
        sys.exit(f"error: {message}{hint}")

    def _help(self, words: list[str]) -> str:
        """The keys of the script's sections that have an effect, given the rest of the command."""
        own = [a for a in self._actions if a.dest not in KEYS]
        options = {name for action in own for name in action.option_strings} - {"--config"}
        words = [word for word in words if word.partition("=")[0] not in options]
        try:
            config = parse(self, words, named=False)[0]
        except UserError:
            config = Config()
        lines = [f"usage: {self.prog} --config FILE [--key VALUE ...]", "", self.description, ""]
        for action in own:
            if action.option_strings and action.dest not in ("help", "config"):
                lines += _entry(f"{action.option_strings[-1]}", action.help or "")
        lines += ["", "Settings in use, with their values; other methods have other settings:", ""]
        shown = {f.name for f in dataclasses.fields(Runtime)}
        for key, value in keys_in_use(config, locations=True).items():
            if key in shown or key.partition(".")[0] in self.sections:
                value = [*value] if isinstance(value, tuple) else value
                section, item = KEYS.get(key, (None, None))  # tables have keys of the user
                comment = comments(section)[item.name] if section else ""
                lines += _entry(f"--{key} {json.dumps(value)}", comment)
        return "\n".join(lines) + "\n"


def _entry(head: str, text: str) -> list[str]:
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    head = f"  {head}".ljust(30)
    return textwrap.wrap(f"{head}  {text}", width, subsequent_indent=" " * 32)


def _json_names(text: str) -> str:
    """Names written as "a,b" or "[a, b]", as a list in JSON."""
    names = re.split("[,\n]", text)
    if text.lstrip().startswith("["):
        try:
            names = yaml.load(text, yaml.BaseLoader)  # keeps every scalar as text
        except yaml.YAMLError:
            return text  # refused by the parser
        if not all(isinstance(name, str) for name in names):
            return text
    return json.dumps([name.strip() for name in names if name.strip()], ensure_ascii=False)


def _refuse_repeated(node: yaml.Node | None, path: str, key: str = "") -> None:
    """YAML takes the last of two equal keys, and settings would silently be lost."""
    lines: dict[str, int] = {}
    for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
        below, line = f"{key}.{name.value}".lstrip("."), name.start_mark.line + 1
        earlier = lines.setdefault(str(name.value), line)
        check(earlier == line, f"{path}: {below} is in lines {earlier} and {line}; join them")
        _refuse_repeated(value, path, below)


def _make_names(node: yaml.Node | None, path: str, key: str = "") -> None:
    """Makes the items of lists of class names text: `no`, `1` and `null` are names."""
    text = "tag:yaml.org,2002:str"
    if key not in NAME_LISTS:
        for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
            below = f"{key}.{name.value}".lstrip(".")
            if any(f"{full}.".startswith(f"{below}.") for full in NAME_LISTS):
                _make_names(value, path, below)
    elif node.tag == text:  # names in one line of text
        names = json.loads(_json_names(node.value))
        node.value = [yaml.ScalarNode(text, name) for name in names]
        node.__class__, node.tag = yaml.SequenceNode, "tag:yaml.org,2002:seq"
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            if isinstance(item, yaml.ScalarNode):
                line = item.start_mark.line + 1
                check(item.value != "", f"{path}, line {line}: {key} has an empty name")
                item.tag = text
    elif node.tag != "tag:yaml.org,2002:null":
        line = node.start_mark.line + 1
        raise UserError(f"{path}, line {line}: {key} must be a list; {A_LIST}")


def make_parser(prog: str, description: str, *sections: str) -> _Parser:
    """A parser with `--config` and every key of `Config`.

    Its --help shows `data` and the given sections of the configuration, or all if none is given;
    `description` is the docstring of the script `prog`.
    """
    parser = _Parser(prog=prog, description=description)
    parser.sections = ("data", *sections) if sections else tuple(KEYS)
    parser.add_argument("--config", action="config", help="The experiment, a YAML file.")
    parser.add_class_arguments(Config, None)
    return parser


def parse(parser: _Parser, args: list[str] | None = None, named: bool = True) -> tuple[Config, Any]:
    """Parses the command line; returns the configuration and the other arguments.

    `args` None: the process's own; `named`: whether class names that no setting gives are taken
    from the data set.

    Raises:
        UserError: settings contradict each other.
        SystemExit: an unknown key or a value out of range, after one message.
    """
    parsed = parser.parse_args(args)
    for key, (_, item) in KEYS.items():  # jsonargparse accepts null for any list
        optional = dataclasses.is_dataclass(item.type) or type(None) in get_args(item.type)
        empty = not optional and parsed.get(key, ()) is None
        check(not empty, f"{key} is empty; give it a value or delete the line")
    for key, value in [*parsed.items()]:
        if isinstance(value, str) and (value.startswith("~") or not is_utf8(value)):
            parsed[key] = str(user_path(value))  # only paths start like this
    namespace = parser.instantiate(parsed)
    config = Config(**{k: v for k, v in vars(namespace).items() if k in KEYS})
    report_in(Path(config.run_dir))
    if named:
        config.data = config.data.with_classes()
    if config.log == "jsonl":
        sys.stdout = sys.stderr  # core.run.log.emit keeps the original
    return config, namespace
