"""Times real kernels and writes what it finds to lookup tables; the only place that may import a runtime.

shapes.py    which sites at which precisions
timing.py    turn by turn, undisturbed, in percentiles; clock.py estimates the clock meanwhile
ort.py       CPU kernels, through graphs that ONNX Runtime optimises as it would a network's
cuda.py      CUDA kernels, through torch
profile.py   all of a table, resumable
fit.py       from a table to the calibration of a device file
"""
