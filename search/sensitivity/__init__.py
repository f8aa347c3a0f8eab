"""Sensitivity: what single choices and pairs of choices cost in quality, and what that foretells of a policy."""
