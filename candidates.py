"""Several answers to a prompt, and the choice among them: accuracy that is bought with tokens at inference time.

    prompts = [ids]
    answers, = sample_candidates(model, tokenizer, prompts, CandidateConfig(samples=32), 64, sampling, generator)
    print(answers[CHOICES["vote"](answers, None)].text)

A prompt is read once for all of its answers, which are decoded in batches that those which have ended leave. A choice is a
line in CHOICES. Where an answer holds a thought, see tasks/thinking.py, what counts is what follows it.
"""
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import GPT
from runtime.cli import progress_bar
from runtime.config import BadInput, check_flags, flag
from sampling import GREEDY, Decoder, Reading, SamplingConfig, TextStream, sample_with_logprobs
from tasks.checkable import THOUGHT_END, countdown_check, final_answer
from tokenizer import Tokenizer

ROWS_PER_BATCH = 256        # answers that are sampled together
ROUND = 4                   # answers between two counts of the votes


class Answer(NamedTuple):
    """ids: with the token that ended it, if one did. logprobs: of each of them by the model alone when it was sampled,
    nats."""
    ids: list[int]
    logprobs: list[float]
    text: str
    has_ended: bool

    @property
    def final(self) -> str:
        """What is compared: the words behind the thought."""
        return " ".join(final_answer(self.text).split())


@dataclass(frozen=True)
class CandidateConfig:
    """Answers at inference time."""
    samples: int = flag(1, "answers that are sampled to each prompt", at_least=1, at_most=10_000)
    choose: str = flag(None, "which of --samples counts; vote: the one that is sampled most often; verifier: one that the "
                             "task's check accepts; logprob: the one with the most probable tokens; mbr: the one that is "
                             "most like all others", choices=("vote", "verifier", "logprob", "mbr"))
    certainty: float = flag(1.0, "with --choose=vote, sample no more answers once the leading one would win with this "
                                 "probability; 1: once the others cannot catch up, which never changes the winner",
                            at_least=0.5, at_most=1)
    think: int = flag(None, "tokens of a thought before the answer, at most: one that is longer is cut off there, and the "
                            "answer has to follow; 0: none (default: as many as the model likes)", at_least=0,
                      at_most=10_000_000)
    think_fully: bool = flag(False, "with --think, not fewer tokens either: a thought cannot end before")

    def __post_init__(self):
        check_flags(self)
        if self.choose and self.samples == 1:
            raise BadInput(f"--choose={self.choose}: has nothing to choose from: give --samples, such as --samples=16")
        if self.think_fully and self.think is None:
            raise BadInput("--think_fully: give --think, the number of tokens")
        if self.certainty < 1 and self.choose != "vote":
            raise BadInput(f"--certainty={self.certainty:g}: is of a vote: add --choose=vote")


@dataclass
class PartialAnswer:
    """An answer that is being sampled; see Answer."""
    prompt: list[int]
    stream: TextStream
    config: CandidateConfig
    end_of_thought: int  # its token
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""

    def __post_init__(self):
        self.is_thinking = self.config.think is not None

    @property
    def must_end_thought(self) -> bool:
        return self.is_thinking and len(self.ids) == self.config.think

    @property
    def must_think_on(self) -> bool:
        return self.is_thinking and self.config.think_fully and len(self.ids) < self.config.think

    def push(self, token_id: int, logprob: float):
        """What comes after the end is no part of it."""
        if not self.stream.is_done:
            self.ids.append(token_id)
            self.logprobs.append(logprob)
            self.is_thinking &= token_id != self.end_of_thought
            self.text += self.stream.push(token_id)

    def answer(self) -> Answer:
        has_ended = self.stream.is_done
        return Answer(self.ids, self.logprobs, self.text + ("" if has_ended else self.stream.finish()), has_ended)


# -- sampling ---------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def sample_texts(model: GPT, tokenizer: Tokenizer, prompts: Sequence[list[int]], max_new_tokens: int,
                 sampling: SamplingConfig, generator: torch.Generator | None, config: CandidateConfig = CandidateConfig(),
                 stop: Sequence[str] = ()) -> list[Answer]:
    """An answer to each of `prompts`, ids; equal ones are read once. config: its --think is kept to."""
    all_rows, device = start_answers(tokenizer, prompts, config, stop), model.embed.weight.device
    for first in range(0, len(all_rows), ROWS_PER_BATCH):
        rows = all_rows[first:first + ROWS_PER_BATCH]
        decoder = Decoder(model, [torch.tensor(row.prompt, device=device) for row in rows], max_new_tokens, sampling)
        decode_answers(decoder, rows, max_new_tokens, sampling, generator)
    return [row.answer() for row in all_rows]


def start_answers(tokenizer: Tokenizer, prompts: Sequence[list[int]], config: CandidateConfig,
                  stop: Sequence[str]) -> list[PartialAnswer]:
    end_of_thought, = tokenizer.encode(THOUGHT_END)
    return [PartialAnswer(prompt, TextStream(tokenizer, stop), config, end_of_thought) for prompt in prompts]


