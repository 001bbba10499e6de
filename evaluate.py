"""Scores of trained models, side by side: bits per byte of any text, multiple choice, and questions answered right.

    python evaluate.py --checkpoint_path checkpoints/gpt.pt --dataset=notes.txt
    python evaluate.py --checkpoint_path a.pt b.pt --task=choice                          HellaSwag
    python evaluate.py --checkpoint_path checkpoints/gpt_finetuned.pt --task=answers      the built-in questions
"""
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataloader import IGNORE_INDEX, PackedBatches
from experiments.report import Table, markdown
from model import GPT
from runtime.checkpoint import load_checkpoint, reading
from runtime.cli import command, explain_failures, parse_flags
from runtime.config import BadInput, check_flags, flag
from runtime.device import DeviceConfig, Machine, open_machine
from runtime.files import atomic_write, check_writable
from runtime.metrics import LossSums
from sampling import GREEDY, generate_texts, load_model
from tasks.conversations import Conversation, ConversationConfig, builtin_held_out, read_everything
from tasks.multiple_choice import Choice, choice_of
from tasks.rows import read_dataset
from text.sources import SourceConfig, local_path, open_source, take_text
from tokenizer import Tokenizer

PROMPTS_AT_ONCE = 64
# What each task takes where no --dataset, or no --split, is given.
DEFAULTS = {"text": ("builtin", "train"), "choice": ("Rowan/hellaswag", "validation"), "answers": ("builtin", "train")}


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure."""
    checkpoint_path: tuple[Path, ...] = flag((Path("checkpoints/gpt.pt"),), "models, with spaces between, to show side by "
                                                                            "side")
    task: str = flag("text", "bits per byte of text; the right one of several endings; or questions answered word for word",
                     choices=tuple(DEFAULTS))
    dataset: str = flag(None, "a dataset of the hub by its id, a local file or folder, or `builtin`: for text the "
                              "documentation inside\nPython, numpy and torch, most of which a model that was trained on "
                              "it has seen; for answers the held-out\nquestions of finetune.py (default: builtin; for "
                              "choice Rowan/hellaswag)")
    dataset_config: str = flag(None, "configuration of a hub dataset")
    split: str = flag(None, "of a hub dataset (default: train, which is all that text is read of; for choice validation)")
    text_column: str = flag("text", "with --task=text, the column or JSON key that holds the text")
    question_column: str = flag(None, "column of questions, or of what the endings go on from (default: the first of ctx, "
                                      "query, question; for\nanswers as finetune.py)")
    answer_column: str = flag(None, "column of answers, or of the number of the right ending (default: the first of label, "
                                    "answerKey, gold,\nanswer; for answers as finetune.py)")
    limit: int = flag(None, "documents, rows or conversations to take, the first ones (default: all; of the built-in "
                            "questions as\nmany as finetune.py holds out)", at_least=1)
    max_bytes: int = flag(1_000_000, "of text to read, with whole documents", at_least=1)
    batch_size: int = flag(16, "rows that the model reads at once", at_least=1, at_most=1_000_000)
    answer_tokens: int = flag(64, "tokens of an answer at most", at_least=1)
    out_path: Path = flag(None, "file to write: a line of JSON for each document or question and model")
    overwrite: bool = flag(False, "let --out_path replace a file")

    def __post_init__(self):
        check_flags(self)
        if self.dataset == "":
            raise BadInput("--dataset=: is empty: give a dataset of the hub, a local path, or `builtin`")
        for name, default in zip(("dataset", "split"), DEFAULTS[self.task]):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if self.task == "text" and self.split != "train":
            raise BadInput(f"--split={self.split}: of a hub dataset, text is read from its train split: give a local file")
        if self.task == "text" and "," in self.dataset and not local_path(self.dataset):
            raise BadInput(f"--dataset={self.dataset}: one at a time")
        if self.task == "choice" and self.dataset == "builtin":
            raise BadInput("--dataset=builtin: has no endings to choose from: give a dataset of the hub, or a local path")


@dataclass(frozen=True)
class Measured:
    """A number and its standard error, nan where that is not known. form: how both are shown."""
    value: float
    error: float = math.nan
    form: str = ".4f"

    def __str__(self) -> str:
        shown = format(self.value, self.form)
        return shown if math.isnan(self.error) else f"{shown} ± {format(self.error, self.form)}"


def share(hits: Sequence[bool]) -> Measured:
    """Of hits, with the standard error of a mean of zeros and ones, √(p (1 - p) / (n - 1))."""
    n, p = len(hits), sum(hits) / len(hits)
    return Measured(p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan, ".1%")


def progress(total: int, unit: str) -> tqdm:
    # as train.py's, where nobody watches; what is done at once needs none
    return tqdm(total=total, unit=unit, unit_scale=unit == "tok", delay=1, dynamic_ncols=True,
                mininterval=0.2 if sys.stderr.isatty() else 30)


# -- losses of tokens -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Window:
    """Token ids, at most one more than the context holds, of which the last `n_scored` are scored."""
    ids: np.ndarray
    n_scored: int


def batch_of(windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 (B, T). Rows are filled up at their ends, which no token before them sees."""
    shape = len(windows), max(len(window.ids) for window in windows) - 1
    idx, targets = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE_INDEX)
    for row, window in enumerate(windows):
        ids, n = torch.from_numpy(window.ids.astype(np.int64)), len(window.ids) - 1
        idx[row, :n] = ids[:-1]
        targets[row, n - window.n_scored:n] = ids[len(ids) - window.n_scored:]
    return idx, targets


