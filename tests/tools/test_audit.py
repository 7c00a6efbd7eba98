"""The audit on clusters made by hand, and on the output of stage 3 with perfect features."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, ROOT, run_inside, run_python
from invented_run import perfect_features
from PIL import Image
from torch.nn import functional as F

from core.config import Config, make_parser, parse
from core.cut import BINS, find_cuts
from core.data.labels import read_label, write_label
from core.data.lists import Split
from core.data.settings import DataConfig
from core.data.tags import read_table
from core.run.errors import UserError
from core.run.files import read_json, write_json
from tools.audit.audit_bias import area_under_curve
from tools.audit.clusters import Clusters
from tools.audit.ranking import FEW, Audit, context_share, distinct, rank
from tools.common.charts import LEFT
from tools.common.cuts import ClassCut, read_decisions
from tools.common.pages import templates

GRASS, RAILS, SKY, TRAIN, CAT = range(5)


def world(rails_elsewhere: int) -> tuple[Config, Split, Clusters]:
    """60 images of a train, mostly on rails, and 60 of a cat; what each removes is its ground."""
    generator = torch.Generator().manual_seed(0)
    vectors, labels, images, removed = [], [], [], []
    for image in range(120):
        c = 1 + image // 60
        if c == 1:
            ground = RAILS if image % 10 else GRASS
        else:
            ground = RAILS if image - 60 < rails_elsewhere else GRASS
        rows = (
            (0, ground),
            (0, SKY),
            (c, ground if c == 1 else SKY),
            (c, TRAIN if c == 1 else CAT),
        )
        for number, (label, content) in enumerate(rows):
            noise = 0.1 * torch.randn(16, generator=generator)
            vectors.append(F.one_hot(torch.tensor(content), 16) + noise)
            labels.append(label)
            images.append(image)
            removed.append(50 if number == 2 else 0)
    tags = np.repeat(np.eye(2, dtype=bool), 60, 0)
    split = Split(tuple(map(str, range(120))), (), tags)
    count = len(labels)
    clusters = Clusters(
        F.normalize(torch.stack(vectors), dim=1),
        np.array(labels),
        np.array(images),
        np.full(count, 60),
        np.array(removed),
        np.full(120, 400),
        np.array([0, 100, 100]),
        np.array([0, 40, 40]),
        [],
    )
    data = DataConfig(classes=("train", "cat"), biased_classes=("train",))
    return Config(data=data), split, clusters


def test_context_that_keeps_a_class_company_is_bias_and_common_context_is_not():
    audits = rank(*world(rails_elsewhere=12), examples=2, witnesses=2)
    train, cat = audits
    assert (train.name, train.removed, cat.removed) == ("train", 0.4, 0.4)
    assert train.odds > 2 and train.score > 0.3
    assert cat.odds == pytest.approx(1, abs=0.5) and cat.score < 0.15
    assert area_under_curve(audits) == 1


def test_witnesses_show_what_was_removed_and_lack_the_class():
    config, split, clusters = world(rails_elsewhere=12)
    train = rank(config, split, clusters, examples=3, witnesses=2)[0]
    assert len(train.examples) == 3
    for example in train.examples:
        assert clusters.labels[example.part] == 1 and len(example.witnesses) == 2
        for row in example.witnesses:
            assert clusters.labels[row] == 0
            assert not split.tags[clusters.images[row], 0]
            assert clusters.vectors[row].argmax() == clusters.vectors[example.part].argmax()


def test_context_that_never_occurs_without_the_class_is_warned_of():
    train = rank(*world(rails_elsewhere=0), examples=1, witnesses=1)[0]
    assert train.name == "train" and train.unseen > 0.8 and "unseen" in train.warning
    audits = rank(*world(rails_elsewhere=50), examples=1, witnesses=1)
    assert not any(audit.warning for audit in audits)


def test_class_of_every_image_has_nothing_to_be_compared_with():
    config, split, clusters = world(rails_elsewhere=12)
    split.tags[:, 1] = True
    cat = next(a for a in rank(config, split, clusters, 1, 1) if a.name == "cat")
    assert cat.score == 0 and "no image without it" in cat.warning


def test_class_of_which_nothing_was_removed_has_no_score():
    config, split, clusters = world(rails_elsewhere=12)
    clusters.removed[:], clusters.marked[:] = 0, 0
    assert [a.score for a in rank(config, split, clusters, 1, 1)] == [0, 0]


def test_one_witness_of_each_image_nearest_first():
    assert distinct(np.array([3, 1, 2, 0]), np.array([7, 5, 7, 5]), 2) == [3, 2]


def page_of(*audits: Audit) -> str:
    template = templates(ROOT / "tools/audit").get_template("audit_bias.html.j2")
    values = {"images": 1, "scores": {}, "checked": False, "inline": None, "labels": "<labels>"}
    values["context"] = context_share([*audits])
    return template.render(audits=audits, blind=1, min_gain=0.1, **values)


def test_share_of_context_is_that_of_the_whole_labelled_area():
    shares = {"boat": 0.5, "cow": 1.0, "cat": None}
    audits = [Audit(n, 9, cut=ClassCut(object_share=share)) for n, share in shares.items()]
    for audit, area in zip(audits, (300, 100, 1000), strict=True):
        audit.labelled = area
    assert context_share(audits) == 150 / 400  # a cat's labels are not known to hold any
    assert context_share(audits[2:]) is None
    assert "38&nbsp;%</strong> of the labelled area" in page_of(*audits)


def test_class_of_few_photographs_has_a_warning():
    assert "Only one photograph has it" in page_of(Audit("cow", 1))
    assert f"Only {FEW - 1} photographs have it" in page_of(Audit("cow", FEW - 1))
    assert "have it" not in page_of(Audit("cow", FEW))


def test_names_are_escaped():
    html = page_of(Audit("<b>&", 1, warning="<i>"))
    assert "&lt;b&gt;&amp;" in html and "<b>" not in html and "<i>" not in html


def stage_3(folder: Path, warnings: list[dict]) -> Path:
    """A folder of decisions: on a class with two hills, one with a single hill, one without cells,
    and one that is all object."""
    rng = np.random.default_rng(0)
    counts = np.zeros((4, 3, BINS), np.int64)
    for c, means in {0: (0.3, 0, 0.6), 1: (0.2, 0.21, 0.2), 3: (0.6, 0, 0.6)}.items():
        for k, mean in enumerate(means):
            bins = ((rng.normal(mean, 0.05, 5000) + 1) * BINS / 2).astype(int)
            counts[c, k] = np.bincount(bins, minlength=BINS)
    counts[3, 0] = counts[3, 2]
    np.savez(folder / "cuts.npz", counts=counts, **find_cuts(counts))
    results = {"removed": [0.95, 0.0, 0.0, 0.001], "warnings": warnings}
    names = ("boat", "<sofa>", "absent", "cat")
    write_json(folder / "manifest.json", {"classes": names, "finished": True, "results": results})
    return folder


def charts_of(html: str) -> dict[str, str]:
    """The charts of cuts by class."""
    drawn = re.findall(r"<figure class=\"chart\">.*?</figure>", html, re.DOTALL)
    return {re.search(r"in and around ([^<]*)</fig", svg)[1]: svg for svg in drawn}


def cut_in(svg: str) -> tuple[float, float] | None:
    """The mark of a chart and its left edge on the scale that its labels give; None if unmarked."""
    mark = re.search(r'<line class="mark" x1="([0-9.]+)"', svg)
    labels = re.findall(r'<text x="([0-9.]+)" y="173" text-anchor="middle">([^<]+)', svg)
    (left, low), (right, high) = ((float(x), float(text)) for x, text in (labels[0], labels[-1]))
    ends = (float(mark[1]), LEFT) if mark else ()
    return tuple(low + (x - left) / (right - left) * (high - low) for x in ends) or None


def test_each_class_with_cells_has_a_chart_with_its_cut(tmp_path):
    found = read_decisions(stage_3(tmp_path, []))
    html = page_of(*(Audit(name, 1, cut=cut) for name, cut in found.classes.items()))
    charts = charts_of(html)
    assert [*charts] == ["boat", "&lt;sofa&gt;", "cat"]
    assert cut_in(charts["boat"])[0] == pytest.approx(found.classes["boat"].cut, abs=0.005)
    assert found.classes["cat"].cut is None and cut_in(charts["cat"]) is None
    assert [svg.count("<polyline") for svg in charts.values()] == [3, 3, 3]
    assert 0.1 < found.classes["boat"].cut < 0.5 and cut_in(charts["&lt;sofa&gt;"]) is None
    assert "Cut at 0." in html and "contrast 1.00" in html and "95.0% removed" in html
    assert "a cut would raise its expected IoU from 1.00 to 1.00, by less than 0.1." in html
    assert "its kept clusters are no more similar to it than its surroundings" in html
    assert "no cells to compare (none in: region, ring, kept)" in html


def test_warnings_of_stage_3_stand_in_the_section_of_their_classes(tmp_path):
    lost = {
        "problem": "stage 3 removed nearly all labels",
        "classes": {"boat": "95%", "cat": "91%"},
    }
    found = read_decisions(stage_3(tmp_path, [{**lost, "remedy": "Use other features"}]))
    told = "Stage 3 removed nearly all labels: 95%. Use other features."
    assert found.classes["boat"].warnings == [told] and not found.classes["<sofa>"].warnings
    assert found.warnings == [told.replace("95%", "boat 95%, cat 91%")]
    html = page_of(*(Audit(name, 1, cut=cut) for name, cut in found.classes.items()))
    assert html.count(f"&#9888; {told}") == 1


def test_unfinished_stage_3_has_decided_nothing(tmp_path):
    assert not read_decisions(tmp_path).classes
    write_json(tmp_path / "manifest.json", {"finished": False, "classes": ["a"], "results": {}})
    assert not read_decisions(tmp_path).classes


@pytest.fixture
def debiased(experiment, tiny_data):
    """Stage 3's output on features that say what each cell shows; labels claim the lower half."""

    def lower_half(mask: np.ndarray, main: int) -> np.ndarray:
        label = np.zeros(mask.shape, np.uint8)
        label[40:] = main
        return label

    perfect_features(experiment, tiny_data, lower_half)
    done = run_inside("make_debiased_labels.py", "--config", experiment)
    assert done.returncode == 0, done.stderr
    return experiment


