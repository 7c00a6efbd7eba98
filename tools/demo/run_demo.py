"""The full method on the built-in benchmark: data set, five stages, all training modes, report.

    bash tools/demo.sh [--quick] [--seed N]

Independent jobs run in parallel, one thread each. Finished jobs are not run again; a killed
job resumes where it stopped. Each job's output is in <run_dir>/logs/.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.run.errors import run_script
from core.run.files import user_path
from tools.common import ROOT, tool_parser
from tools.common.experiment import experiment_jobs
from tools.common.jobs import Job, call, digest_of_configs, run_jobs


def main() -> None:
    parser = tool_parser(__doc__, prog="tools/demo.sh")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a smoke test")
    parser.add_argument("--seed", type=int, default=0, help="seed of data set and stages")
    parser.add_argument(
        "--run-dir", type=user_path, help="results; default: runs/demo[_quick][_seedN]"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="jobs at a time")
    options = parser.parse_args()
    name = "demo_quick" if options.quick else "demo"
    os.chdir(ROOT)  # where the jobs run, and relative folders start
    default = Path("runs") / (f"{name}_seed{options.seed}" if options.seed else name)
    run_dir = options.run_dir or default
    began = time.monotonic()
    settings = settings_of(name, options.seed, run_dir)
    jobs = make_jobs(name, options.seed, run_dir)
    run_jobs(jobs, run_dir, digest_of_configs(f"{name}.yaml"), options.jobs)
    call("tools/report/make_report.py", *settings, "--summary")
    print(f"\n{time.monotonic() - began:.0f} s in total; open {run_dir / 'report.html'}")


def settings_of(name: str, seed: int, run_dir: Path) -> list[str]:
    """Arguments of the stages: the configuration, and the settings that differ from it."""
    overrides = {"run_dir": run_dir, "seed": seed, "data.root": f"data/{name}_seed{seed}"}
    return [f"--config=configs/{name}.yaml", *(f"--{k}={v}" for k, v in overrides.items())]


def make_jobs(name: str, seed: int, run_dir: Path) -> list[Job]:
    """All jobs of the demo, in an order in which each follows those it reads from."""
    sizes = ["--train=96", "--val=32"] if name == "demo_quick" else []
    drawn = [f"--root=data/{name}_seed{seed}", f"--seed={seed}", *sizes]
    first = Job("data set", ["tools/data/make_demo_dataset.py", *drawn])
    return [first, *experiment_jobs(settings_of(name, seed, run_dir), run_dir, first.name)]


if __name__ == "__main__":
    run_script(main)
