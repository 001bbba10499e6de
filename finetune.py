"""Finetunes a model on conversations, so that it answers.

    python finetune.py --checkpoint_path=checkpoints/gpt.pt --dataset=builtin     writes checkpoints/gpt_finetuned.pt
    python chat.py --checkpoint_path=checkpoints/gpt_finetuned.pt                 talks with it

The loop is trainer.py's. What differs from pretraining: rows are packed with whole conversations, none of which attends to
another, and only the assistant's messages carry a loss. The model answers the held-out questions before the first step and
at every validation. The folder named after the checkpoint holds metrics.jsonl, answers.jsonl and, at the end,
finetuning.html. With --meta it trains on documents instead, so that the model adapts better at inference time: meta.py.
"""
import dataclasses
import itertools
import json
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from dataloader import IGNORE_INDEX, PackedBatches, TrainLoader, encodable
from evaluate import (
    PROMPTS_PER_BATCH,
    EvalPrompt,
    accuracy,
    answer_prompts,
    eval_prompts,
    group_by_kind,
    group_by_task,
    mean_losses,
)
from experiments.plots import draw_finetuning
from experiments.report import Figure, Table, markdown, write_page
from learner import AdaptConfig, Learner
from meta import (
    DocumentBatches,
    MetaConfig,
    check_meta,
    compare_validations,
    encode_pieces,
    estimate_document_validation,
    meta_loss,
    read_documents,
    report_parts,
    validate_documents,
)
from model import GPT
from optimizer import OPTIMIZERS, OptimizerConfig
from runtime.checkpoint import run_folder
from runtime.cli import command, say
from runtime.config import BadInput, check_flags, flag, flag_names, redeclare
from runtime.device import DeviceConfig, Machine, seed_everything
from runtime.distributed import join
from runtime.files import atomic_write
from runtime.metrics import read_rows
from runtime.run import TrainingCommand, override_horizon
from sampling import load_pretrained
from tasks.conversations import ConversationConfig, ReadReport, read_conversations
from tokenizer import ROLES
from trainer import (
    Evaluation,
    LoopConfig,
    Run,
    RunFlags,
    TrainSetup,
    TrainState,
    describe_machine,
    dry_run_step,
    open_output,
    restore_state,
    train_command,
)

LR_RATIO = 0.5  # of pretraining's learning rate: finetuning should redirect what the model knows, not overwrite it
# Of a row of answers.jsonl
ANSWER_FIELDS = {"step": int, "kind": str, "task": str, "question": str, "answer": str, "output": str, "correct": bool}


@dataclass(frozen=True)
class FinetuneConfig(RunFlags):
    """The run."""
    checkpoint_path: Path = flag(Path("checkpoints/gpt.pt"), "the model to finetune")
    out_path: Path = flag(None, "checkpoint to write; metrics go into the folder of its name (default: --checkpoint_path "
                                "with _finetuned added to its name)", on_resume="unsaved", scope="run")
    epochs: float = flag(3.0, "passes over the conversations, unless --max_iter, --max_tokens or --max_seconds is given",
                         above=0, scope="run")
    batch_size: int = flag(16, "rows in a batch; a row holds as many conversations as fit into the model's context, or into "
                               "less where there are few",
                           at_least=1, at_most=1_000_000, on_resume="warn")
    answer_tokens: int = flag(64, "maximum number of tokens in an answer to a held-out question", at_least=1,
                              on_resume="warn")
    seed: int = flag(1337, "random seed of the order of the conversations", at_least=0, at_most=2**63 - 1, scope="run")
    __post_init__ = check_flags


@dataclass(frozen=True)
class FinetuneOptimizer(OptimizerConfig):
    """The optimizer."""
    optimizer: str = flag("auto", "see train.py; auto: the one that the model was trained with here, adamw for an imported "
                                  "model", choices=("auto", *OPTIMIZERS))
    learning_rate: float = flag("auto", f"peak learning rate, see train.py; auto: {LR_RATIO} of its auto", above=0,
                                auto=True, on_resume="warn")
    mix_lr_ratio: float = redeclare(OptimizerConfig, "mix_lr_ratio", 1.0)  # a trained model's have no way to go
    weight_decay: float = flag(0.0, "weight decay of the matrices; each step multiplies it by the learning rate",
                               at_least=0, on_resume="warn")

    def peak_lr(self, step_tokens: int) -> float:
        return super().peak_lr(step_tokens) * (LR_RATIO if self.learning_rate == "auto" else 1.0)

    def for_model(self, pretraining_flags: dict) -> "FinetuneOptimizer":
        """With "auto" resolved to the optimizer of pretraining: Muon would undo what AdamW has made."""
        name = pretraining_flags.get("optimizer", "adamw") if self.optimizer == "auto" else self.optimizer
        return dataclasses.replace(self, optimizer=name)


