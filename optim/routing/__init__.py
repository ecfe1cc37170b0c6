"""Which algorithm updates which parameter, and why.

- ``routing``: rules and routes, the groups for the optimizer, the routing table
- ``used``: the routes that optimizers use
- ``added``: groups of parameters that are added to the optimizer later
- ``model_roles``, ``roles``: the role of each parameter in its model and in its module
- ``output_head``: which layers are output heads
- ``fused_weights``: matrices that one parameter contains: fused projections and stacks of experts
- ``heads``: what attention modules say of their heads; ``by_head``: a matrix for each
- ``wrapped_names``: names without the prefixes of wrappers
"""
