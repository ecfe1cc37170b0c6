"""Saving and loading: exact, whatever a rank keeps of the state."""

import copy
import io
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from model import BLOCKS, Block, make_model
from torch import Tensor
from torch.distributed.checkpoint.optimizer import load_sharded_optimizer_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)
from ways import make_optimizer, train, whole, wrap

from lightning_muon.optim import MuonAdamW, Rule, route_parameters
from lightning_muon.optim.update import state
from lightning_muon.optim.update.state import AVERAGES
from tests.earlier_groups import earlier_groups

OPTIONS: dict[str, Any] = {
    "lr": 0.01,
    "adamw_lr": 0.004,
    "neuron_beta": 0.9,
    "orthogonalizer_options": {"dtype": "float32"},
}
HALF = 3


def ranks() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def trained(
    way: str, steps: int, dtype: torch.dtype = torch.float32, rules: Iterable[Rule] = (), **options: Any
) -> tuple[Any, MuonAdamW]:
    model = make_model(dtype) if way == "one" else wrap(way, make_model(dtype), Block)
    optimizer = make_optimizer(model, way, rules, **{**OPTIONS, **options})
    train(model, optimizer, steps, *((0, 1) if way == "one" else ranks()))
    return model, optimizer


def broadcast(value: Any) -> Any:
    """What rank 0 has, as if read from a file."""
    file = io.BytesIO()
    torch.save(value, file)
    values = [file.getvalue()]
    dist.broadcast_object_list(values, 0)
    return torch.load(io.BytesIO(values[0]), weights_only=True)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def check_sharded_state_resumes_exactly() -> None:
    for dtype, rules, kept in ((torch.float32, BLOCKS, "int8"), (torch.bfloat16, (), None)):
        model, optimizer = trained("ddp_sharded_state", HALF, dtype, rules, momentum_dtype=kept)
        optimizer.consolidate_state_dict()
        saved = broadcast((model.module.state_dict(), optimizer.state_dict()) if dist.get_rank() == 0 else None)
        again = wrap("ddp_sharded_state", make_model(dtype), Block)
        second = make_optimizer(again, "ddp_sharded_state", rules, lr=0.5, momentum_dtype=kept)
        again.module.load_state_dict(saved[0])
        second.load_state_dict(saved[1])
        assert second.param_groups[0]["neuron_beta"] == 0.9
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            for key, value in optimizer.state.get(p, {}).items():
                assert torch.equal(value, second.state[q][key])
                assert value.dtype == second.state[q][key].dtype
    for m, o in ((model, optimizer), (again, second)):
        o.zero_grad()
        m(torch.arange(8)[None], torch.zeros(1, 8, dtype=torch.int64)).square().mean().backward()
        o.step()
    equal(whole(model), whole(again))


def check_sharded_state_is_what_one_device_has() -> None:
    """So that a checkpoint goes from any number of ranks to any other."""
    _, optimizer = trained("ddp_sharded_state", HALF)
    optimizer.consolidate_state_dict()
    one, reference = trained("one", HALF)
    expected = reference.state_dict()
    if dist.get_rank() == 0:
        saved = optimizer.state_dict()
        assert saved["state"].keys() == expected["state"].keys()
        for key, state in expected["state"].items():
            for name, value in state.items():
                found = saved["state"][key][name]
                torch.testing.assert_close(found, value, atol=1e-5, rtol=1e-3)
                assert found.dtype == value.dtype
    fresh = wrap("ddp_sharded_state", copy.deepcopy(one), Block)
    resumed = make_optimizer(fresh, "ddp_sharded_state")
    resumed.load_state_dict(copy.deepcopy(expected))
    train(fresh, resumed, HALF, *ranks(), start=HALF)
    train(one, reference, HALF, start=HALF)
    for name, value in whole(fresh).items():
        torch.testing.assert_close(value, whole(one)[name], atol=1e-5, rtol=0)


def check_each_rank_keeps_its_share() -> None:
    if dist.get_world_size() == 1:
        return
    (_, all_of_it), (_, share) = trained("ddp", 1), trained("ddp_sharded_state", 1)

    def size(optimizer: MuonAdamW) -> int:
        return sum(v.numel() for state in optimizer.state.values() for v in state.values())

    sizes = torch.tensor([size(share)])
    dist.all_reduce(sizes)
    steps = sum("step" in state for state in all_of_it.state.values())
    assert sizes.item() == size(all_of_it) + (dist.get_world_size() - 1) * steps
    assert size(share) < 1.5 * size(all_of_it) / dist.get_world_size()


