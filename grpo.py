"""Reinforcement learning on questions whose answers a program can check: policy gradients with a group as the baseline.

A rollout draws questions, and samples several answers of the model to each; the advantage of an answer is its reward less
the mean of its group. `AnswerLoader` makes rollouts, `policy_gradient_loss` is what `fit` minimises, `evaluate_answers`
measures. Each optimizer step has rollouts of its own, sampled from exactly what it differentiates: temperature 1, no
filters.

    group    r - mean(r), summed over the tokens and divided by a constant: Dr. GRPO, Liu et al. 2025, arXiv:2503.20783. Its
             expectation is the policy gradient times 1 - 1/n
    rloo     r - mean of the others: leave-one-out, unbiased; Kool et al. 2019, Ahmadian et al. 2024, arXiv:2402.14740

With --task=arithmetic the model also proposes the questions, and is rewarded for those that it answers sometimes: 1 minus
its accuracy, where that is neither 0 nor 1. Source: Absolute Zero, Zhao et al. 2025, arXiv:2505.03335.

`selfplay.py` is the command.
"""
import copy
import dataclasses
import hashlib
import itertools
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from candidates import Answer, pass_at_k, sample_texts
from dataloader import IGNORE_INDEX, PackedBatches, TrainLoader, epoch_order
from evaluate import accuracy, exact_match, greedy_answers, group_by_kind, group_by_task
from experiments.answer_plots import draw_answers
from experiments.report import Figure, Table, markdown, write_page
from finetune import FinetuneOptimizer, answer_loss, read_answers, sample_answers, write_answers
from model import GPT
from optimizer import OPTIMIZERS, OptimizerConfig
from runtime.checkpoint import run_folder
from runtime.cli import log_line, say
from runtime.config import BadInput, check_flags, flag, redeclare
from runtime.device import Machine, seed_everything
from runtime.distributed import ALONE, World, join
from runtime.metrics import read_rows
from runtime.run import TrainingCommand
from sampling import SamplingConfig, load_pretrained
from tasks.checkable import ANSWER_TASKS, PROPOSE, AnswerTask, CheckableQuestion, check_proposal, read_checkable
from tasks.conversations import Conversation
from tokenizer import ROLES, Tokenizer
from trainer import (
    Evaluation,
    LoopConfig,
    Run,
    TrainSetup,
    TrainState,
    describe_machine,
    dry_run_step,
    fit,
    init_state,
    open_output,
    restore_state,
)

ON_POLICY = SamplingConfig(temperature=1.0, top_k=0)  # top-k or top-p would sample from another policy than the loss has
N_TRAIN_QUESTIONS = 20_000  # built-in ones that are drawn from
N_DEMONSTRATIONS, DEMONSTRATION_ROWS = 4000, 16
TOKENS_PER_BATCH = 16_384   # of answers that are scored together, with their questions
ESTIMATE_QUESTIONS = 16     # from which the duration of an evaluation is estimated
# --learning_rate=auto of a model of ANSWER_WIDTH; with AdamW it falls as 1/width
ANSWER_LR, ANSWER_WIDTH = {"gpt2": 0.0005, "muon": 0.002, "adamw": 0.001}, 128
ANSWER_COOLDOWN = 0.8
UNANIMOUS, LOW_ACCURACY, AT_LIMIT = 0.95, 0.8, 0.95  # see `describe_collapse`


@dataclass(frozen=True)
class AnswerConfig:
    """Answers that can be checked."""
    task: str = flag(None, f"questions to learn from: {', '.join(ANSWER_TASKS)}, or a file of questions with answers; "
                           "builtin: those of finetune.py; countdown: reach a number with given numbers; arithmetic: the "
                           "model asks itself, and is rewarded for what it half knows")
    questions: int = flag(32, "questions in a rollout", at_least=1, at_most=100_000, on_resume="warn")
    samples: int = flag(8, "answers that are sampled to each, a group", at_least=2, at_most=10_000, on_resume="warn")
    baseline: str = flag("group", "what a reward is compared with; group: the mean of its group, as in Dr. GRPO; rloo: the "
                                  "mean of the others in its group", choices=("group", "rloo"), on_resume="warn")
    answer_tokens: int = flag(64, "maximum number of tokens in an answer; one that has not ended by then is wrong",
                              at_least=1, on_resume="warn")
    kl: float = flag(0.0, "penalty for each nat by which an answer's log-probability has risen since the start", at_least=0,
                     on_resume="warn")
    warm_start_iter: int = flag(100, "with --task=countdown or arithmetic, steps on demonstrations before any rollout: "
                                     "of the form of an answer, and of questions to propose", at_least=0)
    eval_questions: int = flag(240, "held-out questions, always the same ones; of a file at most a tenth of its questions",
                               at_least=1, scope="shared")
    pass_k: int = flag(8, "also report how often one of so many sampled answers is right", at_least=1, at_most=10_000,
                       scope="shared")
    __post_init__ = check_flags


