"""The stages of bench/gpu.py, which runs each in its own process:

    python bench/gpu_stages.py '{"stage": "speed", …}'       the fields of Task, as JSON
"""
import contextlib
import dataclasses
import faulthandler
import gc
import html
import importlib.util
import itertools
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

# Packages that the GPU's machine may lack. Nothing here may import them, which a rehearsal where they are installed would
# not show otherwise.
FORBIDDEN = ("datasets", "gguf", "huggingface_hub", "matplotlib", "rustbpe", "scipy", "tenacity", "tensorboard", "tiktoken",
             "transformers")
GIB = 2**30


def forbid_imports():
    """Makes importing a FORBIDDEN package raise ModuleNotFoundError."""
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
from runtime.device import (  # noqa: E402
    DTYPES,
    DeviceConfig,
    Machine,
    can_compile,
    compile_model,
    describe_hardware,
    open_machine,
    preferred_dtype,
)
from runtime.files import atomic_write  # noqa: E402
from runtime.memory import is_out_of_memory, peak_memory, reset_peak_memory  # noqa: E402
from sampling import SamplingConfig, cache_dtype, generate  # noqa: E402
from shards import Manifest, ShardWriter, open_data  # noqa: E402
from tokenizer import SPECIAL_TOKENS, Tokenizer  # noqa: E402

# What `answer` compares: flags of train.py
ANSWER_ARMS = {"attention": [], "SSSA": ["--mixer=SSSA"], "DDDA": ["--mixer=DDDA"],
               "RRRA": ["--mixer=RRRA", "--positions=none", "--qk_scale=1.5"]}
# Sizes of the measurements on a GPU, and in a rehearsal. vocab_sizes: GPT-2's, and half of it; accum: batches in a step;
# lengths: context lengths that step_tokens are split into; batches: rows that are decoded together; new: tokens to generate;
# seconds: of each speed measurement.
REAL = {"shape": {"n_layer": 12, "n_head": 12, "head_size": 64}, "block_size": 1024, "vocab_sizes": (50_257, 32_768),
        "accum": 4, "lengths": (1024, 4096, 16_384), "step_tokens": 16_384, "batches": (1, 64), "prompt": 128, "new": 256,
        "workers": 2, "seconds": 5.0, "text": ["--vocab_size=32768", "--val_bytes=2_000_000"],
        "answer": {"shape": {"n_layer": 8, "n_head": 8, "head_size": 64}, "block_size": 16_384, "step_tokens": 65_536,
                   "arms": ANSWER_ARMS}}
TINY = {"shape": {"n_layer": 4, "n_head": 2, "head_size": 8}, "block_size": 32, "vocab_sizes": (600, 500),
        "accum": 2, "lengths": (32, 64, 128), "step_tokens": 128, "batches": (1, 4), "prompt": 8, "new": 20,
        "workers": 0, "seconds": 0.1, "text": ["--vocab_size=512", "--val_bytes=8000", "--tokens_threshold=30_000",
                                               "--tokenizer_bytes=300_000"],
        "answer": {"shape": {"n_layer": 4, "n_head": 2, "head_size": 8}, "block_size": 128, "step_tokens": 512,
                   "arms": dict(list(ANSWER_ARMS.items())[::3])}}
LARGE_TEXT = 20_000_000  # bytes of text that are enough for a vocabulary of 32,768
SMALL_TEXT = ["--vocab_size=4096", "--val_bytes=400_000"]  # for a few MB of text
TRACE = 6000     # last characters of a traceback that a row keeps
TEST_MEMORY = 12 * GIB  # of the GPU, for each process that runs tests
LONG_RUN = 300.0  # seconds for one of several runs, from which compiling it pays
LIMIT = 6 * GIB  # memory of the GPU that --preset=6gb is for


# -- rows -------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """A stage to run. until: the time.time() at which it should have ended. work: a temporary folder that stages share."""
    stage: str
    out_path: str
    work: str
    until: float
    rehearse: bool = False
    text: str | None = None
    data_path: str | None = None


