"""The report on a made-up run folder: what it says, and what it leaves out."""

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from invented_run import make_run

from core.config import Config, make_parser, parse
from core.data.labels import BIASED_ON_DISK
from core.data.lists import Split, read_split
from core.pipeline import Run
from core.run.errors import UserError
from tools.common import charts
from tools.common.titles import LABELS, MODES
from tools.report import figures, make_report, pictures
from tools.report.analyses import PNG, cell, read_analyses
from tools.report.record import Commands, read_record


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Config, list[str], str]:
    """A finished run, the arguments of its report, and the page."""
    arguments = make_run(tmp_path_factory.mktemp("report"))
    config, _ = parse(make_parser("test", ""), arguments)
    path = make_report.write_report(config, arguments)
    return config, arguments, path.read_text("utf-8")


class Reader(HTMLParser):
    """Checks that tags are closed in order; collects visible text and what attributes refer to."""

    VOID = {"meta", "img", "input", "br", "line", "polyline", "colgroup"}

    def __init__(self, html: str):
        super().__init__()
        self.open, self.text, self.references, self.tags = [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.references += [v for k, v in attributes if k in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def test_page_is_one_well_formed_file_without_network(finished):
    _, _, html = finished
    page = Reader(html)
    assert page.open == []
    assert all(r.startswith(("data:image/", "#")) for r in page.references)
    assert not re.search(r"https?://|@import", html)
    assert len(html) < 6e6
    assert all(a["alt"] for tag, a in page.tags if tag == "img" and "src" in a)


def test_every_part_of_a_finished_run_is_on_the_page(finished):
    _, _, html = finished
    words = Reader(html).words
    assert "Not in this run" not in words
    for titles in (LABELS, MODES):
        assert all(title in words for title, _ in titles.values())
    assert "MARS raises mIoU" in words
    for part in ("Similarity", "Network, MARS", "Control, classifier features", "certainty"):
        assert part in words


def test_headline_figures_are_those_of_the_score_files(finished):
    config, _, html = finished
    names = ("wsss_best", "mars", "supervised")
    miou = [
        json.loads((Run(config).evaluation(n) / "scores.json").read_text())["miou"] for n in names
    ]
    low, value, high = miou
    words = Reader(html).words
    assert f"from {100 * low:.1f} to {100 * value:.1f} %" in words
    assert f"{100 * (value - low) / (high - low):.0f} % of the gap" in words


def test_headline_is_plain_when_mars_is_not_better(finished):
    config, _, _ = finished
    scores = read_record(Run(config).folder).scores
    scores = {**scores, "mars": scores["wsss"], "wsss_best": scores["mars"]}
    found = figures.headline(scores, config)
    assert not found["better"] and found["gain"] < 0 and found["closed"] < 0
    same = figures.headline({**scores, "mars": scores["wsss_best"]}, config)
    assert not same["better"]


def test_missing_parts_name_the_command_that_makes_them(tmp_path):
    (tmp_path / "run").mkdir()
    config = Config(run_dir=str(tmp_path / "run"))
    config.data.root = str(tmp_path / "none")
    path = make_report.write_report(config, ["--config", "my own.yaml"])
    page = Reader(path.read_text("utf-8"))
    assert page.open == []
    ours = "--config 'my own.yaml'"
    assert f"python train_wsss.py {ours}" in page.words
    assert f"python train_segmentation.py {ours} --segmentation.mode mars" in page.words
    assert f"python tools/demo/sweep_threshold.py {ours}" in page.words
    assert "MARS raises" not in page.words


def test_without_masks_and_training_no_scores_are_missed(tmp_path):
    (tmp_path / "run").mkdir()
    config = Config(run_dir=str(tmp_path / "run"))
    config.data.format, config.data.root = "folder", str(tmp_path / "none")
    words = Reader(make_report.write_report(config, []).read_text("utf-8")).words
    assert "have no masks, so nothing is scored" in words
    assert "Not in this run: a trained network. Next: python train_segmentation.py" in words
    assert "evaluate.py" not in words and "analyse_bias.py" not in words
    assert "Predictions" not in words and "The loss of every training" not in words
    log = tmp_path / "run/wsss/log.jsonl"
    log.parent.mkdir()
    log.write_text('{"iteration": 1, "loss": 1.0}\n')
    words = Reader(make_report.write_report(config, []).read_text("utf-8")).words
    assert "a trained network" not in words and "The loss of every training" in words


def test_missing_run_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="run_dir"):
        make_report.write_report(Config(run_dir=str(tmp_path / "none")), [])


def test_names_cannot_inject_html(tmp_path):
    folder = tmp_path / "<script>alert(1)<"
    folder.mkdir()
    path = make_report.write_report(Config(run_dir=str(folder)), [])
    assert "<script>alert" not in path.read_text("utf-8")


def test_best_value_is_never_that_of_full_supervision(finished):
    config, arguments, _ = finished
    record = read_record(Run(config).folder)
    commands = Commands(config, arguments)
    labels, predictions, *_ = figures.score_table(record.scores, config, commands)
    best = {row["name"] for row in predictions["rows"] if "miou" in row["best"]}
    weak = {n: record.scores[n]["miou"] for n in MODES if n != "supervised"}
    assert best == {max(weak, key=weak.get)}
    assert record.scores["supervised"]["miou"] > max(weak.values())
    assert labels["list"] == "train" and predictions["list"] == "val"


def test_score_on_part_of_the_images_is_never_best(finished):
    config, arguments, _ = finished
    scores = read_record(Run(config).folder).scores
    part = {**scores["mars"], "miou": 0.99, "images": {"scored": 5, "of": 6}}
    commands = Commands(config, arguments)
    _, predictions, *_ = figures.score_table({**scores, "mars": part}, config, commands)
    row = next(row for row in predictions["rows"] if row["name"] == "mars")
    assert "miou" not in row["best"]
    assert not figures.headline({**scores, "mars": part}, config)["comparable"]


def test_images_are_the_first_of_each_class_shown_once():
    tags = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 1, 0]], bool)
    ids = ("a", "b", "c", "d")
    chosen = pictures.choose(Split(ids, tuple(map(Path, ids)), tags), per_class=2)
    assert chosen == {0: ([0], True), 1: ([1, 0], True), 2: ([1], False)}


