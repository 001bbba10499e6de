"""Finetunes a model on conversations, so that it answers.

    python finetune.py --checkpoint_path=checkpoints/gpt.pt --dataset=builtin     writes checkpoints/gpt_finetuned.pt
    python chat.py --checkpoint_path=checkpoints/gpt_finetuned.pt                 talks with it

The loop is trainer.py's. What differs from pretraining: rows packed with whole conversations, none of which attends to
another, and a loss on the assistant's messages alone. The held-out questions are asked before the first step and at every validation.
Beside the checkpoint a folder of its name holds metrics.jsonl, answers.jsonl, and at the end finetuning.html.
"""
import dataclasses
import json
import math
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from dataloader import PackedBatches, TrainLoader
from evaluate import EvalPrompt, accuracy, accuracy_by, answer_losses, answer_prompts, eval_prompts
from experiments.plots import draw_lines
from experiments.report import Figure, Table, markdown, write_page
from model import GPT
from optimizer import OptimizerConfig
from runtime.checkpoint import load_checkpoint, reading, run_folder
from runtime.cli import command, explain_failures
from runtime.config import check_flags, flag
from runtime.device import DeviceConfig, Machine, seed_everything
from runtime.files import atomic_write, folder_lock
from runtime.metrics import read_rows
from runtime.run import TrainingCommand, is_finished, override_horizon
from tasks.conversations import ConversationConfig, read_conversations
from tokenizer import Tokenizer
from trainer import (
    Evaluation,
    LoopConfig,
    TrainSetup,
    TrainState,
    make_state,
    oom_advice,
    open_output,
    report_start,
    train,
)

LR_RATIO = 0.5  # of pretraining's learning rate: what the model knows is to be redirected, not learnt anew


@dataclass(frozen=True)
class FinetuneConfig:
    """The run."""
    checkpoint_path: Path = flag(Path("checkpoints/gpt.pt"), "the model to start from")
    out_path: Path = flag(None, "file to write; metrics go into the folder of its name (default: that of --checkpoint_path "
                                "with _finetuned in its name)", on_resume="unsaved", scope="run")
    resume_checkpoint: str = flag(None, "continue --out_path, or the file given here; flags not given keep their value, and "
                                        "the run goes on exactly as if never stopped", bare="1", on_resume="unsaved",
                                  scope="run")
    overwrite: bool = flag(False, "let a new run replace the checkpoint and metrics of an earlier one", on_resume="unsaved",
                           scope="run")
    epochs: float = flag(3.0, "passes over the conversations, if no other end is given", above=0, scope="run")
    batch_size: int = flag(16, "rows in a batch, each of as many conversations as fit into the model's context",
                           at_least=1, at_most=1_000_000, on_resume="warn")
    answer_tokens: int = flag(64, "longest answer, in tokens, to a held-out question", at_least=1, on_resume="warn")
    compile_model: bool = flag("auto", "torch.compile: a slow start, then faster steps; auto: on GPUs that Triton supports",
                               auto=True, on_resume="warn")
    gradient_checkpointing: bool = flag(False, "keep only the inputs of blocks and recompute the rest: less memory, slower",
                                        on_resume="free")
    seed: int = flag(1337, "of the order of the conversations", at_least=0, at_most=2**63 - 1, scope="run")
    __post_init__ = check_flags


@dataclass(frozen=True)
class FinetuneOptimizer(OptimizerConfig):
    """The optimizer."""
    optimizer: str = flag("auto", "see train.py; auto: the one that trained the model here, adamw for an imported model",
                          choices=("auto", "muon", "adamw", "gpt2"))
    learning_rate: float = flag("auto", f"peak learning rate, see train.py; auto: {LR_RATIO} of its", above=0, auto=True,
                                on_resume="warn")
    weight_decay: float = flag(0.0, "of the matrices, per step and learning rate", at_least=0, on_resume="warn")

    def peak_lr(self, step_tokens: int) -> float:
        return super().peak_lr(step_tokens) * (LR_RATIO if self.learning_rate == "auto" else 1.0)

    def for_model(self, trained_with: dict) -> "FinetuneOptimizer":
        """With the optimizer that trained the model: Muon would undo what AdamW has made. trained_with: the flags of its
        run."""
        chosen = trained_with.get("optimizer", "adamw") if self.optimizer == "auto" else self.optimizer
        return dataclasses.replace(self, optimizer=chosen)


