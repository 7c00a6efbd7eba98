"""The paper's analyses of one run: a table, a figure, and how to read them.

    python tools/paper/analyse.py figure8 --config configs/demo.yaml    # selected centroids
    python tools/paper/analyse.py figure9 --config configs/demo.yaml    # gains by class
    python tools/paper/analyse.py figure10 --config configs/demo.yaml    # sensitivity of stage 3
    python tools/paper/analyse.py figure10 --config configs/demo.yaml --segmenters K_bg alpha
    python tools/paper/analyse.py table6 --config configs/demo.yaml      # ablation of stage 4

Takes any key of the configuration, as the stages do. Writes <run_dir>/analysis/<name>.json, .png
and .pdf, and prints a Markdown table. figure8 and figure9 read the output of the stages; figure10
makes labels; table6 and figure10 with --segmenters train networks. Finished jobs are not run again.
All of them read masks, for scoring only. tools/demo/compare.py makes Tables 4 and 5, and
tools/reproduce.sh makes everything.
"""

import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.config import make_parser, parse
from core.pipeline import Run
from core.run.errors import run_script
from tools.common import ROOT, tool_parser
from tools.paper.ablation import table6
from tools.paper.gains import figure9
from tools.paper.results import publish
from tools.paper.selection import figure8
from tools.paper.sensitivity import figure10


def main() -> None:
    parser = tool_parser(__doc__, prog="tools/paper/analyse.py", allow_abbrev=False)
    parser.add_argument("what", choices=["figure8", "figure9", "figure10", "table6"])
    parser.add_argument("--list", help="list of training images that have masks; default: all")
    parser.add_argument("--paper", choices=["voc"], help="show the published figures, too")
    parser.add_argument("--supervised-masks", help="table6: masks for supervised training")
    parser.add_argument("--quick", action="store_true", help="figure10: few points")
    parser.add_argument(
        "--segmenters",
        nargs="+",
        default=(),
        metavar="SETTING",
        help="figure10: train a segmenter for each value of these settings (K_bg, alpha, distance, "
        "cut, threshold), as the paper does, for figure10_segmenters",
    )
    parser.add_argument("--jobs", type=int, default=1, help="figure10, table6: jobs at a time")
    options, arguments = parser.parse_known_args()
    os.chdir(ROOT)  # where the jobs run, and relative folders start
    config, _ = parse(make_parser("tools/paper/analyse.py", __doc__), arguments)
    if options.what == "figure8":
        made = figure8(config, options.list, options.paper)
    elif options.what == "figure9":
        made = figure9(config, options.paper)
    elif options.what == "figure10":
        made = figure10(
            config, arguments, options.list, options.jobs, options.quick, options.segmenters
        )
    else:
        masks = options.supervised_masks
        made = (table6(config, arguments, options.list, options.jobs, options.paper, masks),)
    command = f"python tools/paper/analyse.py {shlex.join(sys.argv[1:])}"
    publish([Run(config).folder / "analysis"], made[0], command, *made[1:])


if __name__ == "__main__":
    run_script(main)
