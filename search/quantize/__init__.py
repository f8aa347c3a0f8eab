"""The simulation: formats' values, their ranges, batch norm folding, and the model that takes any policy."""
