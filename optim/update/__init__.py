"""The update rules: Muon and AdamW, as functions of tensors.

- ``muon``: the rule of Muon with its variants, and the transport for matrices that are whole on this rank
- ``adamw``: torch's functional AdamW, with care for half precision
- ``scale``: how large an orthogonalized update is
- ``matrix_layout``: where the matrices are inside a parameter
- ``state``: names and dtypes of the optimizer state
- ``options``: the options of a parameter group
"""
