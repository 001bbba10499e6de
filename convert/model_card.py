"""README.md of an exported folder: how to load it, and the figures of the model and its training.

    text = model_card("exported_gpt", model, tokenizer, training, rows)
"""
from pathlib import Path

from convert.hf_mapping import hf_architecture
from convert.hf_tokenizer import has_chat_tokens
from model import GPT
from tokenizer import Tokenizer

CLASSES = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", None: "GPTWorkbenchForCausalLM"}
# The hub reads what is between the lines of ---. Of a licence only the owner of the model can say.
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
# license: choose one of https://huggingface.co/docs/hub/repositories-licenses, and remove the # at the start of this line
---

# {name}

```python
{load_lines}
```

The path of this folder, or its id on the hub, goes in place of the name. {trust_note}

| | |
|---|---|
{figures}

Bits per byte and nats are of text that the model was not trained on; lower is better. Bits per byte compares models
whatever their vocabulary, if they are measured on the same text.

## Left to you

- The licence: in the header of this file.
- What the training text was, and what it may be used for.
"""
OWN_CODE = """\
The network is not one of transformers' own: its source is the `.py` files in this folder. `trust_remote_code=True` lets
transformers run them; without it, transformers asks whether it may, or refuses."""


def load_lines(folder: str, architecture: str | None) -> str:
    """Two lines of Python that load the exported folder of this path. architecture: of `hf_architecture`."""
    trust = ", trust_remote_code=True" if architecture is None else ""
    return (f"from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f"model, tokenizer = AutoModelForCausalLM.from_pretrained({folder!r}{trust}), "
            f"AutoTokenizer.from_pretrained({folder!r})")


def model_card(name: str, model: GPT, tokenizer: Tokenizer, training: dict, rows: list[dict]) -> str:
    """The text of README.md. name: of the folder; training: the training state in the checkpoint, {} of an imported model;
    rows: of the run's metrics.jsonl."""
    architecture = hf_architecture(model.config)
    figures = model_figures(model, tokenizer) | training_figures(training, rows)
    table = "\n".join(f"| {label} | {value} |" for label, value in figures.items())
    return CARD.format(name=name, load_lines=load_lines(name, architecture),
                       trust_note=OWN_CODE if architecture is None else "No code of this folder runs.",
                       figures=table)


def model_figures(model: GPT, tokenizer: Tokenizer) -> dict[str, str]:
    config = model.config
    chat = ", with tokens for conversations" if has_chat_tokens(tokenizer) else ""
    return {"class": f"`{CLASSES[hf_architecture(config)]}`", "parameters": f"{model.n_parameters():,}",
            "of these in the embedding": f"{model.embed.weight.numel():,}",
            "network": f"{config.describe_shape()}, {config.mixer} and {config.mlp}",
            "context": f"{config.block_size:,} tokens",
            "tokenizer": f"byte-level BPE, {tokenizer.vocab_size:,} ids{chat}"}


def training_figures(training: dict, rows: list[dict]) -> dict[str, str]:
    """What a run's checkpoint and metrics say of its training; {} of an imported model."""
    step, best, figures = training.get("step"), training.get("best"), {}
    if step is None:
        return {}
    script, base = training.get("script"), training.get("settings", {}).get("checkpoint_path")
    figures["trained by"] = f"{script}, {step:,} steps" + (f", from `{Path(base).name}`" if script == "finetune.py" else "")
    figures["training tokens"] = f"{training['tokens']:,}" + (", not counting the model that it started from"
                                                              if script == "finetune.py" else "")
    validations = {row["val_loss"]: row for row in reversed(rows) if "val_loss" in row}
    if best is not None:  # the metrics beside a checkpoint that was moved may be another run's
        row = validations.get(best, {"val_loss": best})
        figures["best validation"] = format_validation(row)
        own = next((row for row in rows if row["step"] == step and "val_loss" in row), None)
        if best in validations and own and row["step"] != step:
            figures["validation of these weights"] = format_validation(own)
    return figures


def format_validation(row: dict) -> str:
    bpb = f"{row['val_bpb']:.4f} bits/byte, " if "val_bpb" in row else ""
    return f"{bpb}{row['val_loss']:.4f} nats/token" + (f", at step {row['step']:,}" if "step" in row else "")
