"""Speculative decoding against plain decoding: tokens per second with prompt look-up and with a draft model.

    python bench/speculative.py --data=data --out=runs/speculative

Continues passages of the validation documents, which no model was trained on, by 128 tokens. The models are trained into
the folder first, unless they are there: the quick start's, a larger one with a longer context, and a draft model for it.
All sides run in this process, with one thread, and take turns; fails unless look-up, and greedy decoding with any draft,
give the tokens of plain decoding. Writes its tables into docs/benchmarks.md. About half an hour, most of it training.
"""
import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from side_by_side import REPO, machine, write_into_docs

sys.path.insert(0, str(REPO))
from experiments.report import Table, markdown  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from sampling import GREEDY, SamplingConfig, generate, load_pretrained  # noqa: E402
from shards import open_data  # noqa: E402
from speculative import Drafter, DraftModel, PromptLookup, speculate  # noqa: E402

NEW_TOKENS = 128
LONG = ["--preset=quickstart", "--block_size=512", "--batch_size=4", "--threads=1"]
MODELS = {"quickstart": ["--preset=quickstart", "--threads=1"],
          "large": [*LONG, "--n_layer=8", "--head_size=64", "--max_iter=600"],
          "draft": [*LONG, "--n_layer=2"]}
SAMPLINGS = {"greedy": GREEDY, "greedy, repetition penalty 1.2": SamplingConfig(temperature=0, repetition_penalty=1.2),
             "temperature 0.8": SamplingConfig()}
WIDTHS = 1, 2, 5, 9, 17  # positions of a forward pass


def train_model(name: str, data: str, out: Path) -> GPT:
    """In fp32, on the CPU; what `out` has already is not trained again."""
    path = out / f"{name}.pt"
    if not path.exists():
        subprocess.run([sys.executable, REPO / "train.py", f"--data_path={data}", f"--checkpoint_path={out / 'new.pt'}",
                        "--device=cpu", "--verbose=0", "--overwrite", *MODELS[name]], check=True)
        (out / "new.pt").rename(path)
    model, _, _ = load_pretrained(path)
    return model.requires_grad_(False)


