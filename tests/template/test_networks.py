"""A generated project trains other networks than its own: one of the user's, and one of transformers."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.processes import launch

PROGRAM = Path(__file__).with_name("network_training.py")
SMALL_LLAMA = """
model:
  net:
    class_path: lightning_muon.cli.models.hugging_face
    init_args:
      model_type: llama
      overrides: {vocab_size: 256, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
        num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: "${model.context}"}
"""


@pytest.fixture
def train(baked_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 99)

    def train_network(*options: str) -> Any:
        configs, source = baked_project / "configs", baked_project / "src"
        (found,) = launch(PROGRAM, "train", 1, configs, list(options), folder=tmp_path, path=[source])
        assert found["steps"] == [2, 2, 3]
        assert len(set(found["networks"])) == 1
        assert found["same"]
        assert found["table"].count("Who updates what") == 1
        assert found["text"].startswith("def ")
        return found

    return train_network


def test_a_network_of_the_user(train: Any) -> None:
    found = train("--model.net=network_training.Recurrent", "--model.net.width=16")
    assert found["networks"][0] == "Recurrent"
    matrices = [f"net.layers.{i}.weight_{part}_l0" for i in range(2) for part in ("ih", "hh")]
    assert found["groups"]["matrix"] == matrices
    assert found["groups"]["head"] == ["net.head.weight"]
    assert found["measured"]  # the repeated layers, without a word of the user


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_a_network_of_transformers(train: Any, tmp_path: Path) -> None:
    (tmp_path / "llama.yaml").write_text(SMALL_LLAMA)
    found = train("--config=llama.yaml")
    assert found["networks"][0] == "LlamaForCausalLM"
    assert found["groups"]["embedding"] == ["net.model.embed_tokens.weight"]
    assert found["groups"]["head"] == ["net.lm_head.weight"]
    assert len(found["groups"]["matrix"]) == 14
    assert "net.model.layers.0.self_attn.q_proj.weight" in found["table"]
