"""Accuracy against what it costs at inference: tokens, FLOPs and seconds for every way to spend more that a model has.

    points = measure_budgets(subject, config)
    print(markdown(budget_table({"a.pt": points})))

Ways: a longer thought, more samples and a choice among them, more loops of a recurrent-depth model, a deeper search over a
game. All are asked the same questions, so that differences are paired. `evaluate.py --budget_curve` is the command.
"""
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from candidates import (
    CHOICES,
    ROUND,
    Answer,
    CandidateConfig,
    choose_vote,
    given,
    is_decided,
    pass_at_k,
    sample_candidates,
    sample_texts,
    subsets_of,
)
from experiments.report import Table
from experiments.stats import Estimate
from model import GPT
from players import Positions, best_moves, expand, is_best, open_positions, predict, search
from runtime.cli import progress_bar
from runtime.config import BadInput
from runtime.device import Machine
from sampling import GREEDY, SamplingConfig
from strength import Question
from tasks.positions import Game
from tasks.thinking import Level, Problem, messages
from tokenizer import Tokenizer

N_SUBSETS = 64             # of the samples of a question, over which the accuracy of fewer is averaged
TIMED_QUESTIONS = 16       # from which seconds are measured
CERTAINTIES = 1.0, 0.95    # of votes that stop early
PROBE = 4                  # samples of which the agreement says how difficult a question is
LOOPS = 1, 2, 4, 8, 16
AHEAD = 1, 2, 3            # moves
SIMULATIONS = 2, 8, 32, 128
POSITIONS_PER_BATCH = 64   # of which all continuations are read together
WITHOUT_CHOICE = "one of them is right"  # pass@k


class Point(NamedTuple):
    """A way to spend, and how much. budget: in the way's own unit. right: of each question, whether the answer is right, or
    the probability of it. tokens (generated), flops, seconds: of a question on average, the reading of it included."""
    way: str
    budget: int
    right: np.ndarray
    tokens: float
    flops: float
    seconds: float

    @property
    def accuracy(self) -> Estimate:
        return Estimate.from_values(self.right.tolist())


@dataclass(frozen=True)
class Depth:
    """How much the model is asked to think. name: of the level, "" where it has none. n_tokens: of the longest thought."""
    name: str
    n_tokens: int
    prompts: list[list[int]]


@dataclass(frozen=True)
class Subject:
    """A model and what it is asked. depths: from thinking most to answering at once; at least one. checks: of each question,
    answer -> 1.0 where it is right. has_verifier: whether that can be known without the right answer."""
    model: GPT
    tokenizer: Tokenizer
    machine: Machine
    depths: Sequence[Depth]
    checks: Sequence[Callable[[str], float]]
    has_verifier: bool
    answer_tokens: int


def ask_problems(model: GPT, tokenizer: Tokenizer, machine: Machine, problems: Sequence[Problem], levels: Sequence[Level],
                 size: int, has_verifier: bool) -> Subject:
    """Problems of think.py's tasks, with each of these amounts of thought. size: of the largest problem. Raises BadInput
    where one does not fit into the context."""
    depths = [Depth(level.name, level.n_tokens(size), [
        tokenizer.encode_chat(messages(problem, level), add_generation_prompt=True)[0] for problem in problems])
        for level in levels]
    block_size, longest = model.config.block_size, max(len(prompt) for depth in depths for prompt in depth.prompts)
    if longest >= block_size:
        raise BadInput(f"--size: a problem has {longest:,} tokens, the model's context {block_size:,}: give smaller ones")
    return Subject(model, tokenizer, machine, depths, [problem.check for problem in problems], has_verifier,
                   block_size + 1 - longest)


# -- cost -------------------------------------------------------------------------------------------------------------

def inference_flops(model: GPT, n_read: float, n_new: float, n_samples: float = 1) -> float:
    """FLOPs of the matrix products that read `n_read` tokens once and generate `n_new` in each of `n_samples` answers.
    Attention is over the positions so far."""
    per_token = lambda context: model.flops_per_token(max(1, round(context))) / 3  # of training, two thirds are backward
    return n_read * per_token(n_read / 2) + n_samples * n_new * per_token(n_read + n_new / 2)


def mean_length(prompts: Sequence[Sequence]) -> float:
    return sum(map(len, prompts)) / len(prompts)


# -- one answer -------------------------------------------------------------------------------------------------------

def measure_greedy(subject: Subject, depth: Depth, way: str, budget: int, think: int | None = None) -> Point:
    """Not timed."""
    config = CandidateConfig(think=think)
    with subject.machine.autocast():
        answers = sample_texts(subject.model, subject.tokenizer, depth.prompts, subject.answer_tokens, GREEDY, None, config)
    n_new = mean_length([answer.ids for answer in answers])
    return Point(way, budget, grade(subject, answers), n_new,
                 inference_flops(subject.model, mean_length(depth.prompts), n_new), 0.0)


