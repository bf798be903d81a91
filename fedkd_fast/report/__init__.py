"""Run folders -> one self-contained HTML page. Reads files; knows nothing of training."""

from fedkd_fast.report.groups import group_runs
from fedkd_fast.report.page import build_page, read_runs, write_report

__all__ = ["build_page", "group_runs", "read_runs", "write_report"]
