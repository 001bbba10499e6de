"""Few-shot rules at inference time: a model trains on the demonstrations of a rule it has never seen, answers, and forgets.

    train_on(learner, task, rng, n_steps=40, n_rows=8)     leave-one-out, re-ordered, recoloured demonstrations
    answers = answer(model, machine, task, [plain_view(3)])
    learner.forget()

`run_rules` is `adapt.py --task=rules`: it trains bases on rules of training, shown in context, and lets each answer the same
questions about rules of a test in several ways, side by side. A row for each rule and base goes into --out_path, from which
the same command continues where it was stopped; so do the bases. Source: Akyürek et al. 2024, arXiv:2411.07279.
"""
import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataloader import IGNORE_INDEX
from experiments.code_hash import code_hash
from experiments.rules_report import RulesStudy, write_rules_report
from experiments.runner import save_plan
from learner import ADAPT_SCOPES, AdaptConfig, Learner
from model import GPT, GPTConfig
from optimizer import OptimizerConfig
from runtime.checkpoint import explain_damage, load_checkpoint, save_checkpoint
from runtime.cli import log_line, progress_bar, say
from runtime.config import BadInput, check_flags, flag, read_flags, redeclare
from runtime.device import Machine, describe_hardware, seed_everything
from runtime.files import append_json_line, atomic_write, folder_lock, read_json_lines
from runtime.signals import StopSignals
from sampling import cache_dtype
from tasks.rules import (
    FAMILY_NAMES,
    N_COLORS,
    PAIR_END,
    RULE_VOCAB_SIZE,
    Grid,
    Pair,
    Rule,
    Task,
    decode_grid,
    digest,
    draw_rules,
    encode_episode,
    encode_grid,
    encode_pair,
    encode_question,
    make_task,
    permute_colors,
    read_arc,
)
from trainer import Evaluation, LoopConfig, TrainSetup, describe_machine, fit, init_state, next_token_loss

SCRIPT = Path(__file__)
BASES = "undertrained", "converged", "random"
RULE_RATE = 1e-3         # of AdamW on all weights, --adapt_rate=auto
VOTING_SHARE = 0.25      # of the compute of an arm that trains and votes, spent on its views
PLAIN_SHARE = 0.25       # of the rows of a batch at inference time, with the colours as they are
STATISTICS_STEPS = 32    # batches of rules of training from which --adapt_optimizer=rms takes its statistics
MAX_ROWS = 512           # that are answered at a time
EVAL_EPISODES = 256      # of rules of training, in an evaluation of a base


@dataclass(frozen=True)
class RulesConfig:
    """--task=rules: new rules from a few demonstrations."""
    families: tuple[str, ...] = flag(FAMILY_NAMES, "kinds of rules that are asked for; with a +, two steps in this order",
                                     choices=FAMILY_NAMES)
    train_families: tuple[str, ...] = flag(FAMILY_NAMES, "kinds of rules that a base is trained on", choices=FAMILY_NAMES)
    rules: int = flag(2, "rules of a test per family, at most", at_least=1, at_most=100_000)
    demonstrations: int = flag(3, "pairs that show a rule", at_least=2, at_most=100)
    questions: int = flag(32, "pairs of each rule that are asked for", at_least=1, at_most=100)
    seeds: int = flag(1, "bases of each kind, which differ in weights and data", at_least=1, at_most=1000)
    bases: tuple[str, ...] = flag(("undertrained", "random"),
                                  "models that answer; undertrained and converged: trained for --undertrained_iter and "
                                  "--converged_iter steps on rules in context; random: not trained", choices=BASES)
    undertrained_iter: int = flag(400, "optimizer steps of the undertrained base", at_least=1)
    converged_iter: int = flag(2000, "optimizer steps of the converged base", at_least=1)
    train_rules: int = flag(1000, "rules per family that a base is trained on, at most", at_least=1, at_most=100_000)
    adapt_steps: int = flag(40, "optimizer steps at inference time, for each rule", at_least=1, at_most=100_000)
    adapt_rows: int = flag(8, "rows in each of these steps", at_least=1, at_most=100_000)
    batch_size: int = flag(32, "episodes in a batch of a base's training", at_least=1, at_most=1_000_000)
    learning_rate: float = flag(0.02, "peak learning rate of a base's training, see train.py", above=0)
    n_layer: int = redeclare(GPTConfig, "n_layer", 4)
    n_head: int = redeclare(GPTConfig, "n_head", 4)
    head_size: int = redeclare(GPTConfig, "head_size", 16)
    block_size: int = redeclare(GPTConfig, "block_size", 128)
    mixer: str = redeclare(GPTConfig, "mixer", "attention")
    mlp: str = redeclare(GPTConfig, "mlp", "auto")
    linear: str = redeclare(GPTConfig, "linear", "linear")
    __post_init__ = check_flags

    def model_config(self) -> GPTConfig:
        """Raises BadInput."""
        return read_flags(GPTConfig, vars(self) | {"vocab_size": RULE_VOCAB_SIZE})

    def base_iter(self, base: str) -> int:
        return {"undertrained": self.undertrained_iter, "converged": self.converged_iter, "random": 0}[base]