def check_state_that_is_shared_out_is_not_saved_by_mistake() -> None:
    if dist.get_world_size() == 1:
        return
    model, optimizer = trained("ddp_sharded_state", 1)
    with pytest.raises(RuntimeError, match=r"call consolidate_state_dict\(\) on all ranks"):
        optimizer.state_dict()
    optimizer.consolidate_state_dict(to=1)
    if dist.get_rank() == 1:
        assert len(optimizer.state_dict()["state"]) > 0
    else:
        with pytest.raises(RuntimeError, match="consolidate_state_dict"):
            optimizer.state_dict()
    train(model, optimizer, 1, *ranks())
    with pytest.raises(RuntimeError, match="consolidate_state_dict"):
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match="shard_state"):
        copy.deepcopy(optimizer)


def check_groups_that_come_later_leave_state_where_it_is() -> None:
    model = wrap("ddp_sharded_state", make_model(), Block)
    optimizer = MuonAdamW(route_parameters(model, part=model.module.blocks[0]), shard_state=True, **OPTIONS)
    train(model, optimizer, HALF, *ranks())
    for group in route_parameters(model, part=model.module.blocks[1]):
        optimizer.add_param_group(group)
    train(model, optimizer, HALF, *ranks(), start=HALF)
    one = make_model()
    reference = MuonAdamW(route_parameters(one, part=one.blocks[0]), **OPTIONS)
    train(one, reference, HALF)
    for group in route_parameters(one, part=one.blocks[1]):
        reference.add_param_group(group)
    train(one, reference, HALF, start=HALF)
    for name, value in whole(model).items():
        torch.testing.assert_close(value, whole(one)[name], atol=1e-5, rtol=0)


def check_other_groups_load_by_name() -> None:
    """Those of version 0.1, in the opposite order, saved on one device."""
    one = make_model()
    reference = MuonAdamW(earlier_groups(route_parameters(one), backwards=True), **OPTIONS)
    train(one, reference, HALF)
    start, saved = copy.deepcopy((one, reference.state_dict()))
    train(one, reference, HALF, start=HALF)
    for way in ("ddp", "ddp_sharded_state", "fsdp2"):
        model = wrap(way, copy.deepcopy(start), Block)
        optimizer = make_optimizer(model, way)
        assert len(optimizer.param_groups) == 4 > len(saved["param_groups"])
        optimizer.load_state_dict(copy.deepcopy(saved))
        train(model, optimizer, HALF, *ranks(), start=HALF)
        for name, value in whole(model).items():
            torch.testing.assert_close(value, whole(one)[name], atol=1e-5, rtol=0)


def check_fsdp1_resumes_from_sharded_checkpoints() -> None:
    for kept in (None, "int8", "bfloat16"):
        resume_fsdp1(f"fsdp1-{kept}", trained("fsdp1", HALF, momentum_dtype=kept), kept)


def check_fsdp1_resumes_from_other_groups() -> None:
    model = wrap("fsdp1", make_model(), Block)
    optimizer = MuonAdamW(earlier_groups(route_parameters(model), backwards=True), **OPTIONS)
    train(model, optimizer, HALF, *ranks())
    resume_fsdp1("fsdp1_other_groups", (model, optimizer))


def resume_fsdp1(folder: str, trained: tuple[Any, MuonAdamW], kept: Any = None) -> None:
    """Save to a sharded checkpoint, load it into a new optimizer in the groups of roles, and go on with both."""

    def sharded(model: FullyShardedDataParallel) -> Any:
        return FullyShardedDataParallel.state_dict_type(
            model,
            StateDictType.SHARDED_STATE_DICT,
            ShardedStateDictConfig(offload_to_cpu=False),
            ShardedOptimStateDictConfig(offload_to_cpu=False),
        )

    if dist.get_world_size() == 1:
        return  # it shards nothing then
    model, optimizer = trained
    with sharded(model):
        state = {
            "model": model.state_dict(),
            "optimizer": FullyShardedDataParallel.optim_state_dict(model, optimizer),
        }
        dcp.save(state, checkpoint_id=folder)
    again = wrap("fsdp1", make_model(), Block)
    second = make_optimizer(again, "fsdp1", momentum_dtype=kept)
    with sharded(again):
        weights = {"model": again.state_dict()}
        dcp.load(weights, checkpoint_id=folder)
        again.load_state_dict(weights["model"])
        loaded = load_sharded_optimizer_state_dict(
            weights["model"], optimizer_key="optimizer", storage_reader=dcp.FileSystemReader(folder)
        )
        second.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(again, second, loaded["optimizer"]))
    hyperparameters = [
        {name: g["lr"] for g in o.param_groups for name in g["param_names"]} for o in (optimizer, second)
    ]
    assert hyperparameters[0] == hyperparameters[1]
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert optimizer.state.get(p, {}).keys() == second.state.get(q, {}).keys()
        for key, value in optimizer.state.get(p, {}).items():
            assert torch.equal(value, second.state[q][key])
    train(model, optimizer, HALF, *ranks(), start=HALF)
    train(again, second, HALF, *ranks(), start=HALF)
    equal(whole(model), whole(again))