@dataclass(frozen=True)
class FinetuneLoop(LoopConfig):
    """How long to train and how often to look."""
    max_iter: int = flag(None, "optimizer steps; of several ends the first to come counts (default: --epochs)", at_least=1,
                         on_resume="warn", scope="run")
    num_batch_accum: int = flag(1, "batches whose gradients are averaged in a step", at_least=1, on_resume="warn")
    val_intervals: int = flag(250, "steps between validations, each of which asks the held-out questions and writes the "
                                   "checkpoint", at_least=1, on_resume="warn", scope="shared")
    __post_init__ = check_flags


class FinetuneConfigs(NamedTuple):
    """The flags of finetune.py."""
    run: FinetuneConfig
    source: ConversationConfig
    optimizer: FinetuneOptimizer
    loop: FinetuneLoop
    device: DeviceConfig


FINETUNING = TrainingCommand("finetune.py", "Finetunes a model on conversations.", FinetuneConfigs, "out_path")


def answer_loss(model: GPT, batch: list[Tensor]) -> Tensor:
    """Mean loss in nats/token over what the assistant says. batch: inputs, targets and document starts, each (B, T)."""
    idx, targets, doc_starts = batch
    return model(idx, targets, doc_starts=doc_starts)


def dry_run_step(state: TrainState, machine: Machine, batch_size: int):
    """Forward and backward pass of a batch, to see whether they work here. Leaves no gradient."""
    batch = [part.expand(batch_size, -1) for part in machine.to_device(state.loader.batches.read(range(1)))]
    try:
        with machine.autocast():
            loss = answer_loss(state.model, batch)
        loss.backward()
    finally:
        state.model.zero_grad(set_to_none=True)


def validate(state: TrainState, setup: TrainSetup, held_out: PackedBatches, prompts: list[EvalPrompt],
             answer_tokens: int) -> dict:
    """Loss and bits per byte of held-out answers, and the accuracy of the model's own, which go into answers.jsonl."""
    row = answer_losses(state.model, setup.tokenizer, held_out, setup.machine)
    with setup.machine.autocast():
        answers = answer_prompts(state.model, setup.tokenizer, prompts, answer_tokens)
    write_answers(run_folder(setup.writer.path) / "answers.jsonl", state.step, answers)
    by_kind = {f"exact_match/{kind}": value for kind, value in accuracy_by(answers, "kind").items()}
    return row | ({"exact_match": accuracy(answers)} if answers else {}) | (by_kind if len(by_kind) > 1 else {})


def write_answers(path: Path, step: int, answers: list[dict]):
    kept = [row for row in read_answers(path) if row["step"] < step] if step else []
    with atomic_write(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in kept + [{"step": step} | answer for answer in answers])


def read_answers(path: Path) -> list[dict]:
    """Rows of an answers.jsonl; lines that a crash cut off, and a missing file, are left out."""
    rows = []
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                rows.append(json.loads(line))
    return rows


# -- report -----------------------------------------------------------------------------------------------------------