FORMATS = {  # the figures of a row, and how each is printed
    "outcome": "{}", "tok_per_sec": "{:,.0f} tok/s", "ms_per_step": "{:,.1f} ms a step", "mfu": "MFU {:.1%}",
    "peak": "peak {}", "peak_gib": "{:.2f} GiB", "reserved_gib": "{:.2f} GiB reserved",
    "compile_seconds": "compiled in {:.0f} s",
    "loader_share": "{:.2%} of the time waiting for data", "optimizer_share": "{:.1%} in the optimizer",
    "decode_tok_per_sec": "decoding {:,.0f} tok/s",
    "cache_mib": "cache {:,.1f} MiB", "step": "step {:,}", "val_loss": "val {:.4f} nats/token",
    "val_bpb": "{:.4f} bits/byte", "train_seconds": "{:.1f} s of training", "tokens": "{:,} tokens",
    "skipped": "skipped: {}", "error": "FAILED: {}"}


def format_row(row: dict) -> str:
    """"1,234 tok/s, MFU 43.2%"; "" for a row without figures."""
    return ", ".join(form.format(row[name]) for name, form in FORMATS.items() if name in row)


def read_rows(path: Path) -> list[dict]:
    """The rows of results.jsonl, without a last line that was cut off; [] if the file does not exist."""
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
    """A measurement would not end within the stage's time limit."""


class Bench:
    """What the measurements of a stage share: the GPU, the remaining time, and the file for rows."""

    def __init__(self, task: Task):
        self.task, self.work, self.sizes = task, Path(task.work), TINY if task.rehearse else REAL
        self.results = Path(task.out_path) / "results.jsonl"
        self.device = torch.device("cpu" if task.rehearse else "cuda")
        self.card, self.failed = describe_hardware(self.device), False
        self.memory = 0  # bytes of the GPU
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            self.memory = properties.total_memory
            self.card = f"{properties.name} (sm_{properties.major}{properties.minor}, {self.memory / GIB:.0f} GiB)" + \
                self.card.removeprefix(properties.name)
        self.compiles = task.rehearse or can_compile(self.device)
        rows = read_rows(self.results)
        start = max((i for i, row in enumerate(rows) if "began" in row), default=0)
        self.earlier_rows = rows[start:]  # those of earlier stages of this run
        self.compile_seconds = max((row["compile_seconds"] for row in self.earlier_rows if "compile_seconds" in row),
                                   default=30.0)  # the longest so far

    def seconds_left(self) -> float:
        return self.task.until - time.time()

    def write_row(self, name: str, **figures):
        append_row(self.results, {"stage": self.task.stage, "name": name, "card": self.card, **figures})

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def batch_size(self) -> int:
        """Blocks of 1,024 tokens that fit into the GPU's memory with the 12 x 768 model, see docs/benchmarks.md."""
        return 4 if self.memory < 8 * GIB else 8 if self.memory < 12 * GIB else 16

    def measure(self, name: str, function: Callable[[], dict], needs: float = 5.0, must_fit: bool = False) -> dict | None:
        """Calls `function()`, writes the figures it returns as the row `name`, and returns them; None if there are none.

        needs: skipped when fewer seconds are left. Running out of memory is a failure only if it `must_fit`.
        """
        figures = None
        try:
            self.require_time(needs)
            figures = function()
            self.write_row(name, **figures)
        except NoTime as error:
            self.write_row(name, skipped=str(error))
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if (isinstance(error, MemoryError) or is_out_of_memory(error)) and not must_fit:
                self.write_row(name, skipped=f"out of memory ({reason})")
            else:
                self.failed = True
                self.write_row(name, error=reason, trace=traceback.format_exc()[-TRACE:])
                self.exit_if_unusable()
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return figures

    def exit_if_unusable(self):
        """Ends the process after an illegal access or a failed assertion on the GPU: every later call would fail."""
        try:
            self.synchronize()
        except RuntimeError as error:
            self.write_row("the rest of this stage", error=f"the GPU is unusable: {str(error).splitlines()[0]}")
            os._exit(1)

    def require_time(self, seconds: float):
        """Raises NoTime when fewer are left. A rehearsal has all the time it needs."""
        if self.seconds_left() < seconds and not self.task.rehearse:
            raise NoTime(f"no time: {max(0.0, self.seconds_left()):.0f} s left, {seconds:.0f} needed")

    def earlier_figures(self, stage: str, name: str) -> dict:
        """The row `name` of an earlier stage of this run; {} if there is none."""
        return next((row for row in self.earlier_rows if (row.get("stage"), row.get("name")) == (stage, name)), {})

    # -- data ---------------------------------------------------------------------------------------------------------

    def random_shards(self, vocab_size: int) -> Path:
        """A folder of random tokens in the format of download_data.py, with a vocabulary of exactly `vocab_size`."""
        path = self.work / f"random_{vocab_size}"
        if (path / "manifest.json").exists() and Manifest.load(path).complete:
            return path
        path.mkdir(parents=True, exist_ok=True)
        tokens = [bytes([byte]) for byte in range(256)] + [bytes(pair) for pair in np.ndindex(256, 256)]
        tokens = tokens[:vocab_size - len(SPECIAL_TOKENS)]
        tokenizer = Tokenizer.from_ranks({token: i for i, token in enumerate(tokens)}, "gpt4")
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
    """The folder --data_path, or one that download_data.py fills from --text, or from the built-in text."""
    if task.data_path:
        return Path(task.data_path)
    path, text, flags = Path(task.work) / "text", Path(task.text) if task.text else None, REAL["text"]
    if task.rehearse:
        flags = TINY["text"]
        if text is None:  # a rehearsal needs little; collecting the built-in text takes seconds
            text = Path(task.work) / "code.txt"
            text.write_bytes(b"".join(path.read_bytes() for path in sorted(ROOT.glob("*.py"))))
    elif text is None or count_bytes(text) < LARGE_TEXT:
        flags = SMALL_TEXT
    download_data.main([f"--dataset={text or 'builtin'}", f"--data_path={path}", *flags])
    return path


