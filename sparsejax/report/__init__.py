"""Reports: the workdirs of many runs as one table, with statistics, figures and a page."""

from sparsejax.report.output import Report, report
from sparsejax.report.table import ReportError, Results, read, write

__all__ = ["Report", "ReportError", "Results", "read", "report", "write"]