def passages(data: str, n: int, n_tokens: int) -> list[torch.Tensor]:
    """The first tokens of n validation documents, evenly spread over those that are long enough."""
    folder = open_data(Path(data))
    tokens = folder.split("val")
    tokens = torch.from_numpy(tokens.read(0, len(tokens)).astype("int64"))
    starts = (tokens == folder.tokenizer.separator_id).nonzero()[:, 0].tolist()
    fits = [start for start, end in zip(starts, [*starts[1:], len(tokens)]) if end - start >= n_tokens + NEW_TOKENS]
    return [tokens[start:start + n_tokens] for start in fits[::max(1, len(fits) // n)][:n]]


def repeated(prompts: list[torch.Tensor], texts: list[list[int]]) -> float:
    """The fraction of the tokens in `texts` that end 4 tokens which have occurred before, in their prompt or text."""
    again, total = 0, 0
    for prompt, text in zip(prompts, texts):
        whole = [*prompt.tolist(), *text]
        grams = [tuple(whole[end - 4:end]) for end in range(4, len(whole) + 1)]
        again += sum(gram in grams[:-len(text) + i] for i, gram in enumerate(grams[-len(text):]))
        total += len(text)
    return again / total


# -- decoding ---------------------------------------------------------------------------------------------------------

def decode(model: GPT, prompt: torch.Tensor, sampling: SamplingConfig, seed: int,
           drafter: Drafter | None) -> list[list[int]]:
    """The new tokens, in the groups in which they came from forward passes."""
    generator = torch.Generator().manual_seed(seed)
    if drafter is None:
        return [[int(new)] for new in generate(model, [prompt], NEW_TOKENS, sampling, generator)]
    return list(speculate(model, prompt, NEW_TOKENS, sampling, generator, drafter))


def measure(model: GPT, prompts: list[torch.Tensor], sampling: SamplingConfig, drafters: dict[str, Callable],
            rounds: int) -> tuple[dict[str, float], dict[str, list[list[list[int]]]]]:
    """Of each side: median CPU seconds for all prompts, and the groups of tokens after each. drafters: side -> makes what
    drafts for one text."""
    seconds, groups = {side: [] for side in drafters}, {side: [None] * len(prompts) for side in drafters}
    for _ in range(rounds):
        spent = dict.fromkeys(drafters, 0.0)
        for i, prompt in enumerate(prompts):
            for side, make in drafters.items():
                start = time.process_time()
                groups[side][i] = decode(model, prompt, sampling, i, make())
                spent[side] += time.process_time() - start
        for side, value in spent.items():
            seconds[side].append(value)
    return {side: statistics.median(values) for side, values in seconds.items()}, groups


def compare(name: str, model: GPT, prompts: list[torch.Tensor], drafters: dict[str, Callable],
            rounds: int) -> tuple[list[tuple], str]:
    """Rows of the table, and how repetitive the texts of plain decoding are."""
    rows, repetitive, n_tokens = [], [], len(prompts) * NEW_TOKENS
    decode(model, prompts[0], GREEDY, 0, PromptLookup())
    for title, sampling in SAMPLINGS.items():
        seconds, groups = measure(model, prompts, sampling, {"plain": lambda: None} | drafters, rounds)
        texts = {side: [sum(text, []) for text in found] for side, found in groups.items()}
        repetitive.append(f"{repeated(prompts, texts['plain']):.0%} {title}")
        for side in drafters:
            same = texts[side] == texts["plain"]
            if not same and (side == "look-up" or sampling.is_greedy):
                raise SystemExit(f"{name}, {title}, {side}: not the tokens of plain decoding")
            speed = {one: n_tokens / seconds[one] for one in (side, "plain")}
            rows.append((f"{name}, {title}: {side} / plain", f"**{speed[side] / speed['plain']:.2f}**",
                         f"{speed[side]:,.0f} tok/s", f"{speed['plain']:,.0f} tok/s",
                         f"{n_tokens / sum(map(len, groups[side])):.2f}", "equal" if same else "equal in distribution"))
            print(*rows[-1], sep=" | ", flush=True)
    return rows, ", ".join(repetitive)


# -- what a forward pass costs ----------------------------------------------------------------------------------------

@torch.inference_mode()
def pass_costs(model: GPT, dtype: torch.dtype, rounds: int = 15) -> list[float]:
    """CPU seconds of a forward pass over each of WIDTHS in the middle of the context, relative to that of the first."""
    if dtype != torch.float32:
        model.cast_matrices(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        block_size, times = model.config.block_size, {width: [] for width in WIDTHS}
        cache = model.init_cache(1, block_size)
        idx = torch.randint(model.config.vocab_size, (1, block_size // 2), generator=torch.Generator().manual_seed(0))
        model(idx, cache=cache)
        cache.rewindable = True
        for _ in range(rounds):
            for width, seen in times.items():
                start = time.process_time()
                model(idx[:, :width], cache=cache)
                seen.append(time.process_time() - start)
                cache.rewind(width)
    medians = [statistics.median(seen) for seen in times.values()]
    return [value / medians[0] for value in medians]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that download_data.py --dataset=builtin filled")
    parser.add_argument("--out", type=Path, required=True, help="folder for the models")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = {name: train_model(name, args.data, args.out) for name in MODELS}
    rows, notes = [], []
    for name, title, n_tokens in (("quickstart", "quick start's model", 96), ("large", "larger model", 384)):
        drafters = {"look-up": PromptLookup}
        if name == "large":
            drafters["draft model"] = lambda: DraftModel(models["draft"])
        prompts = passages(args.data, args.prompts, n_tokens)
        found, repetitive = compare(title, models[name], prompts, drafters, args.rounds)
        rows += found
        notes.append(f"{title}: prompts of {n_tokens}, {repetitive}")
    costs = []
    for name in ("quickstart", "large", "GPT-2's size"):
        for dtype in (torch.float32, torch.bfloat16):
            model = models.get(name) or GPT(GPTConfig(vocab_size=50_257)).requires_grad_(False)
            costs.append((f"{name}, {model.n_parameters() / 1e6:.1f} M parameters, {str(dtype).removeprefix('torch.')}",
                          *(f"{cost:.2f}" for cost in pass_costs(model, dtype)[1:])))
    text = "\n\n".join([
        markdown(Table((f"speed of {NEW_TOKENS} new tokens", "ratio, higher is better", "with drafts", "plain",
                        "tokens per forward pass", "tokens"), rows)),
        markdown(Table(("CPU time of a forward pass, relative to one over a single position",
                        *(f"over {width}" for width in WIDTHS[1:])), costs)),
        f"The start of {args.prompts} validation documents, continued; the time includes the pass over the prompt. How much "
        f"of the new text repeats itself (tokens that end 4 tokens which have occurred before): {'; '.join(notes)}. CPU "
        f"seconds of one thread, fp32, medians of {args.rounds} rounds in which all sides took turns, {machine()}: "
        f"`python bench/speculative.py --data=data --out=runs/speculative`."])
    print(text)
    write_into_docs("bench/speculative.py", text)


if __name__ == "__main__":
    main()