@dataclass(frozen=True)
class SelfPlayOptimizer(OptimizerConfig):
    """The optimizer."""
    optimizer: str = flag("auto", "see train.py; auto: muon for games, gpt2 for answers", choices=("auto", *OPTIMIZERS))
    learning_rate: float = flag("auto", "peak learning rate, see train.py; auto: that of --algorithm for games; for "
                                        "answers, of models of 128 channels, "
                                        + ", ".join(f"{lr:g} with {name}" for name, lr in ANSWER_LR.items())
                                        + ", with AdamW in proportion to 1/channels", above=0, auto=True, on_resume="warn")
    mix_lr_ratio: float = redeclare(OptimizerConfig, "mix_lr_ratio", 1.0)
    weight_decay: float = flag(None, "weight decay of the matrices; each step multiplies it by the learning rate (default: "
                                     "0.1 for games without hidden cards, else 0)", at_least=0, on_resume="warn")
    cooldown_frac: float = redeclare(OptimizerConfig, "cooldown_frac", None, help="last fraction of the run, in which the "
                                     "learning rate falls linearly (default: that of --algorithm for games, "
                                     f"{ANSWER_COOLDOWN} for answers)")

    def for_answers(self, n_embd: int) -> "SelfPlayOptimizer":
        """With what is not given resolved, for answers of a model of this width."""
        name = "gpt2" if self.optimizer == "auto" else self.optimizer
        if self.learning_rate == "auto" and name not in ANSWER_LR:
            raise BadInput(f"--learning_rate=auto: is not known for answers with --optimizer={name}: give a number")
        scale = 1.0 if name == "muon" else ANSWER_WIDTH / n_embd
        rate = ANSWER_LR[name] * scale if self.learning_rate == "auto" else self.learning_rate
        cooldown = ANSWER_COOLDOWN if self.cooldown_frac is None else self.cooldown_frac
        return dataclasses.replace(self, optimizer=name, learning_rate=rate, weight_decay=self.weight_decay or 0.0,
                                   cooldown_frac=cooldown)


# -- sampling ---------------------------------------------------------------------------------------------------------

class Prompt(NamedTuple):
    """A question, and the ids up to where the answer starts."""
    question: CheckableQuestion
    ids: list[int]


def encode_questions(questions: Sequence[CheckableQuestion], tokenizer: Tokenizer, max_tokens: int) -> list[Prompt]:
    """Those of at most `max_tokens`, which leaves room for an answer."""
    prompts = [Prompt(question, prompt_ids(tokenizer, question.messages())) for question in questions]
    return [prompt for prompt in prompts if len(prompt.ids) <= max_tokens]


