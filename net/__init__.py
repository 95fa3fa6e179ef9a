"""The networks: a shared backbone and one linear head a task."""
# What images are normalised with, of the inputs' full range and whatever the data: their own statistics would leak
# information about tasks not yet seen.
MEAN, STD = 0.5, 0.25
