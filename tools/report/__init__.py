"""The parts of tools/make_report.py: what a run has written, and how the page shows it."""
