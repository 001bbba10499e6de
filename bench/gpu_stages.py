"""The stages of bench/gpu.py, which runs each in a process of its own:

    python bench/gpu_stages.py '{"stage": "speed", …}'       the fields of Task, as JSON
"""
import contextlib
import dataclasses
import faulthandler
import gc
import html
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

# What a machine with a card need not have, and what nothing here may import: a path that does works elsewhere, not there.
FORBIDDEN = ("datasets", "gguf", "huggingface_hub", "matplotlib", "rustbpe", "scipy", "tensorboard", "tiktoken",
             "transformers")
GIB = 2**30


def forbid_imports():
    """As if they were not installed, where they are too."""
    sys.modules.update(dict.fromkeys(FORBIDDEN))


if __name__ == "__main__":
    forbid_imports()
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import download_data  # noqa: E402
import train  # noqa: E402
import trainer  # noqa: E402
from layers.mlp import GELU, MLP  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from optimizer import set_rates  # noqa: E402
from runtime.config import read_flags  # noqa: E402
from runtime.device import DTYPES, DeviceConfig, Machine, can_compile, compile_model, hardware, known_dtype, open_machine  # noqa: E402
from runtime.files import atomic_write  # noqa: E402
from runtime.memory import is_out_of_memory, peak_memory, reset_peak_memory  # noqa: E402
from sampling import SamplingConfig, cache_dtype, generate  # noqa: E402
from shards import Manifest, ShardWriter, open_data  # noqa: E402
from tokenizer import SPECIAL_TOKENS, Tokenizer  # noqa: E402

REAL = {"shape": {"n_layer": 12, "n_head": 12, "head_size": 64}, "block_size": 1024, "vocab_sizes": (50_257, 32_768),
        "accum": 4, "lengths": (1024, 4096, 16_384), "step_tokens": 16_384, "batches": (1, 64), "prompt": 128, "new": 256,
        "workers": 2, "seconds": 5.0, "text": ["--vocab_size=32768", "--val_tokens=500_000"]}
TINY = {"shape": {"n_layer": 4, "n_head": 2, "head_size": 8}, "block_size": 32, "vocab_sizes": (600, 500),
        "accum": 2, "lengths": (32, 64, 128), "step_tokens": 128, "batches": (1, 3), "prompt": 8, "new": 20,
        "workers": 0, "seconds": 0.1, "text": ["--vocab_size=512", "--val_tokens=3000", "--tokens_threshold=30_000",
                                               "--tokenizer_bytes=300_000"]}
LARGE_TEXT = 20_000_000  # bytes, from which on it has merges for 32,768 tokens
SMALL_TEXT = ["--vocab_size=4096", "--val_tokens=100_000"]  # of a few MB
TRACE = 6000     # last characters of a traceback that a row keeps
LIMIT = 6 * GIB  # of the card that README promises a batch for


# -- rows -------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """A stage to run. until: seconds since 1970 at which it should have ended. work: a folder that all stages share."""
    stage: str
    out_path: str
    work: str
    until: float
    rehearse: bool = False
    text: str | None = None
    data_path: str | None = None


FORMATS = {  # what a row may hold, and how it is shown
    "outcome": "{}", "tok_per_sec": "{:,.0f} tok/s", "ms_per_step": "{:,.1f} ms a step", "mfu": "MFU {:.1%}",
    "peak": "its peak {}", "peak_gib": "{:.2f} GiB", "reserved_gib": "{:.2f} GiB reserved",
    "compile_seconds": "compiled in {:.0f} s",
    "loader_share": "{:.2%} of the host's time in the loader", "decode_tok_per_sec": "decoding {:,.0f} tok/s",
    "cache_mib": "cache {:,.1f} MiB", "step": "step {:,}", "val_loss": "val {:.4f} nats/token",
    "val_bpb": "{:.4f} bits/byte", "train_seconds": "{:.1f} s of training", "tokens": "{:,} tokens",
    "skipped": "left out: {}", "error": "FAILED: {}"}


def line_of(row: dict) -> str:
    return ", ".join(form.format(row[name]) for name, form in FORMATS.items() if name in row)


def read_rows(path: Path) -> list[dict]:
    """Those of results.jsonl; a line that was cut off is none."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def append_row(path: Path, row: dict):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


class NoTime(Exception):
    """A measurement would not end within the stage's time."""


