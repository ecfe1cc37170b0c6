"""Test that the GPT is causal, its embeddings, start, experts and cache, and that it learns and writes text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_muon.cli import MuonCLI, main
from lightning_muon.optim import find_routes
from {{ cookiecutter.package_name }}.data import TextData
from {{ cookiecutter.package_name }}.experts import Experts
from {{ cookiecutter.package_name }}.generation import generate
from {{ cookiecutter.package_name }}.model import GPT, Cache, rotary_table

Run = Callable[..., MuonCLI]

SHAPES: list[dict[str, Any]] = [{}, {"kv_heads": 1}, {"softcap": 5.0}, {"experts": 4}]


def small(**options: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(**{"dim": 16, "depth": 2, "heads": 2, "context": 12, **options})
    torch.nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize("options", SHAPES)
def test_a_token_has_no_influence_on_what_came_before(options: dict[str, Any]) -> None:
    model = small(**options)
    tokens = torch.randint(256, (2, 12))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 12, 256)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(dim=(0, 2)).min() > 1e-4


@pytest.mark.parametrize("options", SHAPES)
def test_a_cache_changes_nothing(options: dict[str, Any]) -> None:
    model, tokens = small(**options), torch.randint(256, (2, 12))
    cache: Cache = []
    pieces = [model(piece, cache) for piece in tokens.split([3, 1, 5, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens))


def test_rotation_keeps_lengths() -> None:
    cosine, sine = rotary_table(features=8, context=20)
    torch.testing.assert_close(cosine**2 + sine**2, torch.ones(20, 4))
    assert cosine[0].eq(1).all()


def test_tied_embeddings_are_one_parameter() -> None:
    tied, untied = small(tied_embeddings=True), small()
    assert tied.head.weight is tied.embedding.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 256 * 16


def test_it_begins_with_every_token_equally_likely() -> None:
    logits = GPT(dim=16, depth=2, heads=2, context=12)(torch.randint(256, (2, 12)))
    assert logits.count_nonzero() == 0


def test_a_cap_bounds_the_logits() -> None:
    assert small(softcap=0.5)(torch.randint(256, (2, 12))).abs().max() <= 0.5


@pytest.mark.parametrize("options", SHAPES)
def test_no_route_is_a_guess(options: dict[str, Any]) -> None:
    routes = {route.name: route for route in find_routes(small(**options), strict=True)}
    matrices = {name for name in routes if name.startswith("blocks.") and not name.endswith("norm.weight")}
    assert {routes[name].algorithm for name in matrices} == {"muon"}
    assert {routes[name].algorithm for name in ("embedding.weight", "head.weight")} == {"adamw"}


def test_experts_are_the_weighted_sum_of_the_chosen() -> None:
    experts = Experts(dim=8, count=4, active=2)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(3, 5, 8)

    def of(expert: int) -> Tensor:
        result: Tensor = (x @ experts.up[expert].T).relu().square() @ experts.down[expert].T
        return result

    everyone = torch.stack([of(expert) for expert in range(4)], dim=-2)
    best, chosen = experts.router(x).topk(2)
    expected = (everyone.gather(-2, chosen[..., None].expand(-1, -1, -1, 8)) * best.softmax(-1)[..., None]).sum(-2)
    torch.testing.assert_close(experts(x), expected)
    # Alike, and all tokens to the same two.
    torch.nn.init.zeros_(experts.router.weight)
    experts(x)
    assert experts.balance_loss.item() == pytest.approx(1.0)
    torch.nn.init.eye_(experts.router.weight)
    experts(x.abs() * torch.tensor([9.0, 5.0, 0, 0, 0, 0, 0, 0]))
    assert experts.balance_loss.item() > 1.4


def test_operations_are_counted() -> None:
    matrices = 2 * (16 * 16 * 4 + 2 * 16 * 64) + 256 * 16
    attention = 12 * 2 * 16 * 12
    assert small().flops_per_token() == small(tied_embeddings=True).flops_per_token() == 6 * matrices + attention
    more = 2 * (16 * 4 + 2 * 16 * 64)  # the router, and two experts instead of one MLP
    assert small(experts=4).flops_per_token() == 6 * (matrices + more) + attention


@pytest.mark.parametrize("name", ["vocabulary", "dim", "depth", "heads", "kv_heads", "context"])
def test_sizes_are_at_least_1(name: str) -> None:
    sizes: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        GPT(**sizes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 20, "heads": 4}, r"dim \(20\) must be a multiple of twice the number of heads \(4\)"),
        ({"heads": 4, "kv_heads": 3}, r"heads \(4\) must be a multiple of kv_heads \(3\)"),
        ({"softcap": 0.0}, "softcap must be over 0, got 0"),
        ({"experts": 2, "active_experts": 3}, r"active_experts must be from 1 to the number of experts \(2\), got 3"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT(**options)


def test_text_goes_on_past_the_context() -> None:
    prompts = torch.randint(256, (2, 3))
    texts = generate(small(), prompts, count=20, context=12, temperature=0.5)
    assert [len(text) for text in texts] == [23, 23]
    assert torch.equal(torch.stack(texts)[:, :3], prompts)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}])
def test_the_likeliest_token_is_that_of_the_logits(options: dict[str, Any]) -> None:
    model, prompts = small(), torch.randint(256, (2, 3))
    text = torch.stack(generate(model, prompts, count=8, context=12, **options))
    assert torch.equal(text[:, 3:], model(text[:, :-1]).argmax(-1)[:, 2:])


@pytest.mark.parametrize("options", SHAPES)
def test_a_text_depends_neither_on_the_batch_nor_on_the_cache(options: dict[str, Any]) -> None:
    model = small(**options)
    prompts = [torch.randint(256, (length,)) for length in (5, 1, 12, 9, 17)]
    drawing: dict[str, Any] = {"count": 30, "context": 12, "top_p": 0.9}
    together = generate(model, prompts, **drawing, seeds=range(5))
    for seed, (prompt, text) in enumerate(zip(prompts, together, strict=True)):
        (alone,) = generate(model, [prompt], **drawing, seeds=[seed])
        assert torch.equal(text, alone)
        assert torch.equal(text[: len(prompt)], prompt)
    # Any network, without a cache, as long as the context lasts.
    drawing["count"] = 3
    within = prompts[:2] + prompts[3:4]
    plain = generate(torch.nn.Sequential(model), within, **drawing, seeds=range(3))
    for text, cached in zip(plain, generate(model, within, **drawing, seeds=range(3)), strict=True):
        assert torch.equal(text, cached)


def test_a_token_ends_a_text() -> None:
    model, prompts = small(), [torch.randint(256, (length,)) for length in (2, 6, 4)]
    whole = generate(model, prompts, count=20, context=12, temperature=0)
    stop = int(whole[1][8])
    for prompt, text, stopped in zip(
        prompts, whole, generate(model, prompts, 20, 12, temperature=0, stop=stop), strict=True
    ):
        ends = (text[len(prompt) :] == stop).nonzero()[:, 0].tolist()
        assert torch.equal(stopped, text[: len(prompt) + ends[0]] if ends else text)


def test_few_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1, 1, 4)

    class Fixed(torch.nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return logits.expand(*tokens.shape, 4)

    start = torch.zeros(5_000, 1, dtype=torch.int64)
    for options, expected in (
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.7}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.81}, [0.526, 0.316, 0.158, 0]),
    ):
        torch.manual_seed(0)
        drawn = torch.stack(generate(Fixed(), start, 1, 1, **options))[:, 1]
        assert (drawn.bincount(minlength=4) / len(drawn)).tolist() == pytest.approx(expected, abs=0.03)


def test_it_learns_and_writes(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted = run("fit", "--trainer.max_steps=60")
    metrics = fitted.trainer.callback_metrics
    assert metrics["val/loss"] < 0.8 * metrics["val/unigram_loss"]
    assert metrics["val/perplexity"] == pytest.approx(float(metrics["val/loss"].exp()), rel=1e-3)
    capsys.readouterr()
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    run("predict", f"--ckpt_path={checkpoint}", "--data.prompt=the ", "--model.sample_tokens=30")
    assert "the " in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["version_0"]

    def completions(output: str, *options: str) -> list[str]:
        run("predict", "--data.prompts=prompts.jsonl", f"--output={output}", "--model.sample_tokens=30", *options)
        rows = [json.loads(line) for line in (tmp_path / output).read_text().splitlines()]
        assert [(row["id"], row["prompt"]) for row in rows] == [(0, "the "), (1, "fox jumps"), (2, "f")]
        return [row["completion"] for row in rows]

    prompts = [{"id": 0, "prompt": "the "}, {"id": 1, "prompt": "fox jumps"}, {"id": 2, "prompt": "f"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    together = completions("together.jsonl", f"--ckpt_path={checkpoint}", "--data.batch_size=4")
    assert "predictions: together.jsonl (3 rows)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(args=["export", str(checkpoint), "model.safetensors"])
    assert completions("one by one.jsonl", "--weights=model.safetensors", "--data.batch_size=1") == together


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--model.temperature=.nan", "temperature must be at least 0 and finite, got nan"),
        ("--model.sample_tokens=-1", "sample_tokens must be at least 0, got -1"),
        ("--model.top_p=2", "top_p must be over 0 and at most 1, got 2.0"),
        ("--model.top_k=0", "top_k must be at least 1, got 0"),
        ("--model.net.heads=0", "heads must be at least 1, got 0"),
        ("--data.val_samples=0", "val_samples must be at least 1, got 0"),
    ],
)
def test_values_that_cannot_work_are_refused_in_a_line(
    run: Run, capsys: pytest.CaptureFixture[str], option: str, line: str
) -> None:
    with pytest.raises(SystemExit):
        run("predict", option)
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {line}"


def test_without_files_the_text_is_the_standard_library() -> None:
    paths = list(TextData().default_files())
    assert len(paths) > 300
    assert any(path.name == "argparse.py" for path in paths)
    assert not any("test" in path.parts or "site-packages" in path.parts for path in paths)