def measure_alone(subject: Subject, depth: Depth, way: str, budget: int, think: int | None = None) -> Point:
    """With the seconds of questions that are asked one after the other."""
    point = measure_greedy(subject, depth, way, budget, think)  # first: the clock then runs on a machine that is warm
    return point._replace(seconds=time_answers(subject, depth, 1, GREEDY, think))


def time_answers(subject: Subject, depth: Depth, k: int, sampling: SamplingConfig,
                 think: int | None = None) -> float:
    """Seconds of a question with `k` answers, when each question is asked by itself."""
    prompts, config = depth.prompts[:TIMED_QUESTIONS], CandidateConfig(think=think)
    start = time.perf_counter()
    with subject.machine.autocast():
        for prompt in prompts:
            sample_texts(subject.model, subject.tokenizer, [prompt] * k, subject.answer_tokens, sampling, None, config)
    return (time.perf_counter() - start) / len(prompts)


def grade(subject: Subject, answers: Sequence[Answer]) -> np.ndarray:
    """(questions,) float64, from one answer to each."""
    return np.array([check(answer.text) if answer.has_ended else 0.0 for check, answer in zip(subject.checks, answers)])


def measure_thoughts(subject: Subject) -> list[Point]:
    """What a thought is worth: as long as the model is told that it is to be, and the longest cut off."""
    fullest = subject.depths[0]
    told = [measure_alone(subject, depth, "thinking, as told", depth.n_tokens) for depth in reversed(subject.depths)]
    cut = [measure_alone(subject, fullest, "thinking, cut off", depth.n_tokens, depth.n_tokens)
           for depth in reversed(subject.depths[1:])]
    return told + cut


def measure_loops(subject: Subject) -> list[Point]:
    """The same model with more and fewer loops."""
    own, points = subject.model.loops, []
    try:
        for n in LOOPS:
            subject.model.loops = n
            points.append(measure_alone(subject, subject.depths[0], "loops", n))
    finally:
        subject.model.loops = own
    return points


# -- several answers --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Pool:
    """`n` answers to each question, from which those of fewer samples are drawn. right: (questions, n) float64."""
    answers: list[list[Answer]]
    right: np.ndarray
    n_new: np.ndarray  # (questions, n) tokens

    @property
    def n(self) -> int:
        return self.right.shape[1]


def draw_pool(subject: Subject, depth: Depth, n: int, sampling: SamplingConfig) -> Pool:
    generator = torch.Generator(subject.machine.device).manual_seed(0)
    with subject.machine.autocast():
        found = sample_candidates(subject.model, subject.tokenizer, depth.prompts, CandidateConfig(n),
                                  subject.answer_tokens, sampling, generator)
    right = np.array([[check(answer.text) if answer.has_ended else 0.0 for answer in own]
                      for check, own in zip(subject.checks, found)])
    return Pool(found, right, np.array([[len(answer.ids) for answer in own] for own in found]))


def measure_samples(subject: Subject, depth: Depth, n: int, sampling: SamplingConfig) -> list[Point]:
    """1, 2, 4 … `n` samples and each way to choose one of them; votes that stop early; samples where they help most."""
    pool, n_read = draw_pool(subject, depth, n, sampling), mean_length(depth.prompts)
    sizes = [k for k in (2 ** i for i in range(n.bit_length())) if k <= n]
    seconds = {k: time_answers(subject, depth, k, sampling) for k in sizes}
    time_of = lambda k: float(np.interp(k, [0, *sizes], [0.0, *seconds.values()]))
    cost = lambda k: (k * pool.n_new.mean(), inference_flops(subject.model, n_read, pool.n_new.mean(), k), seconds[k])
    ways = [way for way in CHOICES if way != "verifier" or subject.has_verifier]
    points = [Point(way, k, choice_accuracy(pool, way, k), *cost(k)) for way in ways for k in sizes]
    points += [Point(WITHOUT_CHOICE, k, np.array([pass_at_k(n, round(row.sum()), k) for row in pool.right]), *cost(k))
               for k in sizes]
    for certainty in CERTAINTIES:
        right, n_used, tokens = stop_early(pool, certainty)
        flops = inference_flops(subject.model, n_read, tokens / n_used, n_used)
        points.append(Point(f"vote, certain to {certainty:.0%}", n, right, tokens, flops,
                            n_used / min(ROUND, n) * time_of(min(ROUND, n))))  # one round after the other
    way = "verifier" if subject.has_verifier else "vote"
    for k in sizes:
        if PROBE < k < n:
            right, used, tokens = spend_by_difficulty(pool, way, k)
            flops = inference_flops(subject.model, n_read, tokens / used, used)
            points.append(Point(f"{way}, by difficulty", k, right, tokens, flops,
                                time_of(PROBE) + time_of(used - PROBE)))
    return points


