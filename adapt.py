"""Measures what a model gains by training at inference time: on documents that it reads, or on a rule that it is shown.

    python adapt.py --checkpoint_path=checkpoints/quickstart.pt --dataset=notes.parquet
    python adapt.py --checkpoint_path=checkpoints/quickstart.pt --dataset=data    validation documents of a data folder
    python adapt.py --task=rules                                                  few-shot rules, see fewshot.py

Every document is read twice by a `Learner` (learner.py), with the weights as they are and with a step after each hop of
tokens, and by the controls: with weights that another document has led to, and with the compute spent on a longer overlap of
windows. A row for each document goes into --out_path, from which the same command continues where it was stopped; at its end
the folder holds adaptation.md and adaptation.html, and adaptation.json with what they were made of.
"""
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from download_data import held_out_texts
from evaluate import sliding_windows, token_losses
from experiments.adaptation import AdaptationStudy, write_adaptation
from experiments.code_hash import code_hash
from experiments.runner import save_plan
from fewshot import RulesConfig, run_rules
from layers import gated_delta
from learner import AdaptConfig, Learner, clip_hop, cut_hops, open_learner
from runtime.cli import (
    command,
    command_line,
    explain_failures,
    ignore_output_errors,
    log_line,
    parse_flags,
    progress_bar,
    read_path,
    say,
)
from runtime.config import BadInput, check_flags, flag, flag_names, refuse_given
from runtime.device import DeviceConfig, Machine, open_machine
from runtime.distributed import join
from runtime.files import append_json_line, atomic_write, folder_lock, read_json_lines
from runtime.signals import StopSignals
from sampling import load_pretrained
from text.sources import SourceConfig
from tokenizer import Tokenizer
from trainer import describe_machine

# of every row of a document that did not diverge
ROW_KEYS = {"digest", "text_digest", "next_digest", "tokens", "bytes", "hop_tokens", "hop_bytes", "static", "adapted",
            "static_seconds", "adapted_seconds"}
OVERLAP_BATCH = 16  # windows in a forward pass of the control with a longer overlap


@dataclass(frozen=True)
class AdaptRunConfig:
    """The evaluation."""
    task: str = flag("documents", "documents: read by a model; rules: new ones, from a few demonstrations, by small models "
                                  "that are trained for it", choices=("documents", "rules"), scope="run")
    checkpoint_path: Path = flag(Path("checkpoints/gpt.pt"), "the model that reads documents")
    dataset: str = flag(None, "a folder that download_data.py has prepared, of which the validation documents are read; or "
                              "a local file or folder, a dataset of the hub, or `builtin`, whose first documents are read "
                              "(default: data). With --task=rules, a JSON file of ARC's form or a folder of them (default: "
                              "rules made from a seed)", scope="shared")
    dataset_config: str = flag(None, "configuration of a hub dataset", scope="shared")
    text_column: str = flag("text", "column or JSON key that holds the text", scope="shared")
    limit: int = flag(None, "documents to read, or ARC tasks to answer, at most (default: 40 documents, all tasks)",
                      at_least=1, scope="shared")
    skip: int = flag(0, "documents to leave out before the first that is read", at_least=0, scope="run")
    max_tokens: int = flag(None, "tokens of a document to read, at most (default: all)", at_least=2, scope="shared")
    controls: bool = flag(True, "0 leaves out the controls, which take about as long as the rest", scope="run")
    out_path: Path = flag(None, "folder for the rows and the page (default: --checkpoint_path without its ending, with "
                                "_adapted added; rules)", scope="run")
    overwrite: bool = flag(False, "let another evaluation replace the rows in --out_path", scope="run")
    skip_errors: bool = flag(False, "1 leaves out parts of files that cannot be read", scope="shared")
    seed: int = flag(0, "with --task=rules, random seed of the first base; the rules of a test are always the same",
                     at_least=0, at_most=2**63 - 1, scope="run")

    def __post_init__(self):
        check_flags(self)
        for name, value in (("dataset", "data"), ("limit", 40)) if self.task == "documents" else ():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)


# Flags of one task that have no effect with the other
DOCUMENT_FLAGS = {"checkpoint_path", "dataset_config", "text_column", "skip", "max_tokens", "controls", "skip_errors",
                  "adapt_hop", "adapt_statistics"}
RULES_FLAGS = flag_names(RulesConfig) | {"seed"}


