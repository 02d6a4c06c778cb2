"""Charts of polars frames: functions that return altair charts, and writers of svg, png and html files.

style        colours, fonts, tooltips and titles, shared by all charts
marks        layers which several charts have: lines with bands, a line at 0
numbers      numbers in texts: learning rates, bytes, percentage points
readable     control characters of ids and labels, which no chart can hold, are written as their codes
trajectory   a query's influence or loss over checkpoints
influence    the influence of sources over checkpoints
dominance    fine-tuning against pretraining, query by query
hits         the top samples of a query, and the histogram of its scores
heatmap      groups at checkpoints
columns      two columns of any table
files        render a chart, reproducibly
"""