def choice_accuracy(pool: Pool, way: str, k: int) -> np.ndarray:
    """(questions,) the probability that the choice among `k` samples is right, over random subsets of the pool."""
    found, subsets = np.zeros(len(pool.answers)), subsets_of(pool.n, k, N_SUBSETS)
    for i, (answers, right) in enumerate(zip(pool.answers, pool.right)):
        found[i] = np.mean([right[subset[CHOICES[way]([answers[j] for j in subset], checked(answers, right))]]
                            for subset in subsets])
    return found


def checked(answers: Sequence[Answer], right: np.ndarray) -> Callable[[str], float]:
    """The check of a question whose answers have been checked."""
    return {answer.text: value for answer, value in zip(answers, right)}.__getitem__


def stop_early(pool: Pool, certainty: float) -> tuple[np.ndarray, float, float]:
    """A vote that stops once it is decided, over random orders of the pool. Returns (questions,) the probability that its
    winner is right, and how many samples and how many tokens it took on average."""
    orders = np.argsort(np.random.default_rng(0).random((N_SUBSETS, pool.n)), axis=1)
    right, n_used, tokens = np.zeros(len(pool.answers)), 0.0, 0.0
    for i, answers in enumerate(pool.answers):
        for order in orders:
            drawn = [answers[j] for j in order]
            n = next((n for n in range(ROUND, pool.n, ROUND) if is_decided(given(drawn[:n]), pool.n - n, certainty)), pool.n)
            right[i] += pool.right[i, order[choose_vote(drawn[:n])]]
            n_used += n
            tokens += pool.n_new[i, order[:n]].sum()
    n_all = len(orders) * len(pool.answers)
    return right / len(orders), n_used / n_all, tokens / n_all


def spend_by_difficulty(pool: Pool, way: str, mean_samples: int) -> tuple[np.ndarray, float, float]:
    """As many samples as help most, with `mean_samples` of a question on average at most. How difficult a question is says
    the agreement of its first PROBE samples. What each difficulty gains from more is learnt from one half of the questions
    and used for the other. Returns what `stop_early` does. Source: Snell et al. 2024, arXiv:2408.03314."""
    sizes = [k for k in (PROBE * 2 ** i for i in range(pool.n.bit_length())) if k <= pool.n]
    agreement = np.array([max(Counter(given(answers[:PROBE])).values(), default=0) for answers in pool.answers])
    accuracy = np.stack([choice_accuracy(pool, way, k) for k in sizes])  # (sizes, questions)
    half, chosen = np.arange(len(agreement)) % 2, np.zeros(len(agreement), np.int64)
    for fold in (0, 1):
        known, bins = half != fold, np.unique(agreement)
        weights = np.array([(agreement[known] == level).mean() for level in bins])
        gains = np.array([[row[known & (agreement == level)].mean() if weight else 0.0 for row in accuracy]
                          for level, weight in zip(bins, weights)])
        plan = max((plan for plan in itertools.product(range(len(sizes)), repeat=len(bins))
                    if sum(weight * sizes[j] for weight, j in zip(weights, plan)) <= mean_samples),
                   key=lambda plan: sum(weight * gains[b, j] for b, (weight, j) in enumerate(zip(weights, plan))))
        for level, j in zip(bins, plan):
            chosen[(half == fold) & (agreement == level)] = j
    n_used = np.array(sizes)[chosen]
    return accuracy[chosen, np.arange(len(chosen))], float(n_used.mean()), float((n_used * pool.n_new.mean(1)).mean())


# -- games ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class GameSubject:
    """A model that plays, and positions in which it has to find one of the best moves."""
    model: GPT
    game: Game
    exam: Sequence[Question]
    machine: Machine


def measure_play(subject: GameSubject) -> list[Point]:
    """The move at first sight, that of looking over all moves several times, and that of a tree search; then the same of an
    untrained network, to which only the search can say anything."""
    control = replace(subject, model=untrained(subject.model))
    measure_moves(replace(subject, exam=subject.exam[:1]), "", 0, first_sight)  # so that the machine is warm
    steps = [(who, suffix, *way) for who, suffix in ((subject, ""), (control, ", untrained")) for way in (
        ("at first sight", 0, first_sight),
        *(("all moves, so many ahead", depth, partial(look_ahead, depth=depth)) for depth in AHEAD),
        *(("tree search, positions read", n, partial(search_moves, simulations=n)) for n in SIMULATIONS))]
    return [measure_moves(who, f"{way}{suffix}", n, choose)
            for who, suffix, way, n, choose in progress_bar(steps, desc="budgets", unit="budget", leave=False)]


