"""Which algorithm updates which parameter, and why.

- ``routes``: rules and routes; ``routing``: the groups for the optimizer, the routing table
- ``rates``: learning rates of roles
- ``used``: the routes that optimizers use
- ``added``: groups of parameters that are added to the optimizer later
- ``model_roles``, ``roles``: the role of each parameter in its model and in its module
- ``output_head``: which layers are output heads, by their places (``head_places``), names (``head_names``) and the
  ``widths`` of all modules; ``module_tree``: the modules that contain layers
- ``guesses``: what to say of a role that is a guess
- ``fused_weights``: matrices that one parameter contains: fused projections and stacks of experts
- ``repeated``: the repeated modules of a model
- ``heads``: what attention modules say of their heads; ``by_head``: a matrix for each
- ``wrapped_names``: names without the prefixes of wrappers
"""
