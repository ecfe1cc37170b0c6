"""Compare optimizers on the three matrix problems of the PolarGrad paper, with a sweep of the learning rates."""
