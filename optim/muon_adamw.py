"""One optimizer for a whole model: Muon for its hidden matrices, AdamW for the rest."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_muon.optim.group_step import adamw_step_of, muon_step_of
from lightning_muon.optim.parameter_group import (
    MuonGroup,
    check_algorithm,
    check_one_momentum,
    check_options,
    check_parameters,
    group_label,
    linked,
    named,
)
from lightning_muon.optim.polar.orthogonalize import Orthogonalizer
from lightning_muon.optim.polar.user_function import name_of
from lightning_muon.optim.routing.added import route_added
from lightning_muon.optim.routing.routes import LeftOut
from lightning_muon.optim.sharding.plan import Plan, make_plans
from lightning_muon.optim.sharding.sharding import Sharding
from lightning_muon.optim.sharding.zero1 import StateShares, consolidate
from lightning_muon.optim.state_dict import FUNCTIONS, fill_state, restored
from lightning_muon.optim.stored_state import full_state
from lightning_muon.optim.update.muon import Hooks, OrthogonalizeHook, SourceHook
from lightning_muon.optim.update.options import CommunicationDtype, MomentumDtype, alike, check_number
from lightning_muon.optim.update.scale import UpdateScale


class MuonAdamW(torch.optim.Optimizer):
    r"""Update groups with ``algorithm="muon"`` by Muon, and groups with ``algorithm="adamw"`` by AdamW.

    With gradient :math:`G_t`, momentum :math:`\mu`, learning rate :math:`\eta` and weight decay :math:`\lambda`, each
    matrix :math:`W` of a muon group follows

    .. math::
        M_t &= \mu M_{t-1} + (1 - \mu) G_t \\
        O_t &= \operatorname{polar}\bigl((1 - \mu) G_t + \mu M_t\bigr) \quad\text{(nesterov; otherwise } M_t) \\
        W_t &= (1 - \eta\lambda) W_{t-1} - \eta s O_t

    where the scale :math:`s` depends on ``update_scale`` and on the layer's fan-out and fan-in. Matrices of the same
    shape are orthogonalized as one batch. The adamw groups go through torch's own functional AdamW.

    The polar factor has no scale, so a matrix takes steps of full size however small its gradient. A matrix whose
    gradient is exactly zero, such as an expert without tokens or one matrix of a stack, rests in that step: only weight
    decay moves it. Its momentum decays as usual, and acts again when a gradient arrives.

    :func:`~lightning_muon.optim.route_parameters` makes the groups. Each has its ``algorithm``. Every hyperparameter
    below may be set per group; it is read at each step, so a scheduler or a callback may change it
    (``momentum_dtype`` when state is made or loaded). Gradients are never modified. In a muon group ``betas[0]`` is
    another name of ``momentum``, to read and to set: so schedulers that cycle the momentum (``CyclicLR``,
    ``OneCycleLR``) change μ there and β₁ in the adamw groups, and Lightning's ``LearningRateMonitor`` logs these. Of a
    state dict that has both, ``momentum`` counts.

    Parameters may be replicated (DDP) or sharded (FSDP2, HSDP, FSDP1 with ``use_orig_params``). Each matrix is
    orthogonalized by one rank, its owner: the pieces travel there and the polar factor travels back. All else happens
    where the shards are, and the state has the layout of its parameter. In collectives a parameter without gradient
    enters as zeros, and it is not updated. DTensors with other placements, as under tensor parallelism, are gathered on
    all ranks. With ``neuron_beta``, the sums of neurons that extend over several ranks take one more small collective.
    All ranks must step together, with the same options. Under DDP the gradients must be equal on all ranks, as they are
    without a communication hook.

    Args:
        params: Parameter groups, each with an ``"algorithm"``: usually ``route_parameters(module)``.
        lr: Learning rate of all groups that do not have their own.
        weight_decay: Decoupled weight decay, per unit of ``lr`` (not of the scaled lr, and the same for all scales).
        momentum: Decay μ of the moving average of the gradients, in the muon groups.
        nesterov: Look one step ahead along the momentum.
        orthogonalizer: Method for the polar factor, or a function of your own, see
            :func:`~lightning_muon.optim.orthogonalize`.
        orthogonalizer_options: Options of the orthogonalizer, such as ``{"steps": 5}``.
        update_scale: Scale of the update, or a function, see :func:`~lightning_muon.optim.scale_factor`. With
            ``"moonlight"`` it has the RMS of an AdamW update, so both algorithms share ``lr``; the other scales need
            their own, of about 0.02.
        adamw_lr: Learning rate of the adamw groups that do not have their own. Default: ``lr``. For a rate of each role
            give :func:`~lightning_muon.optim.route_parameters` its ``lr_by_role``.
        polar_first: Orthogonalize each gradient and average the polar factors, instead of orthogonalizing the average
            of the gradients (PolarGrad's second variant).
        neuron_beta: Decay of the moving average by which NorMuon normalizes the neurons of a layer, 0.95 in its paper.
            Default: no normalization.
        cautious_weight_decay: In all groups, decay only the weights that the step does not push outwards.
        fixed_norm: Keep the Frobenius norm of each matrix: each step turns it by a distance of ``lr`` times that norm,
            whatever ``update_scale`` and ``weight_decay`` are. The number is the RMS to which smaller matrices grow
            first, such as those that start at zero. Default: the norm is free.
        momentum_dtype: How the momentum and AdamW's moments are stored between steps, ``"float32"``, ``"bfloat16"`` or
            ``"int8"``: codes of one byte with a scale for each block of at most 2048 elements of a row, linear for the
            momentum, dynamic for AdamW's moments, whose small parameters stay in float32. They are updated in float32.
            Checkpoints contain the values in full precision, so they load with any other ``momentum_dtype``, and
            saving needs memory for them. Default: the momentum has the dtype of its parameter, but float32 for
            float16, whose range ends at 6e-8; AdamW's moments have at least float32.
        batch_elements: Bound of the memory for batches of matrices, in elements; a single parameter may be larger.
            Default: 2²⁵, and 2²⁰ on a CPU, where a batch is fastest in its cache.
        compile: Run the orthogonalizer through ``torch.compile``, once for each shape of a batch. This takes up to a
            minute at the first step, and is meant for GPUs. It changes nothing in checkpoints.
        communication_dtype: Dtype of matrices and polar factors between ranks, ``"bfloat16"`` or ``"float32"``.
            Default: bfloat16 where the orthogonalizer computes in it, else float32.
        shard_state: Under DDP, share out the optimizer state among the ranks (ZeRO-1): the momentum of a matrix to its
            owner, and an equal part of AdamW's moments to each rank. The update is the same. Before ``state_dict()``
            :meth:`consolidate_state_dict` must be called, as Lightning does. No effect under FSDP.
        betas: AdamW's decay of the moving averages of the gradient and of its square. Given in a muon group, its first
            entry must be the group's momentum.
        eps: AdamW's term in the denominator.

    Raises:
        ValueError: If a group has an unknown algorithm, option or value, or contains a parameter that its algorithm
            cannot update. The message names the group.

    Example::

        >>> optimizer = MuonAdamW(route_parameters(model), lr=1e-3, weight_decay=0.1)

    Sources: Jordan, "Muon" (2024), https://kellerjordan.github.io/posts/muon/; Liu et al., "Muon is Scalable for LLM
    Training" (2025), arXiv:2502.16982; Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019),
    arXiv:1711.05101; Lau et al., "PolarGrad" (2025), arXiv:2505.21799; Li et al., "NorMuon" (2025), arXiv:2510.05491;
    Chen et al., "Cautious Weight Decay" (2025), arXiv:2510.12402; Wen et al., "Hyperball Optimization" (2026),
    arXiv:2606.16899; "Effective Quantization of Muon Optimizer States" (2025), arXiv:2509.23106; Dettmers et al.,
    "8-bit Optimizers via Block-wise Quantization" (2022), arXiv:2110.02861. The momentum is an average, as in
    ``torch.optim.Muon``; a sum would give the same polar factor.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        orthogonalizer: Orthogonalizer = "newton_schulz",
        orthogonalizer_options: dict[str, Any] | None = None,
        update_scale: UpdateScale = "moonlight",
        adamw_lr: float | None = None,
        polar_first: bool = False,
        neuron_beta: float | None = None,
        cautious_weight_decay: bool = False,
        fixed_norm: float | None = None,
        momentum_dtype: MomentumDtype | None = None,
        batch_elements: int | None = None,
        compile: bool = False,
        communication_dtype: CommunicationDtype | None = None,
        shard_state: bool = False,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        if adamw_lr is not None:
            check_number("MuonAdamW", "adamw_lr", adamw_lr, 0.0)
        self._adamw_lr = adamw_lr
        self._orthogonalize_hooks: OrderedDict[int, OrthogonalizeHook] = OrderedDict()
        self._source_hooks: OrderedDict[int, SourceHook] = OrderedDict()
        self.shard_state = shard_state
        self._consolidated: dict[str, Any] | None = None
        self._shardings: dict[Tensor, Sharding] = {}
        self._left_out = LeftOut()
        self._plans: tuple[list[tuple[str, ...]], list[Plan]] | None = None
        super().__init__(
            params,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "nesterov": nesterov,
                "orthogonalizer": orthogonalizer,
                "orthogonalizer_options": orthogonalizer_options or {},
                "update_scale": update_scale,
                "polar_first": polar_first,
                "neuron_beta": neuron_beta,
                "cautious_weight_decay": cautious_weight_decay,
                "fixed_norm": fixed_norm,
                "momentum_dtype": momentum_dtype,
                "batch_elements": batch_elements,
                "compile": compile,
                "communication_dtype": communication_dtype,
                "betas": betas,
                "eps": eps,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check a group and add it; see the class for what a group contains.

        Parameters that ``route_parameters`` has left out, because they were frozen or in another part of the model, may
        be added without an algorithm: ``{"params": […], "lr": 0.001}``. They are routed as the rest was, into a group
        for each algorithm and role. Options given here are those of all, and to set ``lr`` of the last of these groups
        sets that of the others.
        """
        label = group_label(param_group, len(self.param_groups))
        if isinstance(param_group, dict) and "algorithm" not in param_group and self._add_left_out(param_group):
            return
        check_algorithm(label, param_group)
        param_group = named(param_group, label)
        if isinstance(left_out := param_group.pop("left_out", None), LeftOut):
            self._left_out = left_out
        shardings = param_group.pop("shardings", None) or [None] * len(param_group["params"])
        if self._adamw_lr is not None and param_group["algorithm"] == "adamw":
            param_group.setdefault("lr", self._adamw_lr)
        options = {**self.defaults, **param_group}
        check_options(label, options, hyperparameters=self.defaults)
        if param_group["algorithm"] == "muon":
            if "betas" in param_group:
                check_one_momentum(label, options)
            param_group = MuonGroup(param_group)

        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["orthogonalizer_options"] = dict(group["orthogonalizer_options"])
        try:
            check_parameters(label, group, shardings)
        except ValueError:
            self.param_groups.pop()
            raise
        self._shardings.update((p, s) for p, s in zip(group["params"], shardings, strict=True) if s is not None)
        self._plans = None

    def _add_left_out(self, param_group: dict[str, Any]) -> bool:
        """Add a group of parameters that were left out, routed; return whether they are such."""
        groups = route_added(param_group, self._left_out, [str(group.get("name")) for group in self.param_groups])
        if groups is None:
            return False
        number = 1 + max((group.get("added", 0) for group in self.param_groups), default=0)
        for group in groups:
            self.add_param_group({**group, "added": number})
        self.param_groups = linked(self.param_groups)
        self._left_out.unfreeze(param for group in groups for param in group["params"])
        return True

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters that have a gradient; ``closure`` computes the loss again and returns it."""
        self._consolidated = None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        hooks = Hooks(tuple(self._source_hooks.values()), tuple(self._orthogonalize_hooks.values()))
        for plan in self._planned():
            if plan.algorithm == "muon":
                muon_step_of(plan, self.param_groups, self.state, hooks)
            else:
                adamw_step_of(plan, self.param_groups, self.state)
        return loss

    def register_orthogonalize_hook(self, hook: OrthogonalizeHook) -> RemovableHandle:
        """Call a function with what the next steps orthogonalize, until the handle is removed.

        Args:
            hook: Called as ``hook(names, factors)`` once for each batch of matrices of one shape: ``factors`` has the
                shape (b, m, n), contains the polar factors before scaling, and is only valid during the call;
                ``names[i]`` is the parameter of ``factors[i]`` (that of a fused or stacked one occurs repeatedly).

        Returns:
            A handle; its ``remove()`` ends the calls. A step without hooks does no work for them.
        """
        handle = RemovableHandle(self._orthogonalize_hooks)
        self._orthogonalize_hooks[handle.id] = hook
        return handle

    def register_orthogonalize_pre_hook(self, hook: SourceHook) -> RemovableHandle:
        """Call a function with what the next steps will orthogonalize, until the handle is removed.

        Args:
            hook: Called as ``hook(names, firsts, matrices)`` before the batch is orthogonalized, and then handed to the
                hooks of :meth:`register_orthogonalize_hook`, in the same order: ``matrices`` (b, m, n) are momenta, or
                what the options make of them, and only valid during the call; ``firsts[i]`` is the place of the first
                element of ``matrices[i]`` in its flat parameter, which tells blocks and experts apart.

        Returns:
            A handle; its ``remove()`` ends the calls.
        """
        handle = RemovableHandle(self._source_hooks)
        self._source_hooks[handle.id] = hook
        return handle

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Bring the shares of ``shard_state`` together on the rank ``to`` of DDP's group, for :meth:`state_dict` there.

        A collective: all ranks must call this. Without ``shard_state`` it does nothing.
        """
        shares = self._shares()
        if not shares:
            return
        whole = consolidate(shares, self._full_state(), to)
        if whole is not None:
            full = {param: state for (param, _), state in zip(shares, whole, strict=True) if state}
            self._consolidated = self._saved(full)

    def state_dict(self) -> dict[str, Any]:
        """Return hyperparameters and state, whole tensors or DTensors, as any ``torch.optim`` optimizer does.

        Raises:
            RuntimeError: If the ranks share out the state, and it was not consolidated here since the last step.
        """
        if not self._shares():
            saved = self._saved(self._full_state())
            fill_state(self.param_groups, self.state, saved)
            return saved
        if self._consolidated is None:
            raise RuntimeError(
                "with shard_state each rank keeps a share of the optimizer state: call consolidate_state_dict() on all"
                " ranks, then state_dict() on the one that it names (rank 0)"
            )
        return self._consolidated

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """Return the state of a parameter as a checkpoint contains it, whatever ``momentum_dtype``; empty without one.

        Every tensor has the layout of the parameter; under ``shard_state`` it is this rank's share, shape (elements,).
        """
        return self._full_state([parameter]).get(parameter, {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, hyperparameters included; only ``momentum_dtype`` stays that of this optimizer.

        Parameters are matched by ``param_names``, so they may be in other groups than in this optimizer. Each group
        gets the hyperparameters that its parameters had. Where names are missing, they are matched by position.

        Raises:
            ValueError: If the state dict has other parameters than this optimizer, updates one by another algorithm, or
                has different hyperparameters for the parameters of one group.
        """
        with restored(self, self._planned):
            super().load_state_dict(state_dict)
        # Unfrozen in the run that saved it, and frozen again at the start of this one.
        self._left_out.unfreeze(param for group in self.param_groups if "added" in group for param in group["params"])

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a copy needs; hooks and process groups belong to the original."""
        if self._shares():
            raise RuntimeError("with shard_state each rank has only a share of the state: it cannot be copied")
        own = {name: vars(self)[name] for name in ("_adamw_lr", "shard_state")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or copied optimizer, or load a state dict."""
        super().__setstate__(state)
        self.param_groups = linked(self.param_groups)  # a state dict has plain groups
        for group in self.param_groups:
            for option in self.defaults.keys() - {"differentiable"}:  # torch adds it; it has no meaning here
                group.setdefault(option, self.defaults[option])  # an option that is newer than the checkpoint
        self.__dict__.setdefault("_orthogonalize_hooks", OrderedDict())
        self.__dict__.setdefault("_source_hooks", OrderedDict())
        self.__dict__.setdefault("_shardings", {})  # a copy is for another run
        self.__dict__.setdefault("_left_out", LeftOut())
        self.__dict__.setdefault("_lr_by_role", {})
        self._plans = self._consolidated = None

    def _planned(self) -> list[Plan]:
        """Return how groups are updated together; made anew when options change that decide this."""
        options = [alike(group) for group in self.param_groups]
        if self._plans is None or self._plans[0] != options:
            # A callback may have put groups of what was left out here by itself, to go on from a checkpoint.
            left_out = {p: route.sharding for p, route in self._left_out.items() if route.sharding is not None}
            shardings = {**left_out, **self._shardings}
            self._plans = options, make_plans(self.param_groups, shardings, shard_state=self.shard_state)
        return self._plans[1]

    def _full_state(self, only: Iterable[Tensor] | None = None) -> dict[Tensor, dict[str, Any]]:
        """Return the state of parameters, by default of all, in the form of checkpoints."""
        full = {}
        wanted = None if only is None else {id(param) for param in only}
        for plan in self._planned():
            for index, (number, place) in enumerate(plan.members):
                group = self.param_groups[number]
                param = group["params"][place]
                if param in self.state and (wanted is None or id(param) in wanted):
                    full[param] = dict(full_state(param, self.state[param], group, plan, index))
        return full

    def _saved(self, full: dict[Tensor, dict[str, Any]]) -> dict[str, Any]:
        """Return the state dict of torch, with the ``full`` state of some parameters in place of what is stored."""
        stored = dict(self.state)
        self.state.update(full)
        try:
            saved = super().state_dict()
        finally:
            self.state.clear()
            self.state.update(stored)
        for group in saved["param_groups"]:
            for option in FUNCTIONS:
                if callable(group[option]):
                    group[option] = name_of(group[option])  # a checkpoint contains no code
        return saved

    def _shares(self) -> list[tuple[Tensor, StateShares]]:
        """Return the parameters whose state the ranks share out."""
        places = ((plan.members[index], shares) for plan in self._planned() for index, shares in plan.shares.items())
        return [(self.param_groups[number]["params"][place], shares) for (number, place), shares in places]
