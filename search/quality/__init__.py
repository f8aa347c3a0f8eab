"""What quantization costs in quality: the true metric, intervals, sensitivities."""