class Bench:
    """What the measurements of a stage share: the card, the time that is left, and where rows go."""

    def __init__(self, task: Task):
        self.task, self.work, self.sizes = task, Path(task.work), TINY if task.rehearse else REAL
        self.results = Path(task.out_path) / "results.jsonl"
        self.device = torch.device("cpu" if task.rehearse else "cuda")
        self.card, self.failed = hardware(self.device), False
        self.memory = 0
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            self.memory = properties.total_memory
            self.card = f"{properties.name} (sm_{properties.major}{properties.minor}, {self.memory / GIB:.0f} GiB)" + \
                self.card.removeprefix(properties.name)
        self.compiles = task.rehearse or can_compile(self.device)
        rows = read_rows(self.results)
        began = max((i for i, row in enumerate(rows) if "began" in row), default=0)
        self.before = rows[began:]  # of this run
        # of the model that took longest so far
        self.compile_seconds = max((row["compile_seconds"] for row in self.before if "compile_seconds" in row), default=30.0)

    def left(self) -> float:
        return self.task.until - time.time()

    def row(self, name: str, **figures):
        append_row(self.results, {"stage": self.task.stage, "name": name, "card": self.card, **figures})

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def batch_size(self) -> int:
        """Blocks of 1,024 tokens of the 12 x 768 model, and the optimizer, in the card's memory: see README's table."""
        return 4 if self.memory < 8 * GIB else 8 if self.memory < 12 * GIB else 16

    def measure(self, name: str, function: Callable[[], dict], needs: float = 5.0, must_fit: bool = False) -> dict | None:
        """Writes the row `name` with what function() returns. needs: seconds without which it is left out. A card that is
        too small for it is no failure unless it must fit."""
        figures = None
        try:
            self.require_time(needs)
            figures = function()
            self.row(name, **figures)
        except NoTime as error:
            self.row(name, skipped=str(error))
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if (isinstance(error, MemoryError) or is_out_of_memory(error)) and not must_fit:
                self.row(name, skipped=f"out of memory ({said})")
            else:
                self.failed = True
                self.row(name, error=said, trace=traceback.format_exc()[-TRACE:])
                self.require_card()
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return figures

    def require_card(self):
        """After an illegal access or a failed assertion on the card nothing works any more in this process. Ends it then."""
        try:
            self.synchronize()
        except RuntimeError as error:
            self.row("the rest of this stage", error=f"an error has left the card unusable: {str(error).splitlines()[0]}")
            os._exit(1)

    def require_time(self, seconds: float):
        """Raises NoTime when fewer are left."""
        if self.left() < seconds and not self.task.rehearse:
            raise NoTime(f"no time: {max(0.0, self.left()):.0f} s left, {seconds:.0f} needed")

    def earlier(self, stage: str, name: str) -> dict:
        """The figures of a stage before this one."""
        return next((row for row in self.before if (row.get("stage"), row.get("name")) == (stage, name)), {})

    # -- data ---------------------------------------------------------------------------------------------------------

    def random_shards(self, vocab_size: int) -> Path:
        """A folder of random tokens, as download_data.py would write it, with a vocabulary of exactly that size."""
        path = self.work / f"random_{vocab_size}"
        if (path / "manifest.json").exists() and Manifest.load(path).complete:
            return path
        path.mkdir(parents=True, exist_ok=True)
        words = [bytes([byte]) for byte in range(256)] + [bytes(pair) for pair in np.ndindex(256, 256)]
        words = words[:vocab_size - len(SPECIAL_TOKENS)]
        tokenizer = Tokenizer.from_ranks({word: i for i, word in enumerate(words)}, "gpt4")
        manifest = Manifest({"revisions": []}, {}, tokenizer.fingerprint(), vocab_size, "uint16")
        tokenizer.save(path / "tokenizer.json")
        for split, n_blocks in (("val", 4), ("train", 64)):
            n_tokens = n_blocks * max(self.sizes["lengths"])
            ids = np.random.default_rng(0).integers(vocab_size, size=n_tokens).astype(np.uint16)
            ids[0] = tokenizer.separator_id
            writer = ShardWriter(path, split, len(ids), manifest)
            writer.add(ids, 1, 0)
            writer.close()
        manifest.complete = True
        manifest.save(path)
        return path