def test_page_table_and_picture_without_masks_and_with_them(debiased, tiny_data, tmp_path):
    command = ("tools/audit/audit_bias.py", "--config", debiased, "--output", tmp_path / "out")
    hidden = (tiny_data / "SegmentationClass").rename(tiny_data / "away")
    try:
        done = run_python(*command)
    finally:
        hidden.rename(tiny_data / "SegmentationClass")
    assert done.returncode == 0, done.stderr
    rows = [*csv.DictReader((tmp_path / "out/audit.csv").open())]
    assert {row["name"] for row in rows} == {*CLASSES}
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True) and not rows[0]["precision"]
    cuts = np.load(debiased.parent / "run/debias/cuts.npz")
    shares = {row["name"]: row["object_share"] for row in rows}
    page = (tmp_path / "out/audit.html").read_text()
    charts = charts_of(page)
    assert charts.keys() == {c for c, n in zip(CLASSES, cuts["counts"], strict=True) if n.any()}
    for name, cut, share in zip(CLASSES, cuts["cut"], cuts["object_share"], strict=True):
        assert shares[name] == ("" if np.isnan(share) else f"{share:.4f}")
        if not np.isnan(cut):
            mark, edge = cut_in(charts[name])
            assert mark == pytest.approx(max(cut, edge), abs=0.02)
    warnings = read_json(debiased.parent / "run/debias/manifest.json")["results"]["warnings"]
    for warning in warnings:
        assert page.count(f"{warning['problem'][1:]}: ") >= len(warning["classes"])
    assert "http" not in page and "<script" not in page and "data:image/jpeg" in page
    assert "No mask was read" in page
    assert (tmp_path / "out/audit.png").read_bytes().startswith(b"\x89PNG")
    done = run_inside(*command, "--with-masks")
    assert done.returncode == 0, done.stderr
    rows = [*csv.DictReader((tmp_path / "out/audit.csv").open())]
    assert any(row["precision"] for row in rows)
    assert "recall</th>" in (tmp_path / "out/audit.html").read_text()


