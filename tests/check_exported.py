"""What an exported folder of our own code must do in the version of transformers that is installed. test_export_versions.py
runs it as a program for other versions: a process has one.

    python tests/check_exported.py exported_gpt reference.pt

reference.pt: {"idx": (B, T) int64, "logits": (B, T, V), "text": …, "ids": those of the text after the separator}
"""
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, torch_dtype=dtype).eval()


@torch.no_grad()
def check_logits(model, idx, logits):
    """Plain, with padding on either side and on both, and with every row padded."""
    assert (model(idx).logits - logits).abs().max() < 1e-4
    row, T = idx[:1, :5], 8
    for left in range(T - 4):
        padded = torch.zeros(2, T, dtype=torch.int64)
        mask = torch.zeros_like(padded)
        padded[:, left:left + 5], mask[:, left:left + 5] = row, 1
        mask[1, left + 4] = 0  # the rows have different padding on the right
        out = model(padded, attention_mask=mask).logits
        assert out.shape == (2, T, logits.size(-1)), out.shape
        assert (out[0, left:left + 5] - logits[0, :5]).abs().max() < 1e-4
    mask[1] = 0
    assert torch.isfinite(model(padded, attention_mask=mask).logits).all()  # a row that is all padding
    mask[0, :] = torch.tensor([1, 0, 1, 1, 1, 1, 1, 1])
    try:
        model(padded, attention_mask=mask)
        raise AssertionError("padding between tokens was taken")
    except ValueError:
        pass


@torch.no_grad()
def check_generation(model, idx):
    """Greedy and by beams, several sequences each, from prompts of one length and of several: with the cache as without."""
    prompts, lengths = idx[:, :8].clone(), (3, 8, 5)
    mask = torch.tensor([[0] * (8 - n) + [1] * n for n in lengths[:len(idx)]])
    for beams, extra in ((1, {}), (4, {"num_return_sequences": 3, "output_scores": True, "return_dict_in_generate": True})):
        for attention_mask in (torch.ones_like(mask), mask):
            options = {"attention_mask": attention_mask, "max_new_tokens": 10, "do_sample": False, "num_beams": beams,
                       "eos_token_id": None, "pad_token_id": 0, **extra}
            cached, plain = (model.generate(prompts, use_cache=use_cache, **options) for use_cache in (True, False))
            if beams == 1:
                assert torch.equal(cached, plain)
                continue
            assert torch.equal(cached.sequences, plain.sequences)
            assert torch.allclose(cached.sequences_scores, plain.sequences_scores, atol=1e-4)
            rows = cached.beam_indices.view(len(idx), -1)
            assert (rows != rows[:, :1]).any()  # the rows of the cache were reordered


def check_loss(model, idx):
    """Two micro-batches of a step, with the number of targets of both: the loss and gradients of one batch of all rows."""
    labels = idx.clone()
    labels[1, 2:] = -100
    whole = model(idx, labels=labels).loss
    whole.backward()
    weight = model.get_input_embeddings().weight
    expected, weight.grad = weight.grad.clone(), None
    n = (labels[:, 1:] != -100).sum()
    losses = [model(part, labels=target, num_items_in_batch=n).loss for part, target in zip(idx.split(2), labels.split(2))]
    sum(losses).backward()
    assert torch.allclose(sum(losses), whole, rtol=1e-5) and torch.allclose(weight.grad, expected, atol=1e-6)


@torch.no_grad()
def check_dtypes(folder, idx, logits):
    assert load(folder, "auto").dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        model = load(folder, dtype)
        assert model.dtype == dtype and (model(idx).logits - logits).square().mean().sqrt() < 0.02 * logits.std(), dtype
        with torch.enable_grad():
            model(idx, labels=idx).loss.backward()
        assert all(torch.isfinite(weight.grad).all() for weight in model.parameters())
        model.generate(idx[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)


def check_tokenizer(folder, model, text, ids):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(text, return_tensors="pt")
    assert encoded["input_ids"][0].tolist()[1:] == ids and set(encoded) == {"input_ids", "attention_mask"}
    model.generate(**encoded, max_new_tokens=2, do_sample=False)
    batch = tokenizer([text, text[:9]], return_tensors="pt", padding=True, padding_side="left")
    model.generate(**batch, max_new_tokens=2, do_sample=False)


def main(folder: str, reference_path: str):
    reference = torch.load(reference_path)
    idx, logits, model = reference["idx"], reference["logits"], load(folder)
    check_logits(model, idx, logits)
    check_generation(model, idx)
    check_loss(model, idx)
    check_dtypes(folder, idx, logits)
    check_tokenizer(folder, model, reference["text"], reference["ids"])
    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        for path in Path(folder).glob("*.py"):
            if not (Path(again) / path.name).exists():  # transformers 4 leaves the code out
                shutil.copy(path, again)
        assert torch.allclose(load(again)(idx).logits, model(idx).logits)
    print(f"transformers {transformers.__version__}: all well")


if __name__ == "__main__":
    main(*sys.argv[1:])