def decode_answers(decoder: Decoder, rows: list[PartialAnswer], max_new_tokens: int, sampling: SamplingConfig,
                   generator: torch.Generator | None):
    """Samples the answers of a batch, which is halved whenever half of them have ended: few are long."""
    for n_left in reversed(range(max_new_tokens)):
        new = sample_with_logprobs(keep_thinking(decoder.logits, rows), sampling, generator, decoder.seen)
        # as numbers: tensors that were made under inference_mode cannot be trained on
        new_ids, logprobs = new.ids.tolist(), new.model_logprobs.tolist()
        for i, row in enumerate(rows):
            if row.must_end_thought:
                new_ids[i], logprobs[i] = row.end_of_thought, 0.0
            row.push(new_ids[i], logprobs[i])
        left = [i for i, row in enumerate(rows) if not row.stream.is_done]
        if not left or not n_left:
            return
        if 2 * len(left) <= len(rows):
            rows, new_ids = [rows[i] for i in left], [new_ids[i] for i in left]
            decoder.keep(left)
        decoder.append(torch.tensor(new_ids, device=new.ids.device))


def keep_thinking(logits: Tensor, rows: list[PartialAnswer]) -> Tensor:
    """Logits, (B, V), in which thoughts that are to go on cannot end."""
    held = [i for i, row in enumerate(rows) if row.must_think_on]
    if not held:
        return logits
    logits = logits.clone()
    banned = torch.tensor([rows[0].end_of_thought, *rows[0].stream.end_ids], device=logits.device)
    logits[torch.tensor(held, device=logits.device)[:, None], banned] = -torch.inf
    return logits


# -- several answers --------------------------------------------------------------------------------------------------

@torch.inference_mode()
def sample_candidates(model: GPT, tokenizer: Tokenizer, prompts: Sequence[list[int]], config: CandidateConfig,
                      max_new_tokens: int, sampling: SamplingConfig, generator: torch.Generator | None,
                      stop: Sequence[str] = ()) -> list[list[Answer]]:
    """--samples answers to each of `prompts`, ids, or with --choose=vote fewer where it is decided earlier: the votes are
    counted after every ROUND of them. Each prompt is read once, for all of its answers."""
    found, device = [[] for _ in prompts], model.embed.weight.device
    n_round = min(ROUND if config.choose == "vote" else config.samples, ROWS_PER_BATCH)
    n_prompts = ROWS_PER_BATCH // n_round
    for first in range(0, len(prompts), n_prompts):
        undecided = list(range(first, min(first + n_prompts, len(prompts))))
        reading = Reading(model, [torch.tensor(prompts[i], device=device) for i in undecided])
        while undecided:
            order = [i for i in undecided for _ in range(min(n_round, config.samples - len(found[i])))]
            decoder = reading.decoder([i - first for i in order], max_new_tokens, sampling)
            rows = start_answers(tokenizer, [prompts[i] for i in order], config, stop)
            decode_answers(decoder, rows, max_new_tokens, sampling, generator)
            for i, row in zip(order, rows):
                found[i].append(row.answer())
            undecided = [i for i in undecided if not is_enough(found[i], config)]
    return found


class Scored(NamedTuple):
    """A given continuation of a prompt: its log-probability in nats, and whether it is the greedy one."""
    logprob: float
    is_greedy: bool