@dataclass(frozen=True)
class FinetuneLoop(LoopConfig):
    """How long to train and how often to validate."""
    max_iter: int = flag(None, "optimizer steps; of several limits the first to be reached ends the run (default: --epochs)",
                         at_least=1, on_resume="warn", scope="run")
    num_batch_accum: int = flag(1, "batches whose gradients are averaged in a step", at_least=1, on_resume="warn")
    val_intervals: int = flag(250, "steps between validations, each of which answers the held-out questions and writes the "
                                   "checkpoint", at_least=1, on_resume="warn", scope="shared")
    __post_init__ = check_flags  # unlike LoopConfig's, leaves max_iter unset, for --epochs to decide


class FinetuneConfigs(NamedTuple):
    """The flags of finetune.py."""
    run: FinetuneConfig
    source: ConversationConfig
    meta: MetaConfig
    adapt: AdaptConfig
    optimizer: FinetuneOptimizer
    loop: FinetuneLoop
    device: DeviceConfig


FINETUNING = TrainingCommand("finetune.py", "Finetunes a model on conversations, or with --meta to adapt better.",
                             FinetuneConfigs, "out_path")
META_DEFAULTS = {"dataset": "builtin", "num_batch_accum": 4}  # of a run with --meta, where it differs
# That a run with --meta has no use for. Nor has it for --answer_tokens, with which compare.py times any finetuning.
CONVERSATION_FLAGS = {"batch_size", "split", "question_column", "answer_column", "val_conversations",
                      "gradient_checkpointing"}


def resolve_flags(start: dict, given: dict) -> dict:
    """The values of all flags. start: {} or the flags of the resumed run. Raises BadInput for a flag without effect."""
    defaults = FINETUNING.defaults()
    values = override_horizon(defaults | (META_DEFAULTS if given.get("meta") else {}) | start, given)
    unused = CONVERSATION_FLAGS if values["meta"] else flag_names(MetaConfig, AdaptConfig)
    if idle := sorted(name for name in given.keys() & unused if given[name] != defaults[name]):
        raise BadInput(f"--{idle[0]}={given[idle[0]]}: has no effect " + (
            "with --meta: drop it" if values["meta"] else "without --meta: drop it, or add --meta=fomaml"))
    return values


# -- loss and validation ----------------------------------------------------------------------------------------------

