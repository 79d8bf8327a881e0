# SPDX-License-Identifier: BSD-3-Clause
"""The checks of ``--baseline``, asked of a finished report."""

from QEfficient.testing.baseline import CHECKS, compare
from QEfficient.testing.report import Report, Stage
from QEfficient.testing.selection import Progress, Selection, perform


def regress(report: Report, earlier: Report, selection: Selection, progress: Progress) -> None:
    """Add what got worse since an earlier report, for each subject that it knows."""
    changes = compare(earlier, report)
    known = {s.name for s in earlier.subjects}
    asked = Selection(skip=selection.skip)  # by an option of its own, so whatever else was selected
    for subject in [s.name for s in report.subjects if s.name in known]:
        report.results += perform(Stage.BASELINE, CHECKS, changes, subject, asked, progress)