@torch.inference_mode()
def score_continuations(model: GPT, prompts: Sequence[list[int]], continuations: Sequence[list[list[int]]],
                        batch_size: int) -> list[list[Scored]]:
    """Those of each prompt, which is read once for all of its continuations, ids, as many for each prompt; about
    `batch_size` of them are computed together. A prompt has to fit into the context with its longest continuation.

    Longest prompts first: so those of one length are read together, and too little memory shows at once.
    """
    device, n_each, found = model.embed.weight.device, len(continuations[0]), {}
    order, n_prompts = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])), max(1, batch_size // n_each)
    for first in progress_bar(range(0, len(order), n_prompts), unit="batch", delay=1):
        batch = order[first:first + n_prompts]
        part = [torch.tensor(prompts[i], device=device) for i in batch]
        rows = [ids for i in batch for ids in continuations[i]]
        lengths = torch.tensor([len(ids) for ids in rows], device=device)
        columns = torch.tensor([*itertools.zip_longest(*rows, fillvalue=0)], device=device)
        decoder = Reading(model, part).decoder([i for i in range(len(part)) for _ in range(n_each)], len(columns), GREEDY)
        logprobs, is_greedy = torch.zeros(len(rows), device=device), torch.ones(len(rows), dtype=torch.bool, device=device)
        for t, column in enumerate(columns):
            if t:
                decoder.append(columns[t - 1])
            is_over, logits = t >= lengths, decoder.logits.float()
            new = logits.gather(1, column[:, None])[:, 0] - logits.logsumexp(dim=-1)
            logprobs += new.masked_fill(is_over, 0.0)
            is_greedy &= is_over | (logits.argmax(dim=-1) == column)
        scored = list(map(Scored, logprobs.tolist(), is_greedy.tolist()))
        found |= {i: scored[k * n_each:(k + 1) * n_each] for k, i in enumerate(batch)}
    return [found[i] for i in range(len(prompts))]


def is_enough(answers: Sequence[Answer], config: CandidateConfig) -> bool:
    n_left = config.samples - len(answers)
    return not n_left or config.choose == "vote" and is_decided(given(answers), n_left, config.certainty)


def is_decided(answers: Sequence[str], n_left: int, certainty: float = 1.0) -> bool:
    """Whether the leading answer wins the vote when `n_left` more come: whatever they are, or with a certainty below 1, when
    it is more frequent than the second with at least this probability, given their votes and a uniform prior. Source:
    Aggarwal et al. 2023, Adaptive-Consistency, arXiv:2305.11860."""
    if not answers:
        return False
    counts = Counter(answers)  # in the order in which they were given first, which decides between equal ones
    leader, first = counts.most_common(1)[0]
    order = {answer: i for i, answer in enumerate(counts)}
    if first >= n_left and all(n + n_left < first + (order[answer] > order[leader]) for answer, n in counts.items()
                               if answer != leader):
        return True
    if certainty == 1:
        return False
    second = max((n for answer, n in counts.items() if answer != leader), default=0)
    # the beta distribution of first + 1 and second + 1, above one half
    n = first + second + 1
    return sum(math.comb(n, i) for i in range(first + 1)) / 2 ** n >= certainty


# -- choices ----------------------------------------------------------------------------------------------------------

Check = Callable[[str], float] | None  # of a CheckableQuestion


def find_check(question: str) -> Callable[[str], float]:
    """The verifier of a question. Raises BadInput where it has none."""
    if check := countdown_check(question):
        return check
    raise BadInput('--choose=verifier: only answers to questions such as "Reach 24 with 3 8 1." can be checked without '
                   'knowing the right one: choose vote, logprob or mbr')


def given(answers: Sequence[Answer]) -> list[str]:
    """What they say, without those that have not ended, which have no vote."""
    return [answer.final for answer in answers if answer.has_ended]


def choose_vote(answers: Sequence[Answer], check: Check = None) -> int:
    """The most frequent one; of several that are, the one that was sampled first. Source: Wang et al. 2022,
    self-consistency, arXiv:2203.11171."""
    if not (said := given(answers)):
        return 0
    winner = Counter(said).most_common(1)[0][0]  # of equal ones, the one that was counted first
    return next(i for i, answer in enumerate(answers) if answer.has_ended and answer.final == winner)


def choose_verifier(answers: Sequence[Answer], check: Check = None) -> int:
    """The first that is right; where none is, that of the vote."""
    right = (i for i, answer in enumerate(answers) if answer.has_ended and check(answer.text) > 0)
    return next(right, choose_vote(answers))


def choose_logprob(answers: Sequence[Answer], check: Check = None) -> int:
    """The highest mean log-probability of its tokens: a sum would favour short answers."""
    means = [(answer.has_ended, sum(answer.logprobs) / max(1, len(answer.logprobs))) for answer in answers]
    return max(range(len(answers)), key=means.__getitem__)


def choose_mbr(answers: Sequence[Answer], check: Check = None) -> int:
    """Minimum Bayes risk: the highest mean F1 of its words with those of every other. Source: Kumar and Byrne 2004;
    Suzgun et al. 2022, arXiv:2211.07634."""
    if not (said := given(answers)):
        return 0
    words = {answer: Counter(answer.split()) for answer in said}

    def likeness(answer: str) -> float:
        own = words[answer]
        return sum(2 * (own & words[other]).total() / max(1, own.total() + words[other].total()) * n
                   for other, n in Counter(said).items())
    best = max(dict.fromkeys(said), key=likeness)
    return next(i for i, answer in enumerate(answers) if answer.has_ended and answer.final == best)


# --choose -> choose(answers, check) -> the index of one
CHOICES = {"vote": choose_vote, "verifier": choose_verifier, "logprob": choose_logprob, "mbr": choose_mbr}


# -- what several answers are worth -----------------------------------------------------------------------------------

def pass_at_k(n: int, n_right: int, k: int) -> float:
    """The probability that one of `k` answers is right, of `n` sampled ones of which `n_right` are: its unbiased estimate.
    Source: Chen et al. 2021, section 2.1, arXiv:2107.03374."""
    return 1 - math.comb(n - n_right, k) / math.comb(n, k)


def subsets_of(n: int, k: int, n_subsets: int, seed: int = 0) -> np.ndarray:
    """(n_subsets, k) int64: random subsets of 0..n-1, always the same ones, each in ascending order; all alike if k = n."""
    rng = np.random.default_rng([7, n, k, seed])
    return np.sort(np.argsort(rng.random((n_subsets if k < n else 1, n)), axis=1)[:, :k], axis=1)