def text_shards(task: Task) -> Path:
    """--data_path, or what download_data.py makes of --text or of the text that is built in."""
    if task.data_path:
        return Path(task.data_path)
    path, text, flags = Path(task.work) / "text", Path(task.text) if task.text else None, REAL["text"]
    if task.rehearse:
        flags = TINY["text"]
        if text is None:  # of which a rehearsal needs little, and what is built in takes seconds to collect
            text = Path(task.work) / "readme.txt"
            text.write_bytes((ROOT / "README.md").read_bytes())
    elif text is None or size_of(text) < LARGE_TEXT:
        flags = SMALL_TEXT
    download_data.main([f"--dataset={text or 'builtin'}", f"--data_path={path}", *flags])
    return path


def half_precision(device: torch.device) -> str:
    """That a card has units for; of a CPU bf16."""
    return "bf16" if device.type == "cpu" or known_dtype(device) == "bf16" else "fp16"


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size


# -- right ------------------------------------------------------------------------------------------------------------

class Recorder:
    """A plugin of pytest: a row a test, and no test begun when no time is left."""

    def __init__(self, bench: Bench):
        self.bench, self.counts = bench, {"passed": 0, "failed": 0, "skipped": 0}
        self.longest = 25.0  # seconds of a test that compiles

    def pytest_runtest_setup(self, item):
        import pytest
        try:
            self.bench.require_time(self.longest if item.get_closest_marker("compiles") else 5.0)
        except NoTime as error:
            pytest.skip(str(error))

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
            why = {}
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                said = f"{Path(crash.path).name}:{crash.lineno}: {crash.message}" if crash else report.longreprtext
                why = {"error": " ".join(said.split())[:200], "trace": report.longreprtext[-TRACE:]}
            elif report.left_pad:
                why = {"skipped": report.longrepr[-1]}
            self.longest = max(self.longest, report.duration)
            self.bench.row(report.nodeid.split("::", 1)[-1], outcome=report.outcome, seconds=round(report.duration, 2),
                           **why)
            if report.failed:
                self.bench.require_card()


