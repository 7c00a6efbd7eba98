"""Everything that the paper shows, from one command: all stages, its tables and its figures.

    bash tools/reproduce.sh demo [--quick]     # on the built-in benchmark
    bash tools/reproduce.sh voc                # on PASCAL VOC 2012, next to the published figures
    bash tools/reproduce.sh coco               # on MS COCO 2014, next to the published figures
    bash tools/reproduce.sh photos             # on photographs in VOC's layout, without a GPU

Finished jobs are not run again. Results are in <run_dir>/analysis/ and <run_dir>/report.html; the
run folders are runs/demo, runs/voc_rsepm, runs/coco and runs/photos. Seeds other than 0 have their
own folders, which end in _seedN.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.config import Config, make_parser, parse
from core.data.lists import gather, ground_truth
from core.data.settings import DataConfig
from core.run.errors import UserError, raise_all, run_script
from tools.common import ROOT, tool_parser
from tools.common.experiment import experiment_jobs
from tools.common.jobs import Job, call, digest_of_configs, run_jobs
from tools.common.titles import BEFORE_AND_AFTER
from tools.paper import photographs, published
from tools.paper.results import publish

TABLES = {
    "demo": ("table4", "table5", "table6", "figure8", "figure9", "figure10"),
    "voc": ("table3", "table4", "table5", "table6", "figure8", "figure9", "figure10"),
    "coco": ("table3", "figure8", "figure9"),  # the paper has the others for VOC only
    "photos": ("features", "table6", "figure8", "figure9"),
}
ANALYSES = ("table6", "figure8", "figure9", "figure10")  # of one run, in this order
COMPARISONS = {"table4": "features", "table5": "methods"}  # on the demo, by tools/demo/compare.py
MASKS = "SegmentationClassAug"  # of VOC's 10,582 training images; SegmentationClass has 1,464
OFFICIAL = "train"  # VOC's list of these 1,464, on which the paper scores training images
LAPTOP = ("configs/laptop.yaml", "configs/laptop_voc.yaml")
LEOPART = {"uss.method": "leopart", "uss.backbone.name": "vit_small_patch16_224.dino"}
PREPARE = {
    "voc": "python tools/data/prepare_voc.py --voc VOCtrainval_11-May-2012.tar --sbd benchmark.tgz "
    "--sbd-masks",
    "coco": "python tools/data/prepare_coco.py --root data/coco2014",
}


def main() -> None:
    parser = tool_parser(__doc__, prog="tools/reproduce.sh", allow_abbrev=False)
    parser.add_argument("data", choices=TABLES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="several give a spread")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these tables and figures")
    parser.add_argument(
        "--quick", action="store_true", help="demo: small sizes, to see that it runs"
    )
    parser.add_argument("--jobs", type=int, help="at a time; default: demo all cores, else 1")
    options, further = parser.parse_known_args()
    unknown = sorted({*(options.only or ())} - {*TABLES[options.data]})
    if unknown:
        known = ", ".join(TABLES[options.data])
        parser.error(f"{options.data} has no {unknown[0]}; there are {known}")
    if options.quick and options.data != "demo":
        parser.error("--quick is for demo only")
    if further and options.data == "demo":
        parser.error(f"demo takes no {further[0]}; its settings are in configs/demo.yaml")
    os.chdir(ROOT)  # where the jobs run, and relative folders start
    wanted = [
        name for name in TABLES[options.data] if name in (options.only or TABLES[options.data])
    ]
    if options.data == "demo":
        reproduce_demo(options.seeds, wanted, options.quick, options.jobs or os.cpu_count() or 1)
    elif options.data == "voc":
        reproduce_voc(options.seeds, wanted, options.jobs or 1, further)
    elif options.data == "photos":
        reproduce_photos(options.seeds, wanted, options.jobs or os.cpu_count() or 1, further)
    else:
        reproduce_coco(options.seeds, wanted, options.jobs or 1, further)


def reproduce_demo(seeds: Sequence[int], wanted: Sequence[str], quick: bool, jobs: int) -> None:
    """Runs the demo and its analyses for each seed, then the comparisons over all seeds."""
    name, small = ("demo_quick", ["--quick"]) if quick else ("demo", [])
    runs = []
    for seed in seeds:
        call("tools/demo/run_demo.py", *small, f"--seed={seed}", f"--jobs={jobs}")
        settings = {"run_dir": numbered(f"runs/{name}", seed), "seed": seed}
        settings["data.root"] = f"data/{name}_seed{seed}"
        runs.append(Experiment(name, [f"configs/{name}.yaml"], settings))
        analyse(runs[-1], wanted, jobs, small)
    for table in [table for table in COMPARISONS if table in wanted]:
        if quick:
            print(f"\n{table} has no quick version; python tools/demo/compare.py makes it")
            continue
        output = [f"{run.run_dir}/analysis" for run in runs]
        names = [COMPARISONS[table], "--seeds", *map(str, seeds), "--output", *output]
        call("tools/demo/compare.py", *names, f"--jobs={jobs}")
    report(runs)
    if len(runs) > 1:
        call("tools/demo/summarise_runs.py", *(run.run_dir for run in runs))


def reproduce_voc(
    seeds: Sequence[int], wanted: Sequence[str], jobs: int, further: Sequence[str]
) -> None:
    """Runs the requested methods of Table 5, and the analyses on RS+EPM."""
    methods = [m for m in published.SEGMENTERS if "table5" in wanted or m == "rsepm"]
    methods = ["irn", *methods] if "table4" in wanted and "irn" not in methods else methods
    runs = {m: [experiment(f"voc_{m}", seed, further) for seed in seeds] for m in methods}
    leopart = {}
    for method in ("irn", "rsepm") if "table4" in wanted else ():
        leopart[method] = [with_leopart(run) for run in runs[method]]
    check_data("voc", [run for found in runs.values() for run in found[:1]])
    todo = [job for found in runs.values() for run in found for job in stages(run)]
    todo += [job for found in leopart.values() for run in found for job in stages(run, ("mars",))]
    run_all(todo, "voc", jobs)
    main_runs = runs["rsepm"]
    for run in main_runs:
        options = [f"--list={OFFICIAL}", "--paper=voc", f"--supervised-masks={MASKS}"]
        analyse(run, wanted, jobs, options)
    tables = []
    if "table3" in wanted:
        tables.append(published.table3("voc", "RS+EPM", folders(main_runs)))
    if "table4" in wanted:
        pairs = {m: {"leopart": folders(leopart[m]), "stego": folders(runs[m])} for m in leopart}
        tables.append(published.table4(pairs))
    if "table5" in wanted:
        tables.append(published.table5({m: folders(found) for m, found in runs.items()}))
    finish(main_runs, tables)


def reproduce_coco(
    seeds: Sequence[int], wanted: Sequence[str], jobs: int, further: Sequence[str]
) -> None:
    """Runs Table 3's row and the analyses."""
    runs = [experiment("coco", seed, further) for seed in seeds]
    check_data("coco", runs[:1])
    run_all([job for run in runs for job in stages(run)], "coco", jobs)
    for run in runs:
        analyse(run, wanted, jobs, [])
    tables = [published.table3("coco", "CAM", folders(runs))] if "table3" in wanted else []
    finish(runs, tables)


