"""Trains a model to think before it answers: on questions that are hard at once and easy in steps, with the steps.

    python think.py --task=permutations                                     writes checkpoints/permutations.pt
    python evaluate.py --task=permutations --checkpoint_path=checkpoints/permutations.pt --budget_curve

From random weights, with bytes as tokens. An answer is a thought, "#" and what the question asks for (tasks/thinking.py).
How much the model is to think stands in the system message: first always as much as there is to say, then by and by less,
because thoughts that leave steps out are only learnt after those that leave out none. The loop is trainer.py's. The folder
named after the checkpoint holds metrics.jsonl and, at the end, thinking.html.
"""
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from budget import Subject, ask_problems, measure_greedy
from dataloader import IGNORE_INDEX
from experiments.answer_plots import draw_thinking
from experiments.report import Figure, Table, markdown, write_page
from model import GPT, GPTConfig
from optimizer import OptimizerConfig
from runtime.checkpoint import run_folder
from runtime.cli import command, say
from runtime.config import BadInput, check_flags, flag, read_flags, redeclare
from runtime.device import DeviceConfig, seed_everything
from runtime.metrics import read_rows
from runtime.run import TrainingCommand, override_horizon
from tasks.checkable import THOUGHT_END
from tasks.thinking import TASKS, Level, ThinkingTask, draw_examples, messages
from tokenizer import Tokenizer
from trainer import (
    Evaluation,
    LoopConfig,
    Run,
    RunFlags,
    TrainSetup,
    TrainState,
    describe_machine,
    dry_run_step,
    next_token_loss,
    open_output,
    restore_state,
    train_command,
)

LONGEST_TRY = 40            # characters of a try of Countdown and what stands around it, at most


@dataclass(frozen=True)
class ThinkConfig(RunFlags):
    """The run."""
    task: str = flag(None, f"what to answer: {', '.join(TASKS)}", choices=tuple(TASKS), scope="shared")
    size: int = flag(None, "size of the largest problems to train on: permutations, digits or numbers (default: the task's "
                           "own)", at_least=2, at_most=10_000, scope="shared")
    out_path: Path = flag(None, "checkpoint to write; metrics go into the folder of its name (default: the task's name in "
                                "checkpoints)", on_resume="unsaved", scope="run")
    batch_size: int = flag(64, "answers in a batch", at_least=1, at_most=1_000_000, on_resume="warn")
    curriculum_iter: int = flag(1500, "steps over which thoughts that say less are added, one kind after the other; 0: all "
                                      "kinds from the start", at_least=0, on_resume="warn")
    thoughts: bool = flag(True, "0 trains the model to answer at once, and never to think: the control")
    eval_questions: int = flag(128, "problems of the largest size that the model answers at a validation with each amount "
                                    "of thought", at_least=1, at_most=100_000, on_resume="warn", scope="shared")
    seed: int = flag(1337, "random seed of the weights and the problems", at_least=0, at_most=2**63 - 1, scope="run")
    __post_init__ = check_flags


@dataclass(frozen=True)
class ThinkModel(GPTConfig):
    """The model."""
    n_layer: int = redeclare(GPTConfig, "n_layer", 4)
    n_head: int = redeclare(GPTConfig, "n_head", 4)
    head_size: int = redeclare(GPTConfig, "head_size", 16)
    block_size: int = redeclare(GPTConfig, "block_size", None, help="context length in tokens (default: for problems of "
                                                                    "twice --size with all that there is to say)")

    def __post_init__(self):
        if self.block_size is not None:
            super().__post_init__()


@dataclass(frozen=True)
class ThinkOptimizer(OptimizerConfig):
    """The optimizer."""
    learning_rate: float = redeclare(OptimizerConfig, "learning_rate", 0.02)
    mix_lr_ratio: float = redeclare(OptimizerConfig, "mix_lr_ratio", 1.0)
    weight_decay: float = redeclare(OptimizerConfig, "weight_decay", 0.1)
    warmup_iter: int = redeclare(OptimizerConfig, "warmup_iter", 20)
    cooldown_frac: float = redeclare(OptimizerConfig, "cooldown_frac", 0.3)


@dataclass(frozen=True)
class ThinkLoop(LoopConfig):
    """How long to train and how often to validate."""
    max_iter: int = redeclare(LoopConfig, "max_iter", 3000)
    num_batch_accum: int = redeclare(LoopConfig, "num_batch_accum", 1)
    grad_clip: float = redeclare(LoopConfig, "grad_clip", 1.0)


@dataclass(frozen=True)
class ThinkDevice(DeviceConfig):
    """The device."""
    dtype: str = redeclare(DeviceConfig, "dtype", "fp32")


class ThinkConfigs(NamedTuple):
    """The flags of think.py."""
    run: ThinkConfig
    model: ThinkModel
    optimizer: ThinkOptimizer
    loop: ThinkLoop
    device: ThinkDevice


THINKING = TrainingCommand("think.py", "Trains a model to think before it answers.", ThinkConfigs, "out_path",
                           lambda values: f"--batch_size={values['batch_size']} answers")


