"""The update rules: Muon and AdamW, as functions of tensors.

- ``muon``: the rule of Muon, and the transport for matrices that are whole on this rank
- ``adamw``: torch's functional AdamW, with care for half precision
- ``normuon``: the normalization of neurons
- ``scale``: how large an orthogonalized update is
- ``matrix_layout``: where the matrices are inside a parameter
- ``state``: names and dtypes of the optimizer state
- ``options``: the options of a parameter group
"""
