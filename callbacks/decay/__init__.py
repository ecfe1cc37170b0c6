"""How AutoWeightDecay decides on a decay."""
