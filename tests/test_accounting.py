"""Bits per byte and bytes of cache against counts of their own, which share no code with what they check."""
import math

import numpy as np
import pytest
import torch

import download_data
import train
from compare import decoding_bytes, time_decoding
from conftest import TINY_MODEL, run_rows
from evaluate import EvaluateConfig, score_text
from experiments.analysis import Arm
from layers import MIXERS
from model import GPT, GPTConfig
from runtime.device import Machine
from sampling import GREEDY, Decoder, load_model, sample

CPU = Machine(torch.device("cpu"), "fp32")
# leading spaces, line ends, characters of two to four bytes, of two characters, and what looks like a special token
WORDS = ["  two spaces before,", "Größe, naïve,", "\n\tЗдравствуй, мир\n", "日本語の文字", "🙂🙃", "e\u0301",
         "<|endoftext|>"]
DOCUMENTS = [" ".join(np.random.default_rng(i).choice(WORDS, 9)) for i in range(40)]


# -- bits per byte ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of data, checkpoint) of a few steps on DOCUMENTS, validated on all of the validation split."""
    folder = tmp_path_factory.mktemp("accounting")
    (folder / "texts").mkdir()
    for i, text in enumerate(DOCUMENTS):
        (folder / "texts" / f"{i:02}.txt").write_bytes(text.encode())
    download_data.main([f"--dataset={folder / 'texts'}", f"--data_path={folder / 'data'}", "--vocab_size=320",
                        "--val_bytes=1000"])
    train.main([f"--data_path={folder / 'data'}", f"--checkpoint_path={folder / 'gpt.pt'}", *TINY_MODEL, "--block_size=40",
                "--batch_size=3", "--max_iter=3", "--device=cpu", "--dtype=fp32", "--verbose=0", "--num_batch_accum=1",
                "--dataloader_num_workers=0"])
    return folder / "data", folder / "gpt.pt"


@torch.inference_mode()
def target_nats(model: GPT, ids: list[int]) -> list[float]:
    """Of each token after the first, from the logits of all positions."""
    logprobs = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(dim=-1)
    return [-logprobs[i, target].item() for i, target in enumerate(ids[1:])]


def test_bits_per_byte_of_a_validation(run):
    """Of train.py, whose rows compare.py reads. Each document of the split is one that was written to disk, and its bytes
    are counted there; separators are no text."""
    data_path, checkpoint = run
    model, tokenizer = load_model(checkpoint, CPU)
    path, = data_path.glob("val_*.npy")
    ids, block_size, nats = np.load(path).tolist(), model.config.block_size, []
    for start in range(0, len(ids) - 1, block_size):
        nats += target_nats(model, ids[start:start + block_size + 1])
    separator = tokenizer.special_tokens["<|endoftext|>"]
    is_text = [token != separator for token in ids[1:]]
    starts = [i for i, token in enumerate(ids) if token == separator]
    texts = [tokenizer.decode(ids[start + 1:stop]) for start, stop in zip(starts, [*starts[1:], len(ids)])]
    assert len(texts) > 3 and set(texts) <= set(DOCUMENTS)
    n_bytes = sum(len(text.encode()) for text in texts)
    row = run_rows(checkpoint)[-1]
    assert row["val_bytes"] == n_bytes and row["val_tokens"] == len(ids) - 1
    bits = [x / math.log(2) for x in nats]
    assert row["val_bpb"] == pytest.approx(sum(x for x, text in zip(bits, is_text) if text) / n_bytes, rel=1e-6)
    assert row["val_loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-6)
    for first, last in ((0, 15), (16, 31), (32, 39)):
        inside = [i for i, text in enumerate(is_text) if text and first <= i % block_size <= last]
        n_bytes = sum(len(tokenizer.tokens[ids[i + 1]]) for i in inside)
        assert row[f"val_bpb/{first}-{last}"] == pytest.approx(sum(bits[i] for i in inside) / n_bytes, rel=1e-6)


def test_bits_per_byte_of_evaluate(run):
    """Documents that fit into a context, each after a separator; every byte of theirs counts."""
    model, tokenizer = load_model(run[1], CPU)
    texts = ["  Größe 🙂", "日本", "<|endoftext|> no", "e\u0301\n"]
    scores, rows = score_text(model, tokenizer, CPU, texts, EvaluateConfig(batch_size=2))
    nats = [sum(target_nats(model, [tokenizer.special_tokens["<|endoftext|>"], *tokenizer.encode(text)])) for text in texts]
    assert max(len(tokenizer.encode(text)) for text in texts) < model.config.block_size
    assert [row["bytes"] for row in rows] == [14, 6, 16, 4] == [len(text.encode()) for text in texts]
    assert [row["nats"] for row in rows] == pytest.approx(nats, rel=1e-6)
    assert scores["bits per byte"].value == pytest.approx(sum(nats) / math.log(2) / 40, rel=1e-6)


# -- bytes of cache ---------------------------------------------------------------------------------------------------

def reachable_tensors(start) -> list[torch.Tensor]:
    """All tensors that can be reached from an object through attributes and containers, each once."""
    seen, pending, found = set(), [start], []
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple, set)):
            pending += value
        elif isinstance(value, dict):
            pending += value.values()
        elif hasattr(value, "__dict__"):
            pending += vars(value).values()
    return found


