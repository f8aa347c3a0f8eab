"""Latencies that Qualcomm AI Hub publishes, against what the calibrated roofline says of the same networks."""