@torch.inference_mode()
def losses_of(model: GPT, machine: Machine, windows: Sequence[Window], batch_size: int) -> Iterator[tuple[int, Tensor]]:
    """Yields the number of each window and the losses of its scored tokens, (n_scored,) float64, in nats. Long windows come
    first: those of a batch are about as long, and if memory does not suffice, it shows at once."""
    order = sorted(range(len(windows)), key=lambda i: len(windows[i].ids), reverse=True)
    with progress(sum(len(window.ids) - 1 for window in windows), "tok") as bar:
        for first in range(0, len(order), batch_size):
            numbers = order[first:first + batch_size]
            idx, targets = batch_of([windows[i] for i in numbers])
            with machine.autocast():
                losses = model.eager_forward(idx.to(machine.device), targets.to(machine.device), reduction="none")
            for i, row in zip(numbers, losses.cpu().double()):
                n = len(windows[i].ids) - 1
                yield i, row[n - windows[i].n_scored:n]
                bar.update(n)


# -- text -------------------------------------------------------------------------------------------------------------

def read_texts(config: EvaluateConfig) -> list[str]:
    """Documents, the last of which reaches --max_bytes. Raises BadInput."""
    source = open_source(SourceConfig(config.dataset, dataset_config=config.dataset_config,
                                      text_column=config.text_column))
    documents = itertools.islice(source.documents(), config.limit)
    if not (texts := list(take_text(documents, config.max_bytes))):
        raise BadInput(f"--dataset={config.dataset}: no text in it")
    return texts


