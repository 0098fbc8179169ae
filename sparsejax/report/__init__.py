"""Reports: the workdirs of many runs as one table, with statistics, figures and a page."""

from sparsejax.report.output import report
from sparsejax.report.table import ReportError, Results, read, write

__all__ = ["ReportError", "Results", "read", "report", "write"]
