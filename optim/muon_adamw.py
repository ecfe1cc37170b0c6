"""One optimizer for a whole model: Muon for its hidden matrices, AdamW for the rest."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_muon.optim.adamw_update import adamw_update
from lightning_muon.optim.matrix_layout import MatrixLayout
from lightning_muon.optim.muon_update import HALF, MuonParameter, OrthogonalizeHook, muon_update
from lightning_muon.optim.orthogonalize import Orthogonalizer
from lightning_muon.optim.parameter_group import (
    ALGORITHMS,
    check_options,
    check_parameters,
    check_same_parameters,
    group_label,
    matrix_layouts,
    named,
)
from lightning_muon.optim.update_scale import UpdateScale


class MuonAdamW(torch.optim.Optimizer):
    r"""Muon for the groups with ``algorithm="muon"``, AdamW for those with ``algorithm="adamw"``.

    With gradient :math:`G_t`, momentum :math:`\mu`, learning rate :math:`\eta` and weight decay :math:`\lambda`, each
    matrix :math:`W` of a muon group follows

    .. math::
        M_t &= \mu M_{t-1} + (1 - \mu) G_t \\
        O_t &= \operatorname{polar}\bigl((1 - \mu) G_t + \mu M_t\bigr) \quad\text{(nesterov; otherwise } M_t) \\
        W_t &= (1 - \eta\lambda) W_{t-1} - \eta s O_t

    where the scale :math:`s` depends on ``update_scale`` and the layer's fan-out and fan-in. Matrices of the same shape
    are orthogonalized as one batch. The adamw groups go through torch's own functional AdamW.

    :func:`~lightning_muon.optim.route_parameters` makes the groups. Each has its ``algorithm``, and every
    hyperparameter below may be set per group; it is read at each step, so a scheduler or a callback may change it.
    Gradients are never modified. The momentum has the dtype of its parameter, but float32 where that is float16, whose
    range ends at 6e-8; AdamW's moments have at least float32. Schedulers that cycle the momentum (``CyclicLR``,
    ``OneCycleLR``) change ``betas``, as for any optimizer that has them, and leave ``momentum`` alone.

    Args:
        params: Parameter groups, each with an ``"algorithm"``: usually ``route_parameters(module)``.
        lr: Learning rate of all groups that do not bring their own.
        weight_decay: Decoupled weight decay, per unit of ``lr`` (not of the scaled lr, and the same for all scales).
        momentum: Decay of the average of the gradients, μ.
        nesterov: Look one step ahead along the momentum.
        orthogonalizer: How the polar factor is computed, see :func:`~lightning_muon.optim.orthogonalize`.
        orthogonalizer_options: What the orthogonalizer takes, such as ``{"steps": 5}``.
        update_scale: How large the update is, see :func:`~lightning_muon.optim.scale_factor`. With ``"moonlight"`` it
            has the RMS of an AdamW update, so both algorithms share ``lr``; the other scales want an ``lr`` of their
            own, of about 0.02.
        adamw_lr: Learning rate of the adamw groups that do not bring their own. Default: ``lr``.
        polar_first: Orthogonalize each gradient and average the polar factors, instead of orthogonalizing the average
            of the gradients (PolarGrad's second variant).
        neuron_beta: Decay of the moving average by which NorMuon evens out the neurons of a layer, 0.95 in its paper.
            Default: no such normalization.
        cautious_weight_decay: Let only those weights decay that the step does not push outwards, in all groups.
        batch_elements: Bound of the memory for batches of matrices, in elements; a single parameter may be larger.
            Default: 2²⁴, and 2²⁰ on a CPU, where a batch is fastest in its cache.
        compile: Let ``torch.compile`` translate the orthogonalizer, once for each shape of a batch. That takes up to a
            minute at the first step, and is meant for GPUs; what is saved and loaded does not change.
        betas: AdamW's decay of the averages of the gradient and of its square.
        eps: AdamW's term in the denominator.

    Raises:
        ValueError: If a group has an unknown algorithm, option or value, or holds a parameter that its algorithm
            cannot update. The message names the group.

    Example::

        >>> optimizer = MuonAdamW(route_parameters(model), lr=1e-3, weight_decay=0.1)

    Sources: Jordan, "Muon" (2024), https://kellerjordan.github.io/posts/muon/; Liu et al., "Muon is Scalable for LLM
    Training" (2025), arXiv:2502.16982; Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019),
    arXiv:1711.05101; Lau et al., "PolarGrad" (2025), arXiv:2505.21799; Li et al., "NorMuon" (2025), arXiv:2510.05491;
    Chen et al., "Cautious Weight Decay" (2025), arXiv:2510.12402. The momentum is an average, as in
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
        batch_elements: int | None = None,
        compile: bool = False,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        self._adamw_lr = adamw_lr
        self._orthogonalize_hooks: OrderedDict[int, OrthogonalizeHook] = OrderedDict()
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
                "batch_elements": batch_elements,
                "compile": compile,
                "betas": betas,
                "eps": eps,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check a group and add it; see the class for what a group holds."""
        label = group_label(param_group, len(self.param_groups))
        algorithm = param_group.get("algorithm") if isinstance(param_group, dict) else None
        if algorithm not in ALGORITHMS:
            raise ValueError(
                f"{label}: algorithm is {algorithm!r}, choose one of {', '.join(ALGORITHMS)}."
                " route_parameters(module) makes groups that say for each parameter which one fits."
            )
        param_group = named(param_group, label)
        if algorithm == "adamw" and self._adamw_lr is not None:
            param_group.setdefault("lr", self._adamw_lr)
        check_options(label, {**self.defaults, **param_group}, hyperparameters=self.defaults)

        super().add_param_group(param_group)
        self.param_groups[-1]["orthogonalizer_options"] = dict(self.param_groups[-1]["orthogonalizer_options"])
        try:
            check_parameters(label, self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters that have a gradient.

        Args:
            closure: Computes the loss again and returns it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["algorithm"] == "muon":
                self._muon(group)
            else:
                self._adamw(group)
        return loss

    def register_orthogonalize_hook(self, hook: OrthogonalizeHook) -> RemovableHandle:
        """Hand out what the coming steps orthogonalize, until the handle is removed.

        Args:
            hook: Called as ``hook(names, factors)`` once for each batch of matrices of one shape: ``factors`` has the
                shape (b, m, n), holds the polar factors before scaling, and is only valid during the call;
                ``names[i]`` is the parameter that ``factors[i]`` belongs to (a fused or stacked one occurs repeatedly).

        Returns:
            A handle; its ``remove()`` ends the calls. A step without hooks does no work for them.
        """
        handle = RemovableHandle(self._orthogonalize_hooks)
        self._orthogonalize_hooks[handle.id] = hook
        return handle

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, whose hyperparameters then hold.

        Raises:
            ValueError: If its groups hold other parameters, or send them to another algorithm, than this optimizer's:
                torch matches state to parameters by position, so it would end up at the wrong ones.
        """
        loaded: dict[str, Any] = {}

        def before(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            check_same_parameters(self.param_groups, state_dict["param_groups"])
            loaded.update(state_dict)

        def after(_: torch.optim.Optimizer) -> None:
            for group, saved in zip(self.param_groups, loaded["param_groups"], strict=True):
                for param, key in zip(group["params"], saved["params"], strict=True):
                    self._restore_moments(param, loaded["state"].get(key, {}))

        # Behind the hooks that others have registered before it, and before those after it.
        hooks = [
            self.register_load_state_dict_pre_hook(before),
            self.register_load_state_dict_post_hook(after, prepend=True),
        ]
        layouts = [group.get("layouts") for group in self.param_groups]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        for group, layout in zip(self.param_groups, layouts, strict=True):
            if layout is not None:
                group["layouts"] = layout

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a copy needs; hooks belong to the original."""
        return {**super().__getstate__(), "_adamw_lr": self._adamw_lr}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or copied optimizer, or load a state dict."""
        super().__setstate__(state)
        for group in self.param_groups:
            for option in self.defaults.keys() - {"differentiable"}:  # which torch adds, of no meaning here
                group.setdefault(option, self.defaults[option])  # one that came after the checkpoint was written
        self.__dict__.setdefault("_orthogonalize_hooks", OrderedDict())

    def _muon(self, group: dict[str, Any]) -> None:
        neurons = group["neuron_beta"] is not None
        parameters = (
            MuonParameter(
                name,
                param,
                gradient,
                momentum=self._state(param, "momentum_buffer", widest=param.dtype == torch.float16),
                mean_square=self._state(param, "neuron_mean_square", widest=True) if neurons else None,
                layout=layout,
            )
            for name, param, gradient, layout in _with_gradient(group)
        )
        muon_update(parameters, group, tuple(self._orthogonalize_hooks.values()))

    def _adamw(self, group: dict[str, Any]) -> None:
        parameters = [(param, gradient) for _, param, gradient, _ in _with_gradient(group)]
        if parameters:
            params, gradients = zip(*parameters, strict=True)
            adamw_update(
                params,
                gradients,
                [self._state(p, "exp_avg", widest=True) for p in params],
                [self._state(p, "exp_avg_sq", widest=True) for p in params],
                [self._step_count(p) for p in params],
                group,
            )

    def _state(self, param: Tensor, key: str, *, widest: bool = False) -> Tensor:
        """Return a state tensor of ``param``, zero at first, always in the layout of its parameter."""
        state = self.state[param]
        if key not in state:
            dtype = torch.float32 if widest and param.dtype in HALF else param.dtype
            state[key] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        tensor: Tensor = state[key]
        return tensor

    def _step_count(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        count: Tensor = state["step"]
        return count

    def _restore_moments(self, param: Tensor, saved: Mapping[str, Any]) -> None:
        """Take the averages as they were saved: torch has cast them to the dtype of the parameter."""
        for key in saved.keys() - {"step"}:
            if param.dtype in HALF:
                self.state[param][key] = saved[key].to(device=param.device, copy=True)


def _with_gradient(group: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, Tensor, MatrixLayout]]:
    """Yield name, parameter, gradient and layout of those parameters in the group that have a gradient."""
    for name, param, layout in zip(group["param_names"], group["params"], matrix_layouts(group), strict=True):
        if param.grad is None or param.numel() == 0:
            continue
        if param.grad.is_sparse:
            raise ValueError(f"{name} has a sparse gradient, which MuonAdamW cannot use: make its module sparse=False")
        yield name, param, param.grad, layout