def untrained(model: GPT) -> GPT:
    """One of the same config with random weights, always the same ones."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        control = GPT(model.config).requires_grad_(False).to(model.embed.weight.device)
    control.loops = model.loops
    return control


@torch.no_grad()
def measure_moves(subject: GameSubject, way: str, budget: int,
                  choose: Callable[[Positions], tuple[np.ndarray, int]]) -> Point:
    """choose(positions) -> a move in each, and how many positions it read besides."""
    model, right, n_read, n_line, start = subject.model, [], 0, 0, time.perf_counter()
    with subject.machine.autocast():
        for line, values in subject.exam:
            best = is_best(values)
            for first in range(0, len(best), POSITIONS_PER_BATCH):
                part = line.take(slice(first, first + POSITIONS_PER_BATCH))
                moves, n = choose(open_positions(model, subject.game, part))
                right.append(best[first:first + POSITIONS_PER_BATCH][np.arange(len(moves)), moves])
                n_read, n_line = n_read + n, n_line + part.history.size + len(moves)
    right = np.concatenate(right).astype(np.float64)
    seconds, n = time.perf_counter() - start, len(right)
    return Point(way, budget, right, n_read / n, inference_flops(model, n_line / n, n_read / n), seconds / n)


def first_sight(positions: Positions) -> tuple[np.ndarray, int]:
    legal = positions.game.legal(positions.state)
    return predict(positions.game, positions.logits, legal).moves.argmax(1), 0


def look_ahead(positions: Positions, depth: int) -> tuple[np.ndarray, int]:
    """The best move when each is followed by the best play of `depth` moves, as the model values what they lead to."""
    n_read = 0

    def best_outcomes(positions: Positions, depth: int) -> np.ndarray:
        """(n, 3), for the player to move."""
        nonlocal n_read
        if positions.state.over.all():
            return np.zeros((len(positions), 3))  # their results are known
        ahead = expand(positions, partial(best_outcomes, depth=depth - 1) if depth > 1 else None)
        n_read += len(ahead.rows)
        return ahead.outcomes[np.arange(len(positions)), ahead.values.argmax(1)]
    ahead = expand(positions, partial(best_outcomes, depth=depth - 1) if depth > 1 else None)
    return ahead.values.argmax(1), n_read + len(ahead.rows)


def search_moves(positions: Positions, simulations: int) -> tuple[np.ndarray, int]:
    found = search(positions, simulations)
    return best_moves(found), found.n_read


# -- all of them ------------------------------------------------------------------------------------------------------

def measure_budgets(subject: Subject, n_samples: int, sampling: SamplingConfig) -> list[Point]:
    """Every way that the model has. n_samples: the most that are drawn."""
    steps = [lambda: [measure_alone(subject, subject.depths[0], "one answer, greedy", 1)]]
    if len(subject.depths) > 1:
        steps.append(lambda: measure_thoughts(subject))
    if n_samples > 1:
        steps.append(lambda: measure_samples(subject, subject.depths[0], n_samples, sampling))
        if len(subject.depths) > 1:
            steps.append(lambda: [point._replace(way=f"{point.way}, answering at once")
                                  for point in measure_samples(subject, subject.depths[-1], n_samples, sampling)])
    if subject.model.config.loops > 1:
        steps.append(lambda: measure_loops(subject))
    return [point for step in progress_bar(steps, desc="budgets", unit="way", leave=False) for point in step()]


def budget_rows(points: Sequence[Point]) -> list[dict]:
    """A row for each point; difference: from the first point, paired by question."""
    first = points[0]
    rows = []
    for point in points:
        difference = Estimate.from_values((point.right - first.right).tolist())
        rows.append({"way": point.way, "budget": point.budget, "accuracy": point.accuracy.mean,
                     "accuracy_margin": point.accuracy.margin, "difference": difference.mean,
                     "difference_margin": difference.margin, "questions": len(point.right), "tokens": point.tokens,
                     "flops": point.flops, "seconds": point.seconds})
    return rows


def budget_table(rows: Sequence[dict]) -> Table:
    return Table(("way", "budget", "accuracy", "minus the first", "tokens", "MFLOP", "ms"), [
        (row["way"], f"{row['budget']:,}", f"{row['accuracy']:.1%} ± {row['accuracy_margin']:.1%}",
         f"{row['difference']:+.1%} ± {row['difference_margin']:.1%}", f"{row['tokens']:,.1f}", f"{row['flops'] / 1e6:,.1f}",
         f"{row['seconds'] * 1e3:,.1f}") for row in rows])
