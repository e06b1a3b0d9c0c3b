"""Train every point of a grid, several seeds each, and write the report.

  qkvjax study --config=configs/quickstart.py --workdir=runs/quickstart
  qkvjax study --config=configs/quickstart.py --workdir=runs/quickstart --jobs=2
  qkvjax study --config=configs/quickstart.py --workdir=W --list       points and their state
  qkvjax study --config=configs/quickstart.py --workdir=W --point=3    one of them (job arrays)
  qkvjax study --config=configs/quickstart.py --workdir=W --report_only

The config is the base of all points and has a group `study`: points (made with qkvjax.sweep;
the first is the baseline), seeds (how many), prompt and title; settings, a grid in each place of
which every point is trained and compared; reference, somebody's figures to print beside. The runs
of a seed see the same batches, so differences are paired. With `tuned` (qkvjax.sweep.tuned) each
point is first trained with several values of a field, on other seeds, and compared at its best:
--list numbers the runs of both phases. Finished points are skipped when the
study is started again; failed ones are recorded and tried again. The workdir gets results.jsonl (a
line a run), results.csv (a line a variant), measurements.json, report.md, report.html and runs/.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from absl import flags

from qkvjax.commands import cli
from qkvjax.errors import UserError

FLAGS = {
    "workdir": (str, None, "where the study is kept"),
    "jobs": (int, None, "runs at a time; unset means one a core on CPU, else one", 1),
    "list": (bool, False, "print the points and their state"),
    "point": (int, None, "train this one only"),
    "measure": (bool, False, "only measure what each point costs on this machine"),
    "report_only": (bool, False, "write the report of what is there"),
    "max_seconds": (float, None, "start no run that would not end in time"),
    **cli.ATTENTION,
}


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv if argv is None else argv)
    arguments = given if given and given[0].startswith("-") else given[1:]
    return cli.run(argv, __doc__, FLAGS, lambda values: body(values, arguments), config="required")


def body(values: flags.FlagValues, arguments: list[str]) -> int:
    from qkvjax.studies.grid import Study
    from qkvjax.studies.measurements import measure_here
    from qkvjax.studies.point import train_point
    from qkvjax.studies.scheduler import run_all
    from qkvjax.workdir import only_one, open_workdir

    study = Study(values.config, open_workdir(values.workdir))
    if values.list:
        print(study.listing())
        return 0
    if values.measure:
        return measure_here(study)
    if values.report_only and not (study.workdir / "study.json").exists():
        raise UserError(f"there is no study in {study.workdir} to report: run it first")
    part = values.report_only or values.point is not None
    study.claim("qkvjax study " + shlex.join(arguments), keep_command=part)
    if values.point is not None:
        return train_point(study, values.point)
    failed = 0
    if not values.report_only:
        with only_one(study.workdir):
            failed = run_all(study, arguments, jobs=values.jobs, max_seconds=values.max_seconds)
    from qkvjax.report.page import closing_lines, write_report

    page = write_report(study.workdir)
    for sentence in study.remarks():
        print(sentence)
    print("\n".join(["", *closing_lines(study.workdir), "", f"report: {page.resolve()}"]))
    failures = f"{failed} runs failed; the report names them, and the same command tries them again"
    if failed and not study.done():
        raise UserError(f"no run has finished: {failures}")
    if failed:
        print(failures)
    return 0
