"""Error and time of all polar-factor methods, for several shapes, precisions and spectra.

``python -m benchmarks.orthogonalization`` computes errors against the singular value decomposition in float64. The
methods run in turns, and each time is divided by that of ``newton_schulz`` in the same turn.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.record import REPOSITORY, RESULTS, report
from benchmarks.stopwatch import seconds
from lightning_muon.optim import orthogonalize
from lightning_muon.optim.polar.orthogonalize import Orthogonalizer

REFERENCE = "newton_schulz"
FULL = ("float32", "float64")
HALF = ("bfloat16", "float16")
SHAPES = [(768, 768), (768, 3072), (256, 1024), (24, 128, 128)]
SPECTRA = ("gaussian", "condition 1e3", "condition 1e6", "half rank")
QUICK_SHAPES = [(32, 48), (3, 16, 16)]
# Repeat turns for this long: at least three turns, at most ``--rounds``.
SECONDS = 5.0


class Method(NamedTuple):
    """A method, its options, and the precisions to measure."""

    orthogonalizer: Orthogonalizer
    options: dict[str, Any]
    precisions: tuple[str, ...]


METHODS = {
    REFERENCE: Method("newton_schulz", {}, (*FULL, *HALF)),
    "polar_express, 4 steps from 0.01": Method("polar_express", {"steps": 4, "lower_bound": 0.01}, (*FULL, *HALF)),
    "polar_express, 3 steps from 0.02": Method("polar_express", {"steps": 3, "lower_bound": 0.02}, (*FULL, *HALF)),
    "polar_express": Method("polar_express", {}, (*FULL, *HALF)),
    "polar_express, 8 steps": Method("polar_express", {"steps": 8}, (*FULL, *HALF)),
    "polar_express, runs of 3": Method("polar_express", {"restart_every": 3}, (*FULL, "float16")),
    "gram_newton_schulz": Method("gram_newton_schulz", {}, (*FULL, "float16")),
    "qdwh": Method("qdwh", {}, FULL),
    "zolo_pd": Method("zolo_pd", {}, FULL),
    "svd": Method("svd", {}, FULL),
}


class Case(NamedTuple):
    """A batch of matrices A, with r singular vectors u and v of each (of its transpose if it is wide)."""

    matrices: Tensor  # (b, m, n)
    u: Tensor  # (b, max(m, n), r)
    v: Tensor  # (b, min(m, n), r)

    def errors(self, factors: Tensor) -> dict[str, float]:
        """Return the largest errors of a batch of computed factors O. H is the symmetric part of VᵀOᵀAV.

        If A is rank-deficient, compare O on the range of A only: elsewhere the factor is not determined.
        """
        a, o = _tall(self.matrices).double() @ self.v, _tall(factors).double() @ self.v
        rank = self.v.shape[-1]
        h = o.mT @ a
        h = (h + h.mT) / 2
        eye = torch.eye(rank, dtype=torch.float64, device=o.device)
        norm = torch.linalg.matrix_norm
        return {
            "orthogonality": float((norm(o.mT @ o - eye) / rank**0.5).max()),
            "backward": float((norm(a - o @ h) / norm(a)).max()),
            "forward": float(norm(o - self.u, 2).max()),
        }


def make_case(shape: tuple[int, ...], spectrum: str, dtype: torch.dtype, device: str) -> Case:
    """Make matrices with a spectrum: gaussian, logarithmically spaced, or half zero."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(shape, generator=generator, dtype=torch.float64).reshape(-1, *shape[-2:])
    u, values, vh = torch.linalg.svd(gaussian, full_matrices=False)
    if spectrum.startswith("condition"):
        decades = torch.tensor(float(spectrum.split()[1])).log10()
        values = torch.logspace(0, -float(decades), values.shape[-1], dtype=torch.float64).expand_as(values)
    elif spectrum == "half rank":
        values = values * (torch.arange(values.shape[-1]) < values.shape[-1] // 2)
    matrices = ((u * values.unsqueeze(-2)) @ vh).to(dtype)
    # The singular vectors of the rounded matrix.
    u, values, vh = torch.linalg.svd(_tall(matrices).double(), full_matrices=False)
    rank = values.shape[-1] // 2 if spectrum == "half rank" else values.shape[-1]
    return Case(matrices.to(device), u[..., :rank].to(device), vh[..., :rank, :].mT.to(device))


def _tall(matrices: Tensor) -> Tensor:
    return matrices.mT if matrices.shape[-2] < matrices.shape[-1] else matrices


def measure(shape: tuple[int, ...], dtype: str, device: str, rounds: int) -> list[dict[str, Any]]:
    """Return one row for each method that supports this precision, for matrices of this shape."""
    methods = {name: method for name, method in METHODS.items() if dtype in method.precisions}
    matrix_dtype = torch.float64 if dtype == "float64" else torch.float32
    cases = {spectrum: make_case(shape, spectrum, matrix_dtype, device) for spectrum in SPECTRA}
    times = _times(methods, cases["gaussian"].matrices, dtype, rounds)
    rows = []
    for name, method in methods.items():
        row: dict[str, Any] = {
            "shape": "×".join(map(str, shape)),
            "precision": dtype,
            "method": name,
            "ms": 1e3 * statistics.median(times[name]),
            "× newton_schulz": statistics.median(
                own / reference for own, reference in zip(times[name], times[REFERENCE], strict=True)
            ),
            "rounds": len(times[name]),
        }
        for spectrum, case in cases.items():
            for error, value in case.errors(_run(method, case.matrices, dtype)).items():
                row[f"{error}, {spectrum}"] = value
        rows.append(row)
    return rows


def _run(method: Method, matrices: Tensor, dtype: str) -> Tensor:
    # svd is the reference: by default it computes in float64 for every input.
    precision = None if method.orthogonalizer == "svd" else dtype
    return orthogonalize(matrices, method.orthogonalizer, dtype=precision, check_finite=False, **method.options)


def _times(methods: dict[str, Method], matrices: Tensor, dtype: str, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each method in each round, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    start = time.perf_counter()
    for turn in range(rounds + 1):
        if turn > min(3, rounds) and time.perf_counter() - start > SECONDS:
            break
        for name, method in methods.items():
            taken = seconds(partial(_run, method, matrices, dtype), matrices.device.type)
            if turn > 0:
                times[name].append(taken)
    return times


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="turns of all methods; fewer if they are slow")
    parser.add_argument("--precisions", nargs="+", choices=[*FULL, *HALF], default=[*FULL, *HALF])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    parser.add_argument("--quick", action="store_true", help="tiny matrices, one round, to check that it runs")
    parser.add_argument("--results", type=Path, help="folder for the JSON record")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)

    shapes, rounds = (QUICK_SHAPES, 1) if options.quick else (SHAPES, options.rounds)
    rows = []
    for shape in shapes:
        for dtype in options.precisions:
            rows += measure(shape, dtype, options.device, rounds)
            print(f"{rows[-1]['shape']} in {dtype}: done", flush=True)
    # --quick gives no valid results, so it must not replace the records.
    scratch = REPOSITORY / "build" / "benchmarks"
    report(
        "Polar factors: time, and errors against the SVD in float64",
        rows,
        ["method", "shape", "precision", "ms", "× newton_schulz"]
        + [f"{error}, {spectrum}" for spectrum in SPECTRA for error in ("orthogonality", "backward", "forward")],
        {"device": options.device, "quick": options.quick, "rounds": rounds},
        name=f"orthogonalization-{options.device}",
        results=options.results or (scratch if options.quick else RESULTS),
    )


if __name__ == "__main__":
    main()
