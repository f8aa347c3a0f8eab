"""Ranges: where the codes of a format lie on the number line.

A smaller range rounds more finely and clips more; the methods differ in what they hold dear:

    minmax          nothing is clipped
    moving_average  the ends are averaged over batches, so that one odd batch counts for little (inputs)
    percentile      a given share of the values is kept
    mse             least squared error
    kl              least Kullback-Leibler divergence of the quantized distribution, as TensorRT has it
    octav           least squared error under uniform rounding noise, by Newton's recursion
    cross_entropy   least change of the softmax (a network's logits)

Weights are seen whole and get a scale per group. Inputs are seen once, batch by batch; one `Histogram` per tensor then
serves all formats and all methods.
"""

from search.quantize.ranges.histogram import Histogram
from search.quantize.ranges.inputs import affine_range, input_range
from search.quantize.ranges.logits import LogitSample
from search.quantize.ranges.methods import METHODS, WEIGHT_METHODS, check_method
from search.quantize.ranges.weights import weight_parameters

__all__ = [
    "METHODS",
    "WEIGHT_METHODS",
    "Histogram",
    "LogitSample",
    "affine_range",
    "check_method",
    "input_range",
    "weight_parameters",
]
