"""What is done with a generated project after its training, by its command line."""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import torch
from my_muon_project.data import TextData
from my_muon_project.module import TextModule

from lightning_muon.cli import main

QUIET = {
    "accelerator": "cpu",
    "limit_val_batches": "1",
    "enable_progress_bar": "false",
    "enable_model_summary": "false",
    "callbacks": "null",
    "max_steps": "2",
}


def run(configs: str, subcommand: str, *arguments: str) -> str:
    """Return what the program wrote to stdout."""
    options = [f"--trainer.{key}={value}" for key, value in QUIET.items()]
    small = ["--model.context=32", "--data.batch_size=4", "--data.files=text.txt", "--model.sample_tokens=8"]
    given = [*arguments] if subcommand == "export" else [*options, *small, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as written, contextlib.suppress(SystemExit):
        main(TextModule, TextData, default_config=f"{configs}/default.yaml", args=[subcommand, *given])
    return written.getvalue()


def checkpoint(folder: str) -> str:
    (path,) = Path(folder).rglob("*.ckpt")
    return str(path)


def text(configs: str) -> None:
    """Export a small network of the project as the README reads it; predict by it."""
    network = ["--model.net.dim=16", "--model.net.depth=1", "--model.net.heads=2"]
    run(configs, "fit", *network, "--trainer.logger.save_dir=text")
    run(configs, "export", checkpoint("text"), "model.safetensors")
    prompts(configs)


def hugging_face(configs: str) -> dict[str, Any]:
    """Fine-tune a folder of Hugging Face, export it to another one, and compare what both say."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 256, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained("pretrained")
    words = {word: number for number, word in enumerate(["the", "quick", "fox", "jumps", "lazy", "dog", "[UNK]"])}
    tokenizer = Tokenizer(WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save("pretrained/tokenizer.json")
    data = ["--data.tokenizer=pretrained", "--data.val_samples=4"]
    run(configs, "fit", "--weights=pretrained", "--trainer.logger.save_dir=tuned", "--model.optimizer.lr=0.1", *data)
    line = run(configs, "export", checkpoint("tuned"), "exported")
    before, after = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in ("pretrained", "exported"))
    tokens = torch.arange(20)[None]
    saved = torch.load(checkpoint("tuned"), weights_only=True)["state_dict"]
    with torch.no_grad():
        old, new = before(tokens).logits, after(tokens).logits
        before.load_state_dict({name.removeprefix("net."): value for name, value in saved.items()})
        expected = before(tokens).logits
    return {
        "line": line,
        "moved": not torch.equal(old, new),
        "same": torch.equal(new, expected),
        "cache": json.loads(Path("exported/config.json").read_text())["use_cache"],
        "files": sorted(path.name for path in Path("exported").iterdir()),
    }


def prompts(configs: str) -> None:
    """Predict a file of prompts on all ranks, by the network that ``text`` exported."""
    size = os.environ["WORLD_SIZE"]
    for strategy in ("ddp", "fsdp2"):
        options = [f"--trainer.devices={size}", f"--trainer.strategy={strategy}", "--data.prompts=prompts.txt"]
        run(configs, "predict", *options, "--weights=model.safetensors", f"--output={strategy}-{size}.csv")