def prompt_ids(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    return tokenizer.encode_chat(messages, add_generation_prompt=True)[0]


def reward(question: CheckableQuestion, answer: Answer) -> float:
    """1.0 where the answer is right and has ended, else 0.0."""
    return question.check(answer.text) if answer.has_ended else 0.0


# -- policy gradient --------------------------------------------------------------------------------------------------

class Group(NamedTuple):
    """Answers to one prompt, which are each other's baseline. role: "solve" or "propose"; those of a role share a mean."""
    prompt: list[int]
    answers: list[Answer]
    rewards: list[float]
    role: str = "solve"


def advantages(rewards: Tensor, baseline: str) -> Tensor:
    """rewards: (n,) of a group -> (n,). [1, 0, 0, 0] -> [0.75, -0.25, -0.25, -0.25], or with rloo [1, -1/3, -1/3, -1/3]."""
    n, centered = len(rewards), rewards - rewards.mean()
    if bool((rewards == rewards[0]).all()):
        return torch.zeros_like(rewards)  # a mean of thirds is rounded, and the optimizer would scale up what is left
    return centered * (n / (n - 1)) if baseline == "rloo" and n > 1 else centered


def pack_answers(rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(prompt, answer) ids -> inputs and targets, int64 (B, T) padded on the right. Only the answers are targets."""
    length = max(len(prompt) + len(answer) for prompt, answer in rows) - 1
    idx, targets = np.full((len(rows), length), pad_id), np.full((len(rows), length), IGNORE_INDEX)
    for row, (prompt, answer) in enumerate(rows):
        stop = len(prompt) + len(answer) - 1
        idx[row, :stop] = (prompt + answer)[:-1]
        targets[row, len(prompt) - 1:stop] = answer
    return torch.from_numpy(idx), torch.from_numpy(targets)


def policy_gradient_loss(model: GPT, batch: Sequence[Tensor]) -> Tensor:
    """-sum of weight * log-probability, whose gradient is the policy gradient. batch: inputs and targets, (B, T), and the
    weights of the rows, (B,). Never holds (B, T, V)."""
    idx, targets, weights = batch
    # eager: a compiled model would recompile for every new shape, and no two rollouts have the same
    return (weights[:, None] * model.eager_forward(idx, targets, reduction="none")).sum()


def answer_logprobs(model: GPT, rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> list[list[float]]:
    """The log-probability in nats of each token of each answer in one pass, as the loss computes it. rows: (prompt, answer)
    ids."""
    found, device = [], model.embed.weight.device
    n_rows = max(1, TOKENS_PER_BATCH // max(len(prompt) + len(answer) for prompt, answer in rows))
    for first in range(0, len(rows), n_rows):
        part = rows[first:first + n_rows]
        idx, targets = (tensor.to(device) for tensor in pack_answers(part, pad_id))
        losses = model.eager_forward(idx, targets, reduction="none").tolist()
        found += [[-nats for nats in row[len(prompt) - 1:len(prompt) + len(answer) - 1]]
                  for row, (prompt, answer) in zip(losses, part)]
    return found


# -- rollouts ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class AnswerContext:
    """What rollouts need besides the model that they ask."""
    config: AnswerConfig
    tokenizer: Tokenizer
    machine: Machine
    prompts: list[Prompt]
    start: GPT  # the model before the first step


class AnswerLoader:
    """Endless batches of sampled answers: inputs and targets, int64 (B, T), and the weight of each row, fp32 (B,).

    Answers whose advantage is 0 have no gradient and are left out. The state holds the position, from which the random
    numbers of a rollout follow on any device, and the starting weights, which the KL divergence is measured from.
    """

    def __init__(self, rollouts: AnswerContext, seed: int, world: World = ALONE):
        """world: whose processes take the rollouts in turns."""
        self.rollouts, self.seed, self.world, self.questions_seen = rollouts, seed, world, 0
        self.generator = torch.Generator(rollouts.machine.device)
        self.sums: dict[str, float] = {}

    def next_batch(self, model: GPT) -> tuple[Tensor, Tensor, Tensor]:
        """A rollout of the model as it is now."""
        start, n = time.perf_counter(), self.rollouts.config.questions
        first = self.questions_seen + self.world.rank * n
        self.questions_seen += self.world.size * n
        self.generator.manual_seed(int(np.random.default_rng([6, self.seed, first]).integers(2**63)))
        with torch.no_grad(), self.rollouts.machine.autocast():
            groups = self.rollout(model, first)
            batch = self.pack(groups)
        self.count("rollout_seconds", time.perf_counter() - start)
        return batch

    def rollout(self, model: GPT, first: int) -> list[Group]:
        """first: the position of its first question."""
        prompts, positions = self.rollouts.prompts, np.arange(first, first + self.rollouts.config.questions)
        return self.solve(model, [prompts[i] for i in epoch_order(positions, len(prompts), self.seed)])

    def solve(self, model: GPT, prompts: list[Prompt]) -> list[Group]:
        """A group of answers to each prompt."""
        config = self.rollouts.config
        answers = self.sample(model, [prompt.ids for prompt in prompts for _ in range(config.samples)])
        groups = []
        for i, (question, ids) in enumerate(prompts):
            own = answers[i * config.samples:(i + 1) * config.samples]
            groups.append(Group(ids, own, [reward(question, answer) for answer in own]))
            self.count("reward", sum(groups[-1].rewards), len(own))
            self.count("answer_length", sum(len(answer.ids) for answer in own), len(own))
            self.count("unfinished", sum(not answer.has_ended for answer in own), len(own))
            self.count("distinct_answers", len({answer.text for answer in own}))
            self.count("no_signal", len(set(groups[-1].rewards)) == 1)
        return groups

    def sample(self, model: GPT, prompts: list[list[int]]) -> list[Answer]:
        answers = sample_texts(model, self.rollouts.tokenizer, prompts, self.rollouts.config.answer_tokens, ON_POLICY,
                               self.generator)
        self.count("rollout_tokens", sum(len(answer.ids) for answer in answers))
        return answers

    def pack(self, groups: list[Group]) -> tuple[Tensor, Tensor, Tensor]:
        """Every row's weight is its advantage by the number of rows of its role and by --answer_tokens: a constant, so that
        the length of an answer changes nothing."""
        config, pad_id = self.rollouts.config, self.rollouts.tokenizer.separator_id
        rows = [(group.prompt, answer.ids) for group in groups for answer in group.answers]
        penalties = iter(self.penalties(groups, rows))
        n_rows = Counter(group.role for group in groups for _ in group.answers)
        weights = torch.cat([
            advantages(torch.tensor([r - next(penalties) for r in group.rewards], dtype=torch.float64), config.baseline)
            / (n_rows[group.role] * config.answer_tokens) for group in groups])
        kept = weights.nonzero()[:, 0].tolist() or [0]
        return *pack_answers([rows[i] for i in kept], pad_id), weights[kept].float()

    def penalties(self, groups: list[Group], rows: list[tuple[list[int], list[int]]]) -> list[float]:
        """--kl times log π(answer) - log π_start(answer) of each row: as a part of the reward, its policy gradient is that
        of the KL divergence of whole answers."""
        config = self.rollouts.config
        if not config.kl:
            return [0.0] * len(rows)
        starts = answer_logprobs(self.rollouts.start, rows, self.rollouts.tokenizer.separator_id)
        now = [answer.logprobs for group in groups for answer in group.answers]
        return [config.kl * (sum(new) - sum(old)) for new, old in zip(now, starts)]

    # -- statistics ---------------------------------------------------------------------------------------------------

    def count(self, name: str, value: float, n: float = 1):
        """Adds `n` observations, whose sum is `value`, to a statistic."""
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.sums[f"n/{name}"] = self.sums.get(f"n/{name}", 0.0) + n

    def take_statistics(self) -> dict:
        """What the rollouts since the last call were like: means over answers of reward, answer_length (tokens, with the
        end) and unfinished; over groups of distinct_answers and no_signal, the fraction whose rewards are all equal; and
        rollout_tokens, summed, and rollout_seconds. Of proposals, see ProposalLoader. {} where there were none. Of all
        processes, which call it at the same time."""
        sums, self.sums = self.all_sums(), {}
        return {name: value if name.startswith("rollout_") else value / sums[f"n/{name}"]
                for name, value in sums.items() if not name.startswith("n/")}

    def all_sums(self) -> dict[str, float]:
        """Of all processes, which spend the seconds of a rollout beside each other."""
        parts = self.world.gather(self.sums)
        sums = {name: sum(part.get(name, 0.0) for part in parts) for name in dict.fromkeys(itertools.chain(*parts))}
        return sums | ({"rollout_seconds": sums["rollout_seconds"] / len(parts)} if "rollout_seconds" in sums else {})

    # -- the loader's state -------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """16 hex digits that change with any question or answer."""
        digest = hashlib.sha256()
        for question, ids in self.rollouts.prompts:
            digest.update(f"{ids} {question.answer}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]

    def state_dict(self) -> dict:
        return {"questions_seen": self.questions_seen, "seed": self.seed, "data": self.fingerprint(),
                "sums": self.all_sums(), "start": self.rollouts.start.state_dict()}

    def load_state_dict(self, state: dict):
        """Raises BadInput when the state belongs to other questions, ValueError or RuntimeError when it is not valid."""
        if state["data"] != self.fingerprint():
            raise BadInput(f"--task={self.rollouts.config.task}: its questions ({self.fingerprint()}) differ from those of "
                           f"the checkpoint's run ({state['data']}): give the same ones to resume, with the version of this "
                           f"program that the run was started with")
        if state["seed"] != self.seed or type(state["questions_seen"]) is not int or state["questions_seen"] < 0:
            raise ValueError(f"a position of seed {state['seed']!r} and questions_seen {state['questions_seen']!r}")
        if not all(isinstance(value, (int, float)) for value in state["sums"].values()):
            raise ValueError("statistics that are no numbers")
        self.rollouts.start.load_state_dict(state["start"])
        self.questions_seen, self.sums = state["questions_seen"], dict(state["sums"]) if self.world.is_main else {}

    def close(self):
        """Nothing to close."""


class ProposalLoader(AnswerLoader):
    """Rollouts of a model that asks itself: it proposes questions, answers those that are valid, and trains on both.

    Statistics: valid and distinct_proposals, fractions of the proposals; learnability, the proposals' mean reward.
    """

    def rollout(self, model: GPT, first: int) -> list[Group]:
        tokenizer, config = self.rollouts.tokenizer, self.rollouts.config
        ids = prompt_ids(tokenizer, [{"role": "user", "content": PROPOSE}])
        proposals = self.sample(model, [ids] * config.questions)
        found = [check_proposal(answer.text, exact_match) if answer.has_ended else None for answer in proposals]
        room = model.config.block_size + 1 - config.answer_tokens
        questions = {question.text: question for question in found if question}  # each is answered once
        prompts = encode_questions(list(questions.values()), tokenizer, room)
        groups = self.solve(model, prompts) if prompts else []
        times = Counter(question.text for question in found if question)
        learnability = {prompt.question.text: half_known(group.rewards) / times[prompt.question.text]
                        for prompt, group in zip(prompts, groups)}
        rewards = [learnability.get(question.text, 0.0) if question else 0.0 for question in found]
        self.count("valid", sum(times.values()), len(found))
        self.count("distinct_proposals", len(times), len(found))
        self.count("learnability", sum(rewards), len(found))
        return [*groups, Group(ids, proposals, rewards, "propose")]


def half_known(rewards: Sequence[float]) -> float:
    """What a question is worth to the model that proposes it. Where several propose the same, they share it: else all would
    soon propose one."""
    solved = sum(rewards) / len(rewards)
    return 1 - solved if 0 < solved < 1 else 0.0


# -- evaluation -------------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate_answers(model: GPT, start: GPT, tokenizer: Tokenizer, machine: Machine, prompts: Sequence[Prompt],
                     config: AnswerConfig, show_progress: bool = False) -> tuple[dict, list[dict]]:
    """A row of metrics, and a row for each question with the greedy answer.

    exact_match: of greedy answers, overall and for each kind of question. Of 2 * pass_k sampled answers to each question:
    pass_at_1 and pass_at_k; mean_length, tokens with the end; entropy, nats per token; kl, of whole answers from those of
    `start`, nats per answer, and kl_per_token; unanimous, the fraction of questions whose answers are all the same;
    logprob_gap, the mean difference of a log-probability between sampling with the cache and the pass that is trained on.
    """
    n = 2 * config.pass_k
    generator = torch.Generator(machine.device).manual_seed(0)
    with machine.autocast():
        outputs = greedy_answers(model, tokenizer, [prompt.ids for prompt in prompts], config.answer_tokens, show_progress)
        sampled = sample_texts(model, tokenizer, [prompt.ids for prompt in prompts for _ in range(n)],
                               config.answer_tokens, ON_POLICY, generator)
        pairs = [(prompts[i // n].ids, answer.ids) for i, answer in enumerate(sampled)]
        now, before = (answer_logprobs(policy, pairs, tokenizer.separator_id) for policy in (model, start))
    answers = [{"kind": question.kind, "task": question.task, "question": question.text, "answer": question.answer,
                "output": output, "correct": question.check(output) > 0} for (question, _), output in zip(prompts, outputs)]
    groups = [sampled[i * n:(i + 1) * n] for i in range(len(prompts))]
    n_right = [sum(reward(question, answer) > 0 for answer in group) for (question, _), group in zip(prompts, groups)]
    n_tokens, kl = sum(map(len, now)), math.fsum(map(sum, now)) - math.fsum(map(sum, before))
    row = {"exact_match": accuracy(answers)}
    if len(by_kind := group_by_kind(answers)) > 1:
        row |= {f"exact_match/{kind}": accuracy(rows) for kind, rows in by_kind.items()}
    mean = lambda values: sum(values) / len(values)
    return row | {
        "pass_at_1": mean([pass_at_k(n, right, 1) for right in n_right]),
        "pass_at_k": mean([pass_at_k(n, right, config.pass_k) for right in n_right]),
        "mean_length": n_tokens / len(sampled), "entropy": -math.fsum(map(sum, now)) / n_tokens,
        "kl": kl / len(sampled), "kl_per_token": kl / n_tokens,
        "unanimous": mean([len({answer.text for answer in group}) == 1 for group in groups]),
        "logprob_gap": sum(abs(a - b) for answer, row in zip(sampled, now) for a, b in zip(answer.logprobs, row)) / n_tokens
    }, answers


@dataclass
class AnswerEvaluation:
    """The held-out questions, and whether a collapse has been reported."""
    prompts: list[Prompt]
    config: AnswerConfig
    show_progress: bool
    has_warned: bool = False

    def run(self, state: TrainState, setup: TrainSetup) -> dict:
        """`evaluate_answers`, whose answers go into answers.jsonl, and the statistics of the rollouts since the last one."""
        row, answers = evaluate_answers(state.model, state.loader.rollouts.start, setup.tokenizer, setup.machine,
                                        self.prompts, self.config, self.show_progress)
        is_main = state.loader.world.is_main
        if setup.writer is not None and is_main:
            write_answers(run_folder(setup.writer.path) / "answers.jsonl", state.step, answers)
        if state.step and not self.has_warned and (what := describe_collapse(row, self.config.answer_tokens)):
            if is_main:
                log_line(f"warning: at step {state.step:,} {what}: lower --learning_rate, or give a --kl, such as 0.01")
            self.has_warned = True
        return row | state.loader.take_statistics()

    def estimate_seconds(self, state: TrainState, setup: TrainSetup) -> float:
        """Of an evaluation, from its first questions."""
        prompts, start = self.prompts[:ESTIMATE_QUESTIONS], time.perf_counter()
        evaluate_answers(state.model, state.loader.rollouts.start, setup.tokenizer, setup.machine, prompts, self.config)
        return (time.perf_counter() - start) * len(self.prompts) / len(prompts)


def describe_collapse(row: dict, answer_tokens: int) -> str:
    """What in an evaluation says that the model has stopped exploring or answering; "" if nothing does."""
    if row["unanimous"] > UNANIMOUS and row["exact_match"] < LOW_ACCURACY:
        return f"all sampled answers are the same to {row['unanimous']:.0%} of the questions, and many of them wrong"
    if row["mean_length"] > AT_LIMIT * answer_tokens:
        return f"answers have {row['mean_length']:.1f} tokens on average, and --answer_tokens={answer_tokens} cuts them off"
    if row["mean_length"] < 1.05 and answer_tokens > 1:  # the end alone
        return "nearly all answers are empty"
    return ""


# -- the warm start ---------------------------------------------------------------------------------------------------

def warm_start(model: GPT, tokenizer: Tokenizer, machine: Machine, demonstrations: list[Conversation], n_steps: int,
               schedule: OptimizerConfig, seed: int):
    """Trains the model on demonstrations, as finetune.py would, in place; each of several processes does the same. Raises
    SystemExit when a signal stops it."""
    batches = PackedBatches(tokenizer, demonstrations, DEMONSTRATION_ROWS, model.config.block_size, seed)
    loader = TrainLoader(batches, batches.fingerprint())
    setup = TrainSetup(machine, schedule, DEMONSTRATION_ROWS * batches.block_size)
    loop = LoopConfig(max_iter=n_steps, num_batch_accum=1, val_intervals=n_steps, log_intervals=n_steps, verbose=False)
    try:
        stopped_by = fit(init_state(model, loader, setup), loop, answer_loss, Evaluation(lambda state: {"val_loss": 0.0}),
                         setup, world=ALONE)
    finally:
        loader.close()
    if stopped_by:
        log_line("stopped in the warm start: nothing was saved")
        raise SystemExit(128 + stopped_by)


# -- a run ------------------------------------------------------------------------------------------------------------

def read_task(config: AnswerConfig, task: AnswerTask | None,
              seed: int) -> tuple[list[CheckableQuestion], list[CheckableQuestion]]:
    """The questions to train on, and those held out, of the task, or without one of a file. Raises BadInput."""
    if task is None:
        return read_checkable(config.task, ROLES, config.eval_questions, exact_match)
    train = [] if task.proposes else list(task.make(N_TRAIN_QUESTIONS, seed, False, exact_match))
    return train, list(task.make(config.eval_questions, 0, True, exact_match))


def encode_task(config: AnswerConfig, parts: Sequence[list[CheckableQuestion]], tokenizer: Tokenizer,
                block_size: int) -> list[list[Prompt]]:
    """Raises BadInput where no question leaves room for an answer."""
    room = block_size + 1 - config.answer_tokens  # the last token of an answer is no input
    found = [encode_questions(part, tokenizer, room) for part in parts]
    if any(part and not prompts for part, prompts in zip(parts, found)):
        raise BadInput(f"--answer_tokens={config.answer_tokens}: leaves {max(room, 0)} of the {block_size} tokens of the "
                       f"model's context for a question, which is too few for all of them: give fewer")
    return found


def open_answer_run(command: TrainingCommand, configs, checkpoint: dict | None, resumed: Path | None) -> Run:
    """Everything a run needs, new or as `checkpoint`, read from `resumed`, left it, with "auto" resolved. Raises BadInput
    before any file is written.

    configs: of `command`, with the fields run (RunFlags with checkpoint_path, out_path and seed), answers (AnswerConfig),
    optimizer (SelfPlayOptimizer), loop and device.
    """
    run, config, loop = configs.run, configs.answers, configs.loop
    task = ANSWER_TASKS.get(config.task)
    output = open_output(command, run.out_path, resumed, run.overwrite, configs.device, checkpoint)
    machine = output.machine
    model, tokenizer, pretraining_flags = load_pretrained(resumed or run.checkpoint_path, checkpoint, chat=True)
    configs = configs._replace(optimizer=configs.optimizer.for_answers(model.config.n_embd))
    parts = read_task(config, task, run.seed)
    train, held_out = encode_task(config, parts, tokenizer, model.config.block_size)
    seed_everything(run.seed)
    model.to(machine.device)
    model.gradient_checkpointing = run.gradient_checkpointing
    if task and task.demonstrate and config.warm_start_iter and not (checkpoint or run.dry_run):
        if loop.verbose:
            say(f"warm start: {config.warm_start_iter:,} steps on demonstrations")
        warm_start(model, tokenizer, machine, list(task.demonstrate(N_DEMONSTRATIONS, run.seed)), config.warm_start_iter,
                   FinetuneOptimizer().for_model(pretraining_flags), run.seed)
    rollouts = AnswerContext(config, tokenizer, machine, train, copy.deepcopy(model).requires_grad_(False))
    loader = (ProposalLoader if task and task.proposes else AnswerLoader)(rollouts, run.seed, join())
    # at most, as many answers end early and those without a gradient are left out
    row_tokens = round(sum(len(prompt.ids) for prompt in train or held_out) / len(train or held_out)) + config.answer_tokens
    batch_tokens = config.questions * config.samples * row_tokens
    state, setup = restore_state(output, model, tokenizer, configs.optimizer, loader, batch_tokens * loop.num_batch_accum,
                                 command.settings(*configs) | vars(model.config))
    evaluation = AnswerEvaluation(held_out, config, loop.verbose)
    return Run(configs, state, setup, policy_gradient_loss,
               Evaluation(lambda state: evaluation.run(state, setup), "exact_match", True, "exact match {:.1%}"),
               partial(dry_run, state, machine, row_tokens),
               partial(describe, state, setup, evaluation, configs, sum(map(len, parts)) - len(train) - len(held_out)),
               partial(evaluation.estimate_seconds, state, setup), max(1, len(train)) * config.samples * row_tokens)


def dry_run(state: TrainState, machine: Machine, row_tokens: int):
    """Forward and backward pass of a batch of full rows, see dry_run_step."""
    config = state.loader.rollouts.config
    n_rows, length = config.questions * config.samples, min(row_tokens, state.model.config.block_size)
    idx = torch.zeros(n_rows, length, dtype=torch.int64)
    dry_run_step(state.model, machine, policy_gradient_loss, machine.to_device((idx, idx, torch.zeros(n_rows))))


def describe(state: TrainState, setup: TrainSetup, evaluation: AnswerEvaluation, configs, n_long: int) -> list[str]:
    """The lines that a run starts with. n_long: questions that leave no room for an answer."""
    run, config, n = configs.run, configs.answers, len(state.loader.rollouts.prompts)
    left_out = f"; {n_long:,} left out, too long for the context with {config.answer_tokens} tokens of answer" * bool(n_long)
    penalty = f", KL penalty {config.kl:g}" if config.kl else ""
    return [f"model    {run.checkpoint_path}: {state.model.n_parameters() / 1e6:.2f} M parameters, context "
            f"{state.model.config.block_size:,}; {configs.optimizer.optimizer} at {setup.peak_lr():.3g}",
            f"data     {config.task}: {f'{n:,} questions' if n else 'questions of its own'}; {len(evaluation.prompts):,} "
            f"held out{left_out}",
            f"rollout  {config.questions} questions x {config.samples} answers of at most {config.answer_tokens} tokens; "
            f"baseline {config.baseline}{penalty}",
            f"machine  {describe_machine(setup.machine)}; steps of {configs.loop.num_batch_accum} rollouts until "
            f"{configs.loop.horizon()}"]


# -- report -----------------------------------------------------------------------------------------------------------

# (key of a row, what it is called, which direction is good, its format). Of rollouts, before is the first interval.
REPORTED = (("exact_match", "exact match of held-out questions, greedy", "higher", "{:.1%}"),
            ("pass_at_1", "pass@1, sampled", "higher", "{:.1%}"), ("pass_at_k", "pass@{k}, sampled", "higher", "{:.1%}"),
            ("mean_length", "tokens in a sampled answer", "", "{:.2f}"),
            ("entropy", "entropy, nats/token", "", "{:.3f}"),
            ("kl", "KL divergence from the start, nats/answer", "lower", "{:.3f}"),
            ("unanimous", "questions to which all sampled answers are the same", "", "{:.1%}"),
            ("reward", "rollouts: reward", "higher", "{:.3f}"),
            ("no_signal", "rollouts: groups whose rewards are all equal", "lower", "{:.1%}"),
            ("learnability", "rollouts: reward of proposals", "", "{:.3f}"),
            ("valid", "rollouts: valid proposals", "higher", "{:.1%}"),
            ("distinct_proposals", "rollouts: distinct valid proposals", "higher", "{:.1%}"))


def compare_evaluations(rows: list[dict], pass_k: int) -> Table:
    """Before and after. rows: of metrics.jsonl."""
    evaluations = [row for row in rows if "exact_match" in row]
    kinds = [(name, f"- {name.partition('/')[2]}", "higher", "{:.1%}") for name in evaluations[0]
             if name.startswith("exact_match/")]
    lines = []
    for name, label, better, form in (REPORTED[0], *kinds, *REPORTED[1:]):
        if found := [row[name] for row in evaluations if name in row]:
            lines.append((label.format(k=pass_k), better, form.format(found[0]), form.format(found[-1])))
    return Table(("metric", "better", "before", "after"), lines)


def compare_tasks(before: list[dict], after: list[dict]) -> Table:
    """Exact match by task. before, after: rows of answers.jsonl."""
    before, after = group_by_task(before), group_by_task(after)
    return Table(("exact match by task", "better", "before", "after"), [
        (task, "higher", f"{accuracy(before[task]):.1%}", f"{accuracy(after[task]):.1%}")
        for task in before if task in after])


def report_answers(state: TrainState, setup: TrainSetup):
    """Prints what has changed, and writes selfplay.html."""
    path, settings = setup.writer.path, setup.settings
    rows, answers = read_rows(run_folder(path) / "metrics.jsonl"), read_answers(run_folder(path) / "answers.jsonl")
    evaluations = [row for row in rows if "exact_match" in row]
    before, after = ([row for row in answers if row["step"] == evaluations[i]["step"]] for i in (0, -1))
    metrics, tasks, samples = (compare_evaluations(rows, settings["pass_k"]), compare_tasks(before, after),
                               sample_answers(before, after))
    for table in (metrics, tasks):
        if table.rows:
            print(markdown(table) + "\n")
    page, best = run_folder(path) / "selfplay.html", max(evaluations, key=lambda row: row["exact_match"])
    write_page(page, f"Reinforcement learning of {settings['checkpoint_path']} on {settings['task']}", [
        ("p", f"{state.step:,} steps of {settings['num_batch_accum']} x {settings['questions']} questions x "
              f"{settings['samples']} answers, {state.seconds:,.0f} s on {setup.machine}; {settings['optimizer']} at "
              f"{setup.peak_lr():.3g}, baseline {settings['baseline']}, KL penalty {settings['kl']:g}. Exact match is "
              f"highest at step {best['step']:,}: best.pt. Metrics: metrics.jsonl; answers: answers.jsonl."),
        ("h2", "Before and after"), metrics, *([tasks] if tasks.rows else []), ("h2", "Curves"),
        Figure(draw_answers(rows), "answers"), *([("h2", "Answers"), samples] if samples.rows else [])])
    say(f"saved {path} and {page}; `python chat.py --checkpoint_path={path}` talks with it")
