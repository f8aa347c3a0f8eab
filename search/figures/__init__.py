"""Figures of a run: for each, a function that gathers plain data and functions that draw it."""