def test_fixed_cut_has_a_page_without_charts(debiased, tmp_path):
    options = ("--config", debiased, "--debias.cut", "fixed", "--debias.output_dir", tmp_path)
    for script in ("make_debiased_labels.py", "tools/audit/audit_bias.py"):
        done = run_inside(script, *options)
        assert done.returncode == 0, done.stderr
    page = (tmp_path / "audit.html").read_text()
    assert "<svg" not in page and "object share" not in page and "bias score" in page
    assert not any(row["contrast"] for row in csv.DictReader((tmp_path / "audit.csv").open()))


def test_missing_or_foreign_output_of_stage_3_is_one_message(debiased, tmp_path):
    folder = debiased.parent / "run/debias"
    label = next((debiased.parent / "labels").glob("*.png"))
    original = read_label(label)
    write_label(label, np.full_like(original, 3))
    done = run_inside("tools/audit/audit_bias.py", "--config", debiased)
    assert done.returncode and "is stale" in done.stderr and "Traceback" not in done.stderr
    write_label(label, original)
    (folder / "centroids.npz").write_bytes(b"broken")
    done = run_inside("tools/audit/audit_bias.py", "--config", debiased)
    assert done.returncode and "centroids.npz cannot be read" in done.stderr
    (folder / "centroids.npz").unlink()
    done = run_inside("tools/audit/audit_bias.py", "--config", debiased)
    assert done.returncode and "run make_debiased_labels.py" in done.stderr


