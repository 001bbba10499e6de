"""Finetunes a model on conversations, so that it answers.

    python finetune.py --checkpoint_path=checkpoints/gpt.pt --dataset=builtin     writes checkpoints/gpt_finetuned.pt
    python generate.py --checkpoint_path=checkpoints/gpt_finetuned.pt --chat      talks with it

The loop is train.py's. What differs: rows of whole conversations, none of which sees another, and a loss of nothing but what
the assistant says. Before the first step and at validations the model is asked the held-out questions. Beside the checkpoint
a folder of its name holds metrics.jsonl, answers.jsonl, and at the end finetuning.html with both side by side.
"""
import dataclasses
import json
import math
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from dataloader import PackedBatches, TrainLoader
from evaluate import EvalPrompt, accuracy, answer_losses, ask, questions_of, shares_of
from experiments.plots import draw_lines
from experiments.report import Figure, Table, markdown, write_page
from model import GPT
from optimizer import OptimizerConfig
from runtime.checkpoint import load_checkpoint, reading, run_folder
from runtime.cli import command
from runtime.config import check_flags, flag, read_flags
from runtime.device import DeviceConfig, explain_device_errors, seed_everything
from runtime.files import atomic_write, folder_lock
from runtime.metrics import read_rows
from runtime.run import TrainingCommand, is_finished, override_horizon
from tasks.conversations import ConversationConfig, read_conversations
from tokenizer import Tokenizer
from train import CHANGEABLE, NOT_SAVED
from trainer import LoopConfig, TrainState, make_state, open_place, report_start, train

RATE_SHARE = 0.5    # of pretraining's learning rate: what is known is to be turned, not to be learnt anew


@dataclass(frozen=True)
class FinetuneConfig:
    """The run."""
    checkpoint_path: Path = flag(Path("checkpoints/gpt.pt"), "the model to begin with")
    out_path: Path = flag(None, "file to write; metrics go into the folder of its name (default: that of --checkpoint_path "
                                "with\n_finetuned in its name)")
    resume_checkpoint: str = flag(None, "go on with --out_path, or with the file given here; flags not given keep their "
                                        "value, and the run\ncontinues exactly as if never stopped", bare="1")
    overwrite: bool = flag(False, "let a fresh run replace the checkpoint and metrics of an earlier one")
    epochs: float = flag(3.0, "times that it sees every conversation, if no other end is given", above=0)
    batch_size: int = flag(16, "rows in a batch, each of as many conversations as fit into the model's context",
                           at_least=1, at_most=1_000_000)
    answer_tokens: int = flag(64, "tokens of an answer at most, when the held-out questions are asked", at_least=1)
    compile_model: bool = flag("auto", "torch.compile: a slow start, then faster steps; auto: on GPUs that it knows",
                               auto=True)
    gradient_checkpointing: bool = flag(False, "keep only the inputs of blocks and compute the rest again: less memory, "
                                                "slower")
    seed: int = flag(1337, "of the order of the conversations", at_least=0, at_most=2**63 - 1)
    __post_init__ = check_flags


@dataclass(frozen=True)
class FinetuneOptimizer(OptimizerConfig):
    """The optimizer."""
    optimizer: str = flag("auto", "see train.py; auto: that which trained the model here, adamw for a model from elsewhere",
                          choices=("auto", "muon", "adamw", "gpt2"))
    learning_rate: float = flag("auto", f"peak learning rate, see train.py; auto: {RATE_SHARE} of its", above=0, auto=True)
    weight_decay: float = flag(0.0, "of the matrices, per step and learning rate", at_least=0)

    def peak_lr(self, step_tokens: int) -> float:
        return super().peak_lr(step_tokens) * (RATE_SHARE if self.learning_rate == "auto" else 1.0)

    def of_model(self, trained_with: dict) -> "FinetuneOptimizer":
        """With what trained the model: what AdamW has made, Muon would make over. trained_with: the flags of its run."""
        chosen = trained_with.get("optimizer", "adamw") if self.optimizer == "auto" else self.optimizer
        return dataclasses.replace(self, optimizer=chosen)


@dataclass(frozen=True)
class FinetuneLoop(LoopConfig):
    """How long to train and how often to look."""
    max_iter: int = flag(None, "optimizer steps; of several ends the first to come counts (default: --epochs)", at_least=1)
    num_batch_accum: int = flag(1, "batches whose gradients are averaged in a step", at_least=1)
    val_intervals: int = flag(250, "steps between validations, each of which asks the held-out questions and writes the "
                                   "checkpoint", at_least=1)
    __post_init__ = check_flags


CONFIGS = FinetuneConfig, ConversationConfig, FinetuneOptimizer, FinetuneLoop, DeviceConfig
FINETUNING = TrainingCommand(
    "finetune.py", "Finetunes a model on conversations.", CONFIGS, "out_path",
    {"seed", "optimizer", "epochs", "checkpoint_path", *(field.name for field in dataclasses.fields(ConversationConfig))},
    CHANGEABLE | {"answer_tokens"}, NOT_SAVED | {"out_path"})