# -- episodes ---------------------------------------------------------------------------------------------------------

def pack_episodes(episodes: Sequence[Sequence[Pair]]) -> tuple[Tensor, Tensor]:
    """Inputs and targets, each int64 (B, T), where T is the longest episode's; shorter ones are padded at their end."""
    encoded = [encode_episode(pairs) for pairs in episodes]
    length = max(len(ids) for ids, _ in encoded)
    pad = lambda values, filler: values + [filler] * (length - len(values))
    return (torch.tensor([pad(ids, PAIR_END) for ids, _ in encoded]),
            torch.tensor([pad(targets, IGNORE_INDEX) for _, targets in encoded]))


class EpisodeLoader:
    """Endless random episodes: a family, one of its rules, and pairs of it that follow each other in context."""

    def __init__(self, rules: dict[str, list[Rule]], n_pairs: int, batch_size: int, seed: Sequence[int]):
        self.rules, self.n_pairs, self.batch_size = list(rules.values()), n_pairs, batch_size
        self.rng = np.random.default_rng(seed)

    def next_batch(self, model: GPT | None) -> tuple[Tensor, Tensor]:
        return pack_episodes([self.draw() for _ in range(self.batch_size)])

    def draw(self) -> list[Pair]:
        rules = self.rules[self.rng.integers(len(self.rules))]
        rule = rules[self.rng.integers(len(rules))]
        return [rule.draw(self.rng) for _ in range(self.n_pairs)]

    def state_dict(self) -> dict:
        return {"rng": json.dumps(self.rng.bit_generator.state)}

    def load_state_dict(self, state: dict):
        self.rng.bit_generator.state = json.loads(state["rng"])

    def close(self):
        pass


def episode_loader(config: RulesConfig, batch_size: int, seed: Sequence[int]) -> EpisodeLoader:
    """Of rules of training."""
    rules = {family: draw_rules(family, "train", config.train_rules) for family in dict.fromkeys(config.train_families)}
    return EpisodeLoader(rules, config.demonstrations + 1, batch_size, seed)


