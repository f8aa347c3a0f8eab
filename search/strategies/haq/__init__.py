"""HAQ: the agent of Wang et al. (CVPR 2019), which walks a network and learns how many bits each layer gets."""

from search.strategies.haq.strategy import Haq

__all__ = ["Haq"]