CONFIGS = {**{mixer: {"mixer": mixer} for mixer in MIXERS}, "pattern": {"mixer": "".join(m.letter for m in MIXERS.values())},
           "window": {"mixer": "SA", "window": 5}, "grouped": {"n_kv_head": 1}, "conv": {"mixer": "DP", "d_conv": 3},
           "d_head_size": {"mixer": "D", "d_head_size": 8}, "ngrams": {"ngram_rows": 50, "smear": True},
           "loops": {"loops": 3}, "value_embeddings": {"value_embeddings": True, "backout": True}}


def count_bytes(cache) -> int:
    """Of all tensors that the cache reaches; they are all of the memory behind them."""
    tensors = reachable_tensors(cache)
    n_bytes = sum(tensor.element_size() * tensor.numel() for tensor in tensors)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == n_bytes
    return n_bytes


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_of_a_cache_are_those_of_its_tensors(name, dtype):
    """When a prompt has been read, and when the text has reached the end of the context."""
    torch.manual_seed(0)
    machine, block_size = Machine(torch.device("cpu"), dtype), 64
    flags = {"n_layer": len(MIXERS), "n_head": 2, "head_size": 8, "block_size": block_size, "init": "gpt2"} | CONFIGS[name]
    model = GPT(GPTConfig(vocab_size=40, **flags))
    with torch.inference_mode(), machine.autocast():
        decoder = Decoder(model, [torch.randint(40, (20,))], block_size - 19, GREEDY)
        assert decoder.cache.n_bytes() == count_bytes(decoder.cache)
        while decoder.cache.length < block_size:
            decoder.append(sample(decoder.logits, GREEDY))
    n_bytes = count_bytes(decoder.cache)
    assert decoder.max_len == block_size and decoder.cache.n_bytes() == n_bytes > 0
    arm = Arm("a", "", flags, (1,), 1, (1, block_size), 0.1, 0, 0, 0, vocab_size=40)
    assert time_decoding([arm], machine, n_rounds=1)[0].cache_bytes == n_bytes  # what compare.py --lengths reports
    if dtype == "fp32":  # what compare.py --match=memory counts
        assert decoding_bytes(model) == 4 * sum(p.numel() for p in model.parameters()) + n_bytes


def test_a_window_and_a_state_bound_the_cache():
    """Twice the context: twice the keys and values of attention, as much for a window of a fixed width, and for a state."""
    def n_bytes(mixer: str, block_size: int) -> int:
        flags = {"n_layer": 1, "n_head": 2, "head_size": 8, "block_size": block_size, "mixer": mixer, "token_shift": False,
                 **({"window": 8} if mixer == "sliding" else {})}
        arm = Arm("a", "", flags, (1,), 1, (1, block_size), 0.1, 0, 0, 0, vocab_size=40)
        return time_decoding([arm], CPU, n_rounds=1)[0].cache_bytes
    sizes = {mixer: (n_bytes(mixer, 64), n_bytes(mixer, 128)) for mixer in MIXERS}
    assert sizes["attention"] == (4 * 2 * 64 * 16, 4 * 2 * 128 * 16)
    assert sizes["sliding"] == (4 * 2 * (8 + 8) * 16,) * 2
    assert sizes["gated_delta"] == (4 * 2 * 8 * 8,) * 2
