"""MLflow as a mirror of run directories: beside a search, from its files later, and asked for the best plan."""
