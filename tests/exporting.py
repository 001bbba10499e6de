"""What the tests of export.py share: small random models, and the command run in this process."""
import torch
import transformers
from transformers import AutoModelForCausalLM

import export
from convert import hf_tokenizer
from model import GPT, GPTConfig
from runtime.checkpoint import load_checkpoint, save_checkpoint
from tokenizer import Tokenizer

transformers.logging.set_verbosity_error()
T = 24  # context of the models
MIXED_TEXT = "The numpy array's 3 axes, 12345 and ἀρχή — 文字 🙂\r\n\r\n   it'll\t do\n <|endoftext|> défi  "
CHECKED, check_same_ids = set(), hf_tokenizer.check_same_ids


def check_once(tokenizer: Tokenizer, saved: str):
    """It takes longer than all the rest, and many models have one tokenizer."""
    if (pair := (str(tokenizer.to_json()), saved)) not in CHECKED:
        check_same_ids(tokenizer, saved)
        CHECKED.add(pair)


hf_tokenizer.check_same_ids = check_once


@torch.no_grad()
def random_model(vocab_size: int = 600, **switches) -> GPT:
    """Two layers with random weights everywhere: a fresh model has zeros that would hide a wrong name."""
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "head_size": 8, "block_size": T, "vocab_size": vocab_size}
    model = GPT(GPTConfig(**shape | switches))
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def run_export(model: GPT, tokenizer: Tokenizer, tmp_path, *flags: str):
    """The folder that the command makes of model and tokenizer."""
    save_checkpoint(tmp_path / "gpt.pt", model.to_checkpoint() | {"tokenizer": tokenizer.to_json()})
    export.main([f"--checkpoint_path={tmp_path / 'gpt.pt'}", f"--out_path={tmp_path / 'out'}", *flags])
    return tmp_path / "out"


def run_import(folder, tmp_path, *flags: str) -> tuple[GPT, Tokenizer]:
    """The model and tokenizer that the command makes of a folder."""
    export.main([f"--import_path={folder}", f"--checkpoint_path={tmp_path / 'in.pt'}", *flags])
    checkpoint = load_checkpoint(tmp_path / "in.pt")
    return GPT.from_checkpoint(checkpoint), Tokenizer.from_json(checkpoint["tokenizer"])


def load_exported(folder):
    """The model as a user of transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