# -- bases ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def in_context_accuracy(model: GPT, machine: Machine, batch: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Loss in nats per token of all outputs, and the fraction of episodes whose last output is right, given the correct
    tokens before each."""
    idx, targets = machine.to_device(batch)
    with machine.autocast():
        logits, loss = model.eager_forward(idx), model.eager_forward(idx, targets).item()
    pair = (idx == PAIR_END).cumsum(1)  # padding is more of them, but has no targets
    last = (targets >= 0) & (pair == pair.masked_fill(targets < 0, 0).amax(1, keepdim=True))
    right = (logits.argmax(-1) == targets) | ~last
    return loss, right.all(1).float().mean().item()


def train_base(config: RulesConfig, machine: Machine, base: str, seed: int) -> tuple[GPT, list[dict]]:
    """A model, and how it came to be: rows with step, val_loss and accuracy in context on rules of training. Raises
    FloatingPointError when it has diverged, SystemExit when a signal stopped it."""
    seed_everything(seed)
    model, rows, n_steps = GPT(config.model_config()).to(machine.device), [], config.base_iter(base)
    if not n_steps:
        return model, rows
    schedule = OptimizerConfig(learning_rate=config.learning_rate, warmup_iter=20)
    setup = TrainSetup(machine, schedule, step_tokens=config.batch_size * config.block_size)
    loader = episode_loader(config, config.batch_size, [1, seed])  # evaluations start from 0
    batch = episode_loader(config, EVAL_EPISODES, [0]).next_batch(None)
    with progress_bar(total=n_steps, desc=f"{base} base, seed {seed}", unit="step", leave=False) as bar:
        def evaluate(state) -> dict:
            loss, accuracy = in_context_accuracy(model, machine, batch)
            bar.update(state.step - bar.n)
            rows.append({"step": state.step, "val_loss": loss, "accuracy": accuracy})
            return rows[-1]
        loop = LoopConfig(max_iter=n_steps, num_batch_accum=1, val_intervals=max(1, n_steps // 10), verbose=False)
        stopped = fit(init_state(model, loader, setup), loop, next_token_loss, Evaluation(evaluate), setup)
    if stopped:
        log_line(f"stopped while the {base} base of seed {seed} was trained: the same command trains it anew, and keeps the "
                 f"rows that are finished")
        raise SystemExit(128 + stopped)
    return model, rows


def open_base(config: RulesConfig, machine: Machine, base: str, seed: int, folder: Path) -> tuple[GPT, list[dict]]:
    """The base, trained unless `folder` holds it. Raises what `train_base` does, and BadInput for a damaged file."""
    path = folder / f"{base}-{seed}.pt"
    if path.exists():
        checkpoint = load_checkpoint(path)
        with explain_damage(path):
            return GPT.from_checkpoint(checkpoint).to(machine.device), checkpoint["evaluations"]
    model, rows = train_base(config, machine, base, seed)
    if rows:
        save_checkpoint(path, model.to_checkpoint() | {"evaluations": rows})
    return model, rows


def open_rule_learner(model: GPT, config: RulesConfig, adapt: AdaptConfig, machine: Machine) -> Learner:
    learner = Learner(model, adapt, machine)
    if adapt.adapt_optimizer == "rms":
        loader = episode_loader(config, config.adapt_rows, [2])
        for _ in range(STATISTICS_STEPS):
            learner.step(loader.next_batch(model), next_token_loss)
        learner.state.optimizer.parts["rms"].end_statistics()
        learner.forget()
    return learner


# -- views of a task --------------------------------------------------------------------------------------------------

class View(NamedTuple):
    """The demonstrations in another order and with other names for the colours. colors: (10,), colour c becomes colors[c];
    the background stays. What a rule does to colours, it then does to others: it is a rule of the same family."""
    order: tuple[int, ...]
    colors: np.ndarray

    def demonstrations(self, task: Task) -> list[Pair]:
        return [permute_colors(task.demonstrations[i], self.colors) for i in self.order]

    def undo(self, grid: Grid) -> Grid:
        return np.argsort(self.colors)[grid]


def plain_view(n: int) -> View:
    return View(tuple(range(n)), np.arange(N_COLORS))


def draw_view(rng: np.random.Generator, n: int, is_recolored: bool = True) -> View:
    colors = np.arange(N_COLORS)
    if is_recolored:
        colors[1:] = rng.permutation(colors[1:])
    return View(tuple(rng.permutation(n).tolist()), colors)


def draw_views(rng: np.random.Generator, n: int, n_views: int) -> list[View]:
    """The plain one and random ones."""
    return [plain_view(n), *(draw_view(rng, n) for _ in range(n_views - 1))]


def leave_one_out(task: Task, rng: np.random.Generator, n_rows: int) -> tuple[Tensor, Tensor]:
    """A batch from the demonstrations alone: each row is a view of them, in which every output is asked for given the pairs
    before it, so the last one given all others."""
    n = len(task.demonstrations)
    return pack_episodes([draw_view(rng, n, rng.random() >= PLAIN_SHARE).demonstrations(task) for _ in range(n_rows)])


def train_on(learner: Learner, task: Task, rng: np.random.Generator, n_steps: int, n_rows: int) -> int:
    """Takes `n_steps` steps on the demonstrations; returns the number of tokens in them. Raises FloatingPointError when a
    step was not finite."""
    n_tokens = 0
    for _ in range(n_steps):
        batch = leave_one_out(task, rng, n_rows)
        learner.step(batch, next_token_loss)
        n_tokens += batch[0].numel()
    learner.check()
    return n_tokens


# -- answers ----------------------------------------------------------------------------------------------------------

def max_answer_tokens(task: Task, question: Grid) -> int:
    """As many as the longest output that is shown, or as its size relative to its input, with its end: a model that has
    learnt nothing may never end."""
    sizes = [(len(encode_grid(pair.output)), len(encode_grid(pair.input))) for pair in task.demonstrations]
    scaled = max(output / given for output, given in sizes) * len(encode_grid(question))
    return 1 + max(math.ceil(scaled), *(output for output, _ in sizes))


def answer(model: GPT, machine: Machine, task: Task, views: Sequence[View]) -> tuple[list[list[Grid | None]], int]:
    """For each question its answers, one for each view, with the colours undone, or None where it is no grid; and how many
    tokens were read, of which the demonstrations count once for each view."""
    answers, n_tokens, by_length = [[] for _ in task.questions], 0, {}
    for i, pair in enumerate(task.questions):
        by_length.setdefault(len(encode_question(pair.input)), []).append(i)
    for asked in by_length.values():
        n_views = max(1, MAX_ROWS // len(asked))
        for first in range(0, len(views), n_views):
            outputs, n = decode(model, machine, task, [task.questions[i].input for i in asked], views[first:first + n_views])
            n_tokens += n
            for i, found in zip(asked, outputs):
                answers[i] += found
    return answers, n_tokens


@torch.no_grad()
def decode(model: GPT, machine: Machine, task: Task, inputs: list[Grid],
           views: Sequence[View]) -> tuple[list[list[Grid | None]], int]:
    """`answer` for questions of one length. The demonstrations of a view are read once, for all questions."""
    device, n, block_size = machine.device, len(inputs), model.config.block_size
    shown = torch.tensor([[token for pair in view.demonstrations(task) for token in encode_pair(pair)] for view in views])
    new = torch.tensor([encode_question(view.colors[grid]) for view in views for grid in inputs]).to(device)
    max_len = min(block_size, shown.size(1) + new.size(1) + max_answer_tokens(task, inputs[0]) - 1)
    tokens, has_ended, n_tokens = [], torch.zeros(len(new), dtype=torch.bool, device=device), shown.numel()
    with machine.autocast():
        context = model.init_cache(len(views), shown.size(1), cache_dtype(model))
        model.eager_forward(shown.to(device), cache=context, logits_to_keep=1)
        cache = context.fork([view for view in range(len(views)) for _ in inputs], max_len)
        while cache.length + new.size(1) <= max_len and not has_ended.all():
            n_tokens += new.numel()
            new = model.eager_forward(new, cache=cache, logits_to_keep=1).argmax(-1)
            tokens.append(new[:, 0])
            has_ended |= new[:, 0] == PAIR_END
    rows = torch.stack(tokens, 1).tolist()
    grids = [decode_grid(row[:row.index(PAIR_END)]) if PAIR_END in row else None for row in rows]
    undone = [None if grid is None else views[i // n].undo(grid) for i, grid in enumerate(grids)]
    return [undone[i::n] for i in range(n)], n_tokens


def answers_demonstrations(model: GPT, machine: Machine, task: Task) -> tuple[bool, int]:
    """Whether each demonstration is answered exactly in context, shown the others, and how many tokens that read."""
    n_tokens = 0
    for i, pair in enumerate(task.demonstrations):
        others = [*task.demonstrations[:i], *task.demonstrations[i + 1:]]
        shown = dataclasses.replace(task, demonstrations=others, questions=[pair])
        answers, n = answer(model, machine, shown, [plain_view(len(others))])
        n_tokens += n
        if accuracy([vote(found) for found in answers], [pair]) < 1:
            return False, n_tokens
    return True, n_tokens


def vote(answers: Sequence[Grid | None]) -> Grid | None:
    """The most frequent of the answers that are grids; of several, the first."""
    grids = {(grid.shape, grid.tobytes()): grid for grid in answers if grid is not None}
    counts = Counter((grid.shape, grid.tobytes()) for grid in answers if grid is not None)
    return grids[counts.most_common(1)[0][0]] if counts else None


def accuracy(answers: Sequence[Grid | None], questions: Sequence[Pair]) -> float:
    """Fraction of answers that are exact."""
    is_exact = [grid is not None and np.array_equal(grid, pair.output) for grid, pair in zip(answers, questions)]
    return sum(is_exact) / len(is_exact)


# -- arms -------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Budget:
    """How much an arm may do, so that those that train or vote cost as many FLOPs as `adapt_steps` steps do.

    steps, views: of training alone, and of voting alone. shared_steps, shared_views: of both in one arm."""
    steps: int
    views: int
    shared_steps: int
    shared_views: int


def make_budget(config: RulesConfig, task: Task) -> Budget:
    """A token that is trained on costs as much as three that are read."""
    shown = sum(len(encode_pair(pair)) for pair in task.demonstrations)
    read = shown + sum(len(encode_question(pair.input)) for pair in task.questions) + len(task.questions) * max(
        len(encode_grid(pair.output)) for pair in task.demonstrations)
    views = 3 * config.adapt_steps * config.adapt_rows * shown / read
    return Budget(config.adapt_steps, 1 + round(views), round((1 - VOTING_SHARE) * config.adapt_steps),
                  1 + round(VOTING_SHARE * views))


def run_arms(learner: Learner, config: RulesConfig, task: Task, elsewhere: Task | None, seed: int,
             votes: bool = True) -> dict:
    """The accuracy of each arm, and FLOPs per question under flops_<arm>. elsewhere: another task, which is answered with
    the weights that this one has led to. votes: False leaves out the arms that vote. Leaves the weights as they were. Raises
    FloatingPointError, see `train_on`."""
    model, machine, budget = learner.model, learner.machine, make_budget(config, task)
    rng, n = np.random.default_rng([3, seed, digest(task.name)]), len(task.demonstrations)
    row, trained_tokens = {}, 0

    def measure(arm: str, task: Task, n_views: int):
        answers, n_tokens = answer(model, machine, task, draw_views(rng, n, n_views))
        row[arm] = accuracy([vote(found) for found in answers], task.questions)
        flops = model.flops_per_token() * (trained_tokens + n_tokens / 3)
        row[f"flops_{arm}"] = flops / len(task.questions)
    try:
        measure("in_context", task, 1)
        if votes:
            measure("in_context_voting", task, budget.views)
        is_known, n_tokens = answers_demonstrations(model, machine, task)
        trained_tokens += train_on(learner, task, rng, budget.shared_steps, config.adapt_rows)
        if votes:
            measure("trained_voting", task, budget.shared_views)
        trained_tokens += train_on(learner, task, rng, budget.steps - budget.shared_steps, config.adapt_rows)
        measure("trained", task, 1)
        chosen = "in_context" if is_known else "trained"
        checking = model.flops_per_token() * n_tokens / 3 / len(task.questions)
        row |= {"trained_if_needed": row[chosen], "flops_trained_if_needed": row[f"flops_{chosen}"] + checking}
        if elsewhere:
            n = len(elsewhere.demonstrations)
            measure("trained_elsewhere", elsewhere, 1)
    finally:
        learner.forget()
    return row


# -- rows -------------------------------------------------------------------------------------------------------------

KEY_NAMES = "base", "seed", "family", "rule"
ROW_KEYS = {*KEY_NAMES, "questions", "seconds"}  # of every row


def row_key(row: dict) -> tuple:
    return tuple(row[name] for name in KEY_NAMES)


def read_rule_rows(path: Path) -> dict[tuple, dict]:
    """row_key -> row."""
    return {row_key(row): row for row in read_json_lines(path)
            if row.keys() >= ROW_KEYS and all(isinstance(part, (str, int)) for part in row_key(row))}


def content_digest(task: Task) -> int:
    """Changes with any pair of it: files of one name may differ."""
    return digest(str([(pair.input.tolist(), pair.output.tolist()) for pair in task.demonstrations + task.questions]))


def is_current(row: dict, task: Task, elsewhere: Task | None) -> bool:
    """Whether the row of an earlier run, which may have had fewer rules, is what would be measured now."""
    name = elsewhere and elsewhere.name
    return row.get("elsewhere", name) == name and row.get("content") == content_digest(task)


def run_bases(config: RulesConfig, adapt: AdaptConfig, machine: Machine, tasks: list[Task], seed: int,
              folder: Path) -> tuple[list[dict], dict]:
    """A row for each base, seed and task, those that are in `folder` already from there, and the evaluations of each base,
    (base, seed) -> rows. Raises SystemExit when a signal stops it, and what `open_base` raises."""
    path, evaluations = folder / "rules.jsonl", {}
    found = read_rule_rows(path)
    with atomic_write(path, "w") as file:  # without a line that a crash cut off, which the next row would be added to
        file.writelines(json.dumps(row) + "\n" for row in found.values())
    wanted = [(base, base_seed) for base_seed in range(seed, seed + config.seeds) for base in dict.fromkeys(config.bases)]
    rows = []
    with progress_bar(total=len(wanted) * len(tasks), desc="rules", unit="rule") as bar:
        for base, base_seed in wanted:
            model, evaluations[base, base_seed] = open_base(config, machine, base, base_seed, folder)
            learner = open_rule_learner(model, config, adapt, machine)
            with StopSignals("stopping after this rule; again stops now") as stop:
                for task in tasks:
                    key, elsewhere = (base, base_seed, task.family, task.name), other_task(tasks, task)
                    if key not in found or not is_current(found[key], task, elsewhere):
                        found[key] = run_task(learner, config, task, elsewhere, key)
                        append_json_line(path, found[key])
                    rows.append(found[key])
                    bar.update()
                    if stop.signal and len(rows) < len(wanted) * len(tasks):
                        log_line(f"stopped after {len(rows):,} of {len(wanted) * len(tasks):,} rows, which are kept: the "
                                 f"same command continues")
                        raise SystemExit(128 + stop.signal)
    return rows, evaluations


def run_task(learner: Learner, config: RulesConfig, task: Task, elsewhere: Task | None, key: tuple) -> dict:
    row = dict(zip(KEY_NAMES, key)) | {"content": content_digest(task), "questions": len(task.questions),
                                       "elsewhere": elsewhere and elsewhere.name}
    start = time.perf_counter()
    try:
        row |= run_arms(learner, config, task, elsewhere, seed=key[1], votes=key[0] != "random")
    except FloatingPointError as error:
        row["diverged"] = str(error)
    return row | {"seconds": round(time.perf_counter() - start, 2)}


def other_task(tasks: list[Task], task: Task) -> Task | None:
    """The next task of the same family, the first after the last."""
    family = [other for other in tasks if other.family == task.family]
    return family[(family.index(task) + 1) % len(family)] if len(family) > 1 else None


# -- the command ------------------------------------------------------------------------------------------------------

def rule_tasks(config: RulesConfig) -> list[Task]:
    """The tasks of a test: a rule of each family in turn, so that the first ones are of all kinds."""
    by_family = [draw_rules(family, "test", config.rules) for family in dict.fromkeys(config.families)]
    rules = [rules[i] for i in range(config.rules) for rules in by_family if i < len(rules)]
    return [make_task(rule, config.demonstrations, config.questions) for rule in rules]


def n_context(task: Task) -> int:
    """Tokens of the demonstrations, the longest question and its answer, except the last."""
    shown = sum(len(encode_pair(pair)) for pair in task.demonstrations)
    return shown + max(len(encode_pair(pair)) for pair in task.questions) - 1


def select_tasks(config: RulesConfig, dataset: Path | None, limit: int | None) -> tuple[list[Task], int]:
    """The tasks to answer and how many ARC tasks do not fit into the context. Raises BadInput."""
    tasks = rule_tasks(config)[:limit] if dataset is None else []
    trained = [make_task(draw_rules(family, "train", 1)[0], config.demonstrations, 1) for family in config.train_families]
    if (longest := max(map(n_context, tasks + trained))) > config.block_size:
        raise BadInput(f"--block_size={config.block_size}: {config.demonstrations} demonstrations and a question need "
                       f"{longest} tokens: give at least as many, or fewer --demonstrations")
    if dataset is None:
        return tasks, 0
    found = read_arc(dataset, f"--dataset={dataset}")
    fitting = [task for task in found if n_context(task) <= config.block_size]
    if not fitting:
        raise BadInput(f"--dataset={dataset}: none of its {len(found):,} tasks fits into --block_size={config.block_size}, "
                       f"the shortest needs {min(map(n_context, found)):,} tokens")
    return fitting[:limit], len(found) - len(fitting)


def make_plan(config: RulesConfig, adapt: AdaptConfig, machine: Machine, dataset: Path | None) -> dict:
    """What rows and bases depend on, as JSON: not how many rules or seeds there are."""
    free = {"families", "rules", "seeds", "bases"}
    flags = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(config).items()
             if name not in free}
    return flags | vars(adapt) | {"dataset": dataset and str(dataset), "machine": str(machine), "code": code_hash(SCRIPT),
                                  "torch": torch.__version__}


def rule_rate(adapt: AdaptConfig) -> AdaptConfig:
    """With the rate of rules for --adapt_rate=auto."""
    if adapt.adapt_rate != "auto" or adapt.adapt_optimizer != "adamw":
        return adapt
    return dataclasses.replace(adapt, adapt_rate=RULE_RATE * ADAPT_SCOPES[adapt.adapt_scope].rate_ratio)


def run_rules(config: RulesConfig, adapt: AdaptConfig, machine: Machine, out_path: Path, command_line: str,
              dataset: Path | None = None, limit: int | None = None, seed: int = 0, overwrite: bool = False):
    """`adapt.py --task=rules`. dataset: ARC tasks to answer instead of rules. Writes the page, the table and the picture
    into `out_path`, and prints a short form. Raises BadInput, SystemExit when a signal stops it, and FloatingPointError when
    a base or all rules diverge."""
    adapt, gpt = rule_rate(adapt), config.model_config()
    tasks, n_left_out = select_tasks(config, dataset, limit)
    with folder_lock(out_path, f"--out_path={out_path}"):
        results = [out_path / "rules.jsonl", *(path for base in BASES for path in out_path.glob(f"{base}-*.pt"))]
        save_plan(out_path, make_plan(config, adapt, machine, dataset), overwrite, "an evaluation", results)
        n_parameters = GPT(gpt).n_parameters()
        conditions = [f"{n_parameters / 1e3:,.0f} k parameters, {gpt.n_layer} layers, {gpt.n_head} heads x {gpt.head_size}, "
                      f"mixer {gpt.mixer}, mlp {gpt.mlp}, linear {gpt.linear}, context {gpt.block_size:,}",
                      f"{len(tasks):,} {'ARC tasks' if dataset else 'new rules'}"
                      + f" ({n_left_out:,} left out, which do not fit into the context)" * bool(n_left_out),
                      f"at inference time {config.adapt_steps} steps of {config.adapt_rows} rows, {adapt.adapt_optimizer} "
                      f"at {adapt.rate:g} on {adapt.adapt_scope}",
                      f"{describe_machine(machine)}, {describe_hardware(machine.device)}"]
        for condition in conditions:
            say(condition)
        rows, evaluations = run_bases(config, adapt, machine, tasks, seed, out_path)
        finished = [row for row in rows if "diverged" not in row]
        if not finished:
            raise FloatingPointError(f"every rule diverged: {rows[0]['diverged']}")
        study = RulesStudy(vars(config), evaluations, conditions, command_line,
                           [row for row in rows if "diverged" in row])
        write_rules_report(finished, study, out_path)
