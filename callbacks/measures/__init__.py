"""What the monitors compute from tensors.

- ``singular_values``: extreme singular values, condition numbers and stable ranks of many matrices at once.
- ``polar_factors``: what Muon orthogonalized, and how far it is from orthogonal.
- ``weight_steps``: by how much weights changed in a step, and the update in it.
- ``output_rms``: the outputs of layers, by forward hooks.
- ``gradient_norms``: norms of the gradients of each step, read together later; ``spikes``: spikes of a series.
"""