def resolve_flags(start: dict, given: dict) -> dict:
    """The values of all flags. start: {} or the flags of the resumed run."""
    values = override_horizon(THINKING.defaults() | start, given)
    if not values["task"]:
        raise BadInput(f"--task: say what to learn: {', '.join(TASKS)}; to resume a run, its --out_path is enough")
    task = TASKS[values["task"]]
    size = values["size"] or task.size
    task.check_size(size)
    block_size = values["block_size"] or context_of(task, min(2 * size, task.max_size))
    if (needed := context_of(task, size)) > block_size:
        raise BadInput(f"--block_size={block_size}: problems of --size={size} take up to {needed} tokens: give more")
    return values | {"size": size, "block_size": block_size}


def byte_tokenizer() -> Tokenizer:
    """A token for each byte, so that every character of a thought is one."""
    return Tokenizer.from_ranks({bytes([i]): i for i in range(256)}, "gpt4")


# -- batches ----------------------------------------------------------------------------------------------------------

def encode_answer(tokenizer: Tokenizer, context: list[dict], answer: str) -> tuple[list[int], list[int]]:
    """Inputs and targets; what stands before the answer is no target."""
    ids, is_target = tokenizer.encode_chat([*context, {"role": "assistant", "content": answer}])
    return ids[:-1], [token_id if own else IGNORE_INDEX for token_id, own in zip(ids[1:], is_target[1:])]


class ThoughtLoader:
    """Endless batches of random problems with thoughts and answers: inputs and targets, int64 (batch_size, T), where T is
    the longest row's."""

    def __init__(self, config: ThinkConfig, tokenizer: Tokenizer, curriculum_batches: int):
        """curriculum_batches: after so many, thoughts of every level occur."""
        self.config, self.tokenizer, self.curriculum_batches = config, tokenizer, curriculum_batches
        self.task, self.n_batches = TASKS[config.task], 0
        self.rngs = [np.random.default_rng([stream, config.seed]) for stream in (9, 10)]  # of problems, and of thoughts

    def levels(self) -> Sequence[Level]:
        """Those that occur by now."""
        levels, n = trained_levels(self.config), len(self.task.levels)
        done = min(1.0, self.n_batches / self.curriculum_batches) if self.curriculum_batches else 1.0
        return levels[:1 + int(done * (n - 1))]

    def next_batch(self, model: GPT | None = None) -> tuple[Tensor, Tensor]:
        examples = draw_examples(self.task, *self.rngs, self.config.batch_size, self.config.size, self.levels())
        self.n_batches += 1
        return pack_rows([encode_answer(self.tokenizer, messages(problem, level), thought + THOUGHT_END + problem.answer)
                          for problem, level, thought in examples], self.tokenizer.separator_id)

    def state_dict(self) -> dict:
        return {"rngs": json.dumps([rng.bit_generator.state for rng in self.rngs]), "n_batches": self.n_batches}

    def load_state_dict(self, state: dict):
        """Raises ValueError or KeyError when the state is not valid."""
        if type(state["n_batches"]) is not int or state["n_batches"] < 0:
            raise ValueError(f"n_batches is {state['n_batches']!r}")
        for rng, saved in zip(self.rngs, json.loads(state["rngs"]), strict=True):
            rng.bit_generator.state = saved
        self.n_batches = state["n_batches"]

    def close(self):
        pass


def typical_batch(config: ThinkConfig) -> tuple[Tensor, Tensor]:
    """One after the curriculum."""
    return ThoughtLoader(config, byte_tokenizer(), 0).next_batch()


def trained_levels(config: ThinkConfig) -> Sequence[Level]:
    levels = TASKS[config.task].levels
    return levels if config.thoughts else levels[-1:]