def test_overlay_is_clear_on_background_and_hatched_on_biased():
    label = np.zeros((12, 12), np.uint8)
    label[:, 6:] = BIASED_ON_DISK
    pixels = np.array(pictures.transparent(label))
    assert (pixels[:, :6, 3] == 0).all() and (pixels[:, 6:, 3] == 255).all()
    colours = {tuple(int(v) for v in p) for p in pixels[:, 6:, :3].reshape(-1, 3)}
    assert colours == {(255, 0, 255), pictures.HATCH}


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 0.1), (1e-4, 2e-4), (5, 5), (0, 0), (1, 800)])
def test_ticks_enclose_the_values_in_a_few_round_steps(low, high):
    found = charts.ticks(low, high)
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9
    assert 2 <= len(found) <= 7


def test_chart_puts_the_extremes_at_the_edges_of_the_box():
    lines = {"loss": [(0, 0.0), (10, 1.0)], "none": []}
    drawn = charts.chart("t", "x", "y", lines)
    left, top = charts.LEFT, charts.TOP
    right, bottom = left + charts.WIDTH, top + charts.HEIGHT
    assert drawn["lines"] == {"loss": f"{left:.1f},{bottom:.1f} {right:.1f},{top:.1f}"}
    assert charts.chart("t", "x", "y", {"none": []}) is None


def test_decisions_of_stage_3_are_a_table_with_its_warnings(finished):
    config, _, html = finished
    page = Reader(html)
    names = config.data.classes
    assert f"Stage 3 removed nearly all labels: {names[1]} 95%. Use other features." in page.words
    left = re.escape(names[0])
    assert re.search(f"{left} (biased )?0.0 left as is [0-9.–]+ 0.50 [0-9.–]+", page.words)
    assert re.search(f"{names[1]} (biased )?95.0 0.[0-9]+ [0-9.]+ [0-9.]+ [0-9.]+", page.words)
    drawn = [a["aria-label"] for tag, a in page.tags if tag == "svg"]
    assert sum(label.startswith("Similarities in and around") for label in drawn) == len(names)


def test_run_with_a_fixed_cut_has_shares_but_no_cuts(finished, tmp_path):
    config, arguments, _ = finished
    debias = tmp_path / "debias"
    debias.mkdir()
    (debias / "manifest.json").write_text((Run(config).debias / "manifest.json").read_text())
    config = copy.deepcopy(config)
    config.debias.output_dir, config.run_dir = str(debias), str(tmp_path)
    words = Reader(make_report.write_report(config, arguments).read_text("utf-8")).words
    assert "Labels removed" in words and f"{config.data.classes[1]} biased 95.0" in words
    assert "Object share" not in words and "Similarities" not in words


def test_settings_that_differ_name_their_stages():
    rows = figures.merged({"a": {"k": 1, "s": {"t": "x"}}, "b": {"k": 2, "s": {"t": "x"}}})
    assert rows == [("k", [("1", "a"), ("2", "b")]), ("s.t", [("x", "")])]


def test_similarity_refuses_centroids_of_other_features(finished):
    config, _, _ = finished
    split = read_split(config.data, "train")
    features = torch.zeros(5, 4, 4).numpy()
    path = Path(config.uss.features_dir) / f"{split.ids[0]}.npy"
    kept = path.read_bytes()
    try:
        np.save(path, features)
        with pytest.raises(UserError, match="one row of 5"):
            pictures.similarity(config, split, [0])
    finally:
        path.write_bytes(kept)


def test_scores_of_training_images_are_a_group_of_their_own(finished):
    config, _, _ = finished
    scores = read_record(Run(config).folder).scores
    scores = {"mars": scores["mars"], "mars_train": scores["mars"], "mine": scores["wsss"]}
    groups = figures.score_table(scores, config, Commands(config, []))
    titles = [[row["title"] for row in group["rows"]] for group in groups]
    assert titles == [[], ["MARS"], ["MARS, training images"], ["mine"]]
    assert [bool(group["missing"]) for group in groups] == [True, True, False, False]


