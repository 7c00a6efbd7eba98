"""Commands that complement the five scripts, by purpose.

data: prepares and checks data sets, and draws the demo's. demo: the built-in benchmark. paper: the
paper's tables and figures. report: one HTML page about a run. audit: what stage 3 did, and with
which features. bench: speed and memory. common: code shared by these folders.
"""