def compare_answers(rows: list[dict], answers: list[dict]) -> tuple[Table, Table, Table]:
    """Before and after: the metrics, the accuracy by task, and sample answers."""
    first, last = rows[0], [row for row in rows if "val_loss" in row][-1]
    names = {"val_loss": "loss of held-out answers, nats/token (lower is better)", "val_bpb": "their bits per byte (lower)",
             "exact_match": "held-out questions answered exactly (higher)"}
    show = lambda name, value: f"{value:.1%}" if name == "exact_match" else f"{value:.4f}"
    metrics = Table(("metric", "before", "after"), [(text, show(name, first[name]), show(name, last[name]))
                                                    for name, text in names.items() if name in first and name in last])
    before, after = ([row for row in answers if row["step"] == step] for step in (first["step"], last["step"]))
    was, now = accuracy_by(before, "task"), accuracy_by(after, "task")
    tasks = Table(("task", "before", "after"), [(task, f"{value:.1%}", f"{now[task]:.1%}")
                                                for task, value in was.items() if task in now])
    samples, seen = [], set()
    for old, new in zip(before, after):  # two of each task
        if sum(task == old["task"] for task, _ in seen) < (2 if old["task"] else 12):
            seen.add((old["task"], old["question"]))
            samples.append(tuple(truncate(text) for text in (old["question"], old["answer"], old["said"], new["said"])))
    return metrics, tasks, Table(("question", "right answer", "before", "after"), samples)


