"""The jobs of one whole experiment: all stages, all training modes, scores, a control."""

from collections.abc import Sequence
from pathlib import Path

from tools.common.jobs import Job


def experiment_jobs(settings: Sequence[str], run_dir: Path, first: str | None = None) -> list[Job]:
    """All jobs of an experiment, in an order in which each follows those it reads from.

    Args:
        settings: arguments of every stage, `--run_dir` included.
        run_dir: folder of the experiment.
        first: job that makes the data set, if there is one.
    """
    best, control = run_dir / "wsss/labels_best", run_dir / "control"
    jobs: list[Job] = []

    def add(title: str, script: str, *arguments: str, after: Sequence[str | None]) -> str:
        needed = tuple(name for name in after if name)
        jobs.append(Job(title, [script, *settings, *arguments], needed))
        return title

    def score(title: str, folder: Path, label: str, after: str) -> None:
        options = f"--predictions={folder}", "--split=train", f"--name={label}"
        add(f"scores: {title}", "evaluate.py", *options, after=[after])

    wsss = add("stage 2: classifier, pseudo labels", "train_wsss.py", after=[first])
    uss = add("stage 1: features", "train_uss.py", after=[first])
    debias = add("stage 3: debiased labels", "make_debiased_labels.py", after=[wsss, uss])
    sweep = add("baseline: best threshold", "tools/demo/sweep_threshold.py", after=[wsss])
    reads = {"wsss_best": sweep, "supervised": first}
    for mode in ("supervised", "wsss_best", "mars", "complement", "ignore"):
        arguments = [f"--segmentation.mode={mode}"]
        if mode == "wsss_best":
            arguments = ["--segmentation.mode=wsss", "--segmentation.name=wsss_best"]
            arguments.append(f"--segmentation.labels_dir={best}")
        after = [reads.get(mode, debias)]
        trained = add(f"stage 4: {mode}", "train_segmentation.py", *arguments, after=after)
        add(f"stage 5: {mode}", "evaluate.py", *arguments, after=[trained])
    score("pseudo labels", run_dir / "wsss/labels", "labels_wsss", wsss)
    score("best threshold", best, "labels_wsss_best", sweep)
    score("debiased labels", run_dir / "debias/labels", "labels_debias", debias)
    arguments = ["--source=classifier", f"--output={control}/features"]
    exported = "control: classifier features"
    add(exported, "tools/export_features.py", *arguments, after=[wsss])
    arguments = [f"--uss.features_dir={control}/features", "--uss.centre=true"]
    arguments.append(f"--debias.output_dir={control}/debias")
    debiased = "control: debiased with them"
    add(debiased, "make_debiased_labels.py", *arguments, after=[exported])
    compared = f"--control={control}/debias"
    add("analysis", "tools/audit/analyse_bias.py", compared, after=[debias, debiased])
    return jobs
