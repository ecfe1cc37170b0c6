"""How ``AutoWeightDecay`` decides on a weight decay and applies it.

- ``controls``: the two modes, a constant decay that is turned on over a limit, and a decay computed for a target.
- ``target_decay``: the decay that brings one set of matrices to a target, and the target of ``"bf16"``.
- ``decay_swap``: another decay than the group's own for the time of a step.
"""
