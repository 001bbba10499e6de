"""What decoding costs: against a loop without a cache, as nanoGPT has it, and against transformers on the exported model.

    python bench/generate.py

A model of GPT-2's size of Llama's shape (--preset=llama, so that transformers runs its own code on it), random weights,
fp32, all cores. Each measurement is a process of its own that takes turns with the others. Writes its table into README.md.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from side_by_side import REPO, install_peers, machine, run, table, take_turns, write_into_readme

sys.path.insert(0, str(REPO))
from model import GPT, GPTConfig  # noqa: E402
from runtime.config import read_flags  # noqa: E402
from sampling import GREEDY, SamplingConfig, generate, sample  # noqa: E402
from train import PRESETS  # noqa: E402

SHAPE = {"n_layer": 12, "n_head": 12, "head_size": 64, "block_size": 1024, "vocab_size": 32_768}
PROMPT, NEW, BATCH, LONG_PROMPT = 16, 512, 16, 512


def make_model(preset: str = "llama") -> GPT:
    torch.manual_seed(0)
    model = GPT(read_flags(GPTConfig, PRESETS.get(preset, {}) | SHAPE))
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):  # which start at zero
            torch.nn.init.normal_(parameter, std=0.02)
    return model.requires_grad_(False)


def prompts(n: int, length: int) -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], (n, length), generator=torch.Generator().manual_seed(1))


def ours(n: int) -> float:
    """Tokens per second of all rows together."""
    model, idx = make_model(), prompts(n, PROMPT)
    list(generate(model, list(idx), 4, SamplingConfig()))
    start = time.perf_counter()
    n_tokens = sum(len(new) for new in generate(model, list(idx), NEW, SamplingConfig()))
    return n_tokens / (time.perf_counter() - start)


@torch.inference_mode()
def uncached() -> float:
    """nanoGPT's loop: the whole context through the model for every token, logits of the last position alone."""
    model, idx, sampling = make_model(), prompts(1, PROMPT), SamplingConfig()
    model(idx, logits_to_keep=1)
    start = time.perf_counter()
    for _ in range(NEW):
        new = sample(model(idx[:, -SHAPE["block_size"]:], logits_to_keep=1)[:, 0], sampling)
        idx = torch.cat((idx, new[:, None]), dim=1)
    return NEW / (time.perf_counter() - start)


@torch.inference_mode()
def theirs(folder: str) -> float:
    """transformers.generate on the exported model, sampling as ours does."""
    from transformers import AutoModelForCausalLM
    model, idx = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), prompts(1, PROMPT)
    options = {"do_sample": True, "temperature": 0.8, "top_k": 50, "eos_token_id": None, "pad_token_id": 0}
    model.generate(idx, max_new_tokens=4, **options)
    start = time.perf_counter()
    made = model.generate(idx, max_new_tokens=NEW, min_new_tokens=NEW, **options)
    return (made.size(1) - PROMPT) / (time.perf_counter() - start)


def median_seconds(function, rounds: int = 7) -> float:
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[rounds // 2]


@torch.inference_mode()
def first_token() -> list[float]:
    """Seconds until the first token after a long prompt, and of one forward pass over it, in turns."""
    model, idx = make_model(), prompts(1, LONG_PROMPT)
    return [median_seconds(lambda: next(generate(model, list(idx), NEW, GREEDY))), median_seconds(lambda: model(idx))]


@torch.inference_mode()
def cache_bytes(preset: str) -> list[float]:
    """What the process comes to hold when a cache of BATCH rows is made and filled, and what the formula says."""
    model, idx = make_model(preset), prompts(BATCH, 1)
    held = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    model(idx, cache=model.init_cache(BATCH, 1))
    before = held()
    cache = model.init_cache(BATCH, SHAPE["block_size"])
    for block in cache.blocks:
        for part in (block.mixer, *block.shifts):
            for tensor in vars(part).values():
                tensor.fill_(1.0)
    measured, width = held() - before, SHAPE["n_head"] * SHAPE["head_size"]
    shifts = 2 * width if preset != "llama" else 0
    return [measured, SHAPE["n_layer"] * 4 * BATCH * (2 * SHAPE["block_size"] * width + shifts)]


def export_model(folder: Path):
    """With a vocabulary of bytes and nothing more; its ids are not asked for."""
    from convert.hf_out import export
    from tokenizer import Tokenizer
    export(make_model(), Tokenizer.train(["text"], 261), folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="internal: the exported model")
    parser.add_argument("--arm", help="internal: one measurement, as JSON")
    args = parser.parse_args()
    arms = {"ours": lambda: ours(1), "batch": lambda: ours(BATCH), "uncached": uncached,
            "transformers": lambda: theirs(args.folder), "first": first_token,
            "cache llama": lambda: cache_bytes("llama"), "cache default": lambda: cache_bytes("")}
    if args.arm:
        print(json.dumps(arms[args.arm]()))
        return
    install_peers()
    with tempfile.TemporaryDirectory() as folder:
        export_model(Path(folder))
        flags = [f"--folder={folder}"]
        sides = ["ours", "batch", "uncached", "transformers"]
        one, batch, slow, peer = take_turns(lambda arm: run(__file__, arm, flags), sides, args.rounds)
        first, forward = run(__file__, "first", flags)
        caches = {preset: run(__file__, f"cache {preset}", flags) for preset in ("llama", "default")}
    mib = lambda n: f"{n / 2**20:,.1f} MiB"
    rows = [(f"{NEW} new tokens, against a loop without a cache as nanoGPT has it: times as fast", f"**{one / slow:.1f}×**",
             f"{one:.1f} tok/s", f"{slow:.1f} tok/s"),
            ("the same, against transformers.generate on the exported model: times as fast", f"**{one / peer:.2f}×**",
             f"{one:.1f} tok/s", f"{peer:.1f} tok/s"),
            (f"{BATCH} texts at once, against one: tokens per second", f"**{batch / one:.1f}×**", f"{batch:.0f} tok/s",
             f"{one:.1f} tok/s"),
            (f"the first token after a prompt of {LONG_PROMPT}, against one forward pass over it: time",
             f"**{first / forward:.2f}**", f"{1e3 * first:,.0f} ms", f"{1e3 * forward:,.0f} ms")]
    rows += [(f"cache of {BATCH} texts, {name}: what the process comes to hold, against its formula",
              f"**{measured / formula:.3f}**", mib(measured), mib(formula)) for name, (measured, formula) in zip(
                  ("Llama's shape", "default architecture"), caches.values())]
    parameters = make_model().n_parameters() / 1e6
    text = table(rows) + (
        f"\n\n{SHAPE['n_layer']} layers x {SHAPE['n_head'] * SHAPE['head_size']}, vocabulary {SHAPE['vocab_size']:,}, "
        f"{parameters:.0f} M parameters, `--preset=llama`, prompts of {PROMPT}, sampling with top-k 50, fp32, {machine()}; "
        f"medians of {args.rounds} processes that took turns: `python bench/generate.py`.")
    print(text)
    write_into_readme("bench/generate.py", text)


if __name__ == "__main__":
    main()
