"""The parts of tools/make_report.py.

record.py and analyses.py read what a run has written; figures.py, charts.py and pictures.py make
numbers, curves and pictures of it; page.html.j2 includes the page's sections, one file each, and
report.css and report.js, which end up inside it.
"""
