"""Polar factors: U Vᵀ of a matrix U S Vᵀ, by six methods.

- ``orthogonalize``: :func:`~lightning_muon.optim.orthogonalize`, which normalizes a batch and calls one of the methods
- ``newton_schulz``: from matrix products alone: Newton–Schulz, the same on the Gram matrix, Polar Express
- ``quintics``: the coefficients of their polynomials, each with its source
- ``exact``: QDWH, ZOLO-PD and the singular value decomposition, to working precision
"""
