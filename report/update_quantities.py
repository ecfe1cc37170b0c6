"""Entries of the table of quantities: the size of updates, and their orthogonality by operator."""

from lightning_muon.report.quantity import Chart, Line, Panel, Quantity, Range

MOVE_ALIKE = (
    "take update_scale: moonlight, with which Muon and AdamW share a learning rate, or set lr and adamw_lr so that both"
    " move alike"
)

# With the orthogonality error, whose shape over the model they are.
OF_OPERATORS = (
    Quantity(
        tag="operator_error/<operator>",
        monitor="OrthogonalityMonitor",
        meaning="orthogonality error of what has the same place in each layer, such as `attention.q`: mean over depth"
        " and experts, blocks of fused projections apart",
        unit="none; 0 is orthogonal",
        usual="alike for all operators",
        advice="look at the map, text and picture orthogonality_map, for the layers in which it is large",
        chart=Chart("Updates", 13, "Orthogonality error of each operator: alike", r"operator_error/.+"),
    ),
    Quantity(
        tag="needed_steps/<operator>",
        monitor="OrthogonalityMonitor",
        meaning="steps of the method after which the smallest singular value σ of each matrix is in the healthy range,"
        " abs(σ² − 1) ≤ 0.7: the largest over depth and experts",
        unit="steps",
        usual="few more than are taken; 13 at most with the classic coefficients, where float32 resolves no more",
        advice="take more steps, or the preset optimizer/polar_express, if the operator's error is large too",
        chart=Chart("Updates", 14, "Steps that each operator's polar factor needs", r"needed_steps/.+"),
    ),
)

OF_UPDATES = (
    Quantity(
        tag="update_rms/<group>",
        monitor="UpdateRMSMonitor",
        meaning="root mean square of a group's update, √mean(U²) with U = ((1 − ηλ)W − W′) / η",
        unit="that of the weights, per unit of the learning rate",
        usual="AdamW: 1 in its first step, then 0.1 to 0.3; Muon: 0.2 with Moonlight's scale, 1/√max(out, in) without",
        advice=MOVE_ALIKE,
        limit=10.0,  # between groups
        chart=Chart("Health", 8, "Update RMS: Muon's as large as AdamW's", r"update_rms/.+"),
        panel=Panel(8, "update RMS", ("update_rms/.+",)),
        report=(Line("update RMS of {group}, median", "update_rms/.+"),),
    ),
    Quantity(
        tag="parameter_update_rms/<name>",
        monitor="UpdateRMSMonitor",
        meaning="the same of one parameter, by `per_parameter`",
        unit="that of the weights, per unit of the learning rate",
        usual="as its group",
        advice="look at the parameter's row in the text routing",
    ),
    Quantity(
        tag="effective_lr/<group>",
        monitor="UpdateRMSMonitor",
        meaning="by how much a step changes a weight of the group, η·√mean(U²)",
        unit="that of the weights",
        usual="follows the schedule; within a factor of 10 between groups",
        advice="as for update_rms",
        chart=Chart("Training", 5, "Effective learning rate: alike for all groups", r"effective_lr/.+"),
        report=(Line("effective learning rate of {group}, median", "effective_lr/.+"),),
    ),
    Quantity(
        tag="rate_ratio",
        monitor="UpdateRMSMonitor",
        meaning="the largest ratio of the effective rates of a group that Muon updates and of another, the larger over"
        " the smaller",
        unit="none",
        usual="1 to 5",
        # At 100, one part of the model moves in a hundred steps as far as another in one.
        healthy=Range("under 10", 10.0, bad=100.0, origin=1.0),
        problem="the rates of two groups are far apart, and one part of the model hardly trains",
        advice=MOVE_ALIKE,
        chart=Chart("Health", 9, "Ratio of effective rates: healthy under 10", "rate_ratio"),
        # The rates themselves: they say which group is behind.
        panel=Panel(12, "effective learning rate", ("effective_lr/.+",), scale="log"),
        report=(Line("ratio of the effective rates of two groups, median", "rate_ratio"),),
    ),
    Quantity(
        tag="angular_update/<group>",
        monitor="UpdateRMSMonitor",
        meaning="size of an update beside its weight, η‖U‖/‖W‖, mean of the sample: about the angle of a step",
        unit="radians",
        usual="falls to its equilibrium, and then with the root of the learning rate",
        problem="over the equilibrium the weights grow, under it they shrink",
        advice="lower the learning rate or the initial size of what starts over 0.1; change lr · weight_decay, by whose"
        " root the equilibrium goes",
        chart=Chart("Training", 6, "Angle of a step: goes to its equilibrium", r"angular_(update|equilibrium)/.+"),
        report=(Line("angle of a step of {group}, median", "angular_update/.+"),),
    ),
    Quantity(
        tag="angular_equilibrium/<group>",
        monitor="UpdateRMSMonitor",
        meaning="the value of it at which updates and decay keep a weight at its size if gradients are noise,"
        " √(2ηλ·(1 − β)/(1 + β)) with momentum β; for groups with decoupled decay",
        unit="radians",
        usual="the root of the learning rate",
        advice="as for angular_update",
    ),
    Quantity(
        tag="parameter_angular_update/<name>",
        monitor="UpdateRMSMonitor",
        meaning="angular_update of one parameter, by `per_parameter`",
        unit="radians",
        usual="as its group",
        advice="look at the parameter's row in the text routing",
    ),
)
