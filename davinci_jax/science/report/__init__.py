"""A run as one page: `write_report(run_dir)` writes report.html from what the run directory holds."""

from davinci_jax.science.report.page import write_report

__all__ = ["write_report"]
