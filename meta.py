"""Meta-learning: trains the weights that a model starts from, so that it adapts better when it trains at inference time.

    python finetune.py --meta=fomaml --checkpoint_path=checkpoints/gpt.pt --dataset=builtin

A task is a piece of a document. A `Learner` reads it hop by hop and takes a step after every hop, as adapt.py does; what is
to become smaller is the sum of the losses of the hops, each before the step on it. Its gradient with respect to the weights
before the first hop is approximated:

    fomaml   by the mean of the gradients of the hops, each where the weights are by then: that of Finn et al. 2017,
             arXiv:1703.03400, section 5.2 (first-order MAML), of a loss that counts every hop
    reptile  by the way from the weights after the last hop back to those before the first. Source: Nichol et al. 2018,
             arXiv:1803.02999
    joint    by the mean of the gradients of the hops at the weights before the first: the control, which trains on the same
             text in the same hops and does not adapt

With plain gradient descent as update rule, and hops of one length, reptile is fomaml.
"""
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from dataloader import epoch_order
from download_data import open_text
from experiments.plots import draw_finetuning
from experiments.report import Figure, Table
from experiments.stats import Estimate
from learner import AdaptConfig, Learner, encode_documents
from model import GPT
from runtime.cli import progress_bar
from runtime.config import BadInput, check_flags, flag
from runtime.distributed import join
from runtime.metrics import LossSums
from text.documents import PackedDocuments, document_hashes
from text.folders import local_path
from text.sources import SourceConfig, take_text
from tokenizer import Tokenizer
from trainer import TrainSetup, TrainState

META_OBJECTIVES = "fomaml", "reptile", "joint"


@dataclass(frozen=True)
class MetaConfig:
    """Meta-learning."""
    meta: str = flag(None, "train weights that adapt better at inference time (adapt.py), on documents rather than on "
                           "conversations: --dataset is then text, as that of download_data.py, or a folder that it has "
                           "prepared (default: builtin); fomaml: first-order MAML; reptile: Reptile; joint: the control, "
                           "the same text in the same hops without adapting. The --adapt_ flags say how documents are read",
                     choices=META_OBJECTIVES)
    meta_contexts: int = flag(8, "documents are cut into pieces of this many contexts of the model, each of which is a "
                                 "task; --num_batch_accum of them make a step (by default 4)", at_least=1, at_most=1_000_000)
    meta_bytes: int = flag(10_000_000, "bytes of text at which reading the dataset stops", at_least=1)
    val_documents: int = flag(40, "documents held out for validation, of which the first piece is read: of the dataset's "
                                  "held-out text, where it has some, else chosen by a hash of the text, at most a tenth",
                              at_least=1, scope="shared")
    text_column: str = flag("text", "column or JSON key that holds the text")
    __post_init__ = check_flags


def check_meta(dataset: str, adapt: AdaptConfig):
    """Raises BadInput for flags that cannot be meta-learned with."""
    if "," in dataset and not local_path(dataset):
        raise BadInput(f"--dataset={dataset}: give one at a time, or a folder that download_data.py has prepared of several")
    if adapt.adapt_scope == "lora":
        raise BadInput("--adapt_scope=lora: its updates always start from zero, there is no initialisation to learn: choose "
                       "another")
    if adapt.adapt_optimizer == "rms":
        raise BadInput("--adapt_optimizer=rms: its statistics belong to weights that stay, and meta-learning changes them: "
                       "choose adamw or sgd")


# -- documents --------------------------------------------------------------------------------------------------------

