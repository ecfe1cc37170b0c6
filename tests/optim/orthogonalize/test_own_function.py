"""A function of the user, given as such or by its import path, in place of a method."""

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from lightning_muon.optim import MuonAdamW, orthogonalize
from lightning_muon.optim.polar.orthogonalize import Orthogonalizer, check_method, working_precision
from lightning_muon.optim.update.scale import UpdateScale
from tests.optim.orthogonalize import own_factors

HERE = own_factors.__name__


@pytest.mark.parametrize("method", [own_factors.by_svd, f"{HERE}.by_svd"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (2, 3, 6, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_gets_normalized_wide_matrices_and_its_factor_comes_back(
    method: Orthogonalizer, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    matrix = (1e-20 * torch.randn(shape)).to(dtype)
    factor = orthogonalize(matrix, method)
    assert factor.dtype == dtype
    torch.testing.assert_close(
        factor, orthogonalize(matrix, "svd"), atol=1e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("given", "wanted", "computed"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_its_contract(given: torch.dtype, wanted: Any, computed: torch.dtype) -> None:
    seen: list[Tensor] = []

    def keep(matrix: Tensor) -> Tensor:
        seen.append(matrix)
        return matrix

    batch = torch.randn(3, 5, 2, 4).to(given).mT  # tall
    orthogonalize(batch, keep, dtype=wanted)
    (matrix,) = seen
    assert matrix.shape == (15, 2, 4)
    assert matrix.dtype == computed == working_precision(batch, keep, wanted)
    norms = torch.linalg.matrix_norm(matrix.double())
    rounding = max(torch.finfo(computed).eps, 2**-23 if given != torch.float64 else 0)
    torch.testing.assert_close(norms, torch.ones(15).double(), atol=4 * rounding, rtol=0)


def test_its_options_are_those_of_its_signature() -> None:
    matrix = torch.randn(6, 9)
    torch.testing.assert_close(
        orthogonalize(matrix, own_factors.by_svd, power=1.0), matrix / torch.linalg.matrix_norm(matrix)
    )
    twelve = orthogonalize(matrix, own_factors.takes_any, two=2.0, six=6.0)
    torch.testing.assert_close(torch.linalg.matrix_norm(twelve), torch.tensor(12.0))
    bound = functools.partial(own_factors.cubic, steps=40)
    torch.testing.assert_close(orthogonalize(matrix, bound), orthogonalize(matrix, "svd"), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (own_factors.by_svd, {"steps": 5}, f"'{HERE}.by_svd' has no option 'steps'; it takes power"),
        (own_factors.transposed, {"steps": 5}, "has no option 'steps'; it takes none"),
        (own_factors.cubic, {}, "needs a value for 'steps'"),
        (f"{HERE}.cubic", {}, f"orthogonalizer '{HERE}.cubic' needs a value for 'steps'"),
        (f"{HERE}.nothing", {}, f"'{HERE}.nothing' cannot be imported: .*has no attribute 'nothing'"),
        (
            "no_such_package.factor",
            {},
            "'no_such_package.factor' cannot be imported: No module named 'no_such_package'",
        ),
        (".factor", {}, "orthogonalizer '.factor' cannot be imported"),
        (f"{HERE}.not_a_function", {}, f"'{HERE}.not_a_function' is not a function, but int"),
        ("newton_shulz", {}, "unknown orthogonalizer 'newton_shulz'; choose one of .*; did you mean 'newton_schulz'?"),
        (
            "qr",
            {},
            "unknown orthogonalizer 'qr'; choose one of newton_schulz, polar_express, .*, or give an import path$",
        ),
        (
            None,
            {},
            "orthogonalizer must be one of newton_schulz, .*, or a function or the import path of one; got None",
        ),
        (["svd"], {}, r"orthogonalizer must be one of .* got \['svd'\]"),
        (own_factors.by_svd, {"dtype": "int8"}, "by_svd' does not run in dtype 'int8'; choose one of float64, float32"),
    ],
)
def test_what_cannot_be_called_is_refused(method: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        orthogonalize(torch.randn(3, 4), method, **options)
    with pytest.raises(ValueError, match=message):
        check_method(method, options)
    group = {"params": [torch.nn.Parameter(torch.randn(3, 4))], "algorithm": "muon", "name": "mine"}
    with pytest.raises(ValueError, match=f"mine.*{message}"):
        MuonAdamW([group], orthogonalizer=method, orthogonalizer_options=options)


@pytest.mark.parametrize(
    ("method", "got"),
    [
        (own_factors.transposed, r"\(1, 4, 3\) of torch.float32 on cpu"),
        (lambda _: None, "NoneType"),
        (lambda matrix: matrix > 0, r"\(1, 3, 4\) of torch.bool"),
    ],
)
def test_what_it_returns_is_checked_and_the_matrix_unchanged(method: Callable[[Tensor], Any], got: str) -> None:
    matrix = torch.randn(3, 4)
    before = matrix.clone()
    with pytest.raises(ValueError, match=rf"must return a real tensor of shape \(1, 3, 4\), got {got}"):
        orthogonalize(matrix, method, out=matrix)
    assert torch.equal(matrix, before)


def test_a_step_takes_it_and_may_compile_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compiled = sys.modules[orthogonalize.__module__]._compiled
    weights = []
    for method, compile in (("svd", False), (own_factors.by_svd, False), (f"{HERE}.by_svd", True)):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(4, 9))]
        groups = [{"params": parameters, "algorithm": "muon"}]
        optimizer = MuonAdamW(groups, lr=0.1, orthogonalizer=method, compile=compile)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        weights.append(copy.deepcopy(parameters))
    assert compiled.cache_info().currsize > 0
    compiled.cache_clear()
    torch.compiler.reset()
    torch.testing.assert_close(weights[1], weights[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(weights[2], weights[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("key", "accepted"), [("orthogonalizer", Orthogonalizer), ("update_scale", UpdateScale)])
@pytest.mark.parametrize("value", ["svd", "mup", f"{HERE}.by_svd", "torch.linalg.qr"])
def test_the_command_line_keeps_names_and_import_paths_as_text(key: str, accepted: Any, value: str) -> None:
    """So that the saved config and the checkpoint contain no function."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{key}", type=accepted)
    config = parser.parse_args([f"--{key}={value}"])
    assert config[key] == value
    assert parser.dump(config).strip() == f"{key}: {value}"