def half_precision(device: torch.device) -> str:
    """The one that the GPU has units for; on a CPU bf16, or fp32 where it would emulate that."""
    if device.type == "cpu":
        return preferred_dtype(device) or "bf16"
    return "bf16" if preferred_dtype(device) == "bf16" else "fp16"


def count_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size


# -- tests ------------------------------------------------------------------------------------------------------------

class Recorder:
    """A pytest plugin that writes a row for each test. tests/conftest.py skips tests when no time is left."""

    def __init__(self, bench: Bench, in_this_process: bool):
        self.bench, self.in_this_process = bench, in_this_process
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
            reason = {}
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                message = f"{Path(crash.path).name}:{crash.lineno}: {crash.message}" if crash else report.longreprtext
                reason = {"error": " ".join(message.split())[:200], "trace": report.longreprtext[-TRACE:]}
            elif report.skipped:
                reason = {"skipped": report.longrepr[-1]}
            self.bench.write_row(report.nodeid.split("::", 1)[-1], outcome=report.outcome, seconds=round(report.duration, 2),
                                 **reason)
            if report.failed and self.in_this_process:
                self.bench.exit_if_unusable()


def run_tests(bench: Bench) -> str:
    import pytest
    n = 1 if bench.task.rehearse or not importlib.util.find_spec("xdist") else max(
        1, min(8, os.cpu_count() // 2, bench.memory // TEST_MEMORY))
    recorder = Recorder(bench, n == 1)
    os.environ |= {"GPU_TESTS_END": str(bench.task.until), "TORCHINDUCTOR_COMPILE_THREADS": str(os.cpu_count() // n)}
    flags = ["-m", "gpu", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--tb=short", f"--rootdir={ROOT}",
             *["-p", "xdist", f"--numprocesses={n}"] * (n > 1), *["--rehearse"] * bench.task.rehearse]
    code = pytest.main([*flags, str(ROOT / "tests" / "test_gpu.py")], plugins=[recorder])
    bench.failed = code != 0
    passed, failed, skipped = recorder.counts.values()
    return f"{passed} tests passed, {failed} failed, {skipped} skipped"


# -- speed ------------------------------------------------------------------------------------------------------------

class AllLogits(nn.Module):
    """The loss as nanoGPT computes it: of all logits at once."""
    sampled_loops = False

    def __init__(self, model: GPT):
        super().__init__()
        self.model, self.config = model, model.config

    def draw_loops(self):
        return None

    def forward(self, idx: Tensor, targets: Tensor, loops: None = None) -> Tensor:
        return F.cross_entropy(self.model(idx).flatten(0, 1), targets.flatten())


class TimedLoader:
    """A loader that counts the seconds spent waiting for it."""

    def __init__(self, loader):
        self.loader, self.seconds = loader, 0.0

    def next_batch(self, model: GPT):
        start = time.perf_counter()
        batch = self.loader.next_batch(model)
        self.seconds += time.perf_counter() - start
        return batch


def train_speed(bench: Bench, vocab_size: int, flags: list[str], compiled: bool = False, as_nanogpt: bool = False,
                seconds: float | None = None, then: Callable[[GPT, Machine], dict] = lambda model, machine: {}) -> dict:
    """Figures of train.py's own steps with these flags.

    as_nanogpt: compute all logits at once, and keep both the input and the output of GELU. seconds: how long to measure.
    then(model, machine) -> further figures of the trained model. Raises NoTime.
    """
    run = open_run(bench, vocab_size, flags)
    state, setup = run.state, run.setup
    loop, batch_size, step_tokens = run.configs.loop, run.configs.run.batch_size, setup.step_tokens
    model, machine, figures = state.model, setup.machine, {}
    loader, state.loader = state.loader, TimedLoader(state.loader)
    module = AllLogits(model) if as_nanogpt else model
    loss_fn = lambda _, batch: trainer.next_token_loss(module, batch)

    def step_seconds(n_steps: int) -> float:
        start = time.perf_counter()
        for _ in range(n_steps):
            set_rates(state.optimizer, state.step, min(state.step / 1000, 0.99), setup.schedule)
            trainer.train_step(state, loop, loss_fn, machine)
            state.step += 1
        bench.synchronize()
        return (time.perf_counter() - start) / n_steps

    try:
        with mock.patch.object(GELU, "forward", MLP.forward) if as_nanogpt else contextlib.nullcontext():
            if compiled:
                start = time.perf_counter()
                compile_model(module)
                train.dry_run(module, machine, batch_size)
                bench.synchronize()
                figures["compile_seconds"] = round(time.perf_counter() - start, 1)
                bench.compile_seconds = max(bench.compile_seconds, figures["compile_seconds"])
            step_seconds(1)  # allocates the optimizer's states; cuBLAS chooses its kernels
            if (one := step_seconds(1)) > 1.5:  # a slow GPU: steps of one batch
                step_tokens //= loop.num_batch_accum
                loop = dataclasses.replace(loop, num_batch_accum=1)
                one = step_seconds(1)
            bench.require_time(4 * one)
            n = max(1, min(10, round(0.5 / one)))
            with contextlib.suppress(OSError):
                reset_peak_memory(machine.device)
            times, state.loader.seconds, start = [], 0.0, time.perf_counter()
            while len(times) < 3 or time.perf_counter() - start < (seconds or bench.sizes["seconds"]):
                times.append(step_seconds(n))
                if bench.seconds_left() < n * times[-1]:
                    break
            loader_share = state.loader.seconds / (n * sum(times))
            optimizer_seconds = statistics.median(time_optimizer(bench, state, lambda: step_seconds(1)) for _ in range(3))
    finally:
        loader.close()
    median = statistics.median(times)
    tok_per_sec = step_tokens / median
    figures |= {"tok_per_sec": round(tok_per_sec, 1), "ms_per_step": round(1e3 * median, 3),
                "mfu": round(tok_per_sec * model.flops_per_token() / machine.peak_flops(), 4),
                "peak": "by the data sheet" if machine.datasheet_flops() else "measured",
                "peak_gib": round(peak_memory(machine.device) / GIB, 3),
                "loader_share": round(loader_share, 5), "optimizer_share": round(optimizer_seconds / median, 4),
                "dtype": machine.dtype, "batch_size": batch_size,
                "step_tokens": step_tokens, "steps": n * len(times)}
    state.optimizer = None  # its memory, for `then`
    return figures | then(model, machine)


def time_optimizer(bench: Bench, state: trainer.TrainState, step: Callable[[], None]) -> float:
    """Seconds of the optimizer in `step()`."""
    seconds, optimizer_step = [], state.optimizer.step

    def timed_step(**options):
        bench.synchronize()
        start = time.perf_counter()
        optimizer_step(**options)
        bench.synchronize()
        seconds.append(time.perf_counter() - start)
    with mock.patch.object(state.optimizer, "step", timed_step):
        step()
    return seconds[0]


def open_run(bench: Bench, vocab_size: int, flags: list[str]) -> trainer.Run:
    """A new run of train.py with these flags on random tokens. Its weights are initialised on the GPU."""
    shape = [f"--{name}={value}" for name, value in bench.sizes["shape"].items()]
    given = train.PRETRAINING.flags_given([
        f"--data_path={bench.random_shards(vocab_size)}", f"--checkpoint_path={bench.work / 'run' / 'gpt.pt'}",
        f"--device={bench.device.type}", *shape, f"--block_size={bench.sizes['block_size']}",
        f"--dataloader_num_workers={bench.sizes['workers']}", *flags])
    values = train.resolve_flags(train.PRETRAINING.defaults() | train.PRESETS.get(given.get("preset"), {}), given)
    with bench.device:  # a CPU takes seconds to initialise weights
        return train.open_run(train.PRETRAINING.read_configs(values), None, None)


def speed(bench: Bench) -> str:
    """12 x 768 at two vocabulary sizes: the default, --preset=gpt2, and that preset as nanoGPT computes it."""
    sides = {"default": [], "gpt2": ["--preset=gpt2"], "nanoGPT": ["--preset=gpt2"]}
    large, small = bench.sizes["vocab_sizes"]
    half = half_precision(bench.device)
    padded = large + -large % 64  # as nanoGPT pads GPT-2's vocabulary, whose odd size slows down its matrix products
    arms = [("default", small, half, True), ("nanoGPT", padded, half, True), ("default", large, half, True),
            ("default", large, half, False), ("nanoGPT", padded, half, False), ("gpt2", small, half, True),
            ("gpt2", large, half, False), ("default", large, "fp16", False), ("default", small, half, False),
            ("gpt2", large, half, True), ("default", padded, half, True), ("default", large, "fp16", True),
            ("gpt2", small, half, False), ("default", large, "fp32", False)]
    if bench.task.rehearse:
        arms = [arms[i] for i in (0, 1, 6, 7)]
    best = None
    for side, vocab_size, dtype, compiled in dict.fromkeys(arms):  # where `half` is fp16, some are listed twice
        name = f"{side}, {vocab_size:,} ids, {dtype}, {'compiled' if compiled else 'eager'}"
        if compiled and not bench.compiles:
            bench.write_row(name, skipped="torch.compile does not support this GPU")
            continue
        flags = [*sides[side], f"--batch_size={bench.batch_size()}", f"--num_batch_accum={bench.sizes['accum']}",
                 f"--dtype={dtype}"]
        needs = 2 * bench.sizes["seconds"] + (bench.compile_seconds if compiled else 0.0)
        figures = bench.measure(name, partial(train_speed, bench, vocab_size, flags, compiled, side == "nanoGPT"), needs)
        if figures and (best is None or compiled and side == "default" and "compiled" not in best):
            best = f"{format_speed(figures)}: {name}"
    return best or "nothing was measured"


def format_speed(figures: dict) -> str:
    return format_row({name: figures[name] for name in ("tok_per_sec", "mfu", "peak_gib")})


def memory_6gb(bench: Bench) -> str:
    """Whether --preset=6gb and the default fit into 6 GiB, including the memory that CUDA itself takes."""
    if bench.device.type == "cuda":
        torch.ones(1, device=bench.device)
        free, total = torch.cuda.mem_get_info()
        context = min(total - free - torch.cuda.memory_reserved(), GIB)  # more than 1 GiB would be other programs
        torch.cuda.set_per_process_memory_fraction(min(1.0, (LIMIT - context) / total))
        bench.write_row("memory of CUDA itself", peak_gib=round(context / GIB, 3))

    def reserved_memory(model, machine):
        reserved = torch.cuda.max_memory_reserved() if bench.device.type == "cuda" else 0
        return {"reserved_gib": round(reserved / GIB, 3)}
    by_speed, vocab_size = {}, bench.sizes["vocab_sizes"][0]
    for preset, compiled in (("6gb", False), (None, False), ("6gb", True))[::2 if bench.task.rehearse else 1]:
        name = f"{f'--preset={preset}' if preset else 'default'}, {'compiled' if compiled else 'eager'}"
        if compiled and not bench.compiles:
            bench.write_row(name, skipped="torch.compile does not support this GPU")
            continue
        flags = [f"--preset={preset}"] if preset else []
        needs = 2 * bench.sizes["seconds"] + (bench.compile_seconds if compiled else 0.0)
        measure = partial(train_speed, bench, vocab_size, flags, compiled, then=reserved_memory)
        if figures := bench.measure(name, measure, needs, must_fit=True):
            by_speed[figures["tok_per_sec"]] = f"{format_speed(figures)}: {name}"
    return by_speed[max(by_speed)] if by_speed else "does not fit"


# -- architectures ----------------------------------------------------------------------------------------------------

def decode_speed(bench: Bench, model: GPT, machine: Machine, n_rows: int, n_prompt: int, n_new: int,
                 one_prompt: bool = False) -> dict:
    """Tokens per second of all `n_rows` together, after prompts of random tokens, or after the same one in every row, and
    the size of the cache."""
    model.requires_grad_(False)
    model.cast_matrices(DTYPES[machine.dtype])
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(model.config.vocab_size, (n_prompt,), generator=generator).to(machine.device)
               for _ in range(1 if one_prompt else n_rows)] * (n_rows if one_prompt else 1)
    with machine.autocast():
        tokens = generate(model, prompts, n_new + 4, SamplingConfig())
        for _ in range(4):
            next(tokens)
        bench.synchronize()
        start = time.perf_counter()
        n_generated = sum(len(new) for new in tokens)
        bench.synchronize()
        seconds = time.perf_counter() - start
        _, cache = model.prefill(prompts, n_prompt + n_new + 4, cache_dtype(model))
    return {"decode_tok_per_sec": round(n_generated / seconds, 1), "cache_mib": round(cache.n_bytes() / 2**20, 3)}


def architectures(bench: Bench) -> str:
    """Training steps with the same number of tokens at each context length, and decoding at the end of such a context."""
    arms = ["mlp=gelu", "mlp=grkan", "mlp=chebkan", "linear=grkan", "mixer=gated_delta", "mixer=DDDA"]
    steps, n_new = {}, bench.sizes["new"] // 8 or 1
    for length in reversed(bench.sizes["lengths"]):  # the longest first: they differ most
        for arm in arms if not bench.task.rehearse else arms[bench.sizes["lengths"].index(length)::3]:
            flags = [f"--{arm}", f"--block_size={length}", f"--batch_size={bench.sizes['step_tokens'] // length}",
                     "--num_batch_accum=1", f"--dtype={half_precision(bench.device)}"]
            decode = lambda model, machine, length=length: decode_speed(bench, model, machine, 1, length - n_new - 4, n_new)
            figures = bench.measure(f"{arm}, {length:,} tokens", partial(
                train_speed, bench, bench.sizes["vocab_sizes"][1], flags, seconds=1.0, then=decode), 8.0)
            if figures:
                steps[arm, length] = figures["ms_per_step"]
    longest = max((length for arm, length in steps if arm == "mlp=gelu"), default=0)
    ratios = [f"{arm} {steps[arm, longest] / steps['mlp=gelu', longest]:.2f}" for arm in arms[1:] if (arm, longest) in steps]
    return f"step time at {longest:,} tokens relative to gelu: {', '.join(ratios)}" if ratios else "nothing was measured"


# -- curves -----------------------------------------------------------------------------------------------------------

def curves(bench: Bench) -> str:
    """Trains the default and --preset=gpt2 with the same shards, model shape, tokens per step and seconds; one seed each."""
    data = text_shards(bench.task)
    plan = plan_curves(bench, open_data(data).manifest.vocab_size)
    sides = {"default": [], "preset gpt2": ["--preset=gpt2", f"--warmup_iter={min(2000, plan.n_steps // 20)}"]}
    ends = train_sides(bench, data, bench.sizes["shape"], plan, sides)
    return f"{ends} after {plan.seconds:.0f} s each, {'compiled' if plan.compiled else 'eager'}, one seed"


def answer(bench: Bench) -> str:
    """Trains its arms in long contexts, with the same shards, width, depth, tokens a step and seconds; one seed each."""
    data, sizes = text_shards(bench.task), bench.sizes["answer"]
    plan = plan_answer(bench, sizes)
    ends = train_sides(bench, data, sizes["shape"], plan, sizes["arms"])
    return (f"{ends} after {plan.seconds:.0f} s each, {'compiled' if plan.compiled else 'eager'}, contexts of "
            f"{plan.block_size:,}, one seed")


def train_sides(bench: Bench, data: Path, shape: dict, plan: "CurvesPlan", sides: dict[str, list[str]]) -> str:
    """Trains each of `sides`, name -> flags of train.py, for the seconds of the plan; writes rows, and a picture called as
    the stage. Returns what they end with."""
    vocab_size = open_data(data).manifest.vocab_size
    common = [f"--data_path={data}", *(f"--{name}={value}" for name, value in shape.items()),
              f"--block_size={plan.block_size}", f"--batch_size={plan.batch_size}", f"--num_batch_accum={plan.accum}",
              f"--max_seconds={plan.seconds:.1f}", f"--val_intervals={max(1, plan.n_steps // 8)}",
              f"--device={bench.device.type}", f"--compile_model={int(plan.compiled)}", "--sample_tokens=64",
              "--val_iter=10"]
    rows, write = {name: [] for name in sides}, trainer.MetricsLog.write

    def run(name: str) -> dict:
        def write_both(log, row):
            write(log, row)
            if "val_loss" in row:
                rows[name].append(row)
                bench.write_row(name, step=row["step"], tokens=row["tokens"], train_seconds=row["seconds"],
                                val_loss=row["val_loss"], val_bpb=row["val_bpb"])
        path = bench.work / bench.task.stage / f"{name.replace(' ', '_')}.pt"
        no_checkpoint = lambda *args, **kwargs: None  # nothing reads them, and they take seconds to write
        with mock.patch.object(trainer.MetricsLog, "write", write_both), mock.patch.object(trainer, "save", no_checkpoint):
            train.main([*common, f"--checkpoint_path={path}", *sides[name]])
        last = rows[name][-1]
        return {"step": last["step"], "val_loss": last["val_loss"], "val_bpb": last["val_bpb"], "vocab_size": vocab_size,
                "step_tokens": plan.accum * plan.batch_size * plan.block_size, "compiled": plan.compiled}
    for name in sides:
        bench.measure(f"{name}, at its end", partial(run, name), 10.0)
        if rows[name]:
            draw_curves_svg(rows, Path(bench.task.out_path) / f"{bench.task.stage}.svg", bench.card)
    ends = [f"{name} {side_rows[-1]['val_loss']:.3f}" for name, side_rows in rows.items() if side_rows]
    return f"{', '.join(ends)} nats/token"


@dataclass(frozen=True)
class CurvesPlan:
    """How the runs of a stage share the remaining time. seconds: of training, each."""
    batch_size: int
    block_size: int
    accum: int
    n_steps: int
    seconds: float
    compiled: bool


def plan_curves(bench: Bench, vocab_size: int) -> CurvesPlan:
    if bench.task.rehearse:
        return CurvesPlan(batch_size=4, block_size=32, accum=1, n_steps=32, seconds=1.0, compiled=False)
    batch_size, block_size, compiled = bench.batch_size(), 1024, bench.compiles
    half, small = half_precision(bench.device), bench.sizes["vocab_sizes"][1]
    earlier = [bench.earlier_figures("speed", f"{side}, {small:,} ids, {half}, compiled") for side in ("default", "gpt2")]
    # a model that was compiled in an earlier stage, with this vocabulary, comes from the compiler's cache
    compile_seconds = sum(15.0 if row.get("tok_per_sec") and vocab_size == small else 1.2 * bench.compile_seconds
                          for row in earlier) if compiled else 0.0
    if (bench.seconds_left() - compile_seconds) / 2 < 30:
        compiled, compile_seconds = False, 0.0
    seconds = max((bench.seconds_left() - compile_seconds) / 2 - 15.0, 10.0)
    tok_per_sec = earlier[0].get("tok_per_sec", 0.0)
    if not tok_per_sec:  # the stage `speed` has not run
        flags = [f"--batch_size={batch_size}", "--num_batch_accum=1", f"--dtype={half}"]
        figures = bench.measure("default, to plan the runs", partial(train_speed, bench, small, flags, seconds=1.0))
        tok_per_sec = figures["tok_per_sec"] if figures else 16_384
    # enough steps for a learning-rate schedule; a step has at most the tokens of the default
    accum = int(max(1, min(65_536, tok_per_sec * seconds / 200) // (batch_size * block_size)))
    n_steps = max(8, int(tok_per_sec * seconds / (accum * batch_size * block_size)))
    return CurvesPlan(batch_size, block_size, accum, n_steps, seconds, compiled)


def plan_answer(bench: Bench, sizes: dict) -> CurvesPlan:
    """Measures each arm's speed; the fastest one's says how many steps the runs have at most. Raises NoTime."""
    bench.require_time(40.0 * len(sizes["arms"]))
    block_size, step_tokens = sizes["block_size"], sizes["step_tokens"]
    batch_size = max(1, min(step_tokens, 1024 * bench.batch_size()) // block_size)
    flags = [*(f"--{name}={value}" for name, value in sizes["shape"].items()), f"--block_size={block_size}",
             f"--batch_size={batch_size}", "--num_batch_accum=1", f"--dtype={half_precision(bench.device)}"]
    speeds = [bench.measure(f"{arm}, to plan the runs", partial(train_speed, bench, bench.sizes["vocab_sizes"][1],
                                                                [*flags, *arm_flags], seconds=1.0))
              for arm, arm_flags in sizes["arms"].items()]
    fastest = max((figures["tok_per_sec"] for figures in speeds if figures), default=step_tokens)
    each = bench.seconds_left() / len(sizes["arms"])
    compiled = bench.compiles and each > LONG_RUN and not bench.task.rehearse
    seconds = 0.5 if bench.task.rehearse else max(10.0, each - 15.0 - compiled * 1.5 * bench.compile_seconds)
    return CurvesPlan(batch_size, block_size, step_tokens // (batch_size * block_size),
                      max(8, int(fastest * seconds / step_tokens)), seconds, compiled)


def draw_curves_svg(runs: dict[str, list[dict]], path: Path, caption: str):
    """Writes an SVG of validation loss against seconds and tokens, without matplotlib, which the GPU's machine may lack.
    runs: name -> rows with seconds, tokens and val_loss."""
    width, height, left, top, gap = 420, 260, 60, 40, 70
    colors = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#666666")
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
        for i, ((name, rows), color) in enumerate(zip(runs.items(), itertools.cycle(colors))):
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
    """The 12 x 768 model generates text, one row at a time and many together."""
    config = GPTConfig(**bench.sizes["shape"], block_size=bench.sizes["block_size"],
                       vocab_size=bench.sizes["vocab_sizes"][0])
    machine, best = open_machine(DeviceConfig(device=bench.device.type, dtype=half_precision(bench.device))), []
    for n_rows, one_prompt in [*((n_rows, False) for n_rows in bench.sizes["batches"]), (bench.sizes["batches"][-1], True)]:
        def run(n_rows=n_rows, one_prompt=one_prompt):
            model = GPT(config).to(machine.device)
            return decode_speed(bench, model, machine, n_rows, bench.sizes["prompt"], bench.sizes["new"], one_prompt)
        label = f"batch of {n_rows}{' samples of one prompt' if one_prompt else ''}"
        if figures := bench.measure(f"{label}, eager, {machine.dtype}", run):
            best.append(f"{label} {figures['decode_tok_per_sec']:,.0f} tok/s")
    bench.write_row("compiled, with CUDA graphs", skipped="generate.py does not do that yet")
    return ", ".join(best) or "nothing was measured"


# -- the list ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Stage:
    """seconds: time limit. at_least: seconds kept for it when earlier stages take long. reads_text: needs `text_shards`.
    on_request: runs only where --only names it, and in rehearsals."""
    run: Callable[[Bench], str]  # returns the stage's figure in the summary
    description: str
    seconds: float
    at_least: float = 0.0
    reads_text: bool = False
    on_request: bool = False


STAGES = {  # most important first
    "tests": Stage(run_tests, "the tests marked gpu: the GPU computes what the CPU computes", 90, 60),
    "speed": Stage(speed, "tok/s, MFU, memory and compile time of the default and of nanoGPT's model", 120, 60),
    "6gb": Stage(memory_6gb, "the presets for a GPU with 6 GB", 40, 30),
    "architectures": Stage(architectures, "steps and decoding of each architecture at three context lengths", 120, 30),
    "curves": Stage(curves, "the default against --preset=gpt2 for equal seconds", float("inf"), 120, True),
    "decode": Stage(decode, "tokens per second of generate.py", 45, 25),
    "answer": Stage(answer, "attention against sliding windows and delta rules in long contexts, for equal seconds",
                    float("inf"), reads_text=True, on_request=True),
}


def main():
    task = Task(**json.loads(sys.argv[1]))
    if task.stage == "text":  # not a stage: prepares the shards for `curves` while the GPU runs the stages before it
        text_shards(task)
        return
    bench = Bench(task)
    # prints where a stage hangs before it is killed; to a descriptor that pytest does not capture
    faulthandler.dump_traceback_later(max(1.0, bench.seconds_left() + 3), file=os.fdopen(os.dup(2), "w"))
    if task.rehearse:
        torch.set_num_threads(1)  # two would wait for each other where the cores are busy
    if task.rehearse and task.stage != "tests":  # without Inductor, which takes half a minute per model on a CPU
        compile_model = nn.Module.compile
        nn.Module.compile = lambda self: compile_model(self, backend="aot_eager")
    figure = STAGES[task.stage].run(bench)
    bench.write_row("summary", figure=figure)
    sys.stdout.flush()
    if bench.failed:
        os._exit(1)  # without waiting for workers and compilers that a failure may have left behind


if __name__ == "__main__":
    main()