def read_documents(dataset: str, dataset_config: str | None, skip_errors: bool, config: MetaConfig) -> tuple[
        list[str], list[str]]:
    """The texts to train on, and those held out. Raises BadInput."""
    source = open_text(SourceConfig(dataset, dataset_config=dataset_config, text_column=config.text_column,
                                    skip_errors=skip_errors))
    held_out = (text for chunk in source.held_out_chunks() for text in chunk.documents.strings())
    held_out, texts = list(islice(held_out, config.val_documents)), list(take_text(source.documents(), config.meta_bytes))
    hashes = document_hashes(PackedDocuments.from_strings(texts)).tolist()
    if held_out:
        excluded = set(document_hashes(PackedDocuments.from_strings(held_out)).tolist())
    else:
        excluded = set(sorted(set(hashes))[:min(config.val_documents, len(set(hashes)) // 10)])
        held_out = list({number: text for number, text in zip(hashes, texts) if number in excluded}.values())
        if not held_out:
            raise BadInput(f"--dataset={dataset}: {len(set(hashes))} different documents are too few to hold out a tenth of "
                           f"them: give at least 10, or a folder with files named train and validation")
    return [text for number, text in zip(hashes, texts) if number not in excluded], held_out


def cut_pieces(documents: Sequence[Tensor], n: int, shortest: int) -> list[Tensor]:
    """Documents, each (T + 1,) ids, as pieces of at most `n` predicted tokens, without those of fewer than `shortest`. The
    last token of a piece is the first input of the next."""
    pieces = [ids[start:start + n + 1] for ids in documents for start in range(0, len(ids) - 1, n)]
    return [piece for piece in pieces if len(piece) > shortest]


def encode_pieces(dataset: str, texts: tuple[list[str], list[str]], tokenizer: Tokenizer, n: int,
                  hop: int) -> tuple[list[Tensor], list[Tensor]]:
    """The pieces of at most `n` tokens to train on, and the first of each held-out text. Raises BadInput where no text is
    longer than a hop, after which there is something to adapt to."""
    train, held_out = (list(encode_documents(tokenizer, part)) for part in texts)
    parts = cut_pieces(train, n, hop + 1), cut_pieces([ids[:n + 1] for ids in held_out], n, hop + 1)
    for part, what in zip(parts, ("to train on", "held out")):
        if not part:
            raise BadInput(f"--dataset={dataset}: none of the documents {what} is longer than a hop: give longer ones, or "
                           f"lower --adapt_hop, now {hop}")
    return parts


class DocumentBatches:
    """What a TrainLoader reads: a batch is one piece, as inputs and targets, each int64 (1, T), and T differs. The order is
    another one in each epoch, as that of dataloader.BlockBatches. block_size: tokens of the longest piece."""
    flag_name, batch_size = "--dataset", 1

    def __init__(self, pieces: list[Tensor], seed: int):
        self.pieces, self.seed, self.n_blocks = pieces, seed, len(pieces)
        lengths = [len(piece) - 1 for piece in pieces]
        self.block_size, self.n_tokens = max(lengths), sum(lengths)

    def fingerprint(self) -> str:
        """16 hex digits that change with any token."""
        hashes = document_hashes(PackedDocuments.from_strings([str(piece.tolist()) for piece in self.pieces]))
        return f"{int(document_hashes(PackedDocuments.from_strings([str(hashes.tolist())]))[0]):016x}"

    def __getitem__(self, first: int) -> tuple[Tensor, Tensor]:
        """Piece number `first` of the sequence of all epochs."""
        return self.read(epoch_order(np.array([first]), self.n_blocks, self.seed)[0])

    def read(self, number: int) -> tuple[Tensor, Tensor]:
        ids = self.pieces[number]
        return ids[None, :-1].contiguous(), ids[None, 1:].contiguous()

    def check(self, batch: tuple[Tensor, ...]):
        """Nothing to check: the tokenizer has just made these ids."""


# -- the gradient of a task -------------------------------------------------------------------------------------------

class GradientSum:
    """The update rule of a learner, which also sums the gradients that it sees, each weighted by the tokens of its hop."""

    def __init__(self, learner: Learner, rule: torch.optim.Optimizer, takes_steps: bool):
        """takes_steps: False sums the gradients and leaves the weights as they are."""
        self.learner, self.rule, self.takes_steps = learner, rule, takes_steps
        self.param_groups, self.state, self.zero_grad = rule.param_groups, rule.state, rule.zero_grad
        self.sums = [torch.zeros_like(p) for p, _ in learner.weights]

    @torch.no_grad()
    def step(self, skip: Tensor | None = None):
        for (p, _), total in zip(self.learner.weights, self.sums):
            if p.grad is not None:
                grad = p.grad if skip is None else p.grad.masked_fill(skip, 0.0)
                total.add_(grad, alpha=self.learner.batch[0].numel())
        if self.takes_steps:
            self.rule.step(skip)


def task_gradient(learner: Learner, ids: Tensor, objective: str) -> tuple[Tensor, list[Tensor]]:
    """The loss of a piece, (T + 1,) ids, read by `learner` from its present weights on, in nats/token, and the gradient of
    `objective`, one of META_OBJECTIVES, for each of `learner.weights`. Leaves weights and gradients as they were, bit for
    bit. The loss is nan where a hop or its gradient is not finite."""
    parts, n_tokens = learner.state.optimizer.parts, len(ids) - 1
    (name, rule), = parts.items()
    learner.keep()
    outer = [p.grad for p, _ in learner.weights]  # of the tasks before this one in the same step
    for p, _ in learner.weights:
        p.grad = None
    parts[name] = gathered = GradientSum(learner, rule, takes_steps=objective != "joint")
    try:
        # fit computes a loss under autocast, which keeps the weights that it has cast until it ends: after a step on them
        # they would be old
        with torch.autocast(learner.machine.device.type, enabled=False, cache_enabled=False):
            losses = learner.read(ids)
        loss = losses.sum() / n_tokens
        gradient = reptile_gradient(rule, len(losses)) if objective == "reptile" else [
            total / n_tokens for total in gathered.sums]
    except FloatingPointError:
        loss, gradient = torch.tensor(float("nan")), gathered.sums
    finally:
        parts[name] = rule
        learner.forget()
        for (p, _), grad in zip(learner.weights, outer):
            p.grad = grad
    return loss.float().to(learner.machine.device), gradient


@torch.no_grad()
def reptile_gradient(rule: torch.optim.Optimizer, n_steps: int) -> list[Tensor]:
    """From the weights now back to those before, in units of the learning rate, per step: of one step of gradient descent
    this is its gradient."""
    return [(initial - p) / (group["lr"] * n_steps) for group in rule.param_groups
            for p, initial in zip(group["params"], group["initial"])]


def meta_loss(learner: Learner, objective: str, model: GPT, batch: Sequence[Tensor]) -> Tensor:
    """The loss of a task in nats/token, whose gradient with respect to the weights of `model`, the learner's, is that of
    `objective`, see task_gradient. batch: inputs and targets, each (1, T)."""
    idx, targets = batch
    loss, gradient = task_gradient(learner, torch.cat([idx[0], targets[0, -1:]]), objective)
    product = sum((p * grad).sum() for (p, _), grad in zip(learner.weights, gradient))
    return loss + (product - product.detach())  # zero, with a gradient


# -- validation -------------------------------------------------------------------------------------------------------

def document_scores(learner: Learner, tokenizer: Tokenizer, ids: Tensor) -> tuple[LossSums, LossSums]:
    """The losses of a document, (T + 1,) ids, with the weights as they are, and adapting; the weights stay.

    Raises FloatingPointError where adapting to it diverges.
    """
    n_tokens, n_bytes = len(ids) - 1, int(tokenizer.token_bytes()[ids[1:].numpy()].sum())
    try:
        nats = [learner.read(ids, learn=learn).sum().item() for learn in (False, True)]
    finally:
        learner.forget()
    return tuple(LossSums(total, n_tokens, total, n_bytes) for total in nats)


def total_losses(parts: Sequence[LossSums]) -> LossSums:
    return LossSums(*(sum(getattr(part, name) for part in parts) for name in ("nats", "tokens", "text_nats", "text_bytes")))


def validate_documents(learner: Learner, tokenizer: Tokenizer, documents: Sequence[Tensor], show_progress: bool) -> dict:
    """val_loss and val_bpb of all documents as the learner reads them, adapting; static_loss and static_bpb with the weights
    as they are; gain_bpb, the mean over documents of static minus adapted bits per byte, with gain_margin, half its 95 %
    interval."""
    learner.keep()
    bar = progress_bar(documents, desc="validation", unit="document", delay=1, leave=False,
                       disable=None if show_progress else True)
    scores = join().map_in_order(partial(document_scores, learner, tokenizer), bar)
    static, adapted = zip(*(own for _, own in scores))
    gain = Estimate.from_values([before.bits_per_byte - after.bits_per_byte for before, after in zip(static, adapted)])
    before, after = total_losses(static), total_losses(adapted)
    return {"val_loss": after.loss, "val_bpb": after.bits_per_byte, "static_loss": before.loss,
            "static_bpb": before.bits_per_byte, "gain_bpb": gain.mean, "gain_margin": gain.margin,
            "val_bytes": after.text_bytes, "val_tokens": after.tokens}


def estimate_document_validation(learner: Learner, tokenizer: Tokenizer, documents: Sequence[Tensor]) -> float:
    """Seconds of a validation, from its first document."""
    start = time.perf_counter()
    validate_documents(learner, tokenizer, documents[:1], show_progress=False)
    return (time.perf_counter() - start) * sum(map(len, documents)) / len(documents[0])


# -- report -----------------------------------------------------------------------------------------------------------

def compare_validations(rows: list[dict]) -> Table:
    """Before and after. rows: of metrics.jsonl."""
    first, last = rows[0], [row for row in rows if "val_loss" in row][-1]
    gain = lambda row: f"{row['gain_bpb']:.4f}" + (f" ± {row['gain_margin']:.4f}" if "gain_margin" in row else "")
    return Table(("bits per byte of held-out documents", "better", "before", "after"), [
        ("with the weights as they are", "lower", *(f"{row['static_bpb']:.4f}" for row in (first, last))),
        ("adapting", "lower", *(f"{row['val_bpb']:.4f}" for row in (first, last))),
        ("gain by adapting, mean of the documents", "higher", gain(first), gain(last))])


def report_parts(state: TrainState, setup: TrainSetup, rows: list[dict], table: Table) -> list:
    """The parts of the page."""
    best = min((row for row in rows if "val_loss" in row), key=lambda row: row["val_loss"])
    return [("p", f"--meta={setup.settings['meta']}: {state.step:,} steps of about {setup.step_tokens:,} tokens, "
                  f"{state.seconds:,.0f} s on {setup.machine}; learning rate {setup.peak_lr():.3g}. The loss of held-out "
                  f"documents, adapting, is lowest at step {best['step']:,}: best.pt. ± is half a 95 % interval over the "
                  f"documents. What is due to meta-learning, and not to more training, is the difference to a run with "
                  f"--meta=joint. Metrics: metrics.jsonl."),
            ("h2", "Before and after"), table, ("h2", "Loss of held-out documents, adapting"),
            Figure(draw_finetuning(rows, "held-out documents"), "loss")]
