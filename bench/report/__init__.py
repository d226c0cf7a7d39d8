"""Tables and pictures from a study's gains: one HTML file to send round, and a table for the terminal.

Everything here works from the contents of `gains.json` alone.
"""

from bench.report.format import format_gain
from bench.report.html import write_report
from bench.report.terminal import print_gains

__all__ = ["format_gain", "print_gains", "write_report"]
