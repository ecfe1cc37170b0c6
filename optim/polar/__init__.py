"""Polar factors: U Vᵀ of a matrix U S Vᵀ, by six methods.

- ``orthogonalize``: :func:`~lightning_muon.optim.orthogonalize`, which normalizes a batch and calls one of the methods
- ``newton_schulz``: the iterations of Muon from matrix products alone, step by step or in runs on the Gram matrix
- ``polar_express``: the same with the best polynomial at each step
- ``quintics``: the coefficients of those polynomials, each with its source
- ``exact``: QDWH, ZOLO-PD and the singular value decomposition, to working precision
"""