def reproduce_photos(
    seeds: Sequence[int], wanted: Sequence[str], jobs: int, further: Sequence[str]
) -> None:
    """Runs the whole method on a CPU, with its controls, and the tables over all seeds."""
    runs = [experiment("photos", seed, further, LAPTOP) for seed in seeds]
    for run in runs:
        todo = experiment_jobs(run.arguments, run.run_dir)
        if "features" in wanted:
            todo += photographs.feature_jobs(run.arguments, run.run_dir)
        audit = ["tools/audit/audit_bias.py", *run.arguments]
        todo.append(Job("audit", audit, ("stage 3: debiased labels",)))
        run_jobs(todo, run.run_dir, digest_of_configs("laptop*.yaml"), jobs)
        analyse(run, wanted, jobs, [])
    data = [run.parsed() for run in runs], folders(runs)
    tables = [photographs.labels_table(*data), photographs.segmenters_table(*data)]
    tables += [photographs.features_table(*data)] if "features" in wanted else []
    finish(runs, [*tables, photographs.audit_table(*data)])
    if len(runs) > 1:
        call("tools/demo/summarise_runs.py", *folders(runs))


@dataclass
class Experiment:
    """Configuration files and the settings that differ from them."""

    name: str
    configs: Sequence[str]
    settings: dict[str, Any]
    further: Sequence[str] = field(default_factory=tuple)  # arguments of all its stages

    @property
    def run_dir(self) -> Path:
        return Path(self.settings["run_dir"])

    @property
    def arguments(self) -> list[str]:
        changes = (f"--{key}={value}" for key, value in self.settings.items())
        return [*(f"--config={file}" for file in self.configs), *self.further, *changes]

    def parsed(self) -> Config:
        return parse(make_parser("tools/reproduce.sh", __doc__), self.arguments)[0]


def experiment(
    name: str, seed: int, further: Sequence[str], configs: Sequence[str] = ()
) -> Experiment:
    """The experiment of configs/<name>.yaml, or of other files, with a seed."""
    settings = {"run_dir": numbered(f"runs/{name}", seed), "seed": seed}
    files = configs or [f"configs/{name}.yaml"]
    return Experiment(f"{settings['run_dir'].name}", files, settings, further)