def check_used(task: str, *configs: object):
    """Raises BadInput for a flag that is given and has no effect with this task."""
    unused, other = (RULES_FLAGS, "--task=rules") if task == "documents" else (DOCUMENT_FLAGS, "--task=documents")
    for config in configs:
        refuse_given(config, unused, f"is only used with {other}: leave it out")


# -- documents --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Document:
    """A text. ids: (n + 1,) int64, led by the separator. digest: of them. text_digest: of the text, whatever the
    tokenizer."""
    ids: Tensor
    digest: str
    text_digest: str


def read_documents(config: AdaptRunConfig, tokenizer: Tokenizer, hop: int) -> tuple[list[Document], Counter]:
    """--limit different documents of more than a hop, after the first --skip of these, and how many were left out before, by
    the reason. Raises BadInput."""
    source_config = SourceConfig(config.dataset, dataset_config=config.dataset_config, text_column=config.text_column,
                                 skip_errors=config.skip_errors)
    documents, left_out, seen = [], Counter(), set()
    for text in held_out_texts(source_config):
        ids = [tokenizer.separator_id, *tokenizer.encode(text)][:config.max_tokens and config.max_tokens + 1]
        if len(ids) <= hop + 1:
            left_out[f"of at most {hop} tokens"] += 1
            continue
        digest, text_digest = (hashlib.sha256(content).hexdigest()[:16]
                               for content in (np.array(ids).tobytes(), text.encode()))
        if digest in seen:  # it would count twice, and be its own control
            left_out["that had come before"] += 1
            continue
        seen.add(digest)
        if len(seen) <= config.skip:
            continue
        documents.append(Document(torch.tensor(ids), digest, text_digest))
        if len(documents) == config.limit:
            break
    if not documents:
        raise BadInput(f"--dataset={config.dataset}: holds no document of more than --adapt_hop={hop} tokens"
                       + f" after the first --skip={config.skip}" * bool(config.skip)
                       + f", and {left_out.total():,} shorter or repeated ones" * bool(left_out))
    return documents, left_out


# -- reading ----------------------------------------------------------------------------------------------------------

def read_document(learner: Learner, document: Document, next_document: Document | None, token_bytes: Tensor,
                  stride: int, controls: bool = True) -> dict:
    """The row of a document, see experiments/adaptation.py. next_document: is scored with the weights that this one has led
    to. Leaves the weights as they were. Raises FloatingPointError when a step was not finite."""
    ids, n = document.ids, len(document.ids) - 1
    hops = list(cut_hops(n, learner.hop, learner.model.config.block_size))
    row = {"digest": document.digest, "text_digest": document.text_digest,
           "next_digest": next_document and next_document.digest, "tokens": n,
           "bytes": int(token_bytes[ids[1:]].sum()),
           "hop_tokens": [hop.stop - hop.start for hop in hops],
           "hop_bytes": [int(token_bytes[ids[hop.start + 1:hop.stop + 1]].sum()) for hop in hops]}
    try:
        row["static"], row["static_seconds"] = timed_read(learner, ids, learn=False)
        row["adapted"], row["adapted_seconds"] = timed_read(learner, ids)
        if not controls:
            return row
        if next_document:
            row["next"] = sum(learner.read(next_document.ids, learn=False).tolist())
        learner.forget()
        windows = list(sliding_windows(ids.numpy(), learner.model.config.block_size, stride))
        losses = token_losses(learner.model, learner.machine, windows, OVERLAP_BATCH, show_progress=False)
        row |= {"stride": stride, "overlap": sum(of_window.sum().item() for _, of_window in losses)}
        if is_recurrent(learner):
            for learn in (False, True):
                losses = learner.read(ids, learn=learn, keep_state=True)
                row["adapted_kept" if learn else "static_kept"] = sum(losses.tolist())
        return row
    finally:
        learner.forget()


def timed_read(learner: Learner, ids: Tensor, learn: bool = True) -> tuple[list[float], float]:
    start = time.perf_counter()
    losses = learner.read(ids, learn=learn).tolist()
    return losses, time.perf_counter() - start


def is_recurrent(learner: Learner) -> bool:
    """Whether every layer carries a state through a text of any length."""
    return not any(block.mixer.needs_mask for block in learner.model.blocks) and learner.model.positions is None