def check_fsdp2_resumes_through_distributed_checkpointing() -> None:
    for full, rules, kept in ((False, BLOCKS, "int8"), (True, (), "bfloat16")):
        model, optimizer = trained("fsdp2", HALF, rules=rules, momentum_dtype=kept)
        # Not strict, as torch refuses a parameter that never had a gradient and so has no state.
        choice = StateDictOptions(full_state_dict=full, strict=False)
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=choice))
        weights = whole(model)
        again = wrap("fsdp2", make_model(), Block)
        second = make_optimizer(again, "fsdp2", rules, momentum_dtype=kept, **OPTIONS)
        with torch.no_grad():
            for q, p in zip(again.parameters(), model.parameters(), strict=True):
                q.to_local().copy_(p.to_local())
        set_optimizer_state_dict(again, second, saved, options=choice)
        equal(whole(again), weights)
        train(model, optimizer, HALF, *ranks(), start=HALF)
        train(again, second, HALF, *ranks(), start=HALF)
        equal(whole(model), whole(again))


def check_fsdp2_takes_the_state_of_one_device() -> None:
    one, reference = trained("one", HALF)
    model = wrap("fsdp2", copy.deepcopy(one), Block)
    optimizer = make_optimizer(model, "fsdp2")
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    train(one, reference, HALF, start=HALF)
    train(model, optimizer, HALF, *ranks(), start=HALF)
    for name, value in whole(model).items():
        torch.testing.assert_close(value, whole(one)[name], atol=1e-5, rtol=0)


def check_state_in_fewer_bytes_is_that_of_one_device() -> None:
    """Where rows are whole, so are blocks: nothing is rounded otherwise than on one device."""
    smallest, state.SMALLEST_IN_CODES = state.SMALLEST_IN_CODES, 40  # of the matrices here, and no bias
    try:
        for kept, dtypes, ways in (
            ("int8", {torch.int8, torch.uint8}, ("ddp", "fsdp2", "ddp_sharded_state", "fsdp1")),
            ("bfloat16", {torch.bfloat16}, ("fsdp1",)),
        ):
            one, _ = trained("one", HALF, momentum_dtype=kept)
            for way in ways:
                model, optimizer = trained(way, HALF, momentum_dtype=kept)
                # ZeRO-1 and FSDP1 have parts of rows, with blocks of their own. Their rounding is that of a whole
                # matrix in one block, which these have rows of 12 elements instead.
                flat = way in {"ddp_sharded_state", "fsdp1"} and kept == "int8" and dist.get_world_size() > 1
                found = whole(model)
                for name, start in make_model().named_parameters():
                    if name.startswith(("unused", "frozen")):
                        continue
                    moved, error = (
                        (a - b).norm() for a, b in ((whole(one)[name], start), (found[name], whole(one)[name]))
                    )
                    assert error <= (0.5 if flat else 0.005) * moved, f"{way}, {kept}, {name}: {error} of {moved}"
                mine = torch.cat([value.flatten() for value in found.values()])
                first = mine.clone()
                dist.broadcast(first, 0)
                assert torch.equal(mine, first), way
                averages = [v for s in optimizer.state.values() for k, v in s.items() if k in AVERAGES and v.ndim > 1]
                assert {v.dtype for v in averages} <= dtypes, way
    finally:
        state.SMALLEST_IN_CODES = smallest


def check_other_optimizers_take_the_groups_too() -> None:
    """They keep what they do not know: it must not get into their checkpoints, nor hinder a copy."""
    model = wrap("ddp", make_model(), Block)
    theirs = torch.optim.AdamW(route_parameters(model))
    train(model, theirs, 1, *ranks())
    copy.deepcopy(theirs)
    saved = broadcast(theirs.state_dict())
    ours = make_optimizer(model, "ddp")
    ours.load_state_dict(saved)
    assert all("shardings" not in group for group in ours.param_groups)
    train(model, ours, 1, *ranks())
