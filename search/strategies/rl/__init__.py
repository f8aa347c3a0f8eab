"""A learning agent that walks the network within the budget: `strategy=rl`."""
