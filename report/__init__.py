"""What finished runs say: read what one or many have logged, judge their health, compare them, write a report.

It needs neither torch nor Lightning, and imports no other room.

- ``quantities``: the table of all that the callbacks log, with unit, chart, healthy range and advice for each quantity;
  ``quantity`` is what an entry is made of
- ``run_log``: find runs below a folder, and read their TensorBoard or CSV files
- ``settings``: what a run saved of its settings; ``differences``: which of them differ between runs; ``groups``: runs
  that differ only in their seed; ``ranking``: the metric that they are sorted by
- ``tags``: under which names values are logged; ``charts``: where TensorBoard shows them
- ``health``: the figures of a run, and their verdicts; ``verdict``: that on the run, since when, and what to do
- ``comparison``: runs side by side
- ``plain_text``: names that are not ours, safe to print and plain in Markdown
- ``overview``: a row for each group; ``render``: the comparison in a terminal and as Markdown; ``curves``: the plots;
  ``picture``: a run in one picture; ``replaced``: files that are complete
"""

from lightning_muon.report.comparison import Comparison, compare
from lightning_muon.report.quantities import QUANTITIES
from lightning_muon.report.quantity import Quantity
from lightning_muon.report.render import ReportFileError, print_comparison, write_report
from lightning_muon.report.run_log import RunLog, RunLogError, find_runs, read_run

__all__ = [
    "QUANTITIES",
    "Comparison",
    "Quantity",
    "ReportFileError",
    "RunLog",
    "RunLogError",
    "compare",
    "find_runs",
    "print_comparison",
    "read_run",
    "write_report",
]
