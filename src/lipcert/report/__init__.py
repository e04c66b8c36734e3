"""The report: certified runs on one self-contained page, for reading and for checking."""

from lipcert.report.page import write_report

__all__ = ["write_report"]
