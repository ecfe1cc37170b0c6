"""The three matrix problems of the PolarGrad paper: which optimizer gets how far, learning rates swept."""
