import json

import pytest
from invented_run import check_order

from core.run.errors import UserError
from core.run.files import write_json
from tools.common.jobs import Job, run_jobs
from tools.demo import compare, run_demo


def script(path, text: str) -> list[str]:
    """A command that runs `text`."""
    path.write_text(text)
    return [str(path)]


def test_jobs_run_after_those_they_read_from_and_once(tmp_path):
    note = f"open({str(tmp_path / 'order')!r}, 'a').write"
    first = Job(
        "first: slow", script(tmp_path / "a.py", f"import time; time.sleep(0.5); {note}('a')")
    )
    second = Job("second", script(tmp_path / "b.py", f"{note}('b')"), ("first: slow",))
    for _ in range(2):
        run_jobs([first, second], tmp_path / "run", "settings", 2)
    assert (tmp_path / "order").read_text() == "ab"
    assert {*json.loads((tmp_path / "run/jobs.json").read_text())} == {"first: slow", "second"}
    run_jobs([first, second], tmp_path / "run", "others", 2)
    assert (tmp_path / "order").read_text() == "abab"


def test_what_reads_from_a_changed_job_runs_again(tmp_path):
    note = f"open({str(tmp_path / 'order')!r}, 'a').write"
    jobs = [
        Job("first", script(tmp_path / "a.py", f"{note}('a')")),
        Job("second", script(tmp_path / "b.py", f"{note}('b')"), ("first",)),
    ]
    run_jobs(jobs, tmp_path / "run", "", 1)
    jobs[0].command.append("--changed")
    run_jobs(jobs, tmp_path / "run", "", 1)
    assert (tmp_path / "order").read_text() == "abab"


def test_failure_shows_the_end_of_the_log(tmp_path):
    job = Job("stage 9: fails", script(tmp_path / "a.py", "raise SystemExit('no such file')"))
    with pytest.raises(
        UserError, match="(?s)stage 9: fails failed.*no such file.*stage_9_fails.log"
    ):
        run_jobs([job], tmp_path / "run", "", 1)
    assert not (tmp_path / "run/jobs.json").exists()


def test_job_that_waits_for_none_is_a_mistake(tmp_path):
    with pytest.raises(ValueError, match="no such job"):
        run_jobs([Job("a", ["x.py"], ("b",))], tmp_path, "", 1)


def test_each_job_of_the_comparison_comes_after_those_it_reads_from(tmp_path):
    methods = [*compare.METHODS]
    jobs = compare.make_jobs(methods, 4, tmp_path) + compare.feature_jobs(methods, 4, tmp_path)
    check_order(jobs)
    assert len(jobs) == 3 + 9 * len(methods) + 4 * 5 * len(methods)
    mars = next(job for job in jobs if job.name == "seam: train mars")
    assert mars.depends_on == ("seam: debiased labels",)
    assert "--segmentation.mode=mars" in mars.command


@pytest.mark.parametrize("name", ["demo", "demo_quick"])
def test_each_job_of_the_demo_comes_after_those_it_reads_from(name, tmp_path):
    jobs = run_demo.make_jobs(name, 4, tmp_path)
    check_order(jobs)
    assert len(jobs) == 21 and ("--train=96" in jobs[0].command) == (name == "demo_quick")


def test_comparison_says_how_much_of_the_gap_is_closed(tmp_path):
    values = {
        3: {"labels_wsss": 0.4, "labels_debias": 0.5, "wsss": 0.5, "mars": 0.6},
        4: {"labels_wsss": 0.4, "labels_debias": 0.5, "wsss": 0.6, "mars": 0.65},
    }
    for seed, scores in values.items():
        for name, miou in scores.items():
            path = tmp_path / f"seed{seed}/irn/evaluation/{name}/scores.json"
            write_json(path, {"miou": miou})
        write_json(tmp_path / f"seed{seed}/cam/evaluation/supervised/scores.json", {"miou": 0.7})
    rows = compare.method_table(tmp_path, ["irn"], [3, 4]).rows
    labels, segmenters = ["40.0 (40.0 .. 40.0)", "50.0 (50.0 .. 50.0)"], ["55.0 (50.0 .. 60.0)"]
    segmenters += ["62.5 (60.0 .. 65.0)", "7.5 (5.0 .. 10.0)", "50.0 (50.0 .. 50.0)"]
    assert rows[0] == ["IRNet", *labels, *segmenters]
    assert rows[1][3] == "70.0 (70.0 .. 70.0)"


def test_comparison_of_features_says_what_each_kind_gains(tmp_path):
    for name in ("labels_wsss", "labels_debias", "wsss", "mars"):
        write_json(tmp_path / f"seed3/cam/evaluation/{name}/scores.json", {"miou": 0.5})
    for kind in ("stego", "leopart", "classifier", "random"):
        for name in ("labels_debias", "mars"):
            path = tmp_path / f"seed3/cam_{kind}/evaluation/{name}/scores.json"
            write_json(path, {"miou": 0.6})
    write_json(tmp_path / "seed3/cam/evaluation/supervised/scores.json", {"miou": 0.7})
    table = compare.feature_table(tmp_path, ["cam"], [3])
    gains = {row[1]: row[4] for row in table.rows}
    assert gains["STEGO"] == 10.0
    assert gains["self-supervised ViT (the demo's)"] == 0.0
    assert table.name == "table4" and "Seeds 3." in table.caption