def measure_cost(learner: Learner, documents: list[Document]) -> tuple[dict[str, float], int, int]:
    """FLOPs per token of static and adapted reading in the windows of a long document, the stride of windows that cost as
    many as adapted reading does, and the bytes that adapted reading holds in memory besides the model."""
    block_size = learner.model.config.block_size
    ids = max(documents, key=lambda document: len(document.ids)).ids[:2 * block_size]
    first = block_size if len(ids) > block_size + 1 else 0  # from there on each window is like every other

    n = len(ids) - 1 - first
    flops = {"static": count_flops(lambda: learner.read(ids, first, learn=False)) / n,
             "adapted": count_flops(lambda: learner.read(ids, first)) / n}
    extra_bytes = learner.extra_bytes()
    learner.forget()
    window = [next(sliding_windows(ids.numpy(), block_size))]
    a_window = count_flops(lambda: list(token_losses(learner.model, learner.machine, window, 1, show_progress=False)))
    stride = max(1, min(block_size // 2, round(a_window / flops["adapted"])))
    return flops | {"overlap": a_window / stride}, stride, extra_bytes


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of the matrix products of `run()`, by torch's counter, which needs to be told of some of them."""
    recurrence = lambda factors, *rest, **kwargs: 2 * math.prod(factors) * factors[-1]
    in_place = lambda total, a, b, *rest, **kwargs: 2 * math.prod(a) * b[-1]
    counter = FlopCounterMode(display=False, custom_mapping={
        getattr(torch.ops, gated_delta.NAMESPACE).linear_recurrence: recurrence, torch.ops.aten.addmm_: in_place})
    with sdpa_kernel(SDPBackend.MATH), counter:  # flash attention on a CPU is not counted
        run()
    return counter.get_total_flops()


# -- rows -------------------------------------------------------------------------------------------------------------

def read_rows(path: Path) -> dict[str, dict]:
    """digest -> the row of a document."""
    return {row["digest"]: row for row in read_json_lines(path)
            if isinstance(row.get("digest"), str) and ("diverged" in row or row.keys() >= ROW_KEYS)}


def is_current(row: dict, next_document: Document | None, stride: int) -> bool:
    """Whether the row of an earlier run, which may have read fewer documents, is what would be measured now."""
    return "diverged" in row or (row["next_digest"] == (next_document and next_document.digest)
                                 and row.get("stride", stride) == stride)


def read_all(learner: Learner, documents: list[Document], token_bytes: Tensor, stride: int, path: Path,
             controls: bool = True) -> list[dict]:
    """A row for each document, those that `path` holds already from there; several processes take them in turns, and the
    main one writes. Raises SystemExit when a signal stops it."""
    world = join()
    earlier, rows = world.gather(read_rows(path) if world.is_main else None)[0], []
    if world.is_main:
        with atomic_write(path, "w") as file:  # without a line that a crash cut off, which the next row would be added to
            file.writelines(json.dumps(row) + "\n" for row in earlier.values())

    def row_of(i: int) -> tuple[dict, bool]:
        """And whether it is new."""
        document, next_document = documents[i], documents[(i + 1) % len(documents)] if len(documents) > 1 else None
        row = earlier.get(document.digest)
        if row is not None and is_current(row, next_document, stride):
            return row, False
        try:
            return read_document(learner, document, next_document, token_bytes, stride, controls), True
        except FloatingPointError as error:
            return {"digest": document.digest, "diverged": str(error)}, True
    with StopSignals() as stop, progress_bar(total=sum(len(document.ids) - 1 for document in documents), unit="tok",
                                             unit_scale=True, disable=not world.is_main) as bar:
        for i, (row, is_new) in world.map_in_order(row_of, range(len(documents))):
            n_tokens = len(documents[i].ids) - 1
            if world.is_main and is_new:
                append_json_line(path, row)
                if "diverged" in row:
                    tqdm.write(f"document {i + 1}: left out, {row['diverged']}")
            elif world.is_main:
                bar.initial += n_tokens
            rows.append(row)
            bar.update(n_tokens)
            signal = int(*world.largest(stop.signal or 0))
            if signal and i + 1 < len(documents):
                if world.is_main:
                    log_line(f"stopped after {i + 1} of {len(documents)} documents, which are kept: the same command "
                             f"continues")
                raise SystemExit(128 + signal)
    for before, row in zip([rows[-1], *rows], rows):
        row["other"] = before.get("next")
    return rows


# -- the command ------------------------------------------------------------------------------------------------------

def make_plan(config: AdaptRunConfig, adapt: AdaptConfig, machine: Machine) -> dict:
    """What rows depend on, as JSON: not how many documents are read."""
    return {"dataset": config.dataset, "max_tokens": config.max_tokens, "controls": config.controls,
            "machine": str(machine)} | vars(adapt) | {
        "model": hashlib.sha256(config.checkpoint_path.read_bytes()).hexdigest()[:16],
        "code": code_hash(Path(__file__)), "torch": torch.__version__}


def describe(learner: Learner, config: AdaptRunConfig, documents: list[Document], token_bytes: Tensor) -> list[str]:
    model = learner.model
    n_tokens = sum(len(document.ids) - 1 for document in documents)
    n_bytes = int(token_bytes[torch.cat([document.ids[1:] for document in documents])].sum())
    return [f"model {config.checkpoint_path}: {model.n_parameters() / 1e6:.2f} M parameters, context "
            f"{model.config.block_size:,}; {learner.config.adapt_optimizer} at {learner.config.rate:g} on "
            f"{learner.n_trained():,} ({learner.config.adapt_scope}), hops of {learner.hop} tokens",
            f"data {config.dataset}: {len(documents):,} documents, {n_tokens:,} tokens, {n_bytes:,} bytes",
            f"machine {describe_machine(learner.machine)}"]


def run_documents(config: AdaptRunConfig, adapt: AdaptConfig, machine: Machine, line: str):
    world = join()
    out_path = config.out_path or config.checkpoint_path.with_name(f"{config.checkpoint_path.stem}_adapted")
    rows_path = out_path / "documents.jsonl"
    with ExitStack() as until_the_end:
        with world.failing_together():
            model, tokenizer, _ = load_pretrained(config.checkpoint_path)
            plan = make_plan(config, adapt, machine)
            documents, omitted = read_documents(config, tokenizer, clip_hop(adapt.adapt_hop, model.config.block_size))
            learner = open_learner(model, tokenizer, adapt, machine)
            token_bytes = torch.from_numpy(tokenizer.token_bytes())
            conditions = describe(learner, config, documents, token_bytes)
            if world.is_main:
                until_the_end.enter_context(folder_lock(out_path, f"--out_path={out_path}"))
                save_plan(out_path, plan, config.overwrite, "an evaluation", [rows_path])
        for condition in conditions if world.is_main else []:
            say(condition)
        flops, stride, extra_bytes = measure_cost(learner, documents)
        rows = read_all(learner, documents, token_bytes, stride, rows_path, config.controls)
        if not world.is_main:
            return
        finished = [row for row in rows if "diverged" not in row]
        left_out = [f"Left out: {n:,} {'document' if n == 1 else 'documents'} {reason}." for reason, n in omitted.items()]
        if n := len(rows) - len(finished):
            reason = next(row["diverged"] for row in rows if "diverged" in row)
            left_out.append(f"{n:,} documents that diverged were left out: {reason}.")
        if not finished:
            raise FloatingPointError(f"all documents diverged: {reason}")
        study = AdaptationStudy(f"Adapting {config.checkpoint_path} at inference time", learner.hop, flops, stride,
                                extra_bytes, left_out, conditions, line)
        write_adaptation(finished, study, out_path)
        with atomic_write(out_path / "adaptation.json", "w") as file:  # last: where it is, the evaluation is complete
            json.dump(plan | {"hop": learner.hop, "rate": adapt.rate, "n_trained": learner.n_trained(), "flops": flops,
                              "stride": stride, "extra_bytes": extra_bytes, "left_out": omitted, "rows": rows}, file)


@command
def main(argv=None):
    """Measures what a model gains by training at inference time, on documents or on new rules."""
    ignore_output_errors()
    config, adapt, rules, device = parse_flags(main.__doc__, argv, AdaptRunConfig, AdaptConfig, RulesConfig, DeviceConfig)
    check_used(config.task, config, adapt, rules)
    machine, line = open_machine(device), command_line("adapt.py", argv)
    with explain_failures(lambda: "try a smaller model, --adapt_scope=last_half_mlps, or --device=cpu"):
        if join().size > 1 and config.task != "documents":
            raise BadInput(f"torchrun --nproc_per_node={join().size}: --task={config.task} runs in one process: start it "
                           f"with python")
        if config.task == "documents":
            run_documents(config, adapt, machine, line)
            return
        arc = None if config.dataset is None else read_path(config.dataset, f"--dataset={config.dataset}")
        run_rules(rules, adapt, machine, config.out_path or Path("rules"), line, arc, config.limit, config.seed,
                  config.overwrite)


if __name__ == "__main__":
    main()
