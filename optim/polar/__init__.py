"""Polar factors: U Vᵀ of a matrix U S Vᵀ, by six methods, or by a function of the user.

- ``orthogonalize``: :func:`~lightning_muon.optim.orthogonalize`, which normalizes a batch and calls one of the methods
- ``normalize``: Frobenius norm one, over the whole range of each dtype
- ``newton_schulz``: from matrix products alone: Newton–Schulz, the same on the Gram matrix, Polar Express
- ``quintics``: the coefficients of their polynomials, each with its source
- ``exact``: QDWH, ZOLO-PD and the singular value decomposition, to working precision
- ``needed_steps``: how many of their steps lift a small singular value
- ``options``: defaults and checks of the methods' options
- ``user_function``: functions given by themselves or by import path
"""
