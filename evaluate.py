"""Scores trained models side by side: bits per byte of any text, multiple choice, questions with one right answer, and facts
hidden in text.

    python evaluate.py --checkpoint_path checkpoints/gpt.pt --dataset=notes.txt
    python evaluate.py --checkpoint_path a.pt b.pt --task=choice                          HellaSwag
    python evaluate.py --checkpoint_path checkpoints/gpt_finetuned.pt --task=answers      the built-in questions
    python evaluate.py --checkpoint_path checkpoints/gpt.pt --task=needle                 a fact in a long text
    python evaluate.py --checkpoint_path checkpoints/gpt.pt --dataset=notes.txt --adapt   also after learning, see learner.py
    python evaluate.py --checkpoint_path checkpoints/countdown.pt --task=countdown --budget_curve     see budget.py

train.py and finetune.py validate with `mean_losses`, finetune.py also with the functions of the last task.
"""
import gc
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from budget import (
    POSITIONS_PER_BATCH,
    Depth,
    GameSubject,
    Point,
    Subject,
    ask_problems,
    budget_rows,
    budget_table,
    first_sight,
    look_ahead,
    measure_budgets,
    measure_moves,
    measure_play,
    search_moves,
)
from candidates import CHOICES, Answer, CandidateConfig, sample_candidates, score_continuations
from dataloader import IGNORE_INDEX, PackedBatches, cut_windows, encodable
from download_data import held_out_texts
from experiments.budget_plots import draw_budgets
from experiments.needle_report import needle_scores, write_needle_report
from experiments.report import markdown, write_results
from experiments.scores import (
    Score,
    adapted_bits_per_byte,
    adapted_proportion,
    bits_per_byte,
    count,
    proportion,
    score_table,
)
from learner import (
    AdaptConfig,
    Learner,
    after_learning,
    drop_diverged,
    encode_documents,
    open_learner,
    require_adapt,
)
from model import GPT, GPTConfig
from players import checkpoint_game, load_player
from runtime.checkpoint import explain_damage, load_checkpoint, run_folder
from runtime.cli import command, explain_failures, log_line, parse_flags, progress_bar, say
from runtime.config import BadInput, declared_flags, flag, redeclare, shorten
from runtime.device import DeviceConfig, Machine, open_machine
from runtime.distributed import join
from runtime.files import atomic_write, check_writable
from runtime.metrics import LossSums, PositionSums
from sampling import GREEDY, LOOPS_HELP, SamplingConfig, generate_texts, load_model, load_pretrained
from strength import EXAM_SIZE, Question, make_exam
from tasks.checkable import final_answer
from tasks.conversations import Conversation, ConversationConfig, ReadReport, builtin_held_out, read_all
from tasks.multiple_choice import Choice, ChoiceColumns, read_choices
from tasks.needle import Haystack, NeedleConfig, default_lengths, make_needles
from tasks.positions import Game
from tasks.rows import local_splits
from tasks.thinking import TASKS, Problem
from text.messages import has_loss
from text.sources import SourceConfig, local_path, open_source, take_text
from tokenizer import ROLES, Tokenizer

PROMPTS_PER_BATCH = 64
# (dataset, split) of each task where the flags do not give them
DEFAULT_DATASETS = {"text": ("builtin", "train"), "choice": ("Rowan/hellaswag", "validation"),
                    "answers": ("builtin", "train"), "needle": ("data", "train")}
NEEDLE = "needle"          # the task whose questions are about facts hidden in text
GAME = "game"              # the task whose questions are positions
N_PROBLEMS = 128           # of think.py's tasks, unless --limit is given
N_NEEDLES = 32             # of each length and depth, unless --limit is given
BUDGET_SAMPLES = 32        # of --budget_curve, unless --samples is given
PICTURES = ".html", ".svg"  # of --budget_curve and --task=needle, beside their rows
SEARCHES = "none", "ahead", "puct"