def answer_loss(model: GPT, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean loss in nats/token over the assistant's messages, and their share of the batch, which makes a step the mean over
    all tokens of theirs. batch: inputs, targets and document starts, each (B, T)."""
    idx, targets, doc_starts = batch
    loss = model(idx, targets, doc_starts=doc_starts, loops=model.draw_loops())
    return loss, (targets != IGNORE_INDEX).float().mean()


@dataclass(frozen=True)
class HeldOut:
    """The conversations that are not trained on: their batches, and the questions that the model answers. report: of the
    reading of the dataset."""
    batches: PackedBatches
    prompts: list[EvalPrompt]
    report: ReadReport


def validate(state: TrainState, setup: TrainSetup, held_out: HeldOut, answer_tokens: int, show_progress: bool) -> dict:
    """val_loss and val_bpb of the right answers; exact_match, the accuracy of the model's own, which go into answers.jsonl,
    overall and for each kind of question; skipped_rows, where rows of the dataset could not be read."""
    batches = held_out.batches
    row = mean_losses(state.model, setup.tokenizer, setup.machine, batches.sequential(),
                      math.ceil(batches.n_blocks / batches.batch_size) if show_progress else None)
    with setup.machine.autocast():
        answers = answer_prompts(state.model, setup.tokenizer, held_out.prompts, answer_tokens, show_progress)
    if join().is_main:
        write_answers(run_folder(setup.writer.path) / "answers.jsonl", state.step, answers)
    if answers:
        row["exact_match"] = accuracy(answers)
    if len(by_kind := group_by_kind(answers)) > 1:
        row |= {f"exact_match/{kind}": accuracy(rows) for kind, rows in by_kind.items()}
    return row | ({"skipped_rows": n} if (n := len(held_out.report.skipped)) else {})


def estimate_validation(state: TrainState, setup: TrainSetup, held_out: HeldOut, run: FinetuneConfig) -> float:
    """Seconds of a validation, from its first batch and its first questions."""
    model, tokenizer, machine, batches = state.model, setup.tokenizer, setup.machine, held_out.batches
    prompts, start = held_out.prompts[:PROMPTS_PER_BATCH], time.perf_counter()
    mean_losses(model, tokenizer, machine, itertools.islice(batches.sequential(), 1))
    read = time.perf_counter()
    with machine.autocast():
        answer_prompts(model, tokenizer, prompts, run.answer_tokens)
    answered = time.perf_counter() - read
    return (read - start) * math.ceil(batches.n_blocks / run.batch_size) + (
        answered * len(held_out.prompts) / max(1, len(prompts)))


def write_answers(path: Path, step: int, answers: list[dict]):
    """Adds the answers of a step to answers.jsonl, in place of any of later steps, which a resumed run repeats."""
    earlier = [row for row in read_answers(path) if row["step"] < step] if step else []
    with atomic_write(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in earlier + [{"step": step} | row for row in answers])


def read_answers(path: Path) -> list[dict]:
    """The rows of an answers.jsonl; [] if the file does not exist. Lines that a crash cut off are ignored; rows from before
    kind and task were fields of their own are brought up to date."""
    rows = []
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and {"said", "right", "task"} <= row.keys():
                    kind, _, task = str(row["task"]).partition(": ")
                    row |= {"output": row.pop("said"), "correct": row.pop("right"), "kind": kind, "task": task or kind}
                if isinstance(row, dict) and all(type(row.get(name)) is kind for name, kind in ANSWER_FIELDS.items()):
                    rows.append(row)
    return rows


# -- report -----------------------------------------------------------------------------------------------------------

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
    best = min((row for row in rows if "val_loss" in row), key=lambda row: row["val_loss"])
    write_page(page, f"Finetuning {settings['checkpoint_path']} on {settings['dataset']}", [
        ("p", f"{state.step:,} steps of {setup.step_tokens:,} tokens, {state.seconds:,.0f} s on {setup.machine}; learning "
              f"rate {setup.peak_lr():.3g}. The loss of held-out answers is lowest at step {best['step']:,}: best.pt. "
              f"Metrics: metrics.jsonl; answers: answers.jsonl."),
        ("h2", "Before and after"), metrics, *([tasks] if tasks.rows else []), ("h2", "Loss of held-out answers"),
        Figure(draw_finetuning(rows), "loss"), *([("h2", "Answers"), samples] if samples.rows else [])])
    say(f"\nsaved {path} and {page}; `python chat.py --checkpoint_path={path}` talks with it")


def report_meta(state: TrainState, setup: TrainSetup):
    """`report` of a run with --meta."""
    path, settings = setup.writer.path, setup.settings
    rows = read_rows(run_folder(path) / "metrics.jsonl")
    table, page = compare_validations(rows), run_folder(path) / "finetuning.html"
    print(markdown(table))
    write_page(page, f"Meta-learning {settings['checkpoint_path']} on {settings['dataset']}",
               report_parts(state, setup, rows, table))
    say(f"\nsaved {path} and {page}; `python adapt.py --checkpoint_path={path}` adapts it to documents")


def compare_answers(rows: list[dict], answers: list[dict]) -> tuple[Table, Table, Table]:
    """Before and after: the metrics, the accuracy by task, and sample answers. rows: of metrics.jsonl; answers: of
    answers.jsonl."""
    first, last = rows[0], [row for row in rows if "val_loss" in row][-1]
    metrics = Table(("metric", "better", "before", "after"), [
        (label, better, form.format(first[name]), form.format(last[name])) for name, label, better, form in (
            ("val_loss", "loss of held-out answers, nats/token", "lower", "{:.4f}"),
            ("val_bpb", "bits per byte of held-out answers", "lower", "{:.4f}"),
            ("exact_match", "exact match of held-out answers", "higher", "{:.1%}")) if name in first and name in last])
    before, after = ([row for row in answers if row["step"] == step] for step in (first["step"], last["step"]))
    tasks_before, tasks_after = group_by_task(before), group_by_task(after)
    tasks = Table(("exact match by task", "better", "before", "after"), [
        (task, "higher", f"{accuracy(tasks_before[task]):.1%}", f"{accuracy(tasks_after[task]):.1%}")
        for task in tasks_before if task in tasks_after])
    return metrics, tasks, sample_answers(before, after)


def sample_answers(before: list[dict], after: list[dict]) -> Table:
    """Answers to the same questions: the first two of each task, or the first twelve of questions without one.

    before, after: rows of answers.jsonl in the same order.
    """
    samples, n_shown = [], {}
    for old, new in zip(before, after):
        task = old["kind"], old["task"]
        n_shown[task] = n_shown.get(task, 0) + 1
        if n_shown[task] <= (2 if old["task"] else 12):
            samples.append(tuple(truncate(text) for text in (old["question"], old["answer"], old["output"], new["output"])))
    return Table(("question", "right answer", "before", "after"), samples)


def truncate(text: str, n: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= n else text[:n - 1] + "…"


# -- the command ------------------------------------------------------------------------------------------------------

def open_run(configs: FinetuneConfigs, checkpoint: dict | None, resumed: Path | None) -> Run:
    """Everything a run needs, new or as `checkpoint`, read from `resumed`, left it, with --epochs and "auto" resolved.
    Raises BadInput before any file is written."""
    return (open_meta_run if configs.meta.meta else open_conversation_run)(configs, checkpoint, resumed)


def open_conversation_run(configs: FinetuneConfigs, checkpoint: dict | None, resumed: Path | None) -> Run:
    """See `open_run`."""
    run, loop, schedule = configs.run, configs.loop, configs.optimizer
    output = open_output(FINETUNING, run.out_path, resumed, run.overwrite, configs.device, checkpoint)
    machine = output.machine
    model, tokenizer, pretraining_flags = load_pretrained(resumed or run.checkpoint_path, checkpoint, chat=True)
    if not checkpoint:
        schedule = schedule.for_model(pretraining_flags)
    conversations, held_out = read_conversations(configs.source, ROLES, report := ReadReport())
    context = model.config.block_size
    if configs.source.skip_errors:
        conversations, held_out = (encodable(part, tokenizer, report.skipped) for part in (conversations, held_out))
    seed_everything(run.seed)
    batches = PackedBatches(tokenizer, conversations, run.batch_size, context, run.seed)
    val = HeldOut(PackedBatches(tokenizer, held_out, run.batch_size, context, 0),
                  eval_prompts(held_out, tokenizer, context), report)
    model.to(machine.device)
    model.gradient_checkpointing = run.gradient_checkpointing
    step_rows = run.batch_size * loop.num_batch_accum
    configs = configs._replace(optimizer=schedule, loop=resolve_epochs(loop, run.epochs * batches.n_blocks / step_rows))
    loader = TrainLoader(batches, batches.fingerprint(), pin_memory=machine.device.type == "cuda", rank=join().rank,
                         n_ranks=join().size)
    state, setup = restore_state(output, model, tokenizer, schedule, loader, step_rows * batches.block_size,
                                 FINETUNING.settings(*configs) | vars(model.config))
    evaluate = Evaluation(lambda state: validate(state, setup, val, run.answer_tokens, loop.verbose))
    return Run(configs, state, setup, answer_loss, evaluate, partial(dry_run, state, machine, run.batch_size),
               partial(describe, state, setup, val, configs), partial(estimate_validation, state, setup, val, run),
               batches.n_blocks * batches.block_size)


def open_meta_run(configs: FinetuneConfigs, checkpoint: dict | None, resumed: Path | None) -> Run:
    """See `open_run`."""
    run, source, meta, schedule = configs.run, configs.source, configs.meta, configs.optimizer
    check_meta(source.dataset, configs.adapt)
    output = open_output(FINETUNING, run.out_path, resumed, run.overwrite, configs.device, checkpoint)
    model, tokenizer, pretraining_flags = load_pretrained(resumed or run.checkpoint_path, checkpoint)
    if not checkpoint:
        schedule = schedule.for_model(pretraining_flags)
    learner = Learner(model.to(output.machine.device), configs.adapt, output.machine)
    texts = read_documents(source.dataset, source.dataset_config, source.skip_errors, meta)
    n_tokens = meta.meta_contexts * model.config.block_size
    pieces, held_out = encode_pieces(source.dataset, texts, tokenizer, n_tokens, learner.hop)
    seed_everything(run.seed)
    batches, n_accum = DocumentBatches(pieces, run.seed), configs.loop.num_batch_accum
    loop = resolve_epochs(configs.loop, run.epochs * batches.n_blocks / n_accum)
    configs = configs._replace(optimizer=schedule, loop=loop)
    step_tokens = n_accum * batches.n_tokens // batches.n_blocks
    loader = TrainLoader(batches, batches.fingerprint(), rank=join().rank, n_ranks=join().size)
    state, setup = restore_state(output, model, tokenizer, schedule, loader, step_tokens,
                                 FINETUNING.settings(*configs) | vars(model.config))
    loss_fn = partial(meta_loss, learner, meta.meta)
    evaluate = Evaluation(lambda state: validate_documents(learner, tokenizer, held_out, loop.verbose),
                          label="adapted {:.4f} nats/token")
    context = [part[:, :model.config.block_size] for part in output.machine.to_device(batches.read(0))]
    return Run(configs, state, setup, loss_fn, evaluate, partial(dry_run_step, model, output.machine, loss_fn, context),
               partial(describe_meta, state, setup, len(held_out), learner.hop, configs),
               partial(estimate_document_validation, learner, tokenizer, held_out), batches.n_tokens)


def resolve_epochs(loop: FinetuneLoop, n_steps: float) -> FinetuneLoop:
    """`loop`, with an end after `n_steps` where it has none."""
    has_end = loop.max_iter or loop.max_tokens or loop.max_seconds
    return loop if has_end else dataclasses.replace(loop, max_iter=max(1, math.ceil(n_steps)))


def dry_run(state: TrainState, machine: Machine, batch_size: int):
    """Forward and backward pass of a full batch, see dry_run_step."""
    batch = [part.expand(batch_size, -1) for part in machine.to_device(state.loader.batches.read(range(1)))]
    dry_run_step(state.model, machine, answer_loss, batch)


def describe(state: TrainState, setup: TrainSetup, val: HeldOut, configs: FinetuneConfigs) -> list[str]:
    """The lines that a run starts with: model, data and machine."""
    batches, run = state.loader.batches, configs.run
    n_targets = sum(int(assistant_mask.sum()) for _, assistant_mask in batches.conversations)
    n_tokens = sum(len(ids) - 1 for ids, _ in batches.conversations)
    counts = {"are longer than the context and truncated": batches.n_truncated,
              "are left out, whose first answer starts beyond the context": batches.n_too_long}
    notes = [f"{n:,} {what}" for what, n in counts.items() if n]
    notes = "".join(f"\n         {note}" for note in notes + val.report.lines())
    return [f"model    {run.checkpoint_path}: {state.model.n_parameters() / 1e6:.2f} M parameters, context "
            f"{state.model.config.block_size:,}; {configs.optimizer.optimizer} at {setup.peak_lr():.3g}",
            f"data     {configs.source.dataset}: {len(batches.conversations):,} conversations in {batches.n_blocks:,} rows "
            f"of {batches.block_size:,} tokens, {n_tokens / batches.n_blocks / batches.block_size:.0%} full; "
            f"{n_targets / n_tokens:.0%} of the tokens are the assistant's; {len(val.batches.conversations):,} held out, "
            f"with {len(val.prompts):,} questions{notes}",
            f"machine  {describe_machine(setup.machine)}; steps of {run.batch_size} x {configs.loop.num_batch_accum} rows "
            f"until {configs.loop.horizon()}"]


def describe_meta(state: TrainState, setup: TrainSetup, n_held_out: int, hop: int, configs: FinetuneConfigs) -> list[str]:
    """The lines that a run with --meta starts with."""
    batches, adapt = state.loader.batches, configs.adapt
    return [f"model    {configs.run.checkpoint_path}: {state.model.n_parameters() / 1e6:.2f} M parameters, context "
            f"{state.model.config.block_size:,}; {configs.optimizer.optimizer} at {setup.peak_lr():.3g}",
            f"data     {configs.source.dataset}: {batches.n_tokens:,} tokens in {batches.n_blocks:,} pieces of at most "
            f"{batches.block_size:,}; {n_held_out:,} documents held out",
            f"learner  {configs.meta.meta}: {adapt.adapt_optimizer} at {adapt.rate:g} on {adapt.adapt_scope}, hops of "
            f"{hop} tokens",
            f"machine  {describe_machine(setup.machine)}; steps of {configs.loop.num_batch_accum} pieces until "
            f"{configs.loop.horizon()}"]


def default_out_path(path: Path, meta: str | None = None) -> Path:
    """checkpoints/gpt.pt -> checkpoints/gpt_finetuned.pt, or checkpoints/gpt_fomaml.pt"""
    return path.with_name(f"{path.stem}_{meta or 'finetuned'}{path.suffix or '.pt'}")


@command
def main(argv=None):
    given, defaults = FINETUNING.flags_given(argv), FINETUNING.defaults()
    base = given.get("checkpoint_path", defaults["checkpoint_path"])
    path, resumed = FINETUNING.paths(given, default_out_path(base, given.get("meta")))
    run = train_command(FINETUNING, given, path, resumed, resolve_flags, open_run)
    if run and run.configs.loop.verbose:
        (report_meta if run.configs.meta.meta else report)(run.state, run.setup)


if __name__ == "__main__":
    main()
