"""Commands around the five scripts, by purpose.

data: preparing and checking data sets, and drawing the demo's. demo: the built-in benchmark.
paper: the paper's tables and figures. report: one HTML page on a run. audit: what stage 3 did, and
on what features. bench: speed and memory. common: shared by these rooms.
"""