def right(bench: Bench) -> str:
    import pytest
    recorder = Recorder(bench)
    flags = ["-m", "gpu", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--tb=short", f"--rootdir={ROOT}"]
    code = pytest.main([*flags, *["--rehearse"] * bench.task.rehearse, str(ROOT / "tests" / "test_gpu.py")],
                       plugins=[recorder])
    bench.failed = code != 0
    passed, failed, skipped = recorder.counts.values()
    return f"{passed} tests passed, {failed} failed, {skipped} left out"


# -- speed ------------------------------------------------------------------------------------------------------------

class AllLogits(nn.Module):
    """The loss as nanoGPT computes it."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model(idx).flatten(0, 1), targets.flatten())


class TimedLoader:
    """A loader, and the seconds that were spent waiting for it."""

    def __init__(self, loader):
        self.loader, self.seconds = loader, 0.0

    def __next__(self):
        start = time.perf_counter()
        batch = next(self.loader)
        self.seconds += time.perf_counter() - start
        return batch


def train_speed(bench: Bench, vocab_size: int, flags: list[str], compiled: bool = False, as_nanogpt: bool = False,
                seconds: float | None = None, then: Callable[[GPT, Machine], dict] = lambda model, machine: {}) -> dict:
    """Figures of train.py's own steps with these flags. as_nanogpt: all logits at once, and what goes into and comes out of
    GELU both kept. seconds: to measure for. then(model, machine) -> further figures of the trained model. Raises NoTime."""
    shape = [f"--{name}={value}" for name, value in bench.sizes["shape"].items()]
    given = train.PRETRAINING.flags_given([
        f"--data_path={bench.random_shards(vocab_size)}", f"--checkpoint_path={bench.work / 'run' / 'gpt.pt'}",
        f"--device={bench.device.type}", *shape, f"--block_size={bench.sizes['block_size']}",
        f"--dataloader_num_workers={bench.sizes['workers']}", *flags])
    values = train.resolve_flags(train.PRETRAINING.defaults() | train.PRESETS.get(given.get("preset"), {}), given)
    with bench.device:  # weights are made there, which takes seconds on a CPU
        state, _, loop, run = train.open_run([read_flags(config, values) for config in train.CONFIGS], None)
    model, machine, figures = state.model, state.machine, {}
    loader, state.loader = state.loader, TimedLoader(state.loader)
    module = AllLogits(model) if as_nanogpt else model
    loss_fn = lambda _, batch: trainer.next_token_loss(module, batch)

    def seconds_of(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            set_rates(state.optimizer, state.step, min(state.step / 1000, 0.99), state.schedule)
            trainer.train_step(state, loop, loss_fn)
            state.step += 1
        bench.synchronize()
        return (time.perf_counter() - start) / n

    try:
        with mock.patch.object(GELU, "forward", MLP.forward) if as_nanogpt else contextlib.nullcontext():
            if compiled:
                start = time.perf_counter()
                compile_model(module)
                train.dry_run_step(module, machine, run.batch_size)
                bench.synchronize()
                figures["compile_seconds"] = round(time.perf_counter() - start, 1)
                bench.compile_seconds = max(bench.compile_seconds, figures["compile_seconds"])
            seconds_of(1)  # the optimizer's states, cuBLAS's choices
            if (one := seconds_of(1)) > 1.5:  # a slow card: a step of one batch says as much
                loop = dataclasses.replace(loop, num_batch_accum=1)
                state.settings["num_batch_accum"] = 1
                one = seconds_of(1)
            bench.require_time(4 * one)
            n = max(1, min(10, round(0.5 / one)))
            with contextlib.suppress(OSError):
                reset_peak_memory(machine.device)
            times, state.loader.seconds, start = [], 0.0, time.perf_counter()
            while len(times) < 3 or time.perf_counter() - start < (seconds or bench.sizes["seconds"]):
                times.append(seconds_of(n))
                if bench.left() < n * times[-1]:
                    break
            waited = state.loader.seconds / (n * sum(times))
    finally:
        loader.close()
    step_seconds, flops = statistics.median(times), model.flops_per_token()
    tok_per_sec = state.step_tokens() / step_seconds
    figures |= {"tok_per_sec": round(tok_per_sec, 1), "ms_per_step": round(1e3 * step_seconds, 3),
                "mfu": round(tok_per_sec * flops / machine.peak_flops(), 4),
                "peak": "by the data sheet" if machine.known_peak() else "measured",
                "peak_gib": round(peak_memory(machine.device) / GIB, 3),
                "loader_share": round(waited, 5), "dtype": machine.dtype, "batch_size": run.batch_size,
                "step_tokens": state.step_tokens(), "steps": n * len(times)}
    state.optimizer = None
    return figures | then(model, machine)


def speed(bench: Bench) -> str:
    """12 x 768 at two vocabularies: the default, the preset gpt2, and that as nanoGPT runs it."""
    sides = {"default": [], "gpt2": ["--preset=gpt2"], "nanoGPT": ["--preset=gpt2"]}
    large, small = bench.sizes["vocab_sizes"]
    half = half_precision(bench.device)
    padded = large + -large % 64  # nanoGPT pads GPT-2's vocabulary, whose odd size slows products down
    arms = [("default", large, half, False), ("default", large, half, True), ("gpt2", large, half, True),
            ("gpt2", large, half, False), ("nanoGPT", padded, half, False), ("default", small, half, True),
            ("gpt2", small, half, True), ("nanoGPT", padded, half, True), ("default", large, "fp16", False),
            ("default", padded, half, True), ("default", large, "fp16", True), ("default", small, half, False),
            ("gpt2", small, half, False), ("default", large, "fp32", False)]
    if bench.task.rehearse:
        arms = [arms[i] for i in (1, 3, 7, 8)]
    best = None
    for side, vocab_size, dtype, compiled in dict.fromkeys(arms):  # where half is fp16, one stands there twice
        name = f"{side}, {vocab_size:,} ids, {dtype}, {'compiled' if compiled else 'eager'}"
        if compiled and not bench.compiles:
            bench.row(name, skipped="torch.compile does not know this card")
            continue
        flags = [*sides[side], f"--batch_size={bench.batch_size()}", f"--num_batch_accum={bench.sizes['accum']}",
                 f"--dtype={dtype}"]
        needs = 2 * bench.sizes["seconds"] + (bench.compile_seconds if compiled else 0.0)
        figures = bench.measure(name, partial(train_speed, bench, vocab_size, flags, compiled, side == "nanoGPT"), needs)
        if figures and (best is None or compiled and side == "default" and "compiled" not in best):
            best = f"{in_short(figures)}: {name}"
    return best or "nothing was measured"


def in_short(figures: dict) -> str:
    return line_of({name: figures[name] for name in ("tok_per_sec", "mfu", "peak_gib")})


def six(bench: Bench) -> str:
    """What README promises of a card of 6 GB: its preset, with what CUDA itself takes counted in."""
    if bench.device.type == "cuda":
        torch.ones(1, device=bench.device)
        free, total = torch.cuda.mem_get_info()
        taken = min(total - free - torch.cuda.memory_reserved(), GIB)  # by CUDA itself; more would be other programs
        torch.cuda.set_per_process_memory_fraction(min(1.0, (LIMIT - taken) / total))
        bench.row("what CUDA itself takes", peak_gib=round(taken / GIB, 3))

    def held(model, machine):
        reserved = torch.cuda.max_memory_reserved() if bench.device.type == "cuda" else 0
        return {"reserved_gib": round(reserved / GIB, 3)}
    found, vocab_size = {}, bench.sizes["vocab_sizes"][0]
    for preset, compiled in (("6gb", False), ("6gb", True), (None, False))[:2 if bench.task.rehearse else 3]:
        name = f"{f'--preset={preset}' if preset else 'default'}, {'compiled' if compiled else 'eager'}"
        if compiled and not bench.compiles:
            bench.row(name, skipped="torch.compile does not know this card")
            continue
        flags = [f"--preset={preset}"] if preset else []
        needs = 2 * bench.sizes["seconds"] + (bench.compile_seconds if compiled else 0.0)
        if figures := bench.measure(name, partial(train_speed, bench, vocab_size, flags, compiled, then=held), needs, True):
            found[figures["tok_per_sec"]] = f"{in_short(figures)}: {name}"
    return found[max(found)] if found else "does not fit"


# -- architectures ----------------------------------------------------------------------------------------------------

def decode_speed(bench: Bench, model: GPT, machine: Machine, n_rows: int, n_prompt: int, n_new: int) -> dict:
    """Tokens per second of all rows together, after prompts of random tokens; and what the cache takes."""
    model.requires_grad_(False)
    model.cast_matrices(DTYPES[machine.dtype])
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(model.config.vocab_size, (n_prompt,), generator=generator).to(machine.device)
               for _ in range(n_rows)]
    with machine.autocast():
        tokens = generate(model, prompts, n_new + 4, SamplingConfig())
        for _ in range(4):
            next(tokens)
        bench.synchronize()
        start = time.perf_counter()
        n_made = sum(len(new) for new in tokens)
        bench.synchronize()
        seconds = time.perf_counter() - start
        cache = model.init_cache(n_rows, n_prompt + n_new + 4, cache_dtype(model))
    parts = [part for block in cache.blocks for part in (block.mixer, *block.shifts)]
    n_bytes = sum(tensor.numel() * tensor.element_size() for part in parts for tensor in vars(part).values())
    return {"decode_tok_per_sec": round(n_made / seconds, 1), "cache_mib": round(n_bytes / 2**20, 3)}


def architectures(bench: Bench) -> str:
    """Steps of as many tokens at every length, and decoding at the end of a context of that length."""
    arms = ["mlp=gelu", "mlp=grkan", "mlp=chebkan", "linear=grkan", "mixer=gated_delta", "mixer=ADDD"]
    steps, n_new = {}, bench.sizes["new"] // 8 or 1
    for length in reversed(bench.sizes["lengths"]):  # the longest tell most
        for arm in arms if not bench.task.rehearse else arms[bench.sizes["lengths"].index(length)::3]:
            flags = [f"--{arm}", f"--block_size={length}", f"--batch_size={bench.sizes['step_tokens'] // length}",
                     "--num_batch_accum=1", f"--dtype={half_precision(bench.device)}"]
            decode = lambda model, machine, length=length: decode_speed(bench, model, machine, 1, length - n_new - 4, n_new)
            figures = bench.measure(f"{arm}, {length:,} tokens", partial(
                train_speed, bench, bench.sizes["vocab_sizes"][1], flags, seconds=1.0, then=decode), 8.0)
            if figures:
                steps[arm, length] = figures["ms_per_step"]
    longest = max((length for arm, length in steps if arm == "mlp=gelu"), default=0)
    told = [f"{arm} {steps[arm, longest] / steps['mlp=gelu', longest]:.2f}" for arm in arms[1:] if (arm, longest) in steps]
    return f"step at {longest:,} tokens, times gelu's: {', '.join(told)}" if told else "nothing was measured"


# -- curves -----------------------------------------------------------------------------------------------------------

def curves(bench: Bench) -> str:
    """The default against the preset gpt2: the same shards, model shape, tokens a step and seconds; one seed."""
    data = text_shards(bench.task)
    vocab_size = open_data(data).manifest.vocab_size
    batch_size, block_size = (4, 32) if bench.task.rehearse else (bench.batch_size(), 1024)
    compiles = bench.compiles and not bench.task.rehearse
    half, small = half_precision(bench.device), bench.sizes["vocab_sizes"][1]
    before = [bench.earlier("speed", f"{side}, {small:,} ids, {half}, compiled") for side in ("default", "gpt2")]
    # what was compiled before, with that vocabulary, comes from the compiler's cache
    compile_seconds = sum(15.0 if row.get("tok_per_sec") and vocab_size == small else
                          1.2 * bench.compile_seconds for row in before) if compiles else 0.0
    if (bench.left() - compile_seconds) / 2 < 30:
        compiles, compile_seconds = False, 0.0
    seconds = max((bench.left() - compile_seconds) / 2 - 15.0, 10.0) if not bench.task.rehearse else 1.0
    rate = before[0].get("tok_per_sec", 0.0) or 16_384
    # enough steps for a schedule, of at most the tokens that a step of the default has
    accum = 1 if bench.task.rehearse else int(max(1, min(65_536, rate * seconds / 200) // (batch_size * block_size)))
    n_steps = max(8, int(rate * seconds / (accum * batch_size * block_size)))
    shape = [f"--{name}={value}" for name, value in bench.sizes["shape"].items()]
    common = [f"--data_path={data}", *shape, f"--block_size={block_size}", f"--batch_size={batch_size}",
              f"--num_batch_accum={accum}", f"--max_seconds={seconds:.1f}", f"--val_intervals={max(1, n_steps // 8)}",
              f"--device={bench.device.type}", f"--compile_model={int(compiles)}", "--sample_tokens=64", "--val_iter=10"]
    sides = {"default": [], "preset gpt2": ["--preset=gpt2", f"--warmup_iter={min(2000, n_steps // 20)}"]}
    rows, write = {name: [] for name in sides}, train.MetricsLog.write

    def run(name: str) -> dict:
        def both(log, row):
            write(log, row)
            if "val_loss" in row:
                rows[name].append(row)
                bench.row(name, step=row["step"], tokens=row["tokens"], train_seconds=row["seconds"],
                          val_loss=row["val_loss"], val_bpb=row["val_bpb"])
        nothing = lambda state, *args, **kwargs: None  # nobody asks for the checkpoints, which take seconds to write
        with mock.patch.object(train.MetricsLog, "write", both), mock.patch.object(trainer.TrainState, "save", nothing):
            train.main([*common, f"--checkpoint_path={bench.work / 'curves' / name.split()[-1]}.pt", *sides[name]])
        last = rows[name][-1]
        return {"step": last["step"], "val_loss": last["val_loss"], "val_bpb": last["val_bpb"], "vocab_size": vocab_size,
                "step_tokens": accum * batch_size * block_size, "compiled": compiles}
    for name in sides:
        bench.measure(f"{name}, at its end", partial(run, name), 10.0)
        if rows[name]:
            curves_as_svg(rows, Path(bench.task.out_path) / "curves.svg", bench.card)
    ends = [f"{name} {of_side[-1]['val_loss']:.3f}" for name, of_side in rows.items() if of_side]
    how = "compiled" if compiles else "eager"
    return f"{', '.join(ends)} nats/token after {seconds:.0f} s each, {how}, one seed"


def curves_as_svg(runs: dict[str, list[dict]], path: Path, caption: str):
    """Validation loss against seconds and tokens, as SVG, by hand: the machine of the card may have no matplotlib. runs:
    name -> rows with seconds, tokens and val_loss."""
    width, height, left, top, gap = 420, 260, 60, 40, 70
    colors = ("#0072b2", "#d55e00")
    losses = [row["val_loss"] for rows in runs.values() for row in rows]
    low, high = min(losses), max(losses)
    pieces = [f'<text x="{left}" y="20" font-size="13">{html.escape(caption)}</text>']
    for panel, (over, unit, label) in enumerate((("seconds", 1, "seconds of training"), ("tokens", 1e6, "million tokens"))):
        x0, most = left + panel * (width + gap), max(row[over] for rows in runs.values() for row in rows) or 1
        at = lambda value, loss, x0=x0, most=most: (
            x0 + width * value / most, top + height * (1 - (loss - low) / ((high - low) or 1)))
        pieces.append(f'<rect x="{x0}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>')
        for i in range(5):
            loss, value = low + i * (high - low) / 4, i * most / 4
            x, y = at(value, loss)
            pieces += [f'<path d="M{x0} {y:.1f}h{width}" stroke="#ddd"/>',
                       f'<text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end">{loss:.2f}</text>',
                       f'<text x="{x:.1f}" y="{top + height + 16}" text-anchor="middle">{value / unit:.3g}</text>']
        pieces.append(f'<text x="{x0 + width / 2}" y="{top + height + 34}" text-anchor="middle">{label}</text>')
        for i, ((name, rows), color) in enumerate(zip(runs.items(), colors)):
            if not rows:
                continue
            points = [at(row[over], row["val_loss"]) for row in rows]
            pieces.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="none" '
                          f'stroke="{color}" stroke-width="2"/>')
            pieces += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points]
            pieces.append(f'<text x="{x0 + width - 8}" y="{top + 20 + 16 * i}" text-anchor="end" fill="{color}">'
                          f'{html.escape(name)}: {rows[-1]["val_loss"]:.3f}</text>')
    pieces.append(f'<text x="14" y="{top + height / 2}" transform="rotate(-90 14 {top + height / 2})" '
                  f'text-anchor="middle">validation loss, nats/token</text>')
    with atomic_write(path, "w") as file:
        file.write(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + 2 * width + gap + 20} '
                   f'{top + height + 50}" font-family="sans-serif" font-size="11">'
                   f'<rect width="100%" height="100%" fill="white"/>\n'
                   + "\n".join(pieces) + "\n</svg>\n")


# -- decode -----------------------------------------------------------------------------------------------------------

def decode(bench: Bench) -> str:
    """The 12 x 768 model writes, for one reader and for many."""
    config = GPTConfig(**bench.sizes["shape"], block_size=bench.sizes["block_size"],
                       vocab_size=bench.sizes["vocab_sizes"][0])
    machine, best = open_machine(DeviceConfig(device=bench.device.type, dtype=half_precision(bench.device))), []
    for n_rows in bench.sizes["batches"]:
        def run(n_rows=n_rows):
            model = GPT(config).to(machine.device)
            return decode_speed(bench, model, machine, n_rows, bench.sizes["prompt"], bench.sizes["new"])
        if figures := bench.measure(f"{n_rows} at once, eager, {machine.dtype}", run):
            best.append(f"{n_rows} at once {figures['decode_tok_per_sec']:,.0f} tok/s")
    bench.row("compiled, with CUDA graphs", skipped="generate.py does not do that yet")
    return ", ".join(best) or "nothing was measured"


# -- the list ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Stage:
    """seconds: that it may take at most. at_least: that are kept for it when those before it take long."""
    run: Callable[[Bench], str]
    what: str
    seconds: float
    at_least: float = 0.0
    reads_text: bool = False


STAGES = {  # in order of worth
    "right": Stage(right, "the tests marked gpu: it computes what the CPU computes", 90, 60),
    "speed": Stage(speed, "tok/s, MFU, memory and compiling of the default and of nanoGPT's model", 120, 60),
    "six": Stage(six, "the batch that README promises for a card of 6 GB", 60, 30),
    "architectures": Stage(architectures, "steps and decoding of each architecture at three lengths", 120, 30),
    "curves": Stage(curves, "the default against the preset gpt2 for equal seconds", float("inf"), 120, True),
    "decode": Stage(decode, "tokens per second of generate.py", 45, 25),
}


def main():
    task = Task(**json.loads(sys.argv[1]))
    if task.stage == "text":  # no stage: what the curves will read, made while the card is busy with the stages before
        text_shards(task)
        return
    bench = Bench(task)
    # where a hang stands, before it is ended; to a descriptor that pytest does not capture
    faulthandler.dump_traceback_later(max(1.0, bench.left() + 3), file=os.fdopen(os.dup(2), "w"))
    if task.rehearse and task.stage != "right":  # without the compiler, which takes half a minute a model on a CPU
        compile_model = nn.Module.compile
        nn.Module.compile = lambda self: compile_model(self, backend="aot_eager")
        torch.set_num_threads(1)
    figure = STAGES[task.stage].run(bench)
    bench.row("in short", figure=figure)
    sys.stdout.flush()
    if bench.failed:
        os._exit(1)  # workers and compilers that a failure has left behind may not hold it up


if __name__ == "__main__":
    main()