def answer_loss(model: GPT, batch: list[Tensor]) -> Tensor:
    """Mean loss in nats/token over what the assistant says in inputs, targets and beginnings, each (B, T)."""
    idx, targets, doc_starts = batch
    return model(idx, targets, doc_starts=doc_starts)


def try_step(state: TrainState):
    """Forward and backward pass of a batch, to see whether they work. Leaves no gradient."""
    batch = state.machine.to_device(state.loader.batches.read(range(1)))
    batch = [part.expand(state.settings["batch_size"], -1) for part in batch]
    try:
        with state.machine.autocast():
            loss = answer_loss(state.model, batch)
        loss.backward()
    finally:
        state.model.zero_grad(set_to_none=True)


def validate(state: TrainState, held_out: PackedBatches, asked: list[EvalPrompt], answer_tokens: int) -> dict:
    """Loss and bits per byte of held-out answers, and the share of questions that are answered right. Their answers go into
    answers.jsonl."""
    row = answer_losses(state.model, state.tokenizer, held_out, state.machine)
    with state.machine.autocast():
        answers = ask(state.model, state.tokenizer, asked, answer_tokens)
    keep_answers(state, answers)
    shares = {f"exact_match/{kind}": share for kind, share in shares_of(answers).items()}
    return row | ({"exact_match": accuracy(answers)} if answers else {}) | (shares if len(shares) > 1 else {})


def keep_answers(state: TrainState, answers: list[dict]):
    path = run_folder(state.writer.path) / "answers.jsonl"
    kept = [row for row in read_answers(path) if row["step"] < state.step] if state.step else []
    with atomic_write(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in kept + [{"step": state.step} | answer for answer in answers])


def read_answers(path: Path) -> list[dict]:
    rows = []
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):  # cut off
                rows.append(json.loads(line))
    return rows


# -- side by side -----------------------------------------------------------------------------------------------------

def side_by_side(rows: list[dict], answers: list[dict]) -> tuple[Table, Table, Table]:
    """Before and after: the numbers, the share of right answers by task, and some answers."""
    first, last = rows[0], [row for row in rows if "val_loss" in row][-1]
    names = {"val_loss": "loss of held-out answers, nats/token", "val_bpb": "bits per byte of them",
             "exact_match": "held-out questions answered right"}
    show = lambda name, value: f"{value:.1%}" if name == "exact_match" else f"{value:.4f}"
    numbers = Table(("", "before", "after"), [(text, show(name, first[name]), show(name, last[name]))
                                              for name, text in names.items() if name in first and name in last])
    before, after = ([row for row in answers if row["step"] == step] for step in (first["step"], last["step"]))
    was, now = (shares_of(part, by=lambda task: task) for part in (before, after))
    tasks = Table(("task", "before", "after"), [(task, f"{share:.1%}", f"{now[task]:.1%}")
                                                for task, share in was.items() if task in now])
    pairs, seen = [], set()
    for old, new in zip(before, after):  # two of each task
        if sum(task == old["task"] for task, _ in seen) < (2 if old["task"] else 12):
            seen.add((old["task"], old["question"]))
            pairs.append(tuple(shortened(text) for text in (old["question"], old["answer"], old["said"], new["said"])))
    return numbers, tasks, Table(("question", "right answer", "before", "after"), pairs)