def test_audit_of_anybodys_labels_needs_photographs_and_label_maps_alone(
    tiny_data, tmp_path, monkeypatch
):
    from tools.audit import audit_labels

    def call(*command, quiet):
        done = run_python(*command)
        assert done.returncode == 0, done.stderr

    monkeypatch.setattr(audit_labels, "call", call)
    labels, features = tmp_path / "labels", tmp_path / "features"
    features.mkdir()
    for path in sorted((tiny_data / "SegmentationClass").glob("train_*.png")):
        label = read_label(path)
        write_label(labels / path.name, np.where(label == 255, 0, label).astype(np.uint8))
        cells = np.random.default_rng(0).normal(size=(4, 16, 16)) + label[4::8, 4::8] * 2
        np.save(features / f"{path.stem}.npy", cells.astype(np.float16))
    arguments = ("--images", tiny_data / "JPEGImages", "--labels", labels)
    arguments += ("--features", features, "--output", tmp_path / "audit")
    script = "tools/audit/audit_labels.py"
    done = run_inside(script, *arguments)
    assert done.returncode == 1 and "give the class names with --classes" in done.stderr
    classes, small = f"--classes={','.join(CLASSES)}", ("--uss.whiten=null", "--workers=0")
    done = run_inside(script, *arguments, classes, *small)
    assert done.returncode == 0, done.stderr
    assert "removed  object share" in done.stdout and "audit.html" in done.stdout
    page = (tmp_path / "audit/audit.html").read_text()
    assert "No mask was read" in page and all(name in page for name in CLASSES)
    report = (tmp_path / "audit/report.html").read_text()
    assert "nothing is scored" in report and all(name in report for name in CLASSES)
    tags = (tmp_path / "audit/run/tags.csv").read_text().splitlines()
    assert tags[0] == "image,tags" and len(tags) == 17
    other = tmp_path / "other"
    for path in labels.iterdir():
        write_label(other / path.name, np.full_like(read_label(path), 1))
    changed = (*arguments[:2], "--labels", other, *arguments[4:], classes, *small)
    done = run_inside(script, *changed)
    assert done.returncode == 1 and "not those of the earlier call" in done.stderr
    assert (tmp_path / "audit/run/tags.csv").read_text().splitlines() == tags
    done = run_inside(script, *arguments[:-1], other / "audit", "--labels", other, classes)
    assert done.returncode == 1 and "is inside" in done.stderr
    (other / "train_00000.png").rename(other / "lost.png")
    done = run_inside(script, *changed)
    assert done.returncode == 1 and "its photograph" in done.stderr
    assert (tmp_path / "audit/run/tags.csv").read_text().splitlines() == tags


@pytest.fixture
def pair(tmp_path) -> tuple:
    """Options of an audit of one photograph whose label map has the labels 1 and 2."""
    (tmp_path / "photographs").mkdir()
    photograph = np.zeros((8, 8, 3), np.uint8)
    Image.fromarray(photograph).save(tmp_path / "photographs/one.jpg")
    write_label(tmp_path / "labels/one.png", np.tile(np.uint8([0, 1, 2, 2]), (8, 2)))
    places = {"images": "photographs", "labels": "labels", "output": "audit"}
    return tuple(f"--{key}={tmp_path / place}" for key, place in places.items())


@pytest.mark.parametrize("name", ["salt; pepper", "salt|pepper", "[salt]"])
def test_names_that_tables_of_tags_would_split_are_refused(pair, tmp_path, name):
    done = run_inside("tools/audit/audit_labels.py", *pair, f"--classes=boat,{name}")
    assert done.returncode == 1 and f"the class {name!r} cannot be in a table" in done.stderr
    write_json(tmp_path / "labels/made_from.json", {"classes": ["boat", "salt, pepper"]})
    done = run_inside("tools/audit/audit_labels.py", *pair)
    assert done.returncode == 1 and "the class 'salt, pepper' cannot be" in done.stderr
    assert not (tmp_path / "audit").exists()


def test_names_reach_the_stages_as_they_are(pair, tmp_path, monkeypatch):
    from tools.audit import audit_labels

    names, commands = ["!boat", "no: entry"], []

    def call(*command, quiet):
        commands.append(command)
        raise UserError("enough")

    monkeypatch.setattr(audit_labels, "call", call)
    run_inside("tools/audit/audit_labels.py", *pair, f"--classes={','.join(names)}")
    parser = make_parser("train_uss.py", "")
    config, _ = parse(parser, [*commands[0][1:]], named=False)
    assert [*config.data.classes] == names
    assert read_table(tmp_path / "audit/run/tags.csv", names) == {"one.jpg": names}
