"""Decoding: speed against nanoGPT's loop without a cache, and against transformers and llama.cpp on the exported model; size
of the cache.

    python bench/generate.py

A model of GPT-2's size with Llama's architecture (--preset=llama, so that transformers runs its own code on it), random
weights, all cores, fp32 unless a row says otherwise. Each measurement is a process of its own; the sides take turns. Writes
its table into docs/benchmarks.md. About twenty minutes on two cores. llama.cpp is left out where llama-cpp-python is not
installed.
"""
import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from side_by_side import REPO, install_peers, machine, run, table, take_turns, write_into_docs

sys.path.insert(0, str(REPO))
from kernels import decode  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from runtime.config import read_flags  # noqa: E402
from runtime.device import DTYPES, Machine  # noqa: E402
from sampling import GREEDY, SamplingConfig, generate, sample  # noqa: E402
from tokenizer import SPECIAL_TOKENS, Tokenizer  # noqa: E402
from train import PRESETS  # noqa: E402

SHAPE = {"n_layer": 12, "n_head": 12, "head_size": 64, "block_size": 1024, "vocab_size": 32_768}
PROMPT_TOKENS, BATCH_SIZE, LONG_PROMPT_TOKENS = 16, 16, 512


def make_model(preset: dict = PRESETS["llama"]) -> GPT:
    torch.manual_seed(0)
    model = GPT(read_flags(GPTConfig, preset | SHAPE))
    for block in model.blocks:  # these matrices start at zero
        for proj in (block.mixer.proj, block.mlp.proj):
            torch.nn.init.normal_(proj.weight, std=0.02)
    return model.requires_grad_(False)


def random_prompts(batch_size: int, n_tokens: int) -> torch.Tensor:
    """(batch_size, n_tokens) int64."""
    return torch.randint(SHAPE["vocab_size"], (batch_size, n_tokens), generator=torch.Generator().manual_seed(1))


# -- measurements: each runs in a process of its own ------------------------------------------------------------------

def cached_speed(batch_size: int, new_tokens: int) -> float:
    """Tokens per second of all rows together, with our `generate`."""
    model, prompts = make_model(), list(random_prompts(batch_size, PROMPT_TOKENS))
    list(generate(model, prompts, 4, SamplingConfig()))
    start = time.perf_counter()
    n_tokens = sum(len(new) for new in generate(model, prompts, new_tokens, SamplingConfig()))
    return n_tokens / (time.perf_counter() - start)


def greedy_speed(dtype: str, new_tokens: int, kernels: bool = True) -> float:
    """Tokens per second of one text as generate.py makes it with --dtype, temperature 0. kernels: whether operations are
    those of kernels/decode.py, or torch's."""
    if not kernels:
        decode.MAX_ROWS.clear()
    model, prompts = make_model(), list(random_prompts(1, PROMPT_TOKENS))
    model.cast_matrices(DTYPES[dtype])
    with Machine(torch.device("cpu"), dtype).autocast():
        return decoding_speed(lambda n: list(generate(model, prompts, n, GREEDY)), new_tokens)


def llama_cpp_speed(path: Path, new_tokens: int) -> float:
    """Tokens per second of llama.cpp on the exported model, the likeliest token each time."""
    from llama_cpp import Llama
    n_threads, prompt = torch.get_num_threads(), random_prompts(1, PROMPT_TOKENS)[0].tolist()
    model = Llama(str(path), n_ctx=SHAPE["block_size"], n_threads=n_threads, n_threads_batch=n_threads, verbose=False)

    def decode(n: int):
        model.reset()
        generated = model.generate(prompt, temp=0.0)
        for _ in range(n):
            next(generated)
    return decoding_speed(decode, new_tokens)


def decoding_speed(decode: Callable[[int], object], new_tokens: int) -> float:
    decode(4)
    start = time.perf_counter()
    decode(new_tokens)
    return new_tokens / (time.perf_counter() - start)