@dataclass(frozen=True)
class EvaluateConfig(CandidateConfig, NeedleConfig):
    """Evaluation."""
    checkpoint_path: tuple[Path, ...] = flag((Path("checkpoints/gpt.pt"),),
                                             "models to score side by side, with spaces between")
    task: str = flag("text", "text: bits per byte; choice: pick the right one of several endings; answers: answer questions "
                             "word for word; needle: find a fact that is hidden in text; game: find one of the best moves, "
                             "of models of selfplay.py; "
                             f"{', '.join(TASKS)}: of models of think.py",
                     choices=(*DEFAULT_DATASETS, GAME, *TASKS))
    dataset: str = flag(None, "a dataset on the Hugging Face hub by its id, a local file or folder, or `builtin`: for text "
                              "the documentation of Python, numpy and torch, most of which a model trained on it has seen; "
                              "for answers the questions that finetune.py holds out; for needle a folder that "
                              "download_data.py has prepared too, of which the validation documents are read (default: "
                              "builtin; for choice Rowan/hellaswag, for needle data)")
    dataset_config: str = flag(None, "configuration of a hub dataset")
    split: str = flag(None, "split of a hub dataset, or of a local folder whose files are named train, validation, test; "
                            "text reads only train (default: train; for choice validation; of such a folder what it holds "
                            "out)")
    text_column: str = flag("text", "for text and needle, the column or JSON key that holds it")
    question_column: str = flag(None, "column with questions, for choice with the contexts (default: the first of ctx, "
                                      "query, question …; for answers as in finetune.py)")
    endings_column: str = flag(None, "for choice, the column with the list of endings (default: the first of endings, "
                                     "choices, options, or the columns of well-known datasets)")
    answer_column: str = flag(None, "column with answers, for choice with the index or letter of the right ending (default: "
                                    "the first of label, answerKey, gold, answer …; for answers as in finetune.py)")
    limit: int = flag(None, "use only the first documents, rows or conversations; for needle, so many questions of each "
                            "length and depth (default: all; of the built-in questions as many as finetune.py holds out; "
                            f"for needle {N_NEEDLES})", at_least=1)
    max_bytes: int = flag(1_000_000, "for text and needle, stop reading at the document that reaches this many bytes",
                          at_least=1)
    size: int = flag(None, "size of the problems of think.py's tasks (default: the largest that the first model was trained "
                           "on)", at_least=2, at_most=10_000)
    search: str = flag("none", "for game, what the model does before a move; ahead: reads all moves, --depth of them one "
                               "after the other; puct: AlphaZero's tree search over --simulations positions",
                       choices=SEARCHES)
    depth: int = flag(1, "moves that --search=ahead looks ahead", at_least=1, at_most=8)
    simulations: int = flag(32, "positions that --search=puct reads before a move", at_least=2, at_most=1_000_000)
    temperature: float = flag(1.0, "of the sampling, with more than one of --samples", above=0, at_most=100)
    budget_curve: bool = flag(False, "measure accuracy against tokens, FLOPs and seconds for every way that the model has "
                                     "to spend more at inference, and draw it")
    batch_size: int = flag(16, "rows in a forward pass", at_least=1, at_most=1_000_000)
    answer_tokens: int = flag(64, "for answers, maximum number of tokens in an answer", at_least=1)
    out_path: Path = flag(None, "file to write: a line of JSON for each document or question and model; with "
                                "--budget_curve for each way, budget and model (default there: budget.jsonl, for needle "
                                "needle.jsonl, in the folder of the first model)")
    overwrite: bool = flag(False, "replace --out_path if it exists")
    skip_errors: bool = flag(False, "1 leaves out and counts rows and parts of files that cannot be read or scored")
    adapt: bool = flag(False, "also score a model that learns as it reads: a document hop by hop, each scored before the "
                              "step on it; for choice the context, for answers the question and what precedes it")
    loops: int = redeclare(GPTConfig, "loops", None, help=LOOPS_HELP)

    def __post_init__(self):
        super().__post_init__()
        self.check_inference()
        if self.dataset == "":
            raise BadInput("--dataset=: is empty: give a dataset of the hub, a local path, or `builtin`")
        for path in self.checkpoint_path:
            parts = str(path).split(",")
            if len(parts) > 1 and not path.exists() and all(Path(part).is_file() for part in parts):
                raise BadInput(f"--checkpoint_path={path}: separate the files by spaces: --checkpoint_path "
                               f"{' '.join(parts)}")
        if self.task not in DEFAULT_DATASETS:
            return
        (dataset, split), reads_text = DEFAULT_DATASETS[self.task], self.task in ("text", NEEDLE)
        if self.dataset is None:
            object.__setattr__(self, "dataset", dataset)
        if self.split is None:
            object.__setattr__(self, "split", split if reads_text else default_split(self.dataset, split))
        if reads_text and self.split != "train":
            raise BadInput(f"--split={self.split}: text is read from the train split of a hub dataset: give a local file")
        if reads_text and "," in self.dataset and not local_path(self.dataset):
            raise BadInput(f"--dataset={self.dataset}: give one at a time")
        if self.task == "choice" and self.dataset == "builtin":
            raise BadInput("--dataset=builtin: has no endings to choose from: give a dataset of the hub, or a local path")


    def check_inference(self):
        """Raises BadInput for flags of inference-time compute that the task has no use for."""
        defaults = {name: field.default for name, field in declared_flags(type(self)).items()}
        answers = self.task == "answers" or self.task in TASKS
        learning = [task for task in DEFAULT_DATASETS if task != NEEDLE]
        for names, is_used, where in (
                (declared_flags(CandidateConfig), answers, f"--task=answers, {', '.join(TASKS)}"),
                (("search", "depth", "simulations"), self.task == GAME, f"--task={GAME}"),
                (("size",), self.task in TASKS, f"--task={', '.join(TASKS)}"),
                (("budget_curve",), answers or self.task == GAME, f"--task=answers, {GAME}, {', '.join(TASKS)}"),
                (declared_flags(NeedleConfig), self.task == NEEDLE, f"--task={NEEDLE}"),
                (("adapt",), self.task in learning, f"--task={', '.join(learning)}")):
            for name in () if is_used else names:
                if getattr(self, name) != defaults[name]:
                    raise BadInput(f"--{name}={shorten(getattr(self, name))}: is of {where}: leave it out")
        if self.choose == "verifier" and not (self.task in TASKS and TASKS[self.task].has_verifier):
            raise BadInput(f"--choose=verifier: an answer of --task={self.task} can only be checked by who knows the right "
                           f"one: choose vote, logprob or mbr")
        if self.choose and self.budget_curve:
            raise BadInput(f"--choose={self.choose}: --budget_curve tries every choice: leave it out")


def default_split(dataset: str, split: str) -> str:
    """`split` of a hub dataset; of a local folder that which finetune.py holds out, or train where no file names another."""
    if dataset == "builtin" or not local_path(dataset):
        return split
    return next((name for name in ("validation", "test") if name in local_splits(dataset)), "train")


# -- token losses -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Window:
    """Token ids, at most block_size + 1 of them; the last `n_scored` are scored, given those before."""
    ids: np.ndarray
    n_scored: int


