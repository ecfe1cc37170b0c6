"""Test that the model is causal, and its embeddings, start and sampling."""

from typing import Any

import pytest
import torch

from {{ cookiecutter.package_name }}.model import GPT, generate, rotary_table


def small(*, tied_embeddings: bool = False) -> GPT:
    torch.manual_seed(0)
    model = GPT(dim=16, depth=2, heads=2, context=12, tied_embeddings=tied_embeddings)
    torch.nn.init.normal_(model.head.weight)
    return model


def test_a_byte_has_no_influence_on_what_came_before() -> None:
    model = small()
    tokens = torch.randint(256, (2, 12))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 12, 256)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(dim=(0, 2)).min() > 1e-4


def test_rotation_keeps_lengths_and_shows_distance_only() -> None:
    cosine, sine = rotary_table(features=8, context=20)
    torch.testing.assert_close(cosine**2 + sine**2, torch.ones(20, 4))
    assert cosine[0].eq(1).all()


def test_tied_embeddings_are_one_parameter() -> None:
    tied, untied = small(tied_embeddings=True), small()
    assert tied.head.weight is tied.embedding.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 256 * 16


def test_it_begins_with_every_byte_equally_likely() -> None:
    logits = GPT(dim=16, depth=2, heads=2, context=12)(torch.randint(256, (2, 12)))
    assert logits.count_nonzero() == 0


def test_generate_goes_on_past_the_context() -> None:
    prompt = torch.randint(256, (2, 3))
    text = generate(small(), prompt, count=20, context=12, temperature=0.5)
    assert text.shape == (2, 23)
    assert torch.equal(text[:, :3], prompt)


@pytest.mark.parametrize("name", ["dim", "depth", "heads", "context"])
def test_sizes_are_at_least_1(name: str) -> None:
    sizes: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        GPT(**sizes)


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dim \(20\) must be a multiple of twice the number of heads \(4\)"):
        GPT(dim=20, heads=4)
