"""Muon on parameters that are sharded over ranks, or replicated.

- ``sharding``: which elements of a parameter each rank has, as flat ranges, and the units that one rank orthogonalizes
- ``plan``: who owns which unit, and in which way each parameter of a group is updated
- ``buckets``, ``exchange``: what travels together, and the all-to-alls to the owners and back
- ``owners``: the transport of sharded and replicated matrices to the ranks that own them
- ``everywhere``: the transport of matrices that DTensor gathers on all ranks
- ``zero1``: optimizer state that the ranks of DDP share out
- ``wrappers`` (DDP, FSDP1) and ``dtensor`` (FSDP2, HSDP): where the parameters are under each strategy
"""