def truncate(text: str, n: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= n else text[:n - 1] + "…"


def report(state: TrainState, setup: TrainSetup):
    """Prints what has changed, and writes finetuning.html."""
    path, settings = setup.writer.path, setup.settings
    rows = read_rows(run_folder(path) / "metrics.jsonl")
    metrics, tasks, samples = compare_answers(rows, read_answers(run_folder(path) / "answers.jsonl"))
    print(markdown(metrics))
    for table in (tasks, samples):
        if table.rows:
            print("\n" + markdown(table))
    page = run_folder(path) / "finetuning.html"
    write_page(page, f"Finetuning {settings['checkpoint_path']} on {settings['dataset']}", [
        ("p", f"{state.step:,} steps of {setup.step_tokens:,} tokens, {state.seconds:,.0f} s on {setup.machine}; learning "
              f"rate {setup.peak_lr():.3g}. Metrics: metrics.jsonl; answers: answers.jsonl."),
        ("h2", "Before and after"), metrics, *([tasks] if tasks.rows else []), ("h2", "Loss of held-out answers"),
        Figure(draw_lines({path.name: [rows]}), "loss"), *([("h2", "Answers"), samples] if samples.rows else [])])
    print(f"\nsaved {path} and {page}; `python chat.py --checkpoint_path={path}` talks with it")


# -- the command ------------------------------------------------------------------------------------------------------

@dataclass
class HeldOut:
    """The conversations that are not trained on: their batches, and the questions among them."""
    batches: PackedBatches
    prompts: list[EvalPrompt]


def load_base(path: Path) -> tuple[GPT, Tokenizer, dict]:
    """The model to start from, its tokenizer, and the flags of its own training, if it was trained here."""
    checkpoint = load_checkpoint(path)
    with reading(path):
        tokenizer = Tokenizer.from_json(checkpoint["tokenizer"])
        tokenizer.chat_ids()
        return GPT.from_checkpoint(checkpoint), tokenizer, checkpoint.get("training", {}).get("settings", {})


def open_run(configs: FinetuneConfigs, checkpoint: dict | None) -> tuple[TrainState, TrainSetup, HeldOut, FinetuneConfigs]:
    """Everything a run needs, new or as `checkpoint` left it, and the flags with what --epochs and the model decide. Raises
    BadInput before any file is written."""
    run, loop, device = configs.run, configs.loop, configs.device
    path, resumed = run.out_path, Path(run.resume_checkpoint) if run.resume_checkpoint else None
    writer, machine = open_output(FINETUNING, path, resumed, run.overwrite, device, checkpoint)
    schedule = configs.optimizer
    if checkpoint:
        with reading(resumed):
            model, tokenizer = GPT.from_checkpoint(checkpoint), Tokenizer.from_json(checkpoint["tokenizer"])
    else:
        model, tokenizer, trained_with = load_base(run.checkpoint_path)
        schedule = schedule.for_model(trained_with)
    conversations, held_out = read_conversations(configs.source)
    block_size = model.config.block_size
    seed_everything(run.seed)
    batches = PackedBatches(tokenizer, conversations, run.batch_size, block_size, run.seed)
    val = HeldOut(PackedBatches(tokenizer, held_out, run.batch_size, block_size, 0),
                  eval_prompts(held_out, tokenizer, block_size))
    model.to(machine.device)
    model.gradient_checkpointing = run.gradient_checkpointing
    if not (loop.max_iter or loop.max_tokens or loop.max_seconds):
        step_rows = run.batch_size * loop.num_batch_accum
        loop = dataclasses.replace(loop, max_iter=max(1, math.ceil(run.epochs * batches.n_blocks / step_rows)))
    configs = configs._replace(optimizer=schedule, loop=loop)
    loader = TrainLoader(batches, batches.fingerprint(), pin_memory=machine.device.type == "cuda")
    settings = FINETUNING.settings(*configs) | vars(model.config)
    state, setup = make_state(FINETUNING, model, tokenizer, schedule, loader, machine, writer, settings, resumed,
                              checkpoint)
    return state, setup, val, configs


def describe(state: TrainState, setup: TrainSetup, val: HeldOut, configs: FinetuneConfigs):
    """The lines that a run starts with."""
    batches, run = state.loader.batches, configs.run
    n_targets = sum(int(assistant_mask.sum()) for _, assistant_mask in batches.texts)
    n_tokens = sum(len(ids) - 1 for ids, _ in batches.texts)
    print(f"model    {run.checkpoint_path}: {state.model.n_parameters() / 1e6:.2f} M parameters, context "
          f"{state.model.config.block_size:,}; {configs.optimizer.optimizer} at {setup.peak_lr():.3g}")
    print(f"data     {configs.source.dataset}: {len(batches.texts):,} conversations in {batches.n_blocks:,} rows, "
          f"{n_tokens / batches.n_blocks / batches.block_size:.0%} full; {n_targets / n_tokens:.0%} of the tokens are the "
          f"assistant's; {len(val.batches.texts):,} held out, {len(val.prompts):,} of them asked")
    if batches.n_truncated:
        print(f"         {batches.n_truncated:,} are longer than the context and truncated")
    print(f"machine  {setup.machine}; steps of {run.batch_size} x {configs.loop.num_batch_accum} rows until "
          f"{configs.loop.horizon()}")


def default_out_path(path: Path) -> Path:
    """checkpoints/gpt.pt -> checkpoints/gpt_finetuned.pt"""
    return path.with_name(path.stem + "_finetuned" + (path.suffix or ".pt"))


@command
def main(argv=None):
    given, defaults = FINETUNING.flags_given(argv), FINETUNING.defaults()
    path, resumed = FINETUNING.paths(given, default_out_path(given.get("checkpoint_path", defaults["checkpoint_path"])))
    with folder_lock(run_folder(path), f"--out_path={path}"):
        start, checkpoint = FINETUNING.read_checkpoint(resumed, given) if resumed else ({}, None)
        values = override_horizon(defaults | start, given) | {
            "out_path": path, "resume_checkpoint": str(resumed) if resumed else None}
        configs = FINETUNING.read_configs(values)
        if checkpoint and is_finished(configs.loop, checkpoint["training"], resumed):
            return
        setup = None
        with explain_failures(oom_advice(values), lambda: setup.checkpoint_status() if setup else ""):
            state, setup, val, configs = open_run(configs, checkpoint)
            run = configs.run
            if configs.loop.verbose:
                describe(state, setup, val, configs)
                report_start(FINETUNING, setup, checkpoint)
            del checkpoint
            evaluate = Evaluation(lambda state: validate(state, setup, val.batches, val.prompts, run.answer_tokens))
            train(FINETUNING, state, setup, configs.loop, answer_loss, evaluate, run.compile_model,
                  dry_run=partial(dry_run_step, state, setup.machine, run.batch_size))
    if configs.loop.verbose:
        report(state, setup)


if __name__ == "__main__":
    main()
