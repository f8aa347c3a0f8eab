"""Searches side by side: what their run directories say, sorted into groups that compare, and one page about it."""
