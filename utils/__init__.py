"""Settings, the training loop, the run folder and the metrics.

The files that are run import this package before torch, whose threads read how to wait when it is loaded.
"""
import os

# Threads that wait for each other give up their cores meanwhile: beside other work a step takes half as long as with
# threads that wait busily, or a tenth, and alone as long (results/speed.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
