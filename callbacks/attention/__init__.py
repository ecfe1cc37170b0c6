"""Attention: which modules of a model attend, their logits, and the weights of their queries and keys.

- ``calls``: the calls of attention in a forward pass, each with the module that made it.
- ``logits``: the largest logit of each head.
- ``projections``: which rows of which weights make the queries and keys of each head.
- ``growth``: when growing logits will reach a limit.
"""