def windows_of(ids: np.ndarray, block_size: int) -> Iterator[Window]:
    """Every token of `ids` but the first is scored once, in windows of `block_size` inputs, each half a block after the one
    before. The first scores all its tokens, the others those that are new: so a token sees at least the half block
    before it, or all there is. Known as strided evaluation."""
    n, scored = len(ids) - 1, 0
    for start in range(0, n, max(1, block_size // 2)):
        stop = min(start + block_size, n)
        yield Window(ids[start:stop + 1], stop - scored)
        scored = stop
        if stop == n:
            return


def document_losses(model: GPT, tokenizer: Tokenizer, machine: Machine, texts: Sequence[str],
                    batch_size: int) -> list[LossSums]:
    """Of each text, a document of its own after the separator, in `windows_of` it."""
    ids, offsets = tokenizer.encode_batch(texts)
    windows, owners = [], []
    for i, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        led = np.concatenate([[tokenizer.separator_id], ids[start:stop]])
        windows += windows_of(led, model.config.block_size)
        owners += [i] * (len(windows) - len(owners))
    sums, token_bytes = [LossSums() for _ in texts], torch.from_numpy(tokenizer.token_bytes())
    for i, losses in losses_of(model, machine, windows, batch_size):
        targets = torch.from_numpy(windows[i].ids[-windows[i].n_scored:].astype(np.int64))
        sums[owners[i]].add(losses, targets, token_bytes)
    return sums


def bits_per_byte(documents: Sequence[LossSums]) -> Measured:
    """Of all together. Documents differ in length, so the error is that of a ratio, linearised. Source: Cochran 1977,
    Sampling Techniques, equation 2.46."""
    bits, n_bytes = [one.text_nats / math.log(2) for one in documents], [one.text_bytes for one in documents]
    n, total, ratio = len(documents), sum(n_bytes), sum(bits) / sum(n_bytes)
    squares = sum((b - ratio * size) ** 2 for b, size in zip(bits, n_bytes))
    return Measured(ratio, math.sqrt(n / (n - 1) * squares) / total if n > 1 else math.nan)


def score_text(model: GPT, tokenizer: Tokenizer, machine: Machine, texts: list[str],
               config: EvaluateConfig) -> tuple[dict[str, Measured], list[dict]]:
    documents = document_losses(model, tokenizer, machine, texts, config.batch_size)
    rows = [{"document": i, "nats": one.nats, "bytes": one.text_bytes, "tokens": one.tokens}
            for i, one in enumerate(documents, 1)]
    nats, n_bytes, n_tokens = (sum(row[name] for row in rows) for name in ("nats", "bytes", "tokens"))
    return {"bits per byte": bits_per_byte(documents), "nats per token": Measured(nats / n_tokens),
            "tokens": Measured(n_tokens, form=","), "bytes": Measured(n_bytes, form=",")}, rows


def read_choices(config: EvaluateConfig) -> list[Choice]:
    rows = itertools.islice(read_dataset(config.dataset, config.dataset_config, config.split), config.limit)
    choices = []
    for where, row in rows:
        try:
            choices.append(choice_of(row, where, config.question_column, config.answer_column))
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from None
    if not choices:
        raise BadInput(f"--dataset={config.dataset}: holds no rows")
    return choices


def endings_of(choice: Choice, tokenizer: Tokenizer, block_size: int) -> Iterator[Window]:
    """One for each ending, after the separator and the context; of what is too long for the model, the beginning is cut.
    Raises BadInput where not even the ending fits."""
    context = choice.context.rstrip()  # a word's token begins with the space before it
    n_context = len(tokenizer.encode(context))
    for ending in choice.endings:
        # together, and then cut: as tokens would come in a text; lm-eval does it like this
        ids = [tokenizer.separator_id, *tokenizer.encode(f"{context} {ending}")]
        n_ending = max(1, len(ids) - 1 - n_context)
        if n_ending > block_size:
            raise BadInput(f"{choice.where}: an ending has {n_ending:,} tokens, the model's context holds {block_size:,}: "
                           f"leave the row out")
        yield Window(np.array(ids[-block_size - 1:]), n_ending)


def score_choice(model: GPT, tokenizer: Tokenizer, machine: Machine, choices: list[Choice],
                 config: EvaluateConfig) -> tuple[dict[str, Measured], list[dict]]:
    """An ending's score is the log-probability of its tokens; acc takes the largest, acc_norm the largest per character of
    the ending. Source: EleutherAI's lm-evaluation-harness, `multiple_choice`."""
    windows = [window for choice in choices for window in endings_of(choice, tokenizer, model.config.block_size)]
    sums = [0.0] * len(windows)
    for i, losses in losses_of(model, machine, windows, config.batch_size):
        sums[i] = -losses.sum().item()
    rows, rest = [], iter(sums)
    for choice in choices:
        scores = list(itertools.islice(rest, len(choice.endings)))
        per_character = [score / len(ending) for score, ending in zip(scores, choice.endings)]
        rows.append({"question": choice.context, "scores": scores, "chosen": scores.index(max(scores)),
                     "chosen_norm": per_character.index(max(per_character)), "label": choice.label})
    chance = sum(1 / len(choice.endings) for choice in choices) / len(choices)
    return {"acc": share([row["chosen"] == row["label"] for row in rows]),
            "acc_norm": share([row["chosen_norm"] == row["label"] for row in rows]),
            "by chance": Measured(chance, form=".1%")}, rows


# -- questions --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class EvalPrompt:
    """The ids of a conversation up to a question, and the answer that is right. kind, task: see Conversation."""
    ids: list[int]
    question: str
    answer: str
    kind: str
    task: str


def eval_prompts(conversations: list[Conversation], tokenizer: Tokenizer, block_size: int) -> list[EvalPrompt]:
    """The last question of each conversation, where it fits into the context together with its answer."""
    prompts = []
    for one in conversations:
        last = max((i for i, message in enumerate(one.messages) if message["role"] == "assistant"), default=0)
        if last:
            ids, _ = tokenizer.encode_chat(one.messages[:last], answer=True)
            question, answer = one.messages[last - 1]["content"], one.messages[last]["content"]
            if len(ids) + len(tokenizer.encode(answer)) <= block_size:
                prompts.append(EvalPrompt(ids, question, answer, one.kind, one.task))
    return prompts


def answer_prompts(model: GPT, tokenizer: Tokenizer, prompts: list[EvalPrompt], answer_tokens: int) -> list[dict]:
    """A row for each prompt with the model's greedy answer: kind, task, question, answer, said, right."""
    longest = max((len(tokenizer.encode(prompt.answer)) for prompt in prompts), default=0) + 1
    said = greedy_answers(model, tokenizer, [prompt.ids for prompt in prompts], min(longest, answer_tokens))
    return [{"kind": prompt.kind, "task": prompt.task, "question": prompt.question, "answer": prompt.answer, "said": text,
             "right": exact_match(text, prompt.answer)} for prompt, text in zip(prompts, said)]


def greedy_answers(model: GPT, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    said = [""] * len(prompts)
    for first in range(0, len(prompts), PROMPTS_AT_ONCE):
        for row, text in generate_texts(model, tokenizer, prompts[first:first + PROMPTS_AT_ONCE], max_new_tokens, GREEDY):
            said[first + row] += text
    return said


def exact_match(said: str, answer: str) -> bool:
    """Equal except for whitespace."""
    return said.split() == answer.split()


def accuracy(answers: list[dict]) -> float:
    """Fraction of the rows that are right."""
    return sum(answer["right"] for answer in answers) / len(answers)


def accuracy_by(answers: list[dict], field: str) -> dict[str, float]:
    """Accuracy for each value of a field of the rows, "kind" or "task", where it is not empty."""
    values = dict.fromkeys(answer[field] for answer in answers if answer[field])
    return {value: accuracy([answer for answer in answers if answer[field] == value]) for value in values}


@torch.no_grad()
def answer_losses(model: GPT, tokenizer: Tokenizer, batches: PackedBatches, machine: Machine) -> dict:
    """val_loss, nats/token, and val_bpb, bits per byte, of what the assistant says."""
    sums, token_bytes = LossSums(), torch.from_numpy(tokenizer.token_bytes())
    for idx, targets, doc_starts in batches.in_turn():
        with machine.autocast():
            losses = model.eager_forward(idx.to(machine.device), targets.to(machine.device), reduction="none",
                                         doc_starts=doc_starts.to(machine.device))
        sums.add(losses, targets, token_bytes)
    return {"val_loss": sums.loss, "val_bpb": sums.bits_per_byte}


def read_questions(config: EvaluateConfig) -> list[Conversation]:
    """All conversations of a dataset, since none is trained on; of the built-in ones, those that finetune.py holds out."""
    source = ConversationConfig(config.dataset, config.dataset_config, config.split, config.question_column,
                                config.answer_column)
    if config.dataset == "builtin":
        return builtin_held_out(config.limit or source.val_conversations)
    return list(itertools.islice(read_everything(source), config.limit))


def score_answers(model: GPT, tokenizer: Tokenizer, machine: Machine, conversations: list[Conversation],
                  config: EvaluateConfig) -> tuple[dict[str, Measured], list[dict]]:
    """As finetune.py does it: the last answer of each conversation, right if equal but for spaces; and bits per byte of
    all that the assistant says."""
    block_size, answers = model.config.block_size, []
    batches = PackedBatches(tokenizer, conversations, config.batch_size, block_size, seed=0)
    prompts = eval_prompts(conversations, tokenizer, block_size)
    with machine.autocast(), progress(len(prompts), "question") as bar:
        for first in range(0, len(prompts), PROMPTS_AT_ONCE):
            answers += answer_prompts(model, tokenizer, prompts[first:first + PROMPTS_AT_ONCE], config.answer_tokens)
            bar.update(len(answers) - bar.n)
    measured = {"answered right": share([row["right"] for row in answers])} if answers else {}
    tasks = dict.fromkeys((row["kind"], row["task"]) for row in answers if row["task"])
    if len(tasks) > 1:
        for kind, task in tasks:
            hits = [row["right"] for row in answers if (row["kind"], row["task"]) == (kind, task)]
            measured[f"- {task}" if kind in ("", task) else f"- {kind}: {task}"] = share(hits)
    bpb = answer_losses(model, tokenizer, batches, machine)["val_bpb"]
    return measured | {"questions that fit into the context": Measured(len(answers), form=","),
                       "bits per byte of the answers": Measured(bpb)}, answers


# -- the command ------------------------------------------------------------------------------------------------------

TASKS = {"text": (read_texts, score_text, "documents"), "choice": (read_choices, score_choice, "questions"),
         "answers": (read_questions, score_answers, "conversations")}


def require_checkpoints(paths: Sequence[Path], task: str):
    """Raises BadInput before anything is measured, rather than after the first of them."""
    for path in paths:
        blob = load_checkpoint(path)
        with reading(path):
            tokenizer = Tokenizer.from_json(blob["tokenizer"])
            _ = tokenizer.separator_id
            if task == "answers":
                tokenizer.chat_ids()


def require_place(config: EvaluateConfig):
    if config.out_path:
        check_writable(config.out_path, f"--out_path={config.out_path}")
        if config.out_path.exists() and not config.overwrite:
            raise BadInput(f"--out_path={config.out_path}: exists: replace it by --overwrite, or choose another path")


def side_by_side(measured: dict[str, dict[str, Measured]]) -> Table:
    """measured: checkpoint -> what is measured -> the number."""
    names = dict.fromkeys(name for column in measured.values() for name in column)
    return Table(("", *measured), [(name, *(str(column.get(name, "")) for column in measured.values())) for name in names])


@command
def main(argv=None):
    """Measures models on text, on multiple choice, or on questions."""
    config, device_config = parse_flags(main.__doc__, argv, EvaluateConfig, DeviceConfig)
    require_place(config)
    require_checkpoints(config.checkpoint_path, config.task)
    read, score, unit = TASKS[config.task]
    examples, machine = read(config), open_machine(device_config)
    start, measured, rows = time.perf_counter(), {}, []
    with explain_failures(f"--batch_size={config.batch_size}: try a smaller one, or --device=cpu"):
        for path in config.checkpoint_path:
            model, tokenizer = load_model(path, machine)
            measured[str(path)], found = score(model, tokenizer, machine, examples, config)
            rows += [{"checkpoint": str(path)} | row for row in found]
            del model  # or two would be in memory while the next is read
    print(markdown(side_by_side(measured)))
    where = f", {config.split}" if config.dataset != "builtin" and not local_path(config.dataset) else ""
    print(f"\n{config.dataset}{where}: {len(examples):,} {unit}; value ± standard error; "
          f"{time.perf_counter() - start:.1f} s on {machine}")
    if config.out_path:
        with atomic_write(config.out_path, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


# -- what it has learnt -----------------------------------------------------------------------------------------------


if __name__ == "__main__":
    main()