def with_leopart(run: Experiment) -> Experiment:
    """The same experiment on the same pseudo labels, with Leopart's features."""
    settings = run.settings | LEOPART | {"run_dir": f"{run.run_dir}_leopart"}
    settings["wsss.labels_dir"] = f"{run.run_dir}/wsss/labels"
    return dataclasses.replace(run, name=f"{run.name}_leopart", settings=settings)


def numbered(folder: str, seed: int) -> Path:
    return Path(f"{folder}_seed{seed}" if seed else folder)


def folders(runs: Sequence[Experiment]) -> list[Path]:
    return [run.run_dir for run in runs]


def stages(run: Experiment, modes: Sequence[str] = tuple(BEFORE_AND_AFTER)) -> list[Job]:
    """All stages of one experiment, in an order in which each follows those it reads from."""
    jobs: list[Job] = []

    def add(stage: str, script: str, *arguments: str, after: Sequence[str] = ()) -> None:
        needed = tuple(f"{run.name}: {name}" for name in after)
        jobs.append(Job(f"{run.name}: {stage}", [script, *run.arguments, *arguments], needed))

    add("features", "train_uss.py")
    first = ["features"]
    if "wsss.labels_dir" not in run.settings:
        add("pseudo labels", "train_wsss.py")
        first.append("pseudo labels")
    else:  # made by the same experiment with other features
        jobs[0].depends_on = (f"{run.name.removesuffix('_leopart')}: pseudo labels",)
    add("debiased labels", "make_debiased_labels.py", after=first)
    for mode in modes:
        settings = [f"--segmentation.mode={mode}"]
        if mode == "supervised" and "voc" in run.name:
            settings.append(f"--data.masks={MASKS}")
        reads = ["features"] if mode == "supervised" else ["debiased labels"]
        add(f"train {mode}", "train_segmentation.py", *settings, after=reads)
        add(f"score {mode}", "evaluate.py", *settings, after=[f"train {mode}"])
    return jobs


def check_data(data: str, runs: Sequence[Experiment]) -> None:
    """Looks for everything that the runs will read, before they take hours.

    Raises:
        UserError: something is missing; one message lists everything.
    """
    problems: list[str] = []
    for run in runs:
        config = run.parsed()
        weights = (part.backbone.weights for part in (config.uss, config.wsss, config.segmentation))
        for file in [w for w in weights if w not in ("timm", "none") and not Path(w).is_file()]:
            problems.append(f"the weight file {file} is missing; {run.configs[0]} says what it is")
        if run is not runs[0]:
            continue  # all read the same data set
        if not Path(config.data.root).is_dir():
            problems.append(f"the folder {config.data.root} (data.root) is missing")
            continue
        lists = [("train", {}), ("val", {})]
        if data == "voc":
            lists = [("train", {"masks": MASKS}), ("train", {"train_list": OFFICIAL}), ("val", {})]
        for which, changes in lists:
            problems += missing(dataclasses.replace(config.data, **changes), which)
    remedy = f"{PREPARE[data]} (see README); data elsewhere: --data.root FOLDER"
    raise_all([*dict.fromkeys(problems)], remedy)


def missing(data: DataConfig, which: str) -> list[str]:
    """Problems of one list: the list itself, images, tags or masks are missing."""
    problems: list[str] = []
    try:
        split, problems = gather(data, which)
        ground_truth(data, split)
    except UserError as error:
        problems.append(str(error))
    return problems


def run_all(jobs: Sequence[Job], data: str, max_parallel: int) -> None:
    settings = digest_of_configs(f"{data}*.yaml")
    run_jobs(jobs, Path(f"runs/reproduce_{data}"), settings, max_parallel)


def analyse(run: Experiment, wanted: Sequence[str], jobs: int, options: Sequence[str]) -> None:
    """Makes the requested analyses of one run with tools/paper/analyse.py."""
    for name in [name for name in ANALYSES if name in wanted]:
        call("tools/paper/analyse.py", name, *options, f"--jobs={jobs}", *run.arguments)


def finish(runs: Sequence[Experiment], tables: Sequence[published.Analysis]) -> None:
    """Writes the tables over all seeds into each run, and the reports."""
    command = f"bash tools/reproduce.sh {' '.join(sys.argv[1:])}"
    for table in tables:
        publish([run.run_dir / "analysis" for run in runs], table, command)
    report(runs)


def report(runs: Sequence[Experiment]) -> None:
    for run in runs:
        call("tools/report/make_report.py", *run.arguments)


if __name__ == "__main__":
    run_script(main)
