"""What is quantized: the contract, the built-in tasks, and their training."""
