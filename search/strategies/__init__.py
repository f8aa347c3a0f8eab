"""Search algorithms, all through one objective."""