def pack_rows(rows: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(inputs, targets) of rows of any lengths -> int64 (B, T) both, padded at the end."""
    length = max(len(ids) for ids, _ in rows)
    pad = lambda values, filler: values + [filler] * (length - len(values))
    return (torch.tensor([pad(ids, pad_id) for ids, _ in rows]),
            torch.tensor([pad(targets, IGNORE_INDEX) for _, targets in rows]))


def context_of(task: ThinkingTask, size: int) -> int:
    """Tokens that a problem of this size takes with the longest thought, about, and its answer."""
    rng, longest = np.random.default_rng(0), 0
    for problem in (task.draw(rng, size) for _ in range(16)):
        ids, _ = encode_answer(byte_tokenizer(), messages(problem, task.levels[0]), THOUGHT_END + problem.answer)
        longest = max(longest, len(ids))
    return longest + task.levels[0].n_tokens(size) + LONGEST_TRY * task.has_verifier


# -- validation -------------------------------------------------------------------------------------------------------

@torch.no_grad()
def validate(subject: Subject) -> dict:
    """exact_match, with as much thought as is trained, and for each level, with the tokens that a greedy answer has on
    average and the FLOPs of it and of reading the question."""
    row = {}
    for depth in subject.depths:
        point = measure_greedy(subject, depth, depth.name, depth.n_tokens)
        row |= {f"exact_match/{depth.name}": float(point.right.mean()), f"tokens/{depth.name}": point.tokens,
                f"flops/{depth.name}": point.flops}
    return {"exact_match": next(iter(row.values()))} | row


# -- the run ----------------------------------------------------------------------------------------------------------

def open_run(configs: ThinkConfigs, checkpoint: dict | None, resumed: Path | None) -> Run:
    """Everything a run needs, new or as `checkpoint`, read from `resumed`, left it. Raises BadInput before any file is
    written."""
    run, loop, task, tokenizer = configs.run, configs.loop, TASKS[configs.run.task], byte_tokenizer()
    output = open_output(THINKING, run.out_path, resumed, run.overwrite, configs.device, checkpoint)
    machine = output.machine
    seed_everything(run.seed)
    model = GPT.from_checkpoint(checkpoint) if checkpoint else GPT(
        read_flags(GPTConfig, vars(configs.model) | {"vocab_size": tokenizer.vocab_size}))
    model.to(machine.device)
    model.gradient_checkpointing = run.gradient_checkpointing
    loader = ThoughtLoader(run, tokenizer, run.curriculum_iter * loop.num_batch_accum)
    batch = machine.to_device(typical_batch(run))
    state, setup = restore_state(output, model, tokenizer, configs.optimizer, loader,
                                 batch[0].numel() * loop.num_batch_accum, THINKING.settings(*configs) | vars(model.config))
    problems = task.make(run.eval_questions, run.size, seed=0)
    subject = ask_problems(model, tokenizer, machine, problems, trained_levels(run), run.size, task.has_verifier)
    evaluate = Evaluation(lambda state: validate(subject), "exact_match", True, "exact match {:.1%}")
    return Run(configs, state, setup, next_token_loss, evaluate,
               partial(dry_run_step, model, machine, next_token_loss, batch),
               partial(describe, state, setup, configs, len(problems)),
               partial(time_validation, subject), None)


def time_validation(subject: Subject) -> float:
    """Seconds of a validation, without effect."""
    start = time.perf_counter()
    with torch.no_grad():
        measure_greedy(subject, subject.depths[0], "", 0)
    return (time.perf_counter() - start) * len(subject.depths)


def describe(state: TrainState, setup: TrainSetup, configs: ThinkConfigs, n_problems: int) -> list[str]:
    """The lines that a run starts with."""
    run, model, task = configs.run, state.model.config, TASKS[configs.run.task]
    return [f"model    {model.n_layer} layers x {model.n_embd}, {model.mixer} and {model.mlp}: "
            f"{state.model.n_parameters() / 1e3:,.0f} k parameters, context {model.block_size}; "
            f"{configs.optimizer.optimizer} at {setup.peak_lr():.3g}",
            f"task     {run.task} of up to {run.size} {task.unit}; {n_problems:,} held out; thoughts: "
            f"{', '.join(level.name for level in trained_levels(run))}",
            f"machine  {describe_machine(setup.machine)}; steps of {run.batch_size * configs.loop.num_batch_accum:,} "
            f"answers until {configs.loop.horizon()}"]


def report(state: TrainState, setup: TrainSetup):
    """Prints what has changed, and writes thinking.html."""
    path, settings = setup.writer.path, setup.settings
    rows = [row for row in read_rows(run_folder(path) / "metrics.jsonl") if "exact_match" in row]
    names = [name for name in rows[0] if name.startswith("exact_match/")]
    table = Table(("exact match of held-out problems, thinking", "better", "before", "after"), [
        (name.partition("/")[2], "higher", f"{rows[0][name]:.1%}", f"{rows[-1][name]:.1%}") for name in names])
    print(markdown(table))
    page = run_folder(path) / "thinking.html"
    write_page(page, f"Thinking: {settings['task']}", [
        ("p", f"{state.step:,} steps of {settings['batch_size'] * settings['num_batch_accum']:,} answers, "
              f"{state.seconds:,.0f} s on {setup.machine}; learning rate {setup.peak_lr():.3g}. Metrics: metrics.jsonl."),
        ("h2", "Before and after"), table, ("h2", "On the way"), Figure(draw_thinking(rows), "thinking")])
    say(f"\nsaved {path} and {page}; `python evaluate.py --task={settings['task']} --checkpoint_path={path} --budget_curve` "
        f"measures what thoughts are worth")


@command
def main(argv=None):
    """Trains a model to think before it answers."""
    given = THINKING.flags_given(argv)
    path, resumed = THINKING.paths(given, Path("checkpoints") / f"{given['task']}.pt" if "task" in given else None)
    if path is None:
        raise BadInput(f"--task: say what to learn: {', '.join(TASKS)}")
    run = train_command(THINKING, given, path, resumed, resolve_flags, open_run)
    if run and run.configs.loop.verbose:
        report(run.state, run.setup)


if __name__ == "__main__":
    main()