def shortened(text: str, n: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= n else text[:n - 1] + "…"


def report(state: TrainState):
    """Prints what has changed, and writes the page of it."""
    path, settings = state.writer.path, state.settings
    rows = read_rows(run_folder(path) / "metrics.jsonl")
    numbers, tasks, samples = side_by_side(rows, read_answers(run_folder(path) / "answers.jsonl"))
    print(markdown(numbers))
    for table in (tasks, samples):
        if table.rows:
            print("\n" + markdown(table))
    page = run_folder(path) / "finetuning.html"
    write_page(page, f"Finetuning {settings['checkpoint_path']} on {settings['dataset']}", [
        ("p", f"{state.step:,} steps of {state.step_tokens():,} tokens, {state.seconds:,.0f} s on {state.machine}; learning "
              f"rate {state.peak_lr():.3g}. Rows of numbers: metrics.jsonl; of answers: answers.jsonl."),
        ("h2", "Before and after"), numbers, *([tasks] if tasks.rows else []), ("h2", "Loss of held-out answers"),
        Figure(draw_lines({path.name: [rows]}), "loss"), *([("h2", "Answers"), samples] if samples.rows else [])])
    print(f"\nsaved {path} and {page}; `python generate.py --checkpoint_path={path} --chat` talks with it")


# -- the command ------------------------------------------------------------------------------------------------------

def read_base(path: Path) -> tuple[GPT, Tokenizer, dict]:
    """The model to begin with, its tokenizer, and the flags of its own training, if it was trained here."""
    blob = load_checkpoint(path)
    with reading(path):
        tokenizer = Tokenizer.from_json(blob["tokenizer"])
        tokenizer.chat_ids()
        return GPT.from_checkpoint(blob), tokenizer, blob.get("training", {}).get("settings", {})


def open_run(configs: list, blob: dict | None) -> tuple[TrainState, LoopConfig, PackedBatches, list[EvalPrompt]]:
    """Everything a run needs, new or as `blob` left it: its state, its loop, the held-out rows and questions. Raises
    BadInput before any file is written."""
    run, source, schedule, loop, device = configs
    path, resumed = run.out_path, Path(run.resume_checkpoint) if run.resume_checkpoint else None
    writer, machine = open_place(FINETUNING, path, resumed, run.overwrite, device, blob)
    if blob:
        with reading(resumed):
            model, tokenizer = GPT.from_checkpoint(blob), Tokenizer.from_json(blob["tokenizer"])
    else:
        model, tokenizer, trained_with = read_base(run.checkpoint_path)
        schedule = schedule.of_model(trained_with)
    conversations, held_out = read_conversations(source)
    block_size = model.config.block_size
    seed_everything(run.seed)
    batches = PackedBatches(tokenizer, conversations, run.batch_size, block_size, run.seed)
    val = PackedBatches(tokenizer, held_out, run.batch_size, block_size, 0)
    asked = questions_of(held_out, tokenizer, block_size)
    model.to(machine.device)
    model.gradient_checkpointing = run.gradient_checkpointing
    step_rows = run.batch_size * loop.num_batch_accum
    if not (loop.max_iter or loop.max_tokens or loop.max_seconds):
        loop = dataclasses.replace(loop, max_iter=max(1, math.ceil(run.epochs * batches.n_blocks / step_rows)))
    loader = TrainLoader(batches, batches.fingerprint(), pin_memory=machine.device.type == "cuda")
    settings = FINETUNING.settings(run, source, model.config, schedule, loop, device)
    state = make_state(FINETUNING, model, tokenizer, schedule, loader, machine, writer, settings, resumed, blob)
    return state, loop, val, asked


def describe(state: TrainState, loop: LoopConfig, val: PackedBatches, asked: list[EvalPrompt]):
    batches, settings = state.loader.batches, state.settings
    n_said = sum(int(assistant_mask.sum()) for _, assistant_mask in batches.texts)
    n_tokens = sum(len(ids) - 1 for ids, _ in batches.texts)
    print(f"model    {settings['checkpoint_path']}: {state.model.n_parameters() / 1e6:.2f} M parameters, context "
          f"{state.model.config.block_size:,}; {settings['optimizer']} at {state.peak_lr():.3g}")
    print(f"data     {settings['dataset']}: {len(batches.texts):,} conversations in {batches.n_blocks:,} rows, "
          f"{n_tokens / batches.n_blocks / batches.block_size:.0%} full; {n_said / n_tokens:.0%} of the tokens are the "
          f"assistant's; held out {len(val.texts):,}, {len(asked):,} of them asked")
    if batches.n_cut:
        print(f"         {batches.n_cut:,} are longer than the context and cut")
    print(f"machine  {state.machine}; steps of {settings['batch_size']} x {loop.num_batch_accum} rows until {loop.ends()}")


def usual_out(path: Path) -> Path:
    """checkpoints/gpt.pt -> checkpoints/gpt_finetuned.pt"""
    return path.with_name(path.stem + "_finetuned" + (path.suffix or ".pt"))


@command
def main(argv=None):
    """Finetunes a model on conversations."""
    given, defaults = FINETUNING.flags_given(argv), FINETUNING.defaults()
    path, resumed = FINETUNING.paths_of(given, usual_out(given.get("checkpoint_path", defaults["checkpoint_path"])))
    with folder_lock(run_folder(path), f"--out_path={path}"):
        start, blob = FINETUNING.read_checkpoint(resumed, given) if resumed else ({}, None)
        values = override_horizon(defaults | start, given) | {
            "out_path": path, "resume_checkpoint": str(resumed) if resumed else None}
        configs = [read_flags(config, values) for config in CONFIGS]
        if blob and is_finished(configs[CONFIGS.index(FinetuneLoop)], blob["training"], resumed, values["verbose"]):
            return
        with explain_device_errors(f"--batch_size={values['batch_size']}: try a smaller one, or --gradient_checkpointing"):
            state, loop, val, asked = open_run(configs, blob)
            if loop.verbose:
                describe(state, loop, val, asked)
                report_start(FINETUNING, state, blob)
            del blob
            evaluate = lambda state: validate(state, val, asked, configs[0].answer_tokens)
            train(state, loop, answer_loss, evaluate, configs[0].compile_model, partial(try_step, state), FINETUNING)
    if loop.verbose:
        report(state)


if __name__ == "__main__":
    main()