@torch.inference_mode()
def token_losses(model: GPT, machine: Machine, windows: Sequence[Window], batch_size: int,
                 show_progress: bool = True) -> Iterator[tuple[int, Tensor]]:
    """Yields (index of a window, the losses of its scored tokens in nats, (n_scored,) float64).

    Longest windows first: so a batch needs little padding, and too little memory shows at once.
    """
    order = sorted(range(len(windows)), key=lambda i: len(windows[i].ids), reverse=True)
    n_tokens = sum(len(window.ids) - 1 for window in windows)
    with progress_bar(total=n_tokens, unit="tok", unit_scale=True, delay=1, disable=None if show_progress else True) as bar:
        for first in range(0, len(order), batch_size):
            indices = order[first:first + batch_size]
            idx, targets = collate([windows[i] for i in indices])
            with machine.autocast():
                losses = model.eager_forward(idx.to(machine.device), targets.to(machine.device), reduction="none")
            for i, row in zip(indices, losses.cpu().double()):
                n = len(windows[i].ids) - 1
                yield i, row[n - windows[i].n_scored:n]
                bar.update(n)


def collate(windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 (B, T), padded at the end, which no token before it sees."""
    shape = len(windows), max(len(window.ids) for window in windows) - 1
    idx, targets = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE_INDEX)
    for row, window in enumerate(windows):
        ids, n = torch.from_numpy(window.ids.astype(np.int64)), len(window.ids) - 1
        idx[row, :n] = ids[:-1]
        targets[row, n - window.n_scored:n] = ids[len(ids) - window.n_scored:]
    return idx, targets


@torch.no_grad()
def mean_losses(model: GPT, tokenizer: Tokenizer, machine: Machine, batches: Iterable[tuple[Tensor, ...]],
                n_batches: int | None = None, by_position: bool = False) -> dict:
    """val_loss, nats/token, and val_bpb, bits per byte, over all targets of `batches`, and how many tokens and bytes of text
    these are: val_tokens, val_bytes. So train.py and finetune.py validate.

    A batch: inputs, targets and, where rows are packed, document starts, each (B, T). n_batches: shows, on a terminal, a
    progress bar of that many. by_position: adds val_bpb/0-15 and so on, see PositionSums.
    """
    batches = progress_bar(batches, total=n_batches, desc="validation", unit="batch", delay=1, leave=False,
                           disable=None if n_batches else True)
    sums, positions, token_bytes = LossSums(), PositionSums(), torch.from_numpy(tokenizer.token_bytes())

    def losses_of(batch: tuple[Tensor, ...]) -> Tensor:
        idx, targets, *packed = (part.to(machine.device) for part in batch)
        with machine.autocast():
            return model.eager_forward(idx, targets, reduction="none", doc_starts=packed[0] if packed else None).cpu()
    for (_, targets, *_), losses in join().map_in_order(losses_of, batches):
        sums.add(losses, targets, token_bytes)
        if by_position:
            positions.add(losses, targets, token_bytes)
    return {"val_loss": sums.loss, "val_bpb": sums.bits_per_byte, "val_bytes": sums.text_bytes, "val_tokens": sums.tokens,
            **{f"val_bpb/{name}": bits for name, bits in positions.bits_per_byte().items()}}


# -- text -------------------------------------------------------------------------------------------------------------

def read_texts(config: EvaluateConfig, report: ReadReport) -> list[str]:
    """Documents, up to the one that reaches --max_bytes. What is skipped is logged. Raises BadInput."""
    source = open_source(SourceConfig(config.dataset, dataset_config=config.dataset_config, text_column=config.text_column,
                                      skip_errors=config.skip_errors))
    documents = itertools.islice(source.documents(), config.limit)
    if not (texts := list(take_text(documents, config.max_bytes))):
        raise BadInput(f"--dataset={config.dataset}: holds no text")
    return texts


def score_text(model: GPT, tokenizer: Tokenizer, machine: Machine, texts: list[str],
               config: EvaluateConfig, learner: Learner | None = None) -> tuple[dict[str, Score], list[dict]]:
    """Bits per byte and nats per token over all documents."""
    documents = document_losses(model, tokenizer, machine, texts, config.batch_size)
    rows = [{"document": i, "nats": sums.nats, "bytes": sums.text_bytes, "tokens": sums.tokens}
            for i, sums in enumerate(documents, 1)]
    adapted, left_out = {}, {}
    if learner is not None:
        all_nats = after_learning(learner, encode_documents(tokenizer, texts), lambda i, losses: losses.sum().item(),
                                  "document", len(texts))
        left_out, (all_nats, documents, rows) = drop_diverged(all_nats, documents, rows)
        adapted = adapted_bits_per_byte(documents, all_nats)
        rows = [row | {"adapted_nats": nats} for row, nats in zip(rows, all_nats)]
    nats, n_bytes, n_tokens = (sum(row[name] for row in rows) for name in ("nats", "bytes", "tokens"))
    return {"bits per byte": bits_per_byte(documents), **adapted, "nats per token": Score(nats / n_tokens, better="lower"),
            "tokens": count(n_tokens), "bytes": count(n_bytes), **left_out}, rows


def document_losses(model: GPT, tokenizer: Tokenizer, machine: Machine, texts: Sequence[str],
                    batch_size: int) -> list[LossSums]:
    """The summed losses of each text, as a document after the separator, in `sliding_windows`."""
    ids, offsets = tokenizer.encode_batch(texts)
    windows, document_index = [], []
    for i, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        document = np.concatenate([[tokenizer.separator_id], ids[start:stop]])
        windows += sliding_windows(document, model.config.block_size)
        document_index += [i] * (len(windows) - len(document_index))
    sums, token_bytes = [LossSums() for _ in texts], torch.from_numpy(tokenizer.token_bytes())
    for i, losses in token_losses(model, machine, windows, batch_size):
        targets = torch.from_numpy(windows[i].ids[-windows[i].n_scored:].astype(np.int64))
        sums[document_index[i]].add(losses, targets, token_bytes)
    return sums


def sliding_windows(ids: np.ndarray, block_size: int, stride: int | None = None) -> Iterator[Window]:
    """The windows of dataloader.cut_windows that score every token of `ids` but the first once."""
    for start, first, stop in cut_windows(len(ids) - 1, block_size, stride=stride):
        yield Window(ids[start:stop + 1], stop - first)


# -- multiple choice --------------------------------------------------------------------------------------------------

def read_choice_rows(config: EvaluateConfig, report: ReadReport) -> list[Choice]:
    columns = ChoiceColumns(config.question_column, config.endings_column, config.answer_column)
    return read_choices(config.dataset, config.dataset_config, config.split, columns, config.limit,
                        report.skipped if config.skip_errors else None)


def score_choices(model: GPT, tokenizer: Tokenizer, machine: Machine, choices: list[Choice],
                  config: EvaluateConfig, learner: Learner | None = None) -> tuple[dict[str, Score], list[dict]]:
    """An ending's score is the log-probability of its tokens; acc picks the largest, acc_norm the largest per character of
    the ending. Source: EleutherAI's lm-evaluation-harness, `multiple_choice`."""
    windows, fitting = [], []
    for choice in choices:
        try:
            windows.append(list(ending_windows(choice, tokenizer, model.config.block_size)))
            fitting.append(choice)
        except BadInput:
            if not config.skip_errors:
                raise
    if not fitting:
        raise BadInput(f"--dataset={config.dataset}: no question has endings that fit into the model's context")
    n_left_out, choices = len(choices) - len(fitting), fitting
    score = lambda windows: [-nats for nats in window_losses(model, machine, windows, config.batch_size)]
    remaining = iter(score([window for of_choice in windows for window in of_choice]))
    rows = [{"question": choice.context} | choose(choice, list(itertools.islice(remaining, len(choice.endings)))) |
            {"label": choice.label} for choice in choices]
    scores, left_out = {}, {}
    if learner is not None:
        contexts = encode_documents(tokenizer, (choice.context.rstrip() for choice in choices))
        chosen = after_learning(learner, contexts, lambda i, losses: choose(choices[i], score(windows[i])), "question",
                                len(choices))
        left_out, (chosen, rows, choices) = drop_diverged(chosen, rows, choices)
        rows = [row | {f"adapted_{name}": value for name, value in one.items()} for row, one in zip(rows, chosen)]
    for name, key in (("acc", "chosen"), ("acc_norm", "chosen_norm")):
        hits = [row[key] == row["label"] for row in rows]
        scores[name] = proportion(hits)
        if learner is not None:
            scores |= adapted_proportion(name, hits, [row[f"adapted_{key}"] == row["label"] for row in rows])
    chance = sum(1 / len(choice.endings) for choice in choices) / len(choices)
    return scores | {"chance": Score(chance, format=".1%")} | (
        {"questions longer than the context, left out": count(n_left_out)} if n_left_out else {}) | left_out, rows


def window_losses(model: GPT, machine: Machine, windows: Sequence[Window], batch_size: int) -> list[float]:
    """The summed loss of each window's scored tokens in nats."""
    sums = [0.0] * len(windows)
    for i, losses in token_losses(model, machine, windows, batch_size):
        sums[i] = losses.sum().item()
    return sums


def choose(choice: Choice, scores: list[float]) -> dict:
    """The scores of the endings, and which of these have the largest, by itself and per character."""
    per_character = [score / len(ending) for score, ending in zip(scores, choice.endings)]
    return {"scores": scores, "chosen": scores.index(max(scores)),
            "chosen_norm": per_character.index(max(per_character))}


def ending_windows(choice: Choice, tokenizer: Tokenizer, block_size: int) -> Iterator[Window]:
    """A window for each ending, after the separator and the context, which is truncated at its beginning where it is too
    long for the model. Raises BadInput where not even the ending fits."""
    for context, ending in zip(choice.contexts or [choice.context] * len(choice.endings), choice.endings):
        context = context.rstrip()  # the space belongs to the ending: a word's token starts with it
        n_context = len(tokenizer.encode(context))
        # encode both as one text, then split, as lm-eval does: a token may span the boundary
        ids = [tokenizer.separator_id, *tokenizer.encode(f"{context} {ending}")]
        n_ending = max(1, len(ids) - 1 - n_context)
        if n_ending > block_size:
            raise BadInput(f"{choice.where}: an ending has {n_ending:,} tokens, the model's context holds {block_size:,}: "
                           f"--skip_errors=1 leaves such rows out")
        yield Window(np.array(ids[-block_size - 1:]), n_ending)


# -- questions --------------------------------------------------------------------------------------------------------

def read_questions(config: EvaluateConfig, report: ReadReport) -> list[Conversation]:
    """All conversations of a dataset, which nothing is trained on here; of the built-in ones those that finetune.py holds
    out. Raises BadInput."""
    source = ConversationConfig(config.dataset, config.dataset_config, config.split, config.question_column,
                                config.answer_column, skip_errors=config.skip_errors)
    if config.dataset == "builtin":
        return builtin_held_out(config.limit or source.val_conversations)
    return list(itertools.islice(read_all(source, ROLES, report), config.limit))


def score_answers(model: GPT, tokenizer: Tokenizer, machine: Machine, conversations: list[Conversation],
                  config: EvaluateConfig, learner: Learner | None = None) -> tuple[dict[str, Score], list[dict]]:
    """As finetune.py validates: exact match of the last answer of each conversation, and bits per byte of everything that
    the assistant says."""
    block_size, answers = model.config.block_size, []
    if config.skip_errors:
        conversations = encodable(conversations, tokenizer, skipped := [])
        if skipped:
            log_line(f"left out {len(skipped):,}, the first: {skipped[0]}")
    batches = PackedBatches(tokenizer, conversations, config.batch_size, block_size, seed=0)
    prompts, spent = eval_prompts(conversations, tokenizer, block_size), {}
    if prompts and (config.samples > 1 or config.think is not None):
        chosen, spent = spend(model, tokenizer, machine, [prompt.ids for prompt in prompts], answer_checks(prompts),
                              room_for_answers(model, tokenizer, prompts, config), config)
        answers = [answer_row(prompt, answer.text) for prompt, answer in zip(prompts, chosen)]
    else:
        with machine.autocast(), progress_bar(total=len(prompts), unit="question", delay=1) as bar:
            for first in range(0, len(prompts), PROMPTS_PER_BATCH):
                answers += answer_prompts(model, tokenizer, prompts[first:first + PROMPTS_PER_BATCH], config.answer_tokens)
                bar.update(len(answers) - bar.n)
    adapted, left_out = {}, {}
    if learner is not None and answers:
        outputs = adapted_answers(learner, tokenizer, prompts, config.answer_tokens)
        left_out, (outputs, answers) = drop_diverged(outputs, answers)
        answers = [row | {"adapted_output": output, "adapted_correct": exact_match(output, row["answer"])}
                   for row, output in zip(answers, outputs)]
        adapted = adapted_proportion("exact match", *([row[name] for row in answers]
                                                      for name in ("correct", "adapted_correct")))
    scores = {"exact match": proportion([row["correct"] for row in answers])} if answers else {}
    scores |= spent | adapted
    by_task = group_by_task(answers)
    if len(by_task) > 1:
        scores |= {f"- {task}": proportion([row["correct"] for row in rows]) for task, rows in by_task.items()}
    n_batches = math.ceil(batches.n_blocks / config.batch_size)
    bpb = mean_losses(model, tokenizer, machine, batches.sequential(), n_batches)["val_bpb"]
    return scores | {"questions that fit into the context": count(len(answers)),
                     "bits per byte of the answers": Score(bpb, better="lower")} | left_out, answers


@dataclass(frozen=True)
class EvalPrompt:
    """The ids of a conversation up to the assistant's turn, and the right answer. kind, task: see Conversation."""
    ids: list[int]
    question: str
    answer: str
    kind: str
    task: str


def eval_prompts(conversations: list[Conversation], tokenizer: Tokenizer, block_size: int) -> list[EvalPrompt]:
    """The last question of each conversation, where it fits into the context together with its answer."""
    prompts = []
    for conversation in conversations:
        messages = conversation.messages
        last = max((i for i, message in enumerate(messages) if has_loss(message)), default=0)
        if last:
            ids, _ = tokenizer.encode_chat(messages[:last], add_generation_prompt=True, max_tokens=block_size + 1)
            question, answer = messages[last - 1]["content"], messages[last]["content"]
            if len(ids) <= block_size and len(ids) + len(tokenizer.encode(answer)) <= block_size:
                prompts.append(EvalPrompt(ids, question, answer, conversation.kind, conversation.task))
    return prompts


def answer_prompts(model: GPT, tokenizer: Tokenizer, prompts: list[EvalPrompt], answer_tokens: int,
                   show_progress: bool = False) -> list[dict]:
    """A row for each prompt with the model's greedy answer, `output`, of at most `answer_tokens` tokens and no more
    than the longest right answer and its end. show_progress: a bar, on a terminal."""
    outputs = greedy_answers(model, tokenizer, [prompt.ids for prompt in prompts],
                             min(longest_answer(tokenizer, prompts) + 1, answer_tokens), show_progress)
    return [answer_row(prompt, output) for prompt, output in zip(prompts, outputs)]


def answer_row(prompt: EvalPrompt, output: str) -> dict:
    return {"kind": prompt.kind, "task": prompt.task, "question": prompt.question, "answer": prompt.answer,
            "output": output, "correct": is_right(output, prompt.answer)}


def is_right(output: str, answer: str) -> bool:
    """With a thought before it or without."""
    return exact_match(output, answer) or exact_match(final_answer(output), answer)


def answer_checks(prompts: list[EvalPrompt]) -> list[Callable[[str], float]]:
    return [partial(is_right, answer=prompt.answer) for prompt in prompts]


def room_for_answers(model: GPT, tokenizer: Tokenizer, prompts: list[EvalPrompt], config: EvaluateConfig) -> int:
    """Tokens of an answer: --answer_tokens, but no more than a right one can take, or fit into the context. Raises BadInput
    where a thought of --think leaves none."""
    room = model.config.block_size + 1 - max(len(prompt.ids) for prompt in prompts)
    needed = longest_answer(tokenizer, prompts) + 1 + (0 if config.think is None else config.think + 1)
    if needed > room:
        raise BadInput(f"--think={config.think}: with its question and its answer, a thought has to fit into the context of "
                       f"{model.config.block_size:,} tokens: give at most {max(0, config.think - needed + room)}")
    return min(room, max(config.answer_tokens, needed) if config.think is not None else min(config.answer_tokens, needed))


def adapted_answers(learner: Learner, tokenizer: Tokenizer, prompts: list[EvalPrompt], answer_tokens: int) -> list:
    """The model's greedy answer to each prompt after it has learnt from the prompt alone, see `after_learning`."""
    n_tokens = min(answer_tokens, longest_answer(tokenizer, prompts) + 1)

    def answer(i: int, losses: Tensor) -> str:
        with learner.machine.autocast():  # its casts of the weights end with it
            return greedy_answers(learner.model, tokenizer, [prompts[i].ids], n_tokens)[0]
    return after_learning(learner, (torch.tensor(prompt.ids) for prompt in prompts), answer, "question", len(prompts))


def longest_answer(tokenizer: Tokenizer, prompts: list[EvalPrompt]) -> int:
    """Tokens of the longest right answer."""
    return max((len(tokenizer.encode(prompt.answer)) for prompt in prompts), default=0)


def greedy_answers(model: GPT, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int,
                   show_progress: bool = False) -> list[str]:
    """The text that the model adds to each of `prompts`, ids; PROMPTS_PER_BATCH are computed together, by several processes
    in turns."""
    def answers_from(first: int) -> list[str]:
        batch = prompts[first:first + PROMPTS_PER_BATCH]
        outputs = [""] * len(batch)
        for row, text in generate_texts(model, tokenizer, batch, max_new_tokens, GREEDY):
            outputs[row] += text
        return outputs
    starts = progress_bar(range(0, len(prompts), PROMPTS_PER_BATCH), desc="answers", unit="batch", delay=1, leave=False,
                          disable=None if show_progress else True)
    return [text for _, outputs in join().map_in_order(answers_from, starts) for text in outputs]


def spend(model: GPT, tokenizer: Tokenizer, machine: Machine, prompts: list[list[int]], checks: list[Callable[[str], float]],
          max_new_tokens: int, config: EvaluateConfig) -> tuple[list[Answer], dict[str, Score]]:
    """The answer to each of `prompts`, ids, that --samples, --choose and --think lead to, and rows of the table: what it
    cost, and of several samples how often one, and any of them, is right."""
    sampling = GREEDY if config.samples == 1 else SamplingConfig(config.temperature, top_k=0)
    generator, found = torch.Generator(machine.device).manual_seed(0), []
    with machine.autocast(), progress_bar(total=len(prompts), unit="question", delay=1) as bar:
        for first in range(0, len(prompts), PROMPTS_PER_BATCH):
            part = prompts[first:first + PROMPTS_PER_BATCH]
            found += sample_candidates(model, tokenizer, part, config, max_new_tokens, sampling, generator)
            bar.update(len(part))
    right = [[check(answer.text) > 0 for answer in answers] for answers, check in zip(found, checks)]
    chosen = [CHOICES[config.choose or "vote"](answers, check) for answers, check in zip(found, checks)]
    n_tokens = sum(len(answer.ids) for answers in found for answer in answers)
    scores = {"exact match": proportion([row[i] for row, i in zip(right, chosen)])}
    if config.samples > 1:
        scores |= {"pass@1": Score(sum(sum(row) / len(row) for row in right) / len(right), better="higher", format=".1%"),
                   "one of the samples right": proportion([any(row) for row in right]),
                   "samples of a question": Score(sum(map(len, right)) / len(right), format=".1f")}
    return ([answers[i] for answers, i in zip(found, chosen)],
            scores | {"tokens generated for a question": Score(n_tokens / len(prompts), format=",.1f")})


def exact_match(output: str, answer: str) -> bool:
    """Equal except for whitespace."""
    return output.split() == answer.split()


def accuracy(answers: list[dict]) -> float:
    """Fraction of the rows that are correct."""
    return sum(row["correct"] for row in answers) / len(answers)


def group_by_kind(answers: list[dict]) -> dict[str, list[dict]]:
    """The rows of each kind of question, without those of no kind."""
    return {kind: [row for row in answers if row["kind"] == kind]
            for kind in dict.fromkeys(row["kind"] for row in answers) if kind}


def group_by_task(answers: list[dict]) -> dict[str, list[dict]]:
    """The rows of each task, under a display name; without those of no task."""
    groups = {}
    for row in answers:
        kind, task = row["kind"], row["task"]
        if task:
            groups.setdefault(task if kind in ("", task) else f"{kind}: {task}", []).append(row)
    return groups


# -- needles ----------------------------------------------------------------------------------------------------------

def read_haystack(config: EvaluateConfig, report: ReadReport) -> list[str]:
    """Held-out documents, up to the one that reaches --max_bytes. Raises BadInput."""
    texts = held_out_texts(SourceConfig(config.dataset, dataset_config=config.dataset_config,
                                        text_column=config.text_column, skip_errors=config.skip_errors))
    return list(take_text(texts, config.max_bytes))


def score_needles(model: GPT, tokenizer: Tokenizer, machine: Machine, texts: list[str], config: EvaluateConfig,
                  learner: None) -> tuple[dict[str, Score], list[dict]]:
    """Facts at each length and depth, and the same questions without the fact. The choice is the answer with the largest
    log-probability; an exact match, the right answer where each of its tokens is the greedy one. The gain is how much more
    the fact raises the log-probability of the right answer than that of the others on average."""
    haystack = Haystack(np.array(tokenizer.encode("\n\n".join(texts))), tokenizer.encode, tokenizer.separator_id)
    needles = make_needles(config.limit or N_NEEDLES, config.needle_choices, config.needle_seed)
    lengths = config.needle_lengths or default_lengths(haystack, needles, model.config.block_size)
    # without the fact first, which gains are measured from
    questions = [*itertools.product(sorted(set(lengths)), (None, *sorted(set(config.needle_depths))), range(len(needles)))]
    prompts, choices = [haystack.prompt(needles[i], *cell) for *cell, i in questions], list(map(haystack.choices, needles))
    with machine.autocast():
        scored = score_continuations(model, prompts, [choices[i] for *_, i in questions], config.batch_size)
    rows, absent = [], {}
    for (length, depth, i), answers in zip(questions, scored):
        scores, label = [answer.logprob for answer in answers], needles[i].label
        margin = scores[label] - statistics.fmean(scores[:label] + scores[label + 1:])
        gain, chosen = margin - absent.setdefault((length, i), margin), scores.index(max(scores))
        rows.append({"fact": i, "length": length, "depth": depth, "question": needles[i].question,
                     "choices": needles[i].choices, "label": label, "scores": scores, "chosen": chosen,
                     "correct": chosen == label, "exact": answers[label].is_greedy, "gain": None if depth is None else gain})
    return needle_scores(rows), rows


# -- problems of think.py ---------------------------------------------------------------------------------------------

def problem_size(config: EvaluateConfig) -> int:
    """Raises BadInput where the first model was not trained on the task and --size is not given."""
    if config.size:
        TASKS[config.task].check_size(config.size)
        return config.size
    path, task = config.checkpoint_path[0], TASKS[config.task]
    _, _, flags = load_pretrained(path)
    return flags.get("size") or task.size if flags.get("task") == config.task else task.size


def read_problems(config: EvaluateConfig, report: ReadReport) -> list[Problem]:
    return TASKS[config.task].make(config.limit or N_PROBLEMS, problem_size(config), seed=0)


def score_problems(model: GPT, tokenizer: Tokenizer, machine: Machine, problems: list[Problem], config: EvaluateConfig,
                   learner: None) -> tuple[dict[str, Score], list[dict]]:
    """Exact match; of Countdown, what the verifier accepts."""
    task, size = TASKS[config.task], problem_size(config)
    level = task.levels[0] if config.think is None else task.level_within(config.think, size)
    subject = ask_problems(model, tokenizer, machine, problems, [level], size, task.has_verifier)
    answers, scores = spend(model, tokenizer, machine, subject.depths[0].prompts, subject.checks, subject.answer_tokens,
                            config)
    rows = [{"question": problem.text, "answer": problem.answer, "output": answer.text,
             "correct": bool(answer.has_ended and problem.check(answer.text) > 0)}
            for problem, answer in zip(problems, answers)]
    return scores, rows


# -- games ------------------------------------------------------------------------------------------------------------

def read_exam(config: EvaluateConfig, report: ReadReport) -> list[Question]:
    """Positions of the game that the first model plays, solved. Raises BadInput where it plays none, or one with hidden
    cards."""
    path = config.checkpoint_path[0]
    name, game = checkpoint_game(load_checkpoint(path), path)
    if game.has_hidden_cards or not (exam := make_exam(game, config.limit or EXAM_SIZE)):
        raise BadInput(f"{path}: {name} has no positions that are solved: give a model of another game")
    return exam


def score_play(model: GPT, game: Game, machine: Machine, exam: list[Question], config: EvaluateConfig,
               learner: None) -> tuple[dict[str, Score], list[dict]]:
    """The fraction of positions in which the model chooses one of the best moves."""
    choose = {"none": first_sight, "ahead": partial(look_ahead, depth=config.depth),
              "puct": partial(search_moves, simulations=config.simulations)}[config.search]
    point = measure_moves(GameSubject(model, game, exam, machine), config.search, 0, choose)
    rows = [{"position": i, "correct": bool(right)} for i, right in enumerate(point.right)]
    return {"optimal moves": proportion(point.right.astype(bool).tolist()),
            "positions read before a move": Score(point.tokens, format=",.1f"),
            "MFLOP of a move": Score(point.flops / 1e6, format=",.2f")}, rows


# -- curves -----------------------------------------------------------------------------------------------------------

def measure_curve(model: GPT, tokenizer: Tokenizer | Game, machine: Machine, examples: list,
                  config: EvaluateConfig) -> list[Point]:
    """Every way to spend more at inference that the model has. Raises BadInput where nothing fits into the context."""
    n_samples = config.samples if config.samples > 1 else BUDGET_SAMPLES
    sampling = SamplingConfig(config.temperature, top_k=0)
    if config.task == GAME:
        return measure_play(GameSubject(model, tokenizer, examples, machine))
    if config.task in TASKS:
        task = TASKS[config.task]
        subject = ask_problems(model, tokenizer, machine, examples, task.levels, problem_size(config), task.has_verifier)
    else:
        prompts = eval_prompts(examples, tokenizer, model.config.block_size)
        if not prompts:
            raise BadInput(f"--dataset={config.dataset}: no question fits into the model's context with its answer")
        subject = Subject(model, tokenizer, machine, [Depth("", 0, [prompt.ids for prompt in prompts])],
                          answer_checks(prompts), False, room_for_answers(model, tokenizer, prompts, config))
    return measure_budgets(subject, n_samples, sampling)


def report_curves(curves: dict[str, list[dict]], config: EvaluateConfig, machine: Machine, n: int, unit: str):
    """Prints a table for each model, and writes rows, a page and its pictures. curves: checkpoint -> rows."""
    path = config.out_path or run_folder(config.checkpoint_path[0]) / "budget.jsonl"
    for name, rows in curves.items():
        print(f"{name}\n\n{markdown(budget_table(rows))}\n")
    sections = {name: (draw_budgets(rows, f": {name}" if len(curves) > 1 else ""), [budget_table(rows)])
                for name, rows in curves.items()}
    timed = f"batches of {POSITIONS_PER_BATCH} positions" if config.task == GAME else "one question at a time"
    rows = [{"checkpoint": name, "task": config.task} | row for name, rows in curves.items() for row in rows]
    write_results(path, rows, f"What accuracy costs: {config.task}", (
        f"{n:,} {unit}, the same ones for every way, on {machine}. Accuracy and differences, which are paired, with 95 % "
        f"intervals. Tokens, FLOPs and seconds: of a question on average, with the reading of it; seconds are those of "
        f"{timed}."), sections, "budgets")
    say(f"saved {path} and {path.with_suffix('.html')}")


# -- the command ------------------------------------------------------------------------------------------------------

# task -> read(config, report) -> examples; score(model, tokenizer, machine, examples, config, learner) -> (scores, rows of
# --out_path), where a learner, of the model, adds the scores after learning; what an example is called
EVALUATIONS = {"text": (read_texts, score_text, "documents"), "choice": (read_choice_rows, score_choices, "questions"),
               "answers": (read_questions, score_answers, "conversations"),
               NEEDLE: (read_haystack, score_needles, "documents"), GAME: (read_exam, score_play, "positions"),
               **dict.fromkeys(TASKS, (read_problems, score_problems, "problems"))}


def load_game_model(path: Path, first: Path) -> tuple[GPT, Game]:
    """A model that plays what the `first` one does, on the CPU. Raises BadInput."""
    name, game = checkpoint_game(load_checkpoint(first), first)
    return load_player(path, load_checkpoint(path), name, game), game


def check_checkpoints(config: EvaluateConfig, adapt: AdaptConfig):
    """Raises BadInput if any of them cannot be used, before the first is scored."""
    for path in config.checkpoint_path:
        if config.task == GAME:
            load_game_model(path, config.checkpoint_path[0])
            continue
        model, *_ = load_pretrained(path, chat=config.task == "answers" or config.task in TASKS)
        longest = max(config.needle_lengths or [0])
        if longest > model.config.block_size:
            raise BadInput(f"--needle_lengths={longest}: {path} has a context of {model.config.block_size:,} tokens: give "
                           f"no more")
        if config.adapt:
            with explain_damage(path):
                Learner(model, adapt, Machine(torch.device("cpu"), "fp32"))  # the scope may have nothing in this model


def load_scored(path: Path, machine: Machine, config: EvaluateConfig) -> tuple[GPT, Tokenizer | Game]:
    """The model on the device, and what its tokens mean."""
    if config.task == GAME:
        model, game = load_game_model(path, config.checkpoint_path[0])
        model.loops = config.loops or model.loops
        return model.to(machine.device), game
    return load_model(path, machine, loops=config.loops)


def score_checkpoint(path: Path, machine: Machine, examples: list, config: EvaluateConfig,
                     adapt: AdaptConfig) -> tuple[dict[str, Score], list[dict]]:
    """See EVALUATIONS."""
    learner = None
    if config.adapt:
        model, tokenizer, _ = load_pretrained(path, loops=config.loops)  # all weights in fp32, to train on
        learner = open_learner(model, tokenizer, adapt, machine)
    else:
        model, tokenizer = load_scored(path, machine, config)
    _, score, _ = EVALUATIONS[config.task]
    return score(model, tokenizer, machine, examples, config, learner)


def check_out_path(config: EvaluateConfig):
    if config.out_path:
        check_writable(config.out_path, f"--out_path={config.out_path}")
        draws = config.budget_curve or config.task == NEEDLE
        if draws and config.out_path.suffix in PICTURES:
            raise BadInput(f"--out_path={config.out_path}: the picture gets this name: end it in .jsonl")
        paths = [config.out_path, *(config.out_path.with_suffix(suffix) for suffix in PICTURES if draws)]
        if not config.overwrite and (found := [path for path in paths if path.exists()]):
            which = "" if found[0] == config.out_path else f"{found[0].name} "
            raise BadInput(f"--out_path={config.out_path}: {which}exists: replace it with --overwrite, or choose another "
                           f"path")


@command
def main(argv=None):
    """Scores models on text, on multiple choice, or on questions."""
    config, adapt, device_config = parse_flags(main.__doc__, argv, EvaluateConfig, AdaptConfig, DeviceConfig)
    require_adapt(config.adapt, adapt)
    check_out_path(config)
    check_checkpoints(config, adapt)
    read, _, unit = EVALUATIONS[config.task]
    examples, machine = read(config, report := ReadReport()), open_machine(device_config)
    start, scores, rows = time.perf_counter(), {}, []
    with explain_failures(lambda: f"--batch_size={config.batch_size}: try a smaller one, or --device=cpu"):
        if config.budget_curve:
            curves = {str(path): budget_rows(measure_curve(*load_scored(path, machine, config), machine, examples, config))
                      for path in config.checkpoint_path}
            report_curves(curves, config, machine, len(examples), unit)
            return
        for path in config.checkpoint_path:
            scores[str(path)], new_rows = score_checkpoint(path, machine, examples, config, adapt)
            rows += [{"checkpoint": str(path)} | row for row in new_rows]
            gc.collect()  # a learner and its state refer to each other: the next model would be loaded beside this one
    print(markdown(score_table(scores)))
    what = config.task if config.task not in DEFAULT_DATASETS else config.dataset
    has_splits = config.task in DEFAULT_DATASETS and config.task != NEEDLE and config.dataset != "builtin" and (
        not local_path(config.dataset) or local_splits(config.dataset))
    split = f", {config.split}" if has_splits else ""
    loops = f" with --loops={config.loops}" if config.loops else ""
    say(f"\n{what}{split}: {len(examples):,} {unit}{loops}; value ± standard error; "
        f"{time.perf_counter() - start:.1f} s on {machine}")
    for line in report.lines():
        say(line)
    if config.task == NEEDLE:
        path = config.out_path or run_folder(config.checkpoint_path[0]) / "needle.jsonl"
        print("", write_needle_report(rows, path, f"text of {config.dataset}"), sep="\n")
        say(f"saved {path} and {path.with_suffix('.html')}")
    elif config.out_path:
        with atomic_write(config.out_path, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