@torch.inference_mode()
def uncached_speed(new_tokens: int) -> float:
    """Tokens per second of nanoGPT's loop: a forward pass over the whole context for every token, with the logits of the
    last position only."""
    model, idx, sampling = make_model(), random_prompts(1, PROMPT_TOKENS), SamplingConfig()
    model(idx, logits_to_keep=1)
    start = time.perf_counter()
    for _ in range(new_tokens):
        new = sample(model(idx[:, -SHAPE["block_size"]:], logits_to_keep=1)[:, 0], sampling)
        idx = torch.cat((idx, new[:, None]), dim=1)
    return new_tokens / (time.perf_counter() - start)


@torch.inference_mode()
def transformers_speed(folder: str, new_tokens: int) -> float:
    """Tokens per second of transformers' `generate` on the exported model, with the same sampling settings."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    idx = random_prompts(1, PROMPT_TOKENS)
    options = {"do_sample": True, "temperature": 0.8, "top_k": 50, "eos_token_id": None, "pad_token_id": 0}
    model.generate(idx, max_new_tokens=4, **options)
    start = time.perf_counter()
    generated = model.generate(idx, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **options)
    return (generated.size(1) - PROMPT_TOKENS) / (time.perf_counter() - start)


@torch.inference_mode()
def first_token_seconds(new_tokens: int) -> tuple[float, float]:
    """Seconds until the first token after a long prompt, and seconds of one forward pass over that prompt."""
    model, prompt = make_model(), random_prompts(1, LONG_PROMPT_TOKENS)
    first_token = lambda: next(generate(model, list(prompt), new_tokens, GREEDY))
    return median_seconds(first_token), median_seconds(lambda: model(prompt))


def median_seconds(function: Callable, rounds: int = 7) -> float:
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.inference_mode()
def cache_bytes(preset: dict) -> tuple[int, int]:
    """Resident bytes that the process gains when a cache of BATCH_SIZE rows is allocated and filled, and the bytes of keys,
    values and shifted tokens in it by their formula."""
    model, idx = make_model(preset), random_prompts(BATCH_SIZE, 1)
    resident_bytes = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    model(idx, cache=model.init_cache(BATCH_SIZE, 1))
    before = resident_bytes()
    cache = model.init_cache(BATCH_SIZE, SHAPE["block_size"])
    for tensor in cache.tensors():
        tensor.fill_(1.0)
    gained, width = resident_bytes() - before, model.config.n_embd
    shifted = 2 * width if model.config.token_shift else 0
    return gained, SHAPE["n_layer"] * 4 * BATCH_SIZE * (2 * SHAPE["block_size"] * width + shifted)


# -- running and comparing --------------------------------------------------------------------------------------------

def export_for_transformers(folder: Path):
    from convert.hf_out import export_model
    export_model(make_model(), Tokenizer.train(["text"], 261), folder)  # the ids of its vocabulary are never used


def export_for_llama_cpp(folder: Path) -> list[str]:
    """Writes fp16.gguf and bf16.gguf, and returns these two names of dtypes; [] with a line where llama.cpp is missing."""
    from convert.gguf import write_gguf
    if importlib.util.find_spec("llama_cpp") is None:
        print("llama.cpp is left out: `pip install llama-cpp-python` builds it", file=sys.stderr)
        return []
    ranks = Tokenizer.train(["text"], 258 + len(SPECIAL_TOKENS)).ranks  # it wants a vocabulary of the model's size
    n_unused = SHAPE["vocab_size"] - len(SPECIAL_TOKENS)
    tokenizer = Tokenizer.from_ranks(ranks, "gpt4", {name: n_unused + i for i, name in enumerate(SPECIAL_TOKENS)})
    for dtype in ("fp16", "bf16"):
        write_gguf(make_model(), tokenizer, folder / f"{dtype}.gguf", dtype)
    return ["fp16", "bf16"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="processes of each side")
    parser.add_argument("--new_tokens", type=int, default=512)
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # the exported model
    parser.add_argument("--arm", help=argparse.SUPPRESS)     # one measurement, printed as JSON
    args = parser.parse_args()
    arms = {"cached": lambda: cached_speed(1, args.new_tokens), "batch": lambda: cached_speed(BATCH_SIZE, args.new_tokens),
            "uncached": lambda: uncached_speed(args.new_tokens),
            "transformers": lambda: transformers_speed(args.folder, args.new_tokens),
            "fp32": lambda: greedy_speed("fp32", args.new_tokens), "bf16": lambda: greedy_speed("bf16", args.new_tokens),
            "torch_fp32": lambda: greedy_speed("fp32", args.new_tokens, kernels=False),
            "torch_bf16": lambda: greedy_speed("bf16", args.new_tokens, kernels=False),
            "llama_cpp_fp16": lambda: llama_cpp_speed(Path(args.folder) / "fp16.gguf", args.new_tokens),
            "llama_cpp_bf16": lambda: llama_cpp_speed(Path(args.folder) / "bf16.gguf", args.new_tokens),
            "first_token": lambda: first_token_seconds(args.new_tokens),
            "cache_llama": lambda: cache_bytes(PRESETS["llama"]), "cache_default": lambda: cache_bytes({})}
    if args.arm:
        print(json.dumps(arms[args.arm]()))
        return
    install_peers()
    with tempfile.TemporaryDirectory() as folder:
        export_for_transformers(Path(folder))
        flags = [f"--folder={folder}", f"--new_tokens={args.new_tokens}"]
        measure = lambda arm: run(__file__, arm, flags)
        ours, peers = ["fp32", "bf16", "torch_fp32", "torch_bf16"], export_for_llama_cpp(Path(folder))
        greedy = [*ours, *(f"llama_cpp_{dtype}" for dtype in peers)]
        speeds = dict(zip(greedy, take_turns(measure, greedy, args.rounds)))
        cached, batch, uncached, transformers = take_turns(measure, ["cached", "batch", "uncached", "transformers"],
                                                           args.rounds)
        first_token, forward = measure("first_token")
        caches = {"Llama's shape": measure("cache_llama"), "default architecture": measure("cache_default")}
    speed = lambda value: f"{value:.1f} tok/s"
    mib = lambda n_bytes: f"{n_bytes / 2**20:,.1f} MiB"
    rows = [(f"speed, {args.new_tokens} new tokens: ours / nanoGPT's loop without a cache", f"{cached / uncached:.1f}",
             "higher", speed(cached), speed(uncached)),
            (f"speed, {args.new_tokens} new tokens: ours / transformers' `generate` on the exported model",
             f"{cached / transformers:.2f}", "higher", speed(cached), speed(transformers)),
            (f"speed of all texts together: {BATCH_SIZE} at once / one", f"{batch / cached:.1f}", "higher", speed(batch),
             speed(cached)),
            (f"time to the first token after a prompt of {LONG_PROMPT_TOKENS} / one forward pass over it",
             f"{first_token / forward:.2f}", "lower", f"{1e3 * first_token:,.0f} ms", f"{1e3 * forward:,.0f} ms")]
    compare = lambda what, own, peer: (f"greedy, {args.new_tokens} new tokens: {what}", f"{speeds[own] / speeds[peer]:.2f}",
                                       "higher", speed(speeds[own]), speed(speeds[peer]))
    rows += [compare("`--dtype=bf16` / `--dtype=fp32`", "bf16", "fp32"),
             compare("fp32, kernels/decode.py / torch's operations", "fp32", "torch_fp32"),
             compare("bf16, kernels/decode.py / torch's operations", "bf16", "torch_bf16")]
    rows += [compare(f"ours in bf16 / llama.cpp on the exported model in {dtype}", "bf16", f"llama_cpp_{dtype}")
             for dtype in peers]
    rows += [(f"memory of a cache of {BATCH_SIZE} texts, {name}: resident / formula", f"{gained / formula:.3f}", "1",
              mib(gained), mib(formula)) for name, (gained, formula) in caches.items()]
    model = make_model()
    text = table(rows) + (
        f"\n\n{SHAPE['n_layer']} layers x {model.config.n_embd}, vocabulary {SHAPE['vocab_size']:,}, "
        f"{model.n_parameters() / 1e6:.0f} M parameters, `--preset=llama`, prompts of {PROMPT_TOKENS}, sampling with top-k "
        f"50, fp32; greedy rows: one text, --dtype as they say; {machine()}; "
        f"medians of {args.rounds} processes that took turns: `python bench/generate.py`.")
    print(text)
    write_into_docs("bench/generate.py", text)


if __name__ == "__main__":
    main()
