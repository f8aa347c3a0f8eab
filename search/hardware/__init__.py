"""The commands `bitplan hardware`: devices listed, shown, and compared on a network."""
