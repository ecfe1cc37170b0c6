"""What routing says of architectures that nobody here wrote, beside the answers in the files of this folder."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_muon.optim import MuonAdamW, route_parameters
from tests.corpus.corpus import Answer, Entry, elements, entries, judge, missing

HERE = [entry for entry in entries().values() if entry.library == "plain"]
"""What needs no library beside torch, and so is in make test."""
ELSEWHERE = [entry for entry in entries().values() if entry not in HERE]
of_corpus = pytest.mark.corpus


def parameters(*chosen: Entry) -> list[Any]:
    """The entries as cases of a test, each under its name; those of libraries are of the corpus."""
    return [pytest.param(entry, marks=[] if entry in HERE else [of_corpus], id=entry.name) for entry in chosen]


def built(entry: Entry) -> nn.Module:
    """The model of an entry, unless its library is absent."""
    if absent := missing(entry.build):
        pytest.skip(f"{absent} is not installed: make test-corpus installs it")
    return entry.model()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", parameters(*HERE, *ELSEWHERE))
def test_no_answer_is_wrong_without_a_warning(entry: Entry) -> None:
    wrong = [str(one) for one in judge(entry, built(entry)) if one.verdict == "wrong"]
    assert not wrong, "\n".join(wrong)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", parameters(*HERE, *ELSEWHERE))
def test_two_steps_change_every_parameter_and_leave_it_finite(entry: Entry) -> None:
    """With real gradients of models of this folder, and with random ones of others."""
    model = built(entry)
    optimizer = MuonAdamW(route_parameters(model), lr=0.01)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    # The bias before a normalization has a gradient of rounding errors, which AdamW's eps swallows.
    clear: set[str] = set()
    for _ in range(2):
        optimizer.zero_grad()
        if hasattr(model, "example"):
            sum(output.square().mean() for output in outputs(model(*model.example()))).backward()
        else:
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        clear |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-6}
        optimizer.step()
    assert clear
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        same = parameter.equal(before[name])
        assert same if parameter.grad is None else not same or name not in clear, name


def outputs(value: Any) -> Iterator[Tensor]:
    """All tensors in what a model returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from outputs(list(value.values()))
    else:
        for part in value:
            yield from outputs(part)


@of_corpus
@pytest.mark.filterwarnings("ignore")
def test_nearly_all_elements_are_right_and_no_shared_pattern_is_idle() -> None:
    judged, used = [], set()
    for entry in entries().values():
        if not missing(entry.build):
            of_entry = judge(entry, entry.model())
            judged += of_entry
            used |= {(entry.file, one.pattern) for one in of_entry}
    right, wrong = elements(judged, "right", "guessed"), elements(judged, "wrong", "wrong with a warning")
    assert right / (right + wrong) >= 0.99
    built_files = {entry.file for entry in entries().values() if not missing(entry.build)}
    shared = {(entry.file, pattern) for entry in entries().values() for pattern in entry.shared}
    assert {pattern for pattern in shared if pattern[0] in built_files} <= used


def test_the_corpus_is_large() -> None:
    libraries = {entry.library for entry in entries().values()}
    assert libraries == {"plain", "transformers", "timm", "diffusers", "torch geometric", "peft"}
    assert len(entries()) >= 120


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 4))
        self.gates = nn.Parameter(torch.zeros(4, 4))
        self.head = nn.Linear(4, 2)


def entry_with(**answers: str) -> Entry:
    return Entry("net", "plain", "none", {}, {"body.0.weight": "matrix", "head.weight": "head"} | answers, {})


@pytest.mark.parametrize(
    ("answers", "verdicts"),
    [
        ({"body.2.weight": "matrix", "gates": "other"}, {"gates": "guessed"}),
        ({"body.2.weight": "matrix", "gates": "matrix"}, {"gates": "wrong with a warning"}),
        ({"body.2.weight": "matrix blocks=2", "gates": "table"}, {"gates": "guessed", "body.2.weight": "wrong"}),
        ({"body.2.weight": "matrix split=2,2 | matrix", "gates": "adamw"}, {"gates": "guessed"}),
        (
            {"body.*": "head", "gates": "embedding | vector"},
            {"gates": "wrong with a warning", "body.2.weight": "wrong"},
        ),
    ],
)
def test_a_verdict(answers: dict[str, str], verdicts: dict[str, str]) -> None:
    judged = judge(entry_with(**answers), _Net())
    assert {one.route.name: one.verdict for one in judged if one.verdict != "right"} == verdicts
    assert elements(judged, "right", "guessed", "wrong", "wrong with a warning") == 4 * 12 * 2 + 16 + 8 + 12 + 4 + 2


def test_a_guess_that_the_warning_leaves_out_is_no_excuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_muon.optim.routing.routing.warnings.warn", lambda *_, **__: None)
    judged = judge(entry_with(**{"body.2.weight": "matrix", "gates": "matrix"}), _Net())
    assert [one.verdict for one in judged if one.route.name == "gates"] == ["wrong"]


def test_answers_must_be_complete_and_needed() -> None:
    with pytest.raises(ValueError, match=r"net has no answer for gates \(4, 4\)"):
        judge(entry_with(**{"body.2.weight": "matrix"}), _Net())
    with pytest.raises(ValueError, match=r"net: no parameter's first pattern is tail\.weight"):
        judge(entry_with(**{"body.2.weight": "matrix", "gates": "table", "tail.weight": "head"}), _Net())
    idle = replace(entry_with(**{"body.2.weight": "matrix", "gates": "table"}), shared={"tail.weight": "head"})
    assert judge(idle, _Net())


@pytest.mark.parametrize("text", ["matrx", "matrix block=2", "matrix blocks=two", "matrix split", ""])
def test_an_answer_that_says_nothing(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Answer.read(text)