@pytest.mark.parametrize(
    "seconds, text",
    [(3.14, "3.1 s"), (125, "2 min 05 s"), (3599.9, "1 h 00 min"), (7260, "2 h 01 min")],
)
def test_durations_are_told_in_words(seconds, text):
    assert figures.duration(seconds) == text


ANALYSIS = {"title": "T", "caption": "C", "columns": ["a", "b"], "rows": [["x", 1.5]]}
ANALYSIS |= {"figure": None, "command": "python tools/some.py", "order": 1}


def write_analysis(folder: Path, name: str = "one.json", **changes) -> Path:
    """An analysis with some keys changed, or left out where the value is ...; returns its file."""
    content = {k: v for k, v in {**ANALYSIS, **changes}.items() if v is not ...}
    (folder / name).write_text(json.dumps(content))
    return folder / name


def test_columns_of_words_are_told_from_columns_of_figures(tmp_path):
    rows = [["CAM", "none", "", "−1.0 (−2 .. 0)"], ["IRNet", "STEGO", 2, "60.1"]]
    write_analysis(tmp_path, columns=["a", "b", "c", "d"], rows=rows)
    assert read_analyses(tmp_path)[0].words == [True, True, False, False]
    write_analysis(tmp_path, rows=[])
    assert read_analyses(tmp_path)[0].words == [True, True]


def test_analyses_come_by_order_then_by_name(tmp_path):
    for name, order in {"a.json": 3, "b.json": -1, "c.json": 3}.items():
        write_analysis(tmp_path, name, order=order, title=name)
    assert [a.title for a in read_analyses(tmp_path)] == ["b.json", "a.json", "c.json"]
    assert read_analyses(tmp_path / "none") == []


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"title": ...}, "title missing"),
        ({"figure": ...}, "figure missing"),
        ({"caption": None}, "caption is None, expected str"),
        ({"order": True}, "order is True, expected int"),
        ({"columns": ["a", 2]}, "columns holds"),
        ({"rows": [["x", 1], ["y"]]}, "row 2 is not a list of 2 values"),
        ({"rows": [["x", None]]}, "row 1 holds"),
        ({"figure": "../secret.png"}, "the name of a file in this folder"),
        ({"figure": "none.png"}, "none.png is missing"),
        ({"figure": "one.json"}, "one.json is not a PNG"),
        ({"figure": "large.png"}, "large.png has 1.5 MB"),
    ],
)
def test_malformed_analysis_is_refused_by_name_and_with_a_remedy(tmp_path, changes, problem):
    (tmp_path / "large.png").write_bytes(PNG + bytes(1_500_000))
    path = write_analysis(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        read_analyses(tmp_path)
    told = str(caught.value)
    assert problem in told and str(path) in told
    assert "make it again" in told or "save it again" in told


@pytest.mark.parametrize("text", ["[1]", "{", "null"])
def test_analysis_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "one.json").write_text(text)
    with pytest.raises(UserError, match=r"one\.json"):
        read_analyses(tmp_path)


@pytest.mark.parametrize(
    "value, text",
    [
        ("a", "a"),
        (12345, "12345"),
        (61.23456, "61.23"),
        (39.0, "39.0"),
        (12345.6, "12346"),
        (math.nan, "–"),
    ],
)
def test_cells_of_an_analysis_are_short(value, text):
    assert cell(value) == text


def test_evaluation_with_a_name_of_its_own_is_shown(finished):
    config, arguments, _ = finished
    scores = read_record(Run(config).folder).scores
    scores = {**scores, "mine": {**scores["mars"], "classes": ["background", *"abcdefgh"]}}
    *_, others = figures.score_table(scores, config, Commands(config, arguments))
    assert [row["title"] for row in others["rows"]] == ["mine"] and not others["rows"][0]["best"]
    table = figures.class_table(scores)
    assert table["rows"]["a"]["mine"] is not None and table["rows"]["a"]["mars"] is None
    assert table["pair"] == ("mars", "wsss_best")


def test_single_evaluation_has_nothing_to_be_compared_with(finished):
    scores = read_record(Run(finished[0]).folder).scores
    table = figures.class_table({"ignore": scores["ignore"]})
    assert table["pair"] is None and [r["shown"] for r in table["runs"]] == [True]


@pytest.mark.parametrize(
    "names, pair",
    [
        (("ignore", "wsss", "mars", "labels_debias"), ("mars", "wsss")),
        (("labels_wsss", "labels_debias", "mars"), ("labels_debias", "labels_wsss")),
        (("labels_wsss", "ignore", "complement"), ("labels_wsss", "ignore")),
    ],
)
def test_first_difference_is_the_one_that_tells_most(finished, names, pair):
    scores = read_record(Run(finished[0]).folder).scores
    table = figures.class_table({name: scores[name] for name in names})
    assert table["pair"] == pair
    assert {r["name"] for r in table["runs"] if r["shown"]} == {*pair, "mars"} & {*names}
