"""The paper's figures and tables, mostly on runs that these tests make up."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, ROOT, run_inside, run_python
from invented_run import check_order

from core.config import Config, make_parser, parse
from core.data.labels import read_label
from core.data.lists import read_split
from core.debias import DebiasConfig
from core.pipeline import Run
from core.run.errors import UserError
from core.run.files import write_json
from tools.common.titles import BEFORE_AND_AFTER, LABELS, MODES
from tools.demo import summarise_runs
from tools.paper import ablation, analyse, gains, published, reproduce, selection, sensitivity
from tools.paper.results import Analysis, paper, publish

SCHEMA = {"title", "caption", "columns", "rows", "figure", "command", "order"}


@pytest.fixture
def config(experiment) -> Config:
    return parse(make_parser("test", ""), [f"--config={experiment}"])[0]


def write_scores(path: Path, miou: float, names=("background", *CLASSES), iou=()) -> None:
    """A scores.json of which all classes have the same IoU, but for those in `iou`."""
    per_class = [dict(iou).get(name, miou) for name in names]
    content = {"miou": miou, "fp": 0.1, "fn": 0.2, "classes": [*names]}
    write_json(path / "scores.json", {**content, "per_class": {"iou": per_class}})


def table(analysis: Analysis) -> dict[str, list]:
    return {row[0]: row[1:] for row in analysis.rows}


# What is written.


def test_analysis_is_written_as_data_and_as_pictures_of_the_same_bytes(tmp_path, capsys):
    points = np.random.default_rng(0).normal(size=(9, 2))
    chosen, labels = np.arange(9) < 4, np.repeat([1, 2, 3], 3)
    shares = {"boat": (0.4, 0.9), "train": (0.5, 0.5), "cat": (None, None)}
    rows = [["boat", np.int64(3), np.float32(0.5)], ["cat", 1, 12.34]]
    made = Analysis("figure8", 80, "A title", "What it means.", ["class", "n", "%"], rows)
    for folder in ("a", "b"):
        figure = selection.draw(points, labels, chosen, chosen[::-1], shares, "voc")
        publish([tmp_path / folder], made, "python tools/paper/analyse.py figure8", figure)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["figure8.json", "figure8.pdf", "figure8.png"]
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    content = json.loads((tmp_path / "a/figure8.json").read_text())
    assert content.keys() == SCHEMA and content["figure"] == "figure8.png"
    assert content["rows"] == [["boat", 3, 0.5], ["cat", 1, 12.34]]
    assert (tmp_path / "a/figure8.pdf").read_bytes().startswith(b"%PDF")
    assert "| cat | 1 | 12.3 |" in capsys.readouterr().out


def test_table_without_a_picture_says_so(tmp_path):
    publish([tmp_path], Analysis("table6", 60, "T", "C", ["a"], [["b"]]), "command")
    assert json.loads((tmp_path / "table6.json").read_text())["figure"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["table6.json"]


# Fig. 8.


def write_stage3(config: Config) -> None:
    """Two clusters an image for its first class: the object, which is selected, and all the rest;
    one for the background."""
    split, folder = read_split(config.data, "train"), Run(config).debias
    labels, images = [], []
    for index, image_id in enumerate(split.ids):
        truth = read_label(Path(config.data.root) / "SegmentationClass" / f"{image_id}.png")
        c = int(np.unique(truth[(truth > 0) & (truth < 255)])[0])
        (folder / "clusters").mkdir(parents=True, exist_ok=True)
        cells = np.where(truth == c, 1, 2).astype(np.int16)
        np.savez(folder / "clusters" / f"{image_id}.npz", cells=cells)
        labels += [0, c, c]
        images += [index] * 3
    vectors = np.random.default_rng(1).normal(size=(len(labels), 8)).astype(np.float32)
    selected = np.arange(len(labels)) % 3 == 1
    np.save(folder / "vectors.npy", vectors)
    np.savez(folder / "centroids.npz", labels=labels, images=images, selected=selected)


def test_figure8_tells_objects_from_context(config):
    write_stage3(config)
    analysis, figure = selection.figure8(config, None, None)
    rows = table(analysis)
    assert rows["mean, all classes"] == ["", "", 50.0, 100.0, "", ""]
    assert sum(rows[name][0] for name in CLASSES) == 32
    assert "16 of 16 training images have masks" in analysis.caption
    assert len(figure.axes) == 2 * 4 + 1


def test_figure8_counts_the_images_of_a_list_that_have_masks(config, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(config.data.root, root)
    lists, masks = root / "ImageSets/Segmentation", root / "SegmentationClass"
    ids = (lists / "train.txt").read_text().split()
    (lists / "some.txt").write_text("\n".join(ids[:10]))
    config.data.root = str(root)
    write_stage3(config)
    for image_id in ids[10:]:
        (masks / f"{image_id}.png").unlink()
    with pytest.raises(UserError, match="6 of 16 label maps are missing"):
        selection.figure8(config, None, None)
    analysis, _ = selection.figure8(config, "some", "voc")
    rows = table(analysis)
    assert sum(rows[name][0] for name in CLASSES) == 20
    assert "10 of 16 training images" in analysis.caption
    assert rows["mean, all classes"][-1] == "over 85"


# Fig. 9.


def test_figure9_shows_gains_over_either_baseline(config):
    run = Run(config)
    write_scores(run.evaluation("wsss"), 0.5)
    write_scores(run.evaluation("wsss_best"), 0.55, iou={"train": None})
    write_scores(run.evaluation("mars"), 0.6, iou={"boat": 0.9})
    analysis, _ = gains.figure9(config, None)
    rows = table(analysis)
    assert rows["boat"] == ["yes", 50.0, 55.0, 90.0, 40.0, 35.0]
    assert rows["train"] == ["yes", 50.0, "–", 60.0, 10.0, "–"]
    assert rows["mean"][3] == pytest.approx((60 * 8 + 90) / 9, abs=0.05)


def test_analysis_notes_the_command_that_makes_it_again(experiment, config, monkeypatch):
    run = Run(config)
    for name in ("wsss", "mars"):
        write_scores(run.evaluation(name), 0.5)
    monkeypatch.chdir(ROOT)
    arguments = ["analyse.py", "figure9", "--config", str(experiment), "--seed=0"]
    monkeypatch.setattr(analyse.sys, "argv", arguments)
    analyse.main()
    content = json.loads((run.folder / "analysis/figure9.json").read_text())
    assert (
        content["command"]
        == f"python tools/paper/analyse.py figure9 --config {experiment} --seed=0"
    )


def test_figure9_without_a_baseline_names_what_to_run(config):
    write_scores(Run(config).evaluation("mars"), 0.6)
    with pytest.raises(UserError, match="lacks scores of mars, or of wsss"):
        gains.figure9(config, None)


# Fig. 10.


@pytest.mark.parametrize(
    "settings", [DebiasConfig(), DebiasConfig(cut="fixed", scale="max", threshold=0.55)]
)
def test_each_point_differs_from_the_configured_settings_in_its_own_factor(settings):
    found = sensitivity.factors(settings)
    assert [p.value for p in found["K_bg"]] == list("12345")
    assert [p.value for p in found["alpha"]][::9] == ["0.1", "1"] and len(found["alpha"]) == 10
    for factor in ("K_bg", "alpha", "distance"):
        assert sum(point.configured(settings) for point in found[factor]) == 1, factor
    for factor, cut in (("cut", "auto"), ("threshold", "fixed")):
        marked = [point.configured(settings) for point in found[factor]]
        assert sum(marked) == (settings.cut == cut)
    folders = [point.folder for group in found.values() for point in group]
    assert len({*folders}) == len(folders)


def test_figure10_runs_stage_3_once_for_each_point(config, monkeypatch):
    run, seen = Run(config), []
    write_json(run.debias / "manifest.json", {"inputs": {}})

    def fake(jobs, folder, settings, max_parallel):
        for job in jobs:
            seen.append(job.name)
            output = next((a for a in job.command if a.startswith("--output=")), None)
            if output:
                write_scores(Path(output.removeprefix("--output=")).parent, 0.3 + 0.01 * len(seen))

    monkeypatch.setattr(sensitivity, "run_jobs", fake)
    analysis, figure = sensitivity.figure10(config, ["--config=x"], "some", 1, quick=True)
    values = [(factor, value) for factor, value, *_ in analysis.rows[1:]]
    assert values == [("K_bg", v) for v in "125"] + [("alpha", v) for v in ("0.1", "0.4", "1")]
    made = [name for name in seen if name.endswith(": labels")]
    assert made == [f"{name}: labels" for name in ("k_bg_1", "k_bg_5", "alpha_0.1", "alpha_1.0")]
    marked = [row for row in analysis.rows if row[2] == "configured"]
    assert len(marked) == 2 and marked[0][3:] == marked[1][3:]
    assert len(figure.axes) == 2


def test_figure10_trains_a_segmenter_for_each_point_of_the_wanted_settings(config, monkeypatch):
    run, commands = Run(config), {}
    write_json(run.debias / "manifest.json", {"inputs": {}})

    def fake(jobs, folder, settings, max_parallel):
        for job in jobs:
            assert commands.keys() >= {*job.depends_on}
            commands[job.name] = job.command
            if job.command[0] == "evaluate.py":
                options = dict(a.removeprefix("--").split("=", 1) for a in job.command[1:])
                place = Path(options.get("run_dir", run.folder)) / "evaluation"
                write_scores(place / options["segmentation.mode"], 0.3 + 0.01 * len(commands))

    monkeypatch.setattr(sensitivity, "run_jobs", fake)
    analysis, figure = sensitivity.figure10(config, ["--config=x"], None, 1, True, ["alpha"])
    assert analysis.name == "figure10_segmenters" and len(figure.axes) == 1
    values = [(factor, value, mark) for factor, value, mark, *_ in analysis.rows]
    assert values[0] == ("(none)", "pseudo labels", "")
    assert values[1:] == [
        ("alpha", v, "configured" if v == "0.4" else "") for v in ("0.1", "0.4", "1")
    ]
    assert len({row[3] for row in analysis.rows}) == 4
    point = run.folder / "analysis/figure10/alpha_1.0"
    assert f"--segmentation.labels_dir={point / 'labels'}" in commands["alpha_1.0: train"]
    assert f"--run_dir={point / 'segmenter'}" in commands["alpha_1.0: score of the segmenter"]
    assert "--segmentation.mode=wsss" in commands["pseudo labels: train"]
    assert not any(a.startswith("--run_dir") for a in commands["configured: train"])
    with pytest.raises(UserError, match="does not vary alfa; it varies K_bg, alpha"):
        sensitivity.figure10(config, [], None, 1, True, ["alfa"])


def test_point_with_clusters_taken_over_ends_with_the_same_labels(experiment, config, tmp_path):
    """On features that are noise, for nothing is to be learnt here."""
    ids, generator = read_split(config.data, "train").ids, np.random.default_rng(2)
    for image_id in ids:
        path = tmp_path / "features" / f"{image_id}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, generator.normal(size=(6, 8, 8)).astype(np.float32))
    arguments = [f"--config={experiment}", f"--uss.features_dir={tmp_path / 'features'}"]
    arguments.append(f"--wsss.labels_dir={Path(config.data.root) / 'SegmentationClass'}")
    base, linked, fresh = (tmp_path / name for name in ("base", "linked", "fresh"))
    point = sensitivity.Point("alpha", "0.2", (("alpha", 0.2),))
    for folder, changes in ((base, []), (linked, point.changes), (fresh, point.changes)):
        if folder == linked:
            sensitivity.take_clusters_over(base, linked, point)
            assert len(list((linked / "clusters").glob("*.npz"))) == len(ids)
        changed = [f"--debias.{key}={value}" for key, value in changes]
        done = run_inside(
            "make_debiased_labels.py", *arguments, *changed, f"--debias.output_dir={folder}"
        )
        assert done.returncode == 0, done.stderr
    for image_id in ids:
        name = f"labels/{image_id}.png"
        assert (linked / name).read_bytes() == (fresh / name).read_bytes()
    other = sensitivity.Point("K_bg", "3", (("k_bg", 3),))
    sensitivity.take_clusters_over(base, tmp_path / "other", other)
    assert not (tmp_path / "other").exists()


# Tables.


def test_table6_trains_what_is_missing_and_scores_both_lists(config, monkeypatch):
    run, commands = Run(config), {}
    write_json(run.debias / "manifest.json", {"inputs": {}})

    def fake(jobs, folder, settings, max_parallel):
        names = set()
        for job in jobs:
            assert names.issuperset(job.depends_on)
            names.add(job.name)
            commands[job.name] = job.command
        for k, mode in enumerate(ablation.TRAINED):
            write_scores(run.evaluation(mode), 0.5 + 0.1 * k)
            write_scores(run.evaluation(f"{mode}_train"), 0.4 + 0.1 * k)

    monkeypatch.setattr(ablation, "run_jobs", fake)
    analysis = ablation.table6(config, ["--config=x"], "some", 1, "voc", masks="All")
    rows = [*analysis.rows]
    assert rows[0][1:] == [40.0, 10.0, 20.0, 50.0, 10.0, 20.0, 77.4, 12.3, 10.8]
    assert rows[1][-3:] == ["–"] * 3  # the paper does not leave biased pixels out
    assert "--data.train_list=some" in commands["mars: score, training"]
    assert "--data.train_list=some" not in commands["mars: score"]
    masked = [name for name, command in commands.items() if "--data.masks=All" in command]
    assert masked == [name for name in commands if name.startswith("supervised")]


def test_published_gaps_are_those_that_the_paper_prints():
    gaps = []
    for row in paper()["table5"].values():
        values = (np.array([row[mode]]) for mode in BEFORE_AND_AFTER)
        gaps.append(round(published.closed_gap(*values)))
    assert gaps == [49, 46, 22, 53]


def test_tables_show_ours_beside_the_papers(tmp_path):
    for seed, miou in enumerate((0.6, 0.7)):
        for mode, more in (("wsss", 0), ("mars", 0.05), ("supervised", 0.1)):
            write_scores(tmp_path / f"seed{seed}/evaluation" / mode, miou + more)
    runs = [tmp_path / "seed0", tmp_path / "seed1"]
    assert published.table3("coco", "CAM", runs[:1]).rows == [
        ["ours", "CAM", 60.0, 65.0, 70.0],
        ["the paper", "RS+EPM", 46.4, 49.4, 61.8],
    ]
    row = published.table5({"seam": runs}).rows[0]
    assert row[2] == "65.0 (60.0 .. 70.0)" and row[5].startswith("50.0")
    assert row[6:] == [64.5, 70.8, 78.1, 46.3]
    row = published.table4({"irn": {"stego": runs[:1], "leopart": runs[1:]}}).rows[0]
    assert row == ["IRNet", 60.0, 75.0, 65.0, 63.5, 68.1, 69.8]


# Everything from one command.


def test_each_job_of_the_reproduction_comes_after_those_it_reads_from():
    runs = [reproduce.experiment(f"voc_{m}", 3, ()) for m in published.SEGMENTERS]
    runs.append(reproduce.experiment("coco", 0, ()))
    jobs = [job for run in runs for job in reproduce.stages(run)]
    leopart = reproduce.with_leopart(runs[0])
    jobs += reproduce.stages(leopart, ("mars",))
    check_order(jobs)
    first = reproduce.stages(leopart)[0]
    assert first.depends_on == ("voc_irn_seed3: pseudo labels",)
    config = leopart.parsed()
    assert config.uss.method == "leopart" and config.run_dir == "runs/voc_irn_seed3_leopart"
    assert config.wsss.labels_dir == "runs/voc_irn_seed3/wsss/labels"


@pytest.fixture
def calls(tmp_path, monkeypatch) -> list[tuple]:
    """What the reproduction calls, nothing of which is run; all its jobs end with some scores."""
    made = []

    def fake(jobs, folder, settings, max_parallel):
        for job in (job for job in jobs if job.command[0] == "evaluate.py"):
            options = dict(a.removeprefix("--").split("=", 1) for a in job.command[1:])
            mode, names = options["segmentation.mode"], [*BEFORE_AND_AFTER]
            path = Path(options["run_dir"]) / "evaluation" / mode
            write_scores(path, 0.5 + 0.1 * names.index(mode))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce.os, "chdir", lambda folder: None)
    monkeypatch.setattr(reproduce, "check_data", lambda data, runs: None)
    monkeypatch.setattr(reproduce, "run_jobs", fake)
    monkeypatch.setattr(reproduce, "call", lambda *arguments: made.append(arguments))
    return made


def test_voc_is_reproduced_for_every_seed(calls, tmp_path, monkeypatch):
    arguments = ["reproduce.py", "voc", "--seeds", "0", "5", "--data.root=here"]
    monkeypatch.setattr(reproduce.sys, "argv", arguments)
    reproduce.main()
    names = [*reproduce.ANALYSES]
    assert [call[1] for call in calls if call[0] == "tools/paper/analyse.py"] == names * 2
    assert [call[0] for call in calls[-2:]] == ["tools/report/make_report.py"] * 2
    assert all("--data.root=here" in call for call in calls)
    assert {"--list=train", "--paper=voc"} < {*calls[0]}
    for folder in ("voc_rsepm", "voc_rsepm_seed5"):
        tables = {p.stem: p for p in (tmp_path / "runs" / folder / "analysis").iterdir()}
        assert sorted(tables) == ["table3", "table4", "table5"]
        rows = json.loads(tables["table5"].read_text())["rows"]
        assert [row[0] for row in rows] == ["IRNet", "SEAM", "AdvCAM", "RS+EPM"]
        assert all(row[2] == "50.0 (50.0 .. 50.0)" for row in rows)
        assert json.loads(tables["table4"].read_text())["rows"][1][-1] == 77.7


def test_demo_is_reproduced_for_every_seed(calls, monkeypatch):
    arguments = ["reproduce.py", "demo", "--seeds", "0", "5", "--only", "table5", "figure9"]
    monkeypatch.setattr(reproduce.sys, "argv", arguments)
    reproduce.main()
    scripts = [call[:2] for call in calls]
    assert scripts[:2] == [
        ("tools/demo/run_demo.py", "--seed=0"),
        ("tools/paper/analyse.py", "figure9"),
    ]
    assert scripts[4] == ("tools/demo/compare.py", "methods")
    assert calls[4][2:5] == ("--seeds", "0", "5") and "runs/demo_seed5/analysis" in calls[4]
    assert calls[-1] == ("tools/demo/summarise_runs.py", Path("runs/demo"), Path("runs/demo_seed5"))


@pytest.mark.parametrize("data", ["voc", "coco"])
def test_reproduction_first_looks_for_its_data(data, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for root in (tmp_path, tmp_path / "none"):
        arguments = ["reproduce.py", data, f"--data.root={root}", "--only", "table3"]
        monkeypatch.setattr(reproduce.sys, "argv", arguments)
        with pytest.raises(UserError) as told:
            reproduce.main()
        assert f"tools/data/prepare_{data}.py" in str(told.value) and str(root) in str(told.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("coco", "--only", "table6"), "coco has no table6; there are table3, figure8"),
        (("voc", "--quick"), "--quick is for demo only"),
        (("demo", "--data.root=x"), "demo takes no --data.root=x"),
    ],
)
def test_reproduction_refuses_what_it_does_not_know(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(reproduce.sys, "argv", ["reproduce.py", *arguments])
    with pytest.raises(SystemExit):
        reproduce.main()
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_quick_reproduction_is_whole_and_resumes(tmp_path):
    """Minutes long; in a copy of the clone, because the demo writes into its own."""
    clone = tmp_path / "clone"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "*_seed*", "__pycache__")
    shutil.copytree(ROOT, clone, ignore=ignored)
    command = [clone / "tools/paper/reproduce.py", "demo", "--quick", "--jobs", "2"]
    done = run_python(*command)
    assert done.returncode == 0, done.stderr
    folder = clone / "runs/demo_quick/analysis"
    for name in ("table6", "figure8", "figure9", "figure10"):
        assert json.loads((folder / f"{name}.json").read_text()).keys() == SCHEMA
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("scores.json")}
    assert len(before) >= 6
    assert run_python(*command).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("scores.json")} == before


def test_class_that_occurs_nowhere_has_no_part_in_a_summary(tmp_path, capsys, monkeypatch):
    """Its IoU is null in scores.json; and in one run, no biased class occurs at all."""
    share = {"context_removed": 0.8, "object_kept": None}
    for k, iou in enumerate(([0.9, 0.5, None, 0.3], [0.9, None, None, 0.7])):
        run = tmp_path / f"run{k}"
        scores = {"classes": ["background", "a", "b", "c"], "per_class": {"iou": iou}}
        scores["data"] = {"biased_classes": ["a", "b"]}
        scores |= {"miou": 0.5 + k / 10, "fp": 0.1, "fn": None}
        for name in (*LABELS, *MODES):
            write_json(run / "evaluation" / name / "scores.json", scores)
        table = {"mean_biased": share, "mean_unbiased": share}
        selection_part = {"mean_selected": 0.9, "mean_all": None}
        parts = {"selection": selection_part, "removal": table, "control": table}
        write_json(run / "analysis.json", parts)
    monkeypatch.setattr(sys, "argv", ["summarise_runs.py", *map(str, tmp_path.iterdir())])
    summarise_runs.main()
    said = capsys.readouterr().out
    row = "| 55.0 (50.0 .. 60.0) | 10.0 (10.0 .. 10.0) | – | 50.0 | 50.0 (30.0 .. 70.0) |"
    assert f"| WSSS pseudo labels {row}" in said
    assert "Targets among all centroids: – %" in said and "nan" not in said
