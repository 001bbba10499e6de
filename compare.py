"""Compares architectures, recipes or vocabularies at an equal budget, with several seeds.

    python compare.py --data_path=data --arms "mlp=relu2" "mlp=grkan" "mixer=DDDA" --budget tokens=3e6

    python compare.py --data_path=data --arms vocab_size=2048 vocab_size=8192 vocab_size=32768 --budget bytes=1e7

    python compare.py --script=finetune --dataset=builtin --arms checkpoint_path=a.pt checkpoint_path=b.pt

    python compare.py --script=selfplay --game=tic_tac_toe --arms mixer=attention mixer=gated_delta --budget games=40_960

    python compare.py --script=think --task=permutations --arms loops=1 loops=4 --budget problems=192_000

    python compare.py --script=adapt --dataset=docs.parquet --arms checkpoint_path=a_{seed}.pt checkpoint_path=b_{seed}.pt

An arm is flags of train.py, or of finetune.py, where arms may also start from different models, or of selfplay.py or
think.py. Arms of train.py, selfplay.py and think.py get as many parameters as the first one: the width of the hidden layer
is solved for. All arms see the same data in the same order; those of selfplay.py play as many games, each against itself.
For an arm with a vocabulary of its own, a tokenizer is trained on the training text of --data_path, and that folder's text
is encoded with it once, into --out_path/data.
Each arm tries the same learning rates on part of the budget. Starting from the best, lower rates are tried on the full
budget while they improve; then every seed is trained at the best rate. Each of these runs, a cell, has its full cooldown and
is a process that checkpoints: the same command continues where it was stopped, and never repeats a finished cell.
With --script=adapt nothing is trained before: arms are models, {seed} in a path stands for 1 to --seeds, and each reads the
same documents with adapt.py.

Writes comparison.md, comparison.csv, a page (comparison.html) and its pictures into --out_path; the metrics of the cells
stay in its folder `runs`.
"""
import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from adapt import AdaptRunConfig, is_recurrent, read_documents, timed_read
from download_data import read_split, retokenize, validation_documents
from experiments.adaptation_cells import AdaptArm, AdaptDocuments, AdaptStudy, DocumentSize, run_adaptation
from experiments.adaptation_comparison import write_adaptation_comparison
from experiments.analysis import (
    EXPLOITABILITY,
    SPEED_WARMUP,
    WRONG_ANSWERS,
    WRONG_MOVES,
    Arm,
    ArmResults,
    Cell,
    share_vocabulary,
)
from experiments.cluster import CLUSTER_HELP, Cluster
from experiments.code_hash import code_hash
from experiments.comparison import group_by_size, write_comparison
from experiments.context import Contexts, Decoding, name_length
from experiments.report import align_columns
from experiments.runner import TrainingJob, flag_texts, save_plan, threads_of_job
from experiments.screening import POWER, SCREEN_SEEDS, plan_confirmation
from experiments.stages import ComparisonBar, readable_name
from experiments.to_loss import N_BUDGETS, TARGETS, Target, needed, run_to_target, write_to_loss
from experiments.tuning import ArmRunner
from finetune import FINETUNING, FinetuneConfig, FinetuneLoop, FinetuneOptimizer
from grpo import SelfPlayOptimizer
from layers import MIXERS
from learner import AdaptConfig, clip_hop, has_scope, open_learner
from model import GPT, GPTConfig, meta_model, upgrade_config
from optimizer import OptimizerConfig
from rollouts import PlayConfig, PlayLoader
from runtime.checkpoint import explain_damage, load_checkpoint
from runtime.cli import (
    Parser,
    add_flags,
    command,
    command_line,
    ignore_output_errors,
    log_line,
    parse_float,
    progress_bar,
    say,
)
from runtime.config import BadInput, check_flags, declared_flags, flag, flag_names, read_flags, shorten, value_type
from runtime.device import DTYPES, DeviceConfig, Machine, describe_hardware, open_machine
from runtime.files import atomic_write, folder_lock
from runtime.forecast import format_bytes, format_seconds, free_disk
from runtime.memory import available_memory, peak_memory, reset_peak_memory
from runtime.run import STOP_FLAGS, TrainingCommand
from runtime.signals import StopSignals
from sampling import GREEDY, Reading, load_pretrained, pretraining_flags, sample
from selfplay import (
    SELFPLAY,
    PlayerModel,
    SelfPlayConfig,
    SelfPlayDevice,
    SelfPlayLoop,
    check_context,
    game_title,
    open_game,
    period_of,
    resolve_games,
)
from selfplay import open_run as open_selfplay
from selfplay import resolve_flags as resolve_play_flags
from shards import SPLITS, DataFolder, open_data, require_block
from tasks.conversations import ConversationConfig, read_conversations
from tasks.positions import Game
from tasks.thinking import TASKS
from text.sources import take_text
from think import THINKING, ThinkConfig, ThinkDevice, ThinkLoop, ThinkModel, ThinkOptimizer, byte_tokenizer, typical_batch
from think import open_run as open_think
from think import resolve_flags as resolve_think_flags
from tokenizer import (
    MAX_VOCAB_SIZE,
    PATTERNS,
    ROLES,
    SPECIAL_TOKENS,
    TRAINING_BYTES,
    Tokenizer,
    compile_pattern,
)
from train import PRESETS, PRETRAINING, RunConfig
from trainer import (
    LoopConfig,
    Run,
    TrainSetup,
    check_compile,
    dry_run_step,
    init_state,
    next_token_loss,
    time_step,
)

REPO = Path(__file__).parent
MATCH_TOLERANCE = 0.01     # largest relative difference in parameters between matched arms
CLOSE_MATCH = 0.0025       # near enough to change nothing, or to prefer a hidden width that is a multiple of 8
NULL_SEED_OFFSET = 1000    # the null arm's seeds are the first arm's plus this
VALIDATIONS = 10           # per run, for its curve
SPEED_ROUNDS = 3           # of timing, in which the arms take turns
SPEED_STEPS = SPEED_WARMUP + 10
DECODE_ROUNDS = 9          # of timing decoding, in which the arms take turns
DECODE_TOKENS = 32         # that a round decodes, the last ones of a context; less of a short one
UNITS = "games", "problems", "tokens", "bytes", "flops", "seconds", *TARGETS  # of --budget; a script has some of them


@dataclass(frozen=True)
class CompareConfig:
    """The comparison."""
    arms: tuple[str, ...] = flag(("mlp=gelu", "mlp=relu2"), "architectures, recipes or vocabularies, each some flags of "
                                                            "train.py (or of --script) separated by commas, also "
                                                            "vocab_size, pattern and tokenizer_path; the first is the "
                                                            "reference")
    script: str = flag("train", "what a run is: train.py, or finetune.py, where an arm may be the model to start from: "
                                "checkpoint_path=a.pt; or selfplay.py, which needs --game; or think.py, which needs --task; "
                                "or adapt.py, where an arm is a model, or one for each seed: checkpoint_path=a_{seed}.pt",
                       choices=("train", "finetune", "selfplay", "think", "adapt"), scope="run")
    budget: str = flag("tokens=1e7", "budget of a run: tokens=N, bytes=N (of text), flops=N or seconds=N; flops count "
                                     "matrix products, activations and bases; flops=N,N with three or more --sizes: the "
                                     "best size for each budget, and multipliers of compute; to_loss=X or to_bpb=X: what "
                                     "it takes until the validation loss in nats/token, or in bits/byte, is X at the end "
                                     "of a run; of one of selfplay.py: games=N, by default the game's own number, tokens=N "
                                     "or seconds=N; of one of think.py: problems=N, by default think.py's own number, "
                                     "tokens=N or flops=N")
    most_tokens: float = flag(None, f"tokens of the longest runs with --budget to_loss=X or to_bpb=X; the others have a "
                                    f"half of it, a quarter, and so on down to a {2 ** (N_BUDGETS - 1)}nd (default: 1e7)",
                              above=0, scope="run")
    seeds: int = flag(3, "runs of each arm, which differ in initial weights and order of data; the same seeds for all arms",
                      at_least=1, at_most=NULL_SEED_OFFSET, scope="run")
    screen: bool = flag(False, f"run {SCREEN_SEEDS} seeds of each arm, then confirm the best ones and the first arm with as "
                               f"many new seeds as their spread asks for", scope="run")
    confirm: int = flag(None, "arms besides the first to confirm after --screen, those with the best means (default: 2)",
                        at_least=1, scope="run")
    smallest_difference: float = flag(None, "difference from the first arm, in the unit of the results, that --screen "
                                            "chooses the number of seeds for, so that it is found with a probability of "
                                            f"{POWER:.0%} (default: 0.01)", above=0, scope="run")
    most_seeds: int = flag(None, "seeds of a confirmed arm, at most (default: 20)", at_least=2, at_most=NULL_SEED_OFFSET,
                           scope="run")
    sizes: tuple[str, ...] = flag((), "compare at several sizes, each some flags of train.py: n_layer=4,n_head=4")
    lengths: tuple[int, ...] = flag((), "compare at several lengths of context, in tokens: 512 2048; batches have as many "
                                        "tokens at each, --batch_size * --block_size", at_least=2)
    epochs: tuple[float, ...] = flag((), "compare on repeated text too, several numbers, such as 1 2 4: the same budget on "
                                         "the first part of the training text that it passes over so many times",
                                     at_least=1)
    rates: tuple[float, ...] = flag((0.5, 1.0, 2.0), "learning rates to try, as multiples of --learning_rate, or of "
                                                     "--adapt_rate", above=0)
    grid_share: float = flag(0.25, "fraction of the budget on which the learning rates are tried", above=0, at_most=1)
    match: str = flag("parameters", "what arms that start from random weights have in common besides the budget, by the "
                                    "width of their hidden layers, and what those of adapt.py must have in common; "
                                    "non_embedding: the parameters without tables of tokens and without an untied head; "
                                    "flops: those of a token, as of --budget; memory: the bytes that decoding one text of "
                                    "--block_size tokens holds, weights and cache in --dtype=fp32",
                      choices=("parameters", "non_embedding", "flops", "memory", "none"))
    null: bool = flag(False, "run only the first arm, against itself with other seeds: how large are chance differences?")
    jobs: int = flag(None, "runs at a time, which share the cores; speed is measured afterwards, one run at a time "
                           "(default: 1; with --cluster one for each GPU, or each core)", at_least=1, at_most=1000,
                     scope="run")
    cluster: str = flag(None, CLUSTER_HELP, scope="run")
    out_path: Path = flag(Path("studies/comparison"), "folder for the results", scope="run")
    overwrite: bool = flag(False, "let another comparison replace the results in --out_path", scope="run")
    dry_run: bool = flag(False, "print the forecast, and do nothing", scope="run")

    def __post_init__(self):
        check_flags(self)
        if not self.null and len(self.arms) < 2:
            raise BadInput(f"--arms {' '.join(map(repr, self.arms))}: give two or more"
                           + ", or one and --null" * (self.script != "adapt"))
        for name in ("confirm", "smallest_difference", "most_seeds"):
            if getattr(self, name) is not None and not self.screen:
                raise BadInput(f"--{name}={getattr(self, name)}: has a meaning with --screen alone: add it")
        if self.screen and (self.null or self.script == "adapt"):
            raise BadInput(f"--screen: chooses among arms that are trained, not with "
                           f"{'--null' if self.null else '--script=adapt'}: leave one out")
        if self.lengths and self.script != "train":
            raise BadInput(f"--lengths {' '.join(map(str, self.lengths))}: needs arms that learn from text, not "
                           f"--script={self.script}: leave it out")
        if self.lengths and (self.budgets or self.epochs):
            raise BadInput(f"--lengths {' '.join(map(str, self.lengths))}: needs one budget and all of the text, not a list "
                           f"of budgets, a target or --epochs: leave one out")
        if self.screen and self.budgets:
            raise BadInput(f"--screen: has one budget for all runs, not --budget={self.budget}: leave one out")
        if len(self.limits) > 1 and (self.script != "train" or self.limit[0] != "flops" or len(self.sizes) < 3):
            raise BadInput(f"--budget={self.budget}: several budgets are for IsoFLOP grids of train.py: give flops=N,N with "
                           f"three or more --sizes, or one budget")
        if self.most_tokens is not None and not self.target:
            raise BadInput(f"--most_tokens={self.most_tokens:g}: has a meaning with --budget to_loss=X or to_bpb=X alone: "
                           f"add that")
        if self.epochs and (self.screen or self.budgets or self.limit[0] not in ("tokens", "bytes", "flops")
                            or self.script != "train"):
            raise BadInput(f"--epochs {' '.join(f'{n:g}' for n in self.epochs)}: are of one --budget tokens=N, bytes=N or "
                           f"flops=N of train.py, without --screen: give such a budget, or leave it out")
        for name in ("arms", "sizes", "lengths", "epochs", "rates"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise BadInput(f"--{name} {' '.join(map(repr, getattr(self, name)))}: has a duplicate: give each once")
        if self.script != "adapt" and self.limit[0] not in self.spec.units:
            raise BadInput(f"--budget={self.budget}: runs of {self.script}.py have no budget in {self.limit[0]}: "
                           f"{self.spec.budget_advice()}")
        if self.cluster and self.dry_run:
            raise BadInput(f"--cluster={self.cluster}: --dry_run times batches on this machine, not there: leave one out")
        if self.jobs is None and (not self.cluster or self.script != "adapt" and self.limit[0] == "seconds"):
            object.__setattr__(self, "jobs", 1)
        if self.script != "adapt" and self.limit[0] == "seconds" and self.jobs > 1:
            raise BadInput(f"--jobs={self.jobs}: with a budget in seconds only one run at a time is fair: leave it out")

    @property
    def limit(self) -> tuple[str, float]:
        """--budget as unit and amount: ("tokens", 1e7); the smallest of several. Raises BadInput."""
        return self.limits[0]

    @property
    def limits(self) -> list[tuple[str, float]]:
        """All of --budget, which may have several: [("flops", 1e13), ("flops", 1e14)]. Raises BadInput."""
        unit, _, amounts = self.budget.partition("=")
        with suppress(argparse.ArgumentTypeError):
            found = sorted({parse_float(amount) for amount in amounts.split(",")})
            if unit in UNITS and all(0 < amount < math.inf for amount in found):
                return [(unit, amount) for amount in found]
        raise BadInput(f"--budget={shorten(self.budget)}: {self.spec.budget_advice()}")

    @property
    def target(self) -> Target | None:
        """Where the budget is what it takes to reach a loss."""
        unit, value = self.limit
        return Target(unit, value) if unit in TARGETS else None

    @property
    def budgets(self) -> list[tuple[str, float]]:
        """Unit and amount of the runs, where there are several, rising; else []."""
        if not self.target:
            return self.limits if len(self.limits) > 1 else []
        return [("tokens", (self.most_tokens or 1e7) / 2 ** i) for i in reversed(range(N_BUDGETS))]

    @property
    def spec(self) -> "ScriptSpec":
        return SCRIPTS[self.script]

    @property
    def matches_size(self) -> bool:
        return self.match != "none" and not self.spec.starts_from_checkpoint


@dataclass(frozen=True)
class VocabularyConfig:
    """The vocabulary, if not that of --data_path."""
    vocab_size: int = flag(None, "size of the vocabulary: a tokenizer of that size is trained on the training text of "
                                 "--data_path, and the text is encoded with it", at_least=256 + len(SPECIAL_TOKENS),
                           at_most=MAX_VOCAB_SIZE)
    pattern: str = flag(None, f"how that tokenizer splits text into words: {', '.join(PATTERNS)}, or any regular expression "
                              f"(default: {next(iter(PATTERNS))})")
    tokenizer_path: Path = flag(None, "tokenizer.json to encode the text with, instead of training one")
    tokenizer_bytes: int = flag(TRAINING_BYTES, "bytes of text that tokenizers are trained on, the same text for all",
                                at_least=1, scope="shared")

    def __post_init__(self):
        check_flags(self)
        if self.pattern is not None:
            compile_pattern(PATTERNS.get(self.pattern, self.pattern))
        if self.tokenizer_path and (self.vocab_size or self.pattern):
            raise BadInput(f"--tokenizer_path={self.tokenizer_path}: has a size and a pattern: leave out "
                           f"{'vocab_size' if self.vocab_size else 'pattern'}")

    @property
    def name(self) -> str:
        """Empty for the vocabulary of --data_path."""
        given = {"vocab_size": self.vocab_size, "pattern": self.pattern, "tokenizer_path": self.tokenizer_path}
        return ",".join(f"{name}={value}" for name, value in given.items() if value is not None)


# -- data -------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class TrainingData:
    """What runs learn from. fingerprint: of its content. digests: of everything that a run reads from it. vocab_size: None
    where the model to start from has its own. shards: the data of pretraining; None for conversations and games, and for
    text that has yet to be encoded. game: of self-play, whose rules are all that a run learns from."""
    description: str
    fingerprint: str
    digests: tuple[str, ...]
    vocab_size: int | None = None
    shards: DataFolder | None = None
    game: Game | None = None

    @classmethod
    def from_shards(cls, shards: DataFolder) -> "TrainingData":
        manifest = shards.manifest
        digests = [shard.sha256 for split in ("train", "val") for shard in manifest.shards[split]]
        return cls(manifest.source.get("dataset", "text"), manifest.fingerprint(), (manifest.tokenizer, *digests),
                   manifest.vocab_size, shards)

    @property
    def vocabulary(self) -> str:
        """What differs between data of different vocabularies; "" where the model to start from has its own."""
        return self.digests[0] if self.vocab_size else ""

    @property
    def bytes_per_token(self) -> float:
        """Bytes of training text per token, separators included; NaN where it is not known."""
        if not self.shards:
            return math.nan
        return self.shards.manifest.total("train", "bytes") / self.shards.manifest.total("train", "tokens")


def load_shards(common: dict) -> TrainingData:
    """common: the flags that all runs share. Raises BadInput."""
    return TrainingData.from_shards(open_data(common.get("data_path", RunConfig.data_path)))


def load_conversations(common: dict) -> TrainingData:
    """common: the flags that all runs share. Raises BadInput."""
    source = read_flags(ConversationConfig, select_fields(ConversationConfig, common))
    splits = [[conversation.messages for conversation in part] for part in read_conversations(source, ROLES)]
    fingerprint = hashlib.sha256(json.dumps(splits).encode()).hexdigest()[:16]
    return TrainingData(f"conversations of {source.dataset}", fingerprint, (fingerprint,))


def load_game(common: dict) -> TrainingData:
    """common: the flags that all runs share. Raises BadInput."""
    if "game" not in common:
        raise BadInput("--game: say which all arms learn, such as --game=tic_tac_toe")
    game = open_game(common["game"], common.get("board"))
    name = game_title(common["game"], game.board)
    return TrainingData(f"games of {name}", name, (name,), game.vocab_size, game=game)


def load_problems(common: dict) -> TrainingData:
    """common: the flags that all runs share. Raises BadInput."""
    run = read_flags(ThinkConfig, common)
    if not run.task:
        raise BadInput(f"--task: say what all arms learn: {', '.join(TASKS)}")
    task = TASKS[run.task]
    size = run.size or task.size
    task.check_size(size)
    name = f"{run.task} with up to {size} {task.unit}"
    return TrainingData(f"problems of {name}", name, (name,), byte_tokenizer().vocab_size)


# -- vocabularies -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Vocabularies:
    """The data of every arm: that of --data_path, its text in another vocabulary, or another folder with the same validation
    text. folder: where the text in other vocabularies is kept."""
    base: TrainingData
    folder: Path

    def planned(self, values: dict) -> TrainingData:
        """The data of an arm with the flags `values`, without its shards if they have yet to be written. Raises BadInput."""
        vocabulary = read_flags(VocabularyConfig, select_fields(VocabularyConfig, values))
        path = values.get("data_path")
        if not self.base.shards or path in (None, self.base.shards.path):
            return self.planned_vocabulary(vocabulary) if vocabulary.name else self.base
        if vocabulary.name:
            raise BadInput(f"data_path={path}: has a vocabulary of its own: leave it out, or {vocabulary.name}")
        return TrainingData.from_shards(open_with_same_validation(path, self.base.shards))

    def planned_vocabulary(self, vocabulary: VocabularyConfig) -> TrainingData:
        if vocabulary.tokenizer_path:
            tokenizer = Tokenizer.load(vocabulary.tokenizer_path)
            _ = tokenizer.separator_id  # raises if it has none
            vocab_size, key = tokenizer.vocab_size, tokenizer.fingerprint()
        else:
            vocab_size = vocabulary.vocab_size or self.base.vocab_size
            pattern = vocabulary.pattern or next(iter(PATTERNS))
            key = f"{vocab_size} {PATTERNS.get(pattern, pattern)} {vocabulary.tokenizer_bytes}"
        facts = [*self.base.digests, key, code_hash(Path(__file__).with_name("tokenizer.py"))]
        digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:10]
        return TrainingData(self.base.description, digest, (digest,), vocab_size)

    def prepared(self, values: dict) -> TrainingData:
        """The data of an arm; writes its shards unless an earlier run of the command has. Raises BadInput."""
        data = self.planned(values)
        if data.shards or data is self.base:
            return data
        vocabulary = read_flags(VocabularyConfig, select_fields(VocabularyConfig, values))
        folder = self.folder / f"{readable_name(vocabulary.name)}-{data.fingerprint}"
        with suppress(BadInput):  # complete, though the path of --data_path may have been spelled in another way
            complete = open_data(folder)
            _ = complete.split("train"), complete.split("val")  # raise for shards that are missing or damaged
            return TrainingData.from_shards(complete)
        try:
            return self.encoded(vocabulary, data.vocab_size, folder)
        except BadInput:  # damaged
            if not folder.exists():
                raise
            shutil.rmtree(folder)
            return self.encoded(vocabulary, data.vocab_size, folder)

    def encoded(self, vocabulary: VocabularyConfig, vocab_size: int, folder: Path) -> TrainingData:
        """The text of --data_path in this vocabulary, from `folder` or written into it."""
        path = folder / "tokenizer.json"
        if not path.exists():
            log_line(f"{folder}: the text of {self.base.shards.path} with {vocabulary.name}")
        tokenizer = Tokenizer.load(path) if path.exists() else self.make_tokenizer(vocabulary, vocab_size)
        return TrainingData.from_shards(retokenize(self.base.shards, tokenizer, folder))

    def make_tokenizer(self, vocabulary: VocabularyConfig, vocab_size: int) -> Tokenizer:
        if vocabulary.tokenizer_path:
            return Tokenizer.load(vocabulary.tokenizer_path)
        texts = (text for chunk in read_split(self.base.shards, "train") for text in chunk.documents.strings())
        return Tokenizer.train(take_text(texts, vocabulary.tokenizer_bytes), vocab_size,
                               vocabulary.pattern or next(iter(PATTERNS)), progress=True)


def open_with_same_validation(path: Path, base: DataFolder) -> DataFolder:
    """Raises BadInput unless the folder `path` has the validation text of `base`: bits per byte of different texts cannot be
    compared."""
    data = open_data(path)
    # the manifest has a digest too, but not in folders of earlier versions, and another one in those of several nodes
    if validation_documents(data).digest() != validation_documents(base).digest():
        raise BadInput(f"data_path={path}: its validation text is not that of {base.path}, so that bits per byte cannot be "
                       f"compared: prepare both from the same text, or encode one with vocab_size=, pattern= or "
                       f"tokenizer_path=")
    return data


# -- models to start from ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class PretrainedModel:
    """A model that finetuning starts from. pretraining_flags: the flags of its own run. tokenizer: its fingerprint. digest:
    of the file."""
    config: GPTConfig
    pretraining_flags: dict
    tokenizer: str
    digest: str


@functools.cache
def read_pretrained(path: Path) -> PretrainedModel:
    """Raises BadInput."""
    checkpoint = load_checkpoint(path)
    with explain_damage(path):
        flags = pretraining_flags(checkpoint)
        config = GPTConfig(**upgrade_config(checkpoint["config"]))
        tokenizer = Tokenizer.from_json(checkpoint["tokenizer"]).fingerprint()
        return PretrainedModel(config, flags, tokenizer, hashlib.sha256(path.read_bytes()).hexdigest())


# -- scripts ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ScriptSpec:
    """What differs between the scripts whose runs are compared."""
    command: TrainingCommand
    loop: type[LoopConfig]
    run: type
    optimizer: type[OptimizerConfig]
    device: type[DeviceConfig]
    units: tuple[str, ...]        # of UNITS
    load_data: Callable[[dict], TrainingData]
    vocabulary: tuple[type, ...]  # VocabularyConfig where an arm may have a vocabulary, or a data_path, of its own
    starts_from_checkpoint: bool  # the flag checkpoint_path names the model of an arm
    arm_defaults: dict            # flags that an arm has unless they are given
    cell_defaults: dict           # the same, of each of its runs
    shortest_validation: dict     # flags of a run that is only timed; None: not this one
    # Of a script whose runs need more than flags to be known before they start:
    model: type[GPTConfig] | None = None             # declares some of the model's flags anew
    resolve_flags: Callable[[dict, dict], dict] | None = None  # the values of all flags, of ({}, those that are given)
    open_run: Callable[..., Run] | None = None       # a run from its flags, before which nothing is written

    def budget_advice(self) -> str:
        *units, last = (f"{unit}={'X' if unit in TARGETS else 'N'}" for unit in self.units)
        return f"give {', '.join(units)} or {last}"


SCRIPTS = {
    "train": ScriptSpec(PRETRAINING, LoopConfig, RunConfig, OptimizerConfig, DeviceConfig,
                        ("tokens", "bytes", "flops", "seconds", *TARGETS), load_shards, (VocabularyConfig,),
                        starts_from_checkpoint=False, arm_defaults={}, cell_defaults={"dataloader_num_workers": 0},
                        shortest_validation={"val_bytes": 1, "val_iter": None}),
    "finetune": ScriptSpec(FINETUNING, FinetuneLoop, FinetuneConfig, FinetuneOptimizer, DeviceConfig,
                           ("tokens", "flops", "seconds"), load_conversations, (), starts_from_checkpoint=True,
                           arm_defaults={"checkpoint_path": FinetuneConfig.checkpoint_path}, cell_defaults={},
                           shortest_validation={"answer_tokens": 1}),
    # not flops: those of play, of which some arms need many more than others, are not counted
    "selfplay": ScriptSpec(SELFPLAY, SelfPlayLoop, SelfPlayConfig, SelfPlayOptimizer, SelfPlayDevice,
                           ("games", "tokens", "seconds"), load_game, (), starts_from_checkpoint=False, arm_defaults={},
                           cell_defaults={"rating_games": 0}, shortest_validation={}, model=PlayerModel,
                           resolve_flags=resolve_play_flags, open_run=open_selfplay),
    # not seconds: how many steps the curriculum takes follows from how many there will be
    "think": ScriptSpec(THINKING, ThinkLoop, ThinkConfig, ThinkOptimizer, ThinkDevice, ("problems", "tokens", "flops"),
                        load_problems, (), starts_from_checkpoint=False, arm_defaults={}, cell_defaults={},
                        shortest_validation={"eval_questions": 1, "curriculum_iter": 0}, model=ThinkModel,
                        resolve_flags=resolve_think_flags, open_run=open_think)}


# -- the environment: what numbers depend on besides flags ------------------------------------------------------------

@dataclass(frozen=True)
class RunEnvironment:
    """What a cell's numbers depend on besides its flags."""
    data: TrainingData
    machine: str     # device and dtype
    hardware: str    # processor, card and versions
    code: str        # hash of the source, see experiments/code_hash.py


def detect_environment(config: CompareConfig, common: dict, data: TrainingData,
                       cluster: Cluster | None = None) -> RunEnvironment:
    """Raises BadInput when the device does not exist."""
    device = read_flags(config.spec.device, select_fields(config.spec.device, common))
    return RunEnvironment(data, *query_device(device, cluster), code_hash(REPO / config.spec.command.script))


def query_device(config: DeviceConfig, cluster: Cluster | None = None) -> tuple[str, str]:
    """Machine and hardware, as text. A GPU is queried in another process: its context would take memory from the runs."""
    if cluster:
        machine, hardware = cluster.run_alone(describe_device, config)
        return machine, f"{cluster.text}, of which one: {hardware}"
    if not torch.cuda.is_available():
        return describe_device(config)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(describe_device, (config,))


def describe_device(config: DeviceConfig) -> tuple[str, str]:
    machine = open_machine(config)
    return str(machine), describe_hardware(machine.device)


# -- arms -------------------------------------------------------------------------------------------------------------

def parse_arm(text: str, given: str, script: str = "train") -> dict:
    """The flags of `script` that an arm sets: "mlp=grkan,n_layer=4" -> {"mlp": "grkan", "n_layer": 4}. One of train.py may
    also set those of VocabularyConfig, and data_path.

    given: the flag that `text` was a value of, for the message. Raises BadInput.
    """
    classes, vocabulary = script_flags(script)
    # at commas before the name of a flag: a regular expression, pattern=\d{1,3}, has commas of its own
    parts = [part.strip() for part in re.split(r",(?=\s*[\w-]+\s*(?:[=,]|$))", text)]
    if {"help", "h"} & {*parts}:
        raise BadInput(f"{given} {text!r}: give flags of {script}.py, such as mlp=relu2; `python {script}.py --help` lists "
                       f"them")
    parser = Parser(None)
    add_arm_flags(parser, script)
    try:
        values = vars(parser.parse_args([f"--{part}" for part in parts]))
        # any: where it is not given, it follows from the game or the task
        derived = {"block_size": 1} if script in ("selfplay", "think") else {}
        for config in (*classes, *vocabulary):
            read_flags(config, select_fields(config, derived | values))
    except BadInput as error:
        suggestions = [f"{name}={part}" for part in parts for name, field in declared_flags(*classes).items()
                       if part in (field.metadata["flag"].choices or ()) or name == "mixer" and part in MIXERS]
        raise BadInput(f"{given} {text!r}: " + (f"did you mean {suggestions[0]}?" if suggestions else str(error))) from None
    allowed = flag_names(*classes, *vocabulary, scope="arm") | ({"data_path"} if vocabulary else set())
    if not_of_an_arm := values.keys() - allowed:
        raise BadInput(f"{given} {text!r}: {min(not_of_an_arm)} is not part of an architecture or recipe: leave it out")
    return values


def script_flags(script: str) -> tuple[tuple[type, ...], tuple[type, ...]]:
    """The dataclasses of a script's flags, and VocabularyConfig where an arm may have a vocabulary of its own."""
    if script == "adapt":
        return (AdaptRunConfig, AdaptConfig, DeviceConfig), ()
    return SCRIPTS[script].command.classes, SCRIPTS[script].vocabulary


def add_arm_flags(parser: Parser, script: str, without: set[str] = frozenset()):
    """The flags of the vocabulary and of the script; those that are not given are absent from the namespace."""
    classes, vocabulary = script_flags(script)
    add_flags(parser, *vocabulary, suppress=True)
    add_flags(parser, *classes, suppress=True, without=without | set(declared_flags(*vocabulary)))


def select_fields(config: type, values: dict) -> dict:
    """The entries of `values`, and of the preset that they name, that are fields of `config`."""
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in (PRESETS.get(values.get("preset"), {}) | values).items() if name in names}


def build_arms(config: CompareConfig, common: dict, data: TrainingData,
               find_data: Callable[[dict], TrainingData] | None = None) -> list[Arm]:
    """Every arm at every size, matched to the first of that size. data: of --data_path. find_data(flags of an arm): its own,
    by default as far as it is known before it is written. Raises BadInput."""
    arms, find_data = [], find_data or Vocabularies(data, config.out_path / "data").planned
    for size, shared in list_sizes(config, common):
        reference, of_size = None, []
        for name, text, seeds in arm_texts(config):
            values = shared | parse_arm(text, "--arms", config.script)
            try:
                own = find_data(values)
                values = {name: value for name, value in values.items() if name not in declared_flags(VocabularyConfig)}
                if own.shards and own is not data:
                    values["data_path"] = own.shards.path
                if config.spec.model:
                    values |= own_shape(config.spec, values)
                if reference and config.matches_size:
                    target = MATCHED[config.match].count(build_meta_model(reference.flags, reference.vocab_size))
                    values = match_arm(values, target, own.vocab_size, config.match)
                if data.game:
                    arm = build_play_arm(name, size, values, seeds, data)
                else:
                    build = build_think_arm if config.script == "think" else functools.partial(build_arm, config.spec)
                    arm = build(name, size, values, seeds, own)
                    check_same_batches(arm, reference or arm)
            except BadInput as error:
                raise BadInput(f"--arms {name!r}: {error}") from None
            reference = reference or arm
            of_size.append(arm)
            check_text(arm, own, config)
        arms += along_axes(of_size, config)
    check_comparable(config, common, arms, data)
    return arms


def list_sizes(config: CompareConfig, common: dict) -> Iterator[tuple[str, dict]]:
    """The name and the flags of each of --sizes, at each of --lengths. Raises BadInput."""
    for text in config.arms if config.lengths else ():
        if own := {"block_size", "batch_size"} & parse_arm(text, "--arms").keys():
            raise BadInput(f"--arms {text!r}: {max(own)} follows from --lengths: leave it out")
    for size in config.sizes or ("",):
        shared = config.spec.arm_defaults | common | (parse_arm(size, "--sizes", config.script) if size else {})
        if not config.lengths:
            yield size, shared
        for length in config.lengths:
            yield name_length(size, length), shared | resize_blocks(shared, length, config.lengths)


def resize_blocks(values: dict, length: int, lengths: tuple[int, ...]) -> dict:
    """The flags that give arms with the flags `values` blocks of `length` tokens, in batches of as many tokens. lengths: all
    that are compared. Raises BadInput when these are no whole number of blocks."""
    given = {"batch_size": RunConfig.batch_size, "block_size": GPTConfig.block_size} | PRESETS.get(
        values.get("preset"), {}) | values
    batch_size, block_size = given["batch_size"], given["block_size"]
    if batch_size != "auto" and batch_size * block_size % length:
        multiple = math.lcm(*(other // math.gcd(other, block_size) for other in lengths))
        raise BadInput(f"--lengths {' '.join(map(str, lengths))}: batches of --batch_size={batch_size} x "
                       f"--block_size={block_size} tokens hold no whole number of blocks of {length}: give a --batch_size "
                       f"that is a multiple of {multiple}")
    return {"batch_size": batch_size if batch_size == "auto" else batch_size * block_size // length, "block_size": length}


def along_axes(arms: list[Arm], config: CompareConfig) -> list[Arm]:
    """The arms of one size at each of several budgets, or with each of --epochs, if there are any."""
    if config.epochs:
        return [dataclasses.replace(arm, epochs=epochs) for epochs in sorted(config.epochs) for arm in arms]
    if not config.budgets:
        return arms
    return [dataclasses.replace(arm, budget=budget, tuned_below=bool(config.target and i))
            for i, budget in enumerate(config.budgets) for arm in arms]


def check_text(arm: Arm, data: TrainingData, config: CompareConfig):
    """Raises BadInput where there is less training text than the fewest --epochs need."""
    if not config.epochs or not data.shards:
        return
    wanted, found = budget_tokens(arm, config), data.shards.manifest.total("train", "tokens")
    if training_tokens(arm, wanted, min(config.epochs)) > found:
        raise BadInput(f"--epochs {min(config.epochs):g}: --budget={config.budget} is {wanted / found:.2f} epochs of the "
                       f"{found:,} training tokens in {data.shards.path}: start from more, or prepare more text")


def training_tokens(arm: Arm, budget: float, epochs: float) -> int:
    """How much text a `budget` of tokens passes over so many times: whole blocks, and the target of the last token."""
    block_size = arm.batch_shape[1]
    return max(1, round(budget / epochs / block_size)) * block_size + 1


def arm_texts(config: CompareConfig) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, flags as text, seeds) of each arm; with --null, of the first one twice."""
    seeds = tuple(range(1, (SCREEN_SEEDS if config.screen else config.seeds) + 1))
    if not config.null:
        return [(text, text, seeds) for text in config.arms]
    text = config.arms[0]
    return [(text, text, seeds), (f"{text} again", text, tuple(NULL_SEED_OFFSET + seed for seed in seeds))]


def check_same_batches(arm: Arm, reference: Arm):
    """Raises BadInput when the two would see different data."""
    if arm.batch_shape != reference.batch_shape:
        own, other = (f"{batch_size} x {block_size}" for batch_size, block_size in (arm.batch_shape, reference.batch_shape))
        raise BadInput(f"has batches of {own} tokens, the first arm {other}: they would see other data: give both the same "
                       f"--batch_size and --block_size")


def check_comparable(config: CompareConfig, common: dict, arms: list[Arm], data: TrainingData):
    """Raises BadInput for flags that would give arms different numbers of games, or those of different vocabularies
    different amounts of text."""
    unit, amount = config.limit
    if unit == "games":
        check_same_games(config, arms)
    if len({arm.vocabulary for arm in arms}) == 1 or not data.vocab_size:
        return
    if unit == "to_loss":
        raise BadInput(f"--budget={config.budget}: nats/token of different vocabularies cannot be compared: give "
                       f"--budget to_bpb=X, in bits/byte")
    if unit == "tokens":
        raise BadInput(f"--budget={config.budget}: with different vocabularies as many tokens are different amounts of "
                       f"text: give --budget bytes={amount * data.bytes_per_token:.2g} for about as much text, or flops=N "
                       f"or seconds=N")
    if common.get("val_iter") is not None:
        raise BadInput(f"--val_iter={common['val_iter']}: with different vocabularies as many batches are different "
                       f"amounts of text: leave it out")


def build_arm(spec: ScriptSpec, name: str, size: str, values: dict, seeds: tuple[int, ...], data: TrainingData) -> Arm:
    """values: all flags of its runs that are the same in each. Raises BadInput."""
    model = build_meta_model(values, data.vocab_size)
    loop, run, schedule = (read_flags(config, select_fields(config, values)) for config in (
        spec.loop, spec.run, spec.optimizer))
    check_compile(run.compile_model, model)
    if run.batch_size == "auto":
        raise BadInput("--batch_size=auto: give a number, so that steps of all arms see the same tokens")
    block_size = model.config.block_size
    if data.shards:
        require_block(data.shards, "train", block_size)
        require_block(data.shards, "val", block_size if run.val_iter else 1)
    vocabulary = data.vocabulary
    if spec.starts_from_checkpoint:
        pretrained = read_pretrained(values["checkpoint_path"])
        schedule, vocabulary = schedule.for_model(pretrained.pretraining_flags), pretrained.tokenizer
    step_tokens = run.batch_size * loop.num_batch_accum * block_size
    return Arm(name, size, values, seeds, step_tokens, (run.batch_size, block_size), schedule.peak_lr(step_tokens),
               **model_size(model), bytes_per_token=data.bytes_per_token, vocabulary=vocabulary, data_digests=data.digests)


def own_shape(spec: ScriptSpec, values: dict) -> dict:
    """The flags of the model whose defaults the script declares anew, with their values. Raises BadInput."""
    resolved, general = spec.resolve_flags({}, values), declared_flags(GPTConfig)
    return {name: resolved[name] for name, field in declared_flags(spec.model).items()
            if field.default != general[name].default}


def build_think_arm(name: str, size: str, values: dict, seeds: tuple[int, ...], data: TrainingData) -> Arm:
    """values: see build_arm. Raises BadInput."""
    model, configs = build_meta_model(values, data.vocab_size), THINKING.read_configs(resolve_think_flags({}, values))
    check_compile(configs.run.compile_model, model)
    step_tokens = typical_batch(configs.run)[0].numel() * configs.loop.num_batch_accum
    return Arm(name, size, values, seeds, step_tokens, (configs.run.batch_size, model.config.block_size),
               configs.optimizer.peak_lr(step_tokens), **model_size(model), vocabulary=data.vocabulary,
               data_digests=data.digests, metric=WRONG_ANSWERS)


def model_size(model: GPT) -> dict:
    """What an Arm says about its model."""
    return {"n_parameters": model.n_parameters(), "flops_per_token": model.flops_per_token(),
            "elementwise_flops_per_token": model.elementwise_flops_per_token(),
            "embedding_parameters": embedding_parameters(model), "vocab_size": model.config.vocab_size}


def build_meta_model(values: dict, vocab_size: int | None) -> GPT:
    """The model of these flags on torch's meta device, without weights. vocab_size: None where the model exists, as the
    checkpoint that finetuning starts from."""
    if vocab_size is None:
        config = read_pretrained(values["checkpoint_path"]).config
    else:
        config = read_flags(GPTConfig, select_fields(GPTConfig, values) | {"vocab_size": vocab_size})
    return meta_model(config)


def embedding_parameters(model: GPT) -> int:
    """Parameters of tables in which tokens are looked up, which costs no product: of the embedding, and of memories of pairs
    and embeddings of values; and those of the head, unless it is the same matrix as the embedding."""
    tables = [model.embed, *(block.mixer.value_embedding.embed for block in model.blocks
                             if getattr(block.mixer, "value_embedding", None) is not None)]
    if not model.config.tied:
        tables.append(model.head)
    if model.ngrams is not None:
        tables.append(model.ngrams.embed)
    return sum(table.weight.numel() for table in tables)


def decoding_bytes(model: GPT) -> int:
    """Of weights and cache of a text as long as the context, in fp32."""
    return 4 * model.n_parameters() + model.init_cache(1, model.config.block_size).n_bytes()


class Matched(NamedTuple):
    """A choice of --match. what: a noun in the plural. count: of a model; linear in its n_hidden."""
    what: str
    count: Callable[[GPT], int]


MATCHED = {
    "parameters": Matched("parameters", GPT.n_parameters),
    "non_embedding": Matched("parameters besides embeddings",
                             lambda model: model.n_parameters() - embedding_parameters(model)),
    "flops": Matched("FLOPs per token", lambda model: model.flops_per_token() + model.elementwise_flops_per_token()),
    "memory": Matched("bytes of weights and cache", decoding_bytes),
}


def match_arm(values: dict, target: int, vocab_size: int, match: str = "parameters") -> dict:
    """`values` with the n_hidden that gives the model the first arm's count of what --match names, `target`. Raises BadInput
    when none comes within MATCH_TOLERANCE."""
    def count(**changed) -> int:
        return MATCHED[match].count(build_meta_model(values | changed, vocab_size))
    found, n_hidden = count(), None
    if abs(found - target) > CLOSE_MATCH * target and "n_hidden" not in values:
        at_8, at_16 = count(n_hidden=8), count(n_hidden=16)
        exact = 8 + 8 * (target - at_8) / (at_16 - at_8)
        n_hidden, multiple_of_8 = max(1, round(exact)), max(8, 8 * round(exact / 8))
        if abs(count(n_hidden=multiple_of_8) - target) <= CLOSE_MATCH * target:
            n_hidden = multiple_of_8  # suits a processor's vectors and a GPU's tiles
        found = count(n_hidden=n_hidden)
    if abs(found - target) > MATCH_TOLERANCE * target:
        raise BadInput(explain_mismatch(found, target, n_hidden, embedding_parameters(
            build_meta_model(values, vocab_size)), match))
    return values if n_hidden is None else values | {"n_hidden": n_hidden}


def explain_mismatch(found: int, target: int, n_hidden: int | None, embedding: int, match: str) -> str:
    """What to do about an arm that the width of its hidden layers cannot give the count `target`. n_hidden: the width that
    came closest; None if it is given."""
    words = f"has {found:,} {MATCHED[match].what}, the first arm {target:,}"
    if match == "parameters" and n_hidden == 1 and embedding > target / 2:
        return (f"{words}, which is {found - target:,} more even with hidden layers of width 1, because its embedding has "
                f"{embedding:,}: list the arm with the largest vocabulary first, compare wider or deeper models, or leave "
                f"the embedding out of the count with --match=non_embedding")
    return f"{words}: change its shape, or compare them as they are with --match=none"


# -- arms that play ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class PlaySchedule:
    """When runs of an arm play, and when they learn."""
    loader: PlayLoader
    loop: SelfPlayLoop

    @classmethod
    def from_flags(cls, values: dict) -> "PlaySchedule":
        """Raises BadInput for a flag without effect."""
        values = resolve_play_flags({}, values)
        game = open_game(values["game"], values["board"])
        return cls(PlayLoader(game, read_flags(PlayConfig, values), seed=0), read_flags(SelfPlayLoop, values))

    @property
    def rollout_games(self) -> int:
        return self.loader.config.rollout_games

    @property
    def period(self) -> int:
        return period_of(self.loader, self.loop.num_batch_accum)

    @property
    def step_games(self) -> float:
        """Games that are played for each step, on average."""
        return self.rollout_games * self.loop.num_batch_accum / self.loader.batches_per_rollout

    @property
    def step_tokens(self) -> int:
        """Positions in the games that a step learns from."""
        return self.loader.batch_rows * self.loop.num_batch_accum * self.loader.replay.ids.shape[1]

    def steps(self, n_games: int) -> int:
        """Of a run of about so many games."""
        return resolve_games(self.loop, self.loader, n_games).max_iter

    def games(self, n_steps: int) -> int:
        """That a run of so many steps plays."""
        return math.ceil(n_steps * self.loop.num_batch_accum / self.loader.batches_per_rollout) * self.rollout_games


def build_play_arm(name: str, size: str, values: dict, seeds: tuple[int, ...], data: TrainingData) -> Arm:
    """values: see build_arm. Raises BadInput."""
    model, play = build_meta_model(values, data.vocab_size), PlaySchedule.from_flags(values)
    block_size, schedule = model.config.block_size, read_flags(SelfPlayOptimizer, resolve_play_flags({}, values))
    check_context(block_size, values["game"], data.game, f"--block_size={block_size}: a context")
    return Arm(name, size, values, seeds, play.step_tokens, (play.loader.batch_rows, block_size),
               schedule.peak_lr(play.step_tokens), **model_size(model), vocabulary=data.vocabulary,
               data_digests=data.digests, metric=EXPLOITABILITY if data.game.has_hidden_cards else WRONG_MOVES,
               speed_window=play.period)


def check_same_games(config: CompareConfig, arms: list[Arm]):
    """Raises BadInput when arms would play different numbers of games, because each plays several at a time."""
    schedules = [PlaySchedule.from_flags(arm.flags) for arm in arms]
    first, *others = (play.games(play.steps(int(config.limit[1]))) for play in schedules)
    for arm, play, n_games in zip(arms[1:], schedules[1:], others):
        if n_games != first:
            multiple = math.lcm(schedules[0].rollout_games, play.rollout_games)
            raise BadInput(f"--budget={config.budget}: {arm.name!r} would play {n_games:,} games, {arms[0].name!r} "
                           f"{first:,}, as they play {play.rollout_games:,} and {schedules[0].rollout_games:,} at a time: "
                           f"give a multiple of {multiple:,}")


def play_steps(arm: Arm, config: CompareConfig, n_games: float, budget_frac: float) -> int:
    """Raises BadInput for fewer games than a rollout has."""
    play = PlaySchedule.from_flags(arm.flags)
    if n_games < play.rollout_games:
        raise BadInput(f"--budget={config.budget}: {budget_frac:g} of it gives a run of {arm.name!r} {n_games:,.0f} games, "
                       f"fewer than it plays at a time: give more, or fewer than {play.rollout_games:,} --rollout_games")
    return play.steps(int(n_games))


# -- cells ------------------------------------------------------------------------------------------------------------

def make_cell(arm: Arm, config: CompareConfig, environment: RunEnvironment, stage: str, lr_multiple: float,
              seed: int) -> Cell:
    """stage: "lr_grid", "run" or "speed", see Cell. Raises BadInput when its part of the budget is less than one step."""
    budget_frac, own = stage_flags(arm, config, stage)
    command = config.spec.command
    values = config.spec.cell_defaults | arm.flags | own | {"learning_rate": arm.base_lr * lr_multiple, "seed": seed}
    digest = cell_digest(arm, values, config.spec, environment, stage)
    readable = readable_name(f"{arm.name}-{arm.group}".strip("-"))
    checkpoint = config.out_path / "runs" / f"{readable}-{stage}-{lr_multiple:g}-{seed}-{digest}.pt"
    job = TrainingJob(REPO / command.script, checkpoint, flag_texts(values), command.out_flag,
                      (arm.metric.field, *arm.metric.other_fields))
    limit = next((counter, float(own[name])) for name, counter in STOP_FLAGS.items() if name in own)
    flops = (arm.flops_per_token + arm.elementwise_flops_per_token) * (arm.step_tokens if limit[0] == "step" else 1)
    return Cell(arm, stage, lr_multiple, seed, budget_frac, job, limit, limit[1] * (1 if limit[0] == "seconds" else flops))


def stage_flags(arm: Arm, config: CompareConfig, stage: str) -> tuple[float, dict]:
    """The fraction of the budget that a cell of this stage gets, and the flags that limit it. Raises BadInput."""
    if stage == "speed":
        n_windows = max(3, (SPEED_STEPS - SPEED_WARMUP) // arm.speed_window)
        n_steps = SPEED_WARMUP + n_windows * arm.speed_window
        return 0.0, config.spec.shortest_validation | {"max_iter": n_steps, "log_intervals": 1, "val_intervals": n_steps}
    budget_frac = config.grid_share if stage == "lr_grid" else 1.0
    unit, amount = arm.budget or config.limit
    amount *= budget_frac
    if unit == "seconds":
        return budget_frac, {"max_seconds": amount}
    if unit == "games":
        n_steps = play_steps(arm, config, amount, budget_frac)
        return budget_frac, {"max_iter": n_steps} | validation_interval(arm, n_steps)
    if unit == "problems":
        step_problems = arm.batch_shape[0] * arm.flags.get("num_batch_accum", config.spec.loop.num_batch_accum)
        n_steps = int(amount / step_problems)
        if n_steps < 1:
            raise BadInput(f"--budget={config.budget}: {budget_frac:g} of it gives a run of {arm.name!r} {amount:,.0f} "
                           f"problems, less than a step of {step_problems:,}: give more")
        return budget_frac, {"max_iter": n_steps} | intervals(arm, config, n_steps, budget_frac)
    tokens = budget_frac * budget_tokens(arm, config)
    if tokens < arm.step_tokens:
        given = f"--budget={config.budget}: {budget_frac:g} of it gives a run"
        if config.target:
            given = f"--most_tokens={config.budgets[-1][1]:g}: gives the shortest run"
        raise BadInput(f"{given} of {arm.name!r} {tokens:,.0f} tokens, less than a step of {arm.step_tokens:,}: give more")
    text = {"train_tokens": training_tokens(arm, tokens / budget_frac, arm.epochs)} if arm.epochs else {}
    return budget_frac, {"max_tokens": int(tokens)} | text | intervals(arm, config, tokens / arm.step_tokens, budget_frac)


def budget_tokens(arm: Arm, config: CompareConfig) -> float:
    """The tokens of a run, where they do not follow from games, problems or seconds."""
    unit, amount = arm.budget or config.limit
    return amount / {"tokens": 1, "bytes": arm.bytes_per_token,
                     "flops": arm.flops_per_token + arm.elementwise_flops_per_token}[unit]


def intervals(arm: Arm, config: CompareConfig, n_steps: float, budget_frac: float) -> dict:
    """The flags that fit what happens in a run to its number of steps: validations, and the curriculum of think.py, of which
    a run on a part of the budget has all too."""
    flags = validation_interval(arm, n_steps)
    if config.script == "think":
        given = arm.flags.get("curriculum_iter")
        flags["curriculum_iter"] = round(n_steps * ThinkConfig.curriculum_iter / ThinkLoop.max_iter if given is None else
                                         given * budget_frac)
    return flags


def validation_interval(arm: Arm, n_steps: float) -> dict:
    """The flag that gives a run VALIDATIONS of them, unless it is given."""
    return {} if "val_intervals" in arm.flags else {"val_intervals": max(1, math.ceil(n_steps / VALIDATIONS))}


def cell_digest(arm: Arm, values: dict, spec: ScriptSpec, environment: RunEnvironment, stage: str) -> str:
    """10 hex digits that change with everything a cell's numbers depend on. Paths count by the content behind them."""
    paths = {name for name, field in declared_flags(*spec.command.classes).items() if value_type(field) is Path}
    model = [read_pretrained(values["checkpoint_path"]).digest] if spec.starts_from_checkpoint else []
    inputs = [*arm.data_digests, *model, environment.machine, torch.__version__, environment.code,
              *flag_texts({name: value for name, value in values.items() if name not in paths}),
              environment.hardware if stage == "speed" else ""]
    return hashlib.sha256("\n".join(inputs).encode()).hexdigest()[:10]


# -- running them -----------------------------------------------------------------------------------------------------

def expected_cost(results: ArmResults, config: CompareConfig, environment: RunEnvironment,
                  is_confirmed: bool = False) -> float:
    """The cost of all cells of an arm, in the unit of Cell.cost, with one lower rate tried on the whole budget until it is
    known how many are. is_confirmed: its learning rate is known from the screen."""
    cost = lambda stage: make_cell(results.arm, config, environment, stage, 1.0, results.arm.seeds[0]).cost
    has_speed = config.limit[0] != "seconds" and (is_confirmed or not config.screen) and is_timed(results.arm, config)
    speed = cost("speed") * SPEED_ROUNDS if has_speed else 0
    if is_confirmed:
        return cost("run") * len(results.arm.seeds) + speed
    n_grid = grid_runs(results.arm, config)
    grid = cost("lr_grid") * n_grid if n_grid else 0
    return grid + cost("run") * (expected_runs(results, config) - n_grid) + speed


def is_timed(arm: Arm, config: CompareConfig) -> bool:
    """Whether its steps are: at other budgets, and on other text, they take as long."""
    return arm.budget in (None, *config.budgets[:1]) and arm.epochs in (None, min(config.epochs, default=None))


def grid_runs(arm: Arm, config: CompareConfig) -> int:
    """How many runs on a part of the budget an arm has."""
    return 0 if arm.tuned_below else len(config.rates)


def expected_runs(results: ArmResults, config: CompareConfig) -> int:
    """How many runs of an arm there will be, those on a part of the budget included."""
    n_searched = len(results.full_budget_lr_runs)
    is_longer = config.grid_share < 1 or results.arm.tuned_below
    if (not n_searched or results.next_lr_multiple()) and len(config.rates) > 1 and is_longer:
        n_searched = max(n_searched, 2)
    return grid_runs(results.arm, config) + max(n_searched, 1) - 1 + len(results.arm.seeds)


def run_all(arms: list[Arm], config: CompareConfig, environment: RunEnvironment, stop: StopSignals,
            cluster: Cluster | None) -> tuple[list[ArmResults], list[ArmResults]]:
    """Runs every arm's learning-rate grid, then lower rates on the full budget while they improve, then every seed at the
    best rate; with --screen, then those of the arms to confirm; and times the arms at the end. With a target, that on rising
    budgets. Returns the results, and those of the screen where it led to a confirmation."""
    all_results = [ArmResults(arm, timed_budget=config.limit[0] == "seconds") for arm in arms]
    screened, confirmed = [], []
    expected = lambda: needed(all_results, config.target) if config.target else all_results
    bar = ComparisonBar(lambda: sum(expected_cost(results, config, environment, is_confirmed)
                                    for group, is_confirmed in ((expected(), False), (confirmed, True))
                                    for results in group))
    runner = ArmRunner(lambda arm, *which: make_cell(arm, config, environment, *which), config.jobs, stop, bar,
                       cluster)
    with closing(bar.bar):
        if config.target:
            run_to_target(all_results, config.target, runner, config.rates, SPEED_ROUNDS)
            return all_results, []
        runner.tune(all_results, config.rates)
        runner.run_seeds(all_results)
        if config.screen and not stop.signal:
            screened = all_results
            for _, group in itertools.groupby(screened, key=lambda results: results.arm.size):
                chosen, plan = plan_confirmation(list(group), config.confirm or 2, config.smallest_difference or 0.01,
                                                 config.most_seeds or 20)
                log_line(plan)
                confirmed += chosen
            runner.run_seeds(confirmed)
        if config.limit[0] != "seconds":
            runner.measure_speed(confirmed if config.screen else all_results, SPEED_ROUNDS)
    return (confirmed, screened) if confirmed else (all_results, [])


# -- what decoding costs ----------------------------------------------------------------------------------------------

def measure_decoding(results: list[ArmResults], config: CompareConfig, environment: RunEnvironment, device: DeviceConfig,
                     stop: StopSignals) -> Contexts:
    """Of the arms at each size and length, unless an earlier run of the command has measured it."""
    machine, decoding = open_machine(dataclasses.replace(device, dtype="auto")), {}
    groups = [[arm_results.arm for arm_results in group] for group in group_by_size(results)]
    for arms in progress_bar(groups, desc="decoding", unit="length", disable=None):
        models = [[f"{arm.vocab_size}", *flag_texts(select_fields(GPTConfig, arm.flags))] for arm in arms]
        facts = [*itertools.chain(*models), str(machine), torch.__version__, environment.code, environment.hardware]
        digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:10]
        path, measured = config.out_path / "runs" / f"decoding-{readable_name(arms[0].size)}-{digest}.json", None
        with suppress(OSError, ValueError, TypeError):  # none yet, or damaged
            measured = [Decoding(*costs) for costs in json.loads(path.read_text(encoding="utf-8"))]
        if measured is None and not stop.signal:
            measured = time_decoding(arms, machine, DECODE_ROUNDS)
            with atomic_write(path, "w") as file:
                json.dump(measured, file)
        decoding |= {(arm.size, arm.name): costs for arm, costs in zip(arms, measured or ())}
    return Contexts(decoding, str(machine), DECODE_ROUNDS)


@torch.inference_mode()
def time_decoding(arms: list[Arm], machine: Machine, n_rounds: int) -> list[Decoding]:
    """The median over rounds, in which the arms take turns, after one that does not count. Models have random weights and
    decode as generate.py does, at the end of their context, which must be equal."""
    if machine.device.type == "cpu":
        torch.set_num_threads(threads_of_job(1))
    length = arms[0].batch_shape[1]
    n_tokens = max(1, min(DECODE_TOKENS, length // 8))
    readings, costs = [], []
    with machine.autocast():
        for arm in arms:
            model = GPT(build_meta_model(arm.flags, arm.vocab_size).config)
            model.cast_matrices(DTYPES[machine.dtype])
            prompt = torch.randint(arm.vocab_size, (length - n_tokens,), generator=torch.Generator().manual_seed(0))
            readings.append(Reading(model.to(machine.device), [prompt.to(machine.device)]))
        for _ in range(1 + n_rounds):
            costs.append([decode(reading, n_tokens) for reading in readings])
    return [Decoding(own[0].cache_bytes, statistics.median(cost.seconds for cost in own[1:])) for own in zip(*costs)]


def decode(reading: Reading, n_tokens: int) -> Decoding:
    """From the text that was read, `n_tokens` after the first."""
    decoder = reading.decoder([0], n_tokens + 1, GREEDY)
    new = sample(decoder.logits, GREEDY)
    new.tolist()  # as text is shown token by token: waits for the device
    start = time.perf_counter()
    for _ in range(n_tokens):
        decoder.append(new)
        new = sample(decoder.logits, GREEDY)
        new.tolist()
    return Decoding(decoder.cache.n_bytes(), (time.perf_counter() - start) / n_tokens)


# -- the report -------------------------------------------------------------------------------------------------------

def describe_match(config: CompareConfig) -> str:
    """Of the arms but the first, or "arms": what --match gives them."""
    return f"as many {MATCHED[config.match].what} as the first" if config.matches_size else "sizes not matched"


def describe_conditions(results: list[ArmResults], config: CompareConfig, environment: RunEnvironment) -> str:
    """The conditions that the verdicts hold for."""
    reference, data = results[0].arm, environment.data
    if data.game:
        return describe_play_conditions(results, config, environment)
    model = build_meta_model(reference.flags, data.vocab_size and reference.vocab_size).config
    unit = "tokens" if share_vocabulary(results) or math.isnan(reference.bytes_per_token) else "bytes"
    seen = sorted({run.rows[-1]["tokens"] * (arm_results.arm.bytes_per_token if unit == "bytes" else 1)
                   for arm_results in results for run in arm_results.finished()}) or [0]
    span = " to ".join(dict.fromkeys(f"{n / 1e6:.2f}" for n in (seen[0], seen[-1])))
    epochs = f", {seen[-1] / data.shards.manifest.total('train', unit):.2f} epochs" if data.shards else ""
    if reference.epochs:
        epochs = f", {reference.epochs:g} epochs of a part of it"
    others = describe_match(config)
    budget = config.budget
    if reference.budget:
        unit, amount = reference.budget
        budget = f"{budget} in at most {config.budgets[-1][1]:,.0f} tokens" if config.target else f"{unit}={amount:g}"
    return (f"First arm: {model.describe_shape()}, blocks of {model.block_size}, vocabulary "
            f"{model.vocab_size:,}, {reference.n_parameters / 1e6:.2f} M parameters, steps of {reference.step_tokens:,} "
            f"tokens; the others: {others}. {span} {'M tokens' if unit == 'tokens' else 'MB'} of {data.description}{epochs}"
            f"; budget {budget}, {len(reference.seeds)} seeds; {environment.hardware}, {environment.machine}")


def describe_play_conditions(results: list[ArmResults], config: CompareConfig, environment: RunEnvironment) -> str:
    reference, data = results[0].arm, environment.data
    model = build_meta_model(reference.flags, reference.vocab_size).config
    batch_games = reference.batch_shape[0] // (2 if data.game.has_hidden_cards else 1)  # a row for each of two players
    played = sorted({run.rows[-1]["games"] for arm_results in results for run in arm_results.finished()}) or [0]
    span = " to ".join(dict.fromkeys(f"{n:,}" for n in (played[0], played[-1])))
    others = describe_match(config)
    return (f"First arm: {model.describe_shape()}, {reference.n_parameters / 1e3:,.0f} k parameters, batches "
            f"of {batch_games:,} games; the others: {others}. {span} {data.description}; budget {config.budget}, "
            f"{len(reference.seeds)} seeds; {environment.hardware}, {environment.machine}")


# -- the forecast -----------------------------------------------------------------------------------------------------

class ArmForecast(NamedTuple):
    """memory: peak bytes, of the process on a CPU. tok_per_sec: of training. open_seconds: that a run needs before it
    begins, besides those of its imports."""
    memory: int
    tok_per_sec: float
    validation_seconds: float
    open_seconds: float = 0.0


def print_forecast(arms: list[Arm], config: CompareConfig, environment: RunEnvironment, device: DeviceConfig):
    """Prints what the runs of each arm need at the speed of a few timed steps, and all of them. Where text has yet to be
    encoded for an arm, its bytes per token count as those of --data_path."""
    machine, total, peak, open_seconds, decoding_seconds = open_machine(device), 0.0, 0, 0.0, 0.0
    on_cpu, data, known = machine.device.type == "cpu", environment.data, {}
    n_rounds = SPEED_ROUNDS if config.limit[0] != "seconds" and not config.screen else 0
    if on_cpu:
        torch.set_num_threads(threads_of_job(config.jobs))
    lines = [("arm", "parameters", "memory", "games/s" if data.game else "tokens/s", "runs", "time")]
    for arm in progress_bar(arms, desc="timing", unit="arm", leave=False, disable=None):
        if math.isnan(arm.bytes_per_token):
            arm = dataclasses.replace(arm, bytes_per_token=data.bytes_per_token)
        if (arm.name, arm.size) not in known:  # else at another budget
            known[arm.name, arm.size] = measure_run(arm, config, machine) if config.spec.open_run else measure_arm(
                arm, config.spec, data, machine)
        measured = known[arm.name, arm.size]
        results, speed = ArmResults(arm), measured.tok_per_sec
        seconds, n_runs = expected_cost(results, config, environment), expected_runs(results, config)
        if config.limit[0] != "seconds":
            seconds /= (arm.flops_per_token + arm.elementwise_flops_per_token) * speed
        n_grid = grid_runs(arm, config)
        stages = {"lr_grid": n_grid, "run": n_runs - n_grid}
        if not config.spec.shortest_validation:
            stages["speed"] = n_rounds
        n_validations = sum(n * validations(arm, config, stage, speed) for stage, n in stages.items())
        seconds += n_validations * measured.validation_seconds
        if config.lengths:
            decoding_seconds += forecast_decoding(arm, device)
        total, peak = total + seconds, max(peak, measured.memory)
        open_seconds = max(open_seconds, measured.open_seconds)  # for later arms, what was solved is remembered
        per_token = PlaySchedule.from_flags(arm.flags).step_games / arm.step_tokens if data.game else 1
        lines.append((f"{arm.name} {arm.group}".strip(), f"{arm.n_parameters:,}", format_bytes(measured.memory),
                      f"{speed * per_token:,.0f}", str(n_runs), format_seconds(seconds)))
    print("\n".join(align_columns(lines, 120 if config.budgets or config.epochs else 80)))
    start, n_processes, n_timed = time.perf_counter(), sum(int(line[4]) for line in lines[1:]), n_rounds * sum(
        is_timed(arm, config) for arm in arms)
    subprocess.run([sys.executable, "-c", f"import {config.script}"], cwd=Path(__file__).parent, check=True)
    start_seconds = time.perf_counter() - start + open_seconds
    jobs = config.jobs if on_cpu else 1  # on a GPU, runs at the same time slow each other down
    total = (total + n_processes * start_seconds) / jobs + n_timed * start_seconds  # speed is measured one run at a time
    total += decoding_seconds
    available = available_memory(machine.device)
    print(f"time    about {format_seconds(total)} with --jobs={config.jobs}, the start of {n_processes} processes included"
          + f", and of {n_timed} that measure speed" * (n_timed > 0)
          + "; that is the screen alone, how many seeds confirm it is known after that" * config.screen
          + "; at most, an arm ends with the budget on which all its seeds reach the target" * bool(config.target))
    print(f"memory  {format_bytes(config.jobs * peak)} at most, {format_bytes(available)} available")
    if others := len({arm.vocabulary for arm in arms} - {data.vocabulary}):
        n_bytes = 2 * others * sum(data.shards.manifest.total(split, "tokens") for split in SPLITS)
        print(f"disk    about {format_bytes(n_bytes)} for the text in {others} other vocabular{'ies' if others > 1 else 'y'}"
              f", {format_bytes(free_disk(config.out_path))} free")


def forecast_decoding(arm: Arm, device: DeviceConfig) -> float:
    """Seconds that its part of `measure_decoding` takes, from one round."""
    start = time.perf_counter()
    found, = time_decoding([arm], open_machine(dataclasses.replace(device, dtype="auto")), 1)
    n_tokens = (DECODE_ROUNDS - 1) * min(DECODE_TOKENS, arm.batch_shape[1] // 8)
    return time.perf_counter() - start + n_tokens * found.seconds


def validations(arm: Arm, config: CompareConfig, stage: str, speed: float) -> int:
    """How many a run of this stage has, at `speed` tokens per second."""
    _, own = stage_flags(arm, config, stage)
    n_steps = own.get("max_iter") or (own.get("max_tokens") or own["max_seconds"] * speed) / arm.step_tokens
    interval = (arm.flags | own).get("val_intervals", config.spec.loop.val_intervals)
    return 1 + math.ceil(n_steps / interval)


def validation_tokens(arm: Arm) -> float:
    """Tokens of one validation of a run; 0 for conversations."""
    if math.isnan(arm.bytes_per_token):
        return 0.0
    run = read_flags(RunConfig, select_fields(RunConfig, arm.flags))
    return run.val_iter * math.prod(arm.batch_shape) if run.val_iter else run.val_bytes / arm.bytes_per_token


class MadeUpBatches:
    """A loader of zeros, for timing."""

    def __init__(self, shape: tuple[int, int]):
        self.batch = torch.zeros(2, *shape, dtype=torch.int64)

    def next_batch(self, model: GPT) -> Tensor:
        return self.batch


def measure_arm(arm: Arm, spec: ScriptSpec, data: TrainingData, machine: Machine) -> ArmForecast:
    """From training steps on made-up tokens."""
    with suppress(OSError):  # where the system cannot restart it, it is that of all arms so far
        reset_peak_memory(machine.device)
    model = GPT(build_meta_model(arm.flags, data.vocab_size and arm.vocab_size).config).to(machine.device)
    schedule, loop = (read_flags(config, select_fields(config, arm.flags)) for config in (spec.optimizer, spec.loop))
    batches, setup = MadeUpBatches(arm.batch_shape), TrainSetup(machine, schedule, arm.step_tokens)
    seconds = time_step(init_state(model, batches, setup), loop, next_token_loss, setup, lambda: dry_run_step(
        model, machine, next_token_loss, machine.to_device(batches.batch)))
    speed = arm.step_tokens / seconds
    # the forward pass is a third of a step
    return ArmForecast(peak_memory(machine.device), speed, validation_tokens(arm) / (3 * speed))


def measure_run(arm: Arm, config: CompareConfig, machine: Machine) -> ArmForecast:
    """From a run that has not begun: a validation, and steps with the rollouts that they learn from, though games and
    answers of a model that has learnt may be shorter or longer. Writes nothing."""
    with suppress(OSError):  # see measure_arm
        reset_peak_memory(machine.device)
    start = time.perf_counter()
    spec = config.spec
    values = spec.resolve_flags({}, spec.cell_defaults | arm.flags) | {"out_path": config.out_path / "forecast.pt",
                                                                       "overwrite": True}
    run = spec.open_run(spec.command.read_configs(values), None, None)
    open_seconds = time.perf_counter() - start
    validation_seconds, speed = run.validation_seconds(), arm.step_tokens / time_step(
        run.state, run.configs.loop, run.loss_fn, run.setup, run.dry_run)
    return ArmForecast(peak_memory(machine.device), speed, validation_seconds, open_seconds)


# -- models that adapt at inference time ------------------------------------------------------------------------------

WITHOUT_MEANING_TO_ADAPT = "budget", "sizes", "lengths", "grid_share", "null"


def read_adapt_flags(values: dict) -> tuple[CompareConfig, dict]:
    """The comparison and the flags of adapt.py that hold for all arms, from the flags that were given. Raises BadInput."""
    for name in WITHOUT_MEANING_TO_ADAPT:
        if name in values:
            raise BadInput(f"--{name}: has no meaning with --script=adapt, which trains nothing before: leave it out")
    if "arms" not in values:
        raise BadInput("--arms: give two or more models, such as checkpoint_path=a_{seed}.pt checkpoint_path=b_{seed}.pt")
    config = read_flags(CompareConfig, values)
    common = {name: value for name, value in values.items() if name not in declared_flags(CompareConfig)}
    seeded = [text for text in (*config.arms, str(common.get("checkpoint_path", ""))) if "{seed}" in text]
    if values.get("seeds", 1) > 1 and not seeded:
        raise BadInput(f"--seeds={config.seeds}: no arm has {{seed}} in its path, so that each is one model: name a model "
                       f"of each seed, as in checkpoint_path=a_{{seed}}.pt, or leave --seeds out")
    return config, common


def build_adapt_arms(config: CompareConfig, common: dict) -> list[AdaptArm]:
    """Raises BadInput for models that do not exist, and, unless --match=none, for arms of different sizes."""
    arms, reference = [], None
    for name, text in zip(short_names(config.arms), config.arms):
        values = common | parse_arm(text, "--arms", "adapt")
        try:
            arm, matched = build_adapt_arm(name, text, values, config)
            reference = reference or matched
            if config.match != "none" and abs(matched - reference) > MATCH_TOLERANCE * reference:
                raise BadInput(f"has {matched:,} {MATCHED[config.match].what}, the first arm {reference:,}: train models of "
                               f"one size, or compare them as they are with --match=none")
        except BadInput as error:
            raise BadInput(f"--arms {text!r}: {error}") from None
        arms.append(arm)
    return arms


def build_adapt_arm(name: str, text: str, values: dict, config: CompareConfig) -> tuple[AdaptArm, int]:
    """The arm and its count of what --match compares. Raises BadInput."""
    if "checkpoint_path" not in values:
        raise BadInput("names no model: add checkpoint_path=a.pt, or checkpoint_path=a_{seed}.pt for one of each seed")
    path = str(values["checkpoint_path"])
    seeds = range(1, config.seeds + 1) if "{seed}" in path else (1,)
    paths = {seed: Path(path.replace("{seed}", str(seed))) for seed in seeds}
    missing = next((seed for seed in seeds if not paths[seed].exists()), 1)
    if missing > 1:  # that there is no model at all, read_pretrained says
        raise BadInput(f"{paths[missing]}: no such file, which --seeds={config.seeds} asks for: train it, or give "
                       f"--seeds={missing - 1}")
    models = {seed: read_pretrained(path) for seed, path in paths.items()}
    for seed, model in models.items():
        if (model.config, model.tokenizer) != (models[1].config, models[1].tokenizer):
            raise BadInput(f"{paths[seed]} has another {'shape' if model.config != models[1].config else 'tokenizer'} than "
                           f"{paths[1]}: the models of an arm differ in their seed alone")
        if twin := next((other for other in range(1, seed) if models[other].digest == model.digest), None):
            raise BadInput(f"{paths[seed]} is the same file as {paths[twin]}: give a model trained with another seed")
    network = build_meta_model({"checkpoint_path": paths[1]}, None)
    flags = {name: value for name, value in values.items() if name != "checkpoint_path"}
    adapt, n_parameters = adapt_config(flags), network.n_parameters()
    if not has_scope(network, adapt.adapt_scope):
        raise BadInput(f"adapt_scope={adapt.adapt_scope}: this model has no parameters there: choose another")
    digests = {seed: model.digest for seed, model in models.items()}
    flops = network.flops_per_token() + network.elementwise_flops_per_token()
    arm = AdaptArm(name, text, paths, digests, flags, adapt.rate, n_parameters, network.config.block_size,
                   models[1].tokenizer, flops)
    return arm, MATCHED[config.match].count(network) if config.match != "none" else 0


def adapt_config(values: dict) -> AdaptConfig:
    return read_flags(AdaptConfig, select_fields(AdaptConfig, values))


def short_names(texts: tuple[str, ...]) -> list[str]:
    """"checkpoint_path=models/gelu_{seed}.pt" -> "gelu", if the names of the arms differ then, else as they are."""
    shorten_path = lambda match: re.sub(r"[_.-]?\{seed\}", "", Path(match[1]).stem) or match[1]
    names = [re.sub(r"\bcheckpoint_path=([^,]*)", shorten_path, text) for text in texts]
    return names if len(set(names)) == len(texts) else list(texts)


def read_adapt_documents(config: CompareConfig, common: dict, arms: list[AdaptArm]) -> AdaptDocuments:
    """Raises BadInput when there are too few."""
    run = read_flags(AdaptRunConfig, select_fields(AdaptRunConfig, common))
    n_rates = max(2, math.ceil(run.limit / 4)) if len(config.rates) > 1 else 0
    wanted, found, of_arm = dataclasses.replace(run, limit=run.limit + n_rates), {}, {}
    for arm in arms:
        hop = clip_hop(adapt_config(arm.flags).adapt_hop, arm.block_size)
        if (arm.tokenizer, hop) not in found:
            tokenizer = Tokenizer.from_json(load_checkpoint(arm.checkpoints[1])["tokenizer"])
            found[arm.tokenizer, hop] = [DocumentSize(document.text_digest, len(document.ids) - 1)
                                         for document in read_documents(wanted, tokenizer, hop)[0]]
        of_arm[arm.name] = found[arm.tokenizer, hop]
    n = min(map(len, of_arm.values()))
    if n_rates and n < run.limit + n_rates:
        raise BadInput(f"--dataset={run.dataset}: has {n:,} documents that are long enough, of which --limit={run.limit} "
                       f"leaves less than {n_rates} to choose the learning rate on: give a lower --limit, or one rate: "
                       f"--rates 1")
    return AdaptDocuments(of_arm, run.limit, n_rates)


def describe_adapt_conditions(arms: list[AdaptArm], config: CompareConfig, documents: AdaptDocuments, common: dict,
                              machine: str, hardware: str) -> list[str]:
    """Sentences."""
    models = "; ".join(f"{arm.name}: {arm.text}, {len(arm.seeds)} model{'s' * (len(arm.seeds) > 1)}"
                       + " (no {seed} in its path: --seeds is 1 for it)" * (config.seeds > len(arm.seeds)) for arm in arms)
    n = min(documents.n_counted, *map(len, documents.of_arm.values()))
    run = read_flags(AdaptRunConfig, select_fields(AdaptRunConfig, common))
    length = f" of at most {run.max_tokens:,} tokens" if run.max_tokens else ""
    rates = (f"the {documents.n_rates} after them are for the choice of the learning rate" if documents.n_rates else
             "no learning rate was chosen")
    sizes = "Sizes not matched" if config.match == "none" else f"Equal {MATCHED[config.match].what}, within 1 %"
    return [f"{models}.", f"{sizes}.", f"{n} documents of {run.dataset}{length}; {rates}.", f"{hardware}, {machine}."]


def compare_adaptation(config: CompareConfig, common: dict, line: str, cluster: Cluster | None):
    """The command with --script=adapt. line: as typed."""
    arms = build_adapt_arms(config, common)
    documents = read_adapt_documents(config, common, arms)
    device = read_flags(DeviceConfig, select_fields(DeviceConfig, common))
    if config.dry_run:
        print_adapt_forecast(arms, config, documents, device)
        return
    machine, hardware = query_device(device, cluster)
    environment = f"{machine} {torch.__version__} {code_hash(REPO / 'adapt.py')}"
    study = AdaptStudy(REPO / "adapt.py", config.out_path / "runs", documents, config.rates, environment, config.jobs,
                       cluster)
    with folder_lock(config.out_path, f"--out_path={config.out_path}"):
        save_plan(config.out_path, make_adapt_plan(config, common, documents.digest()), config.overwrite, "a comparison")
        with StopSignals() as stop:
            results = run_adaptation(arms, study, stop)
        exit_if_stopped(stop, line)
        conditions = describe_adapt_conditions(arms, config, documents, common, machine, hardware)
        write_adaptation_comparison(results, conditions, line, config.out_path)
    exit_if_failed(result.status for arm_results in results for result in arm_results.results())


def print_adapt_forecast(arms: list[AdaptArm], config: CompareConfig, documents: AdaptDocuments, device: DeviceConfig):
    """Prints how many runs of each arm there are, and how long they take at the speed of two contexts of made-up tokens."""
    machine, total, n_runs = open_machine(device), 0.0, 0
    if machine.device.type == "cpu":
        torch.set_num_threads(threads_of_job(config.jobs))
    lines = [("arm", "parameters", "memory besides the model", "tokens/s", "runs", "time")]
    for arm in arms:
        model, tokenizer, _ = load_pretrained(arm.checkpoints[1])
        learner, ids = open_learner(model, tokenizer, adapt_config(arm.flags), machine), torch.zeros(
            2 * arm.block_size + 1, dtype=torch.int64)
        learner.read(ids[:learner.hop + 1])  # the first step is slow
        static, adapted = (seconds / (len(ids) - 1) for learn in (False, True)
                           for _, seconds in [timed_read(learner, ids, learn)])
        tokens = lambda stage, arm=arm: sum(document.n_tokens for document in documents.select(arm, stage))
        kept = static + adapted if is_recurrent(learner) else 0.0
        n_rates = len(config.rates) if documents.n_rates else 0
        # a control is scored without steps, another costs as much as adapting
        seconds = tokens("rates") * n_rates * (static + adapted) + tokens("runs") * len(arm.seeds) * (
            2 * static + 2 * adapted + kept)
        total, n_runs = total + seconds, n_runs + n_rates + len(arm.seeds)
        lines.append((arm.name, f"{arm.n_parameters:,}", format_bytes(learner.extra_bytes()), f"{1 / adapted:,.0f}",
                      str(n_rates + len(arm.seeds)), format_seconds(seconds)))
    print("\n".join(align_columns(lines)))
    say(f"time    about {format_seconds(total / config.jobs)} with --jobs={config.jobs}, without the start of {n_runs} "
        f"processes; more where the best of --rates is the lowest or highest, beyond which others are tried then")


def make_adapt_plan(config: CompareConfig, common: dict, documents: str) -> dict:
    """What makes it this comparison rather than another, as JSON: see make_plan."""
    own = {name: getattr(config, name) for name in ("arms", "rates", "match")}
    shared = {name: value for name, value in common.items() if name != "dataset"}
    return json.loads(json.dumps(own | {"documents": documents, "flags of adapt.py": shared}, default=str))


# -- the command ------------------------------------------------------------------------------------------------------

def check_budget(arms: list[Arm], config: CompareConfig, environment: RunEnvironment):
    """Raises BadInput if the budget is too small for a run of an arm, as far as that is known."""
    for arm in arms:
        if config.limit[0] != "bytes" or not math.isnan(arm.bytes_per_token):
            make_cell(arm, config, environment, "lr_grid", 1.0, 1)


def read_command_line(argv) -> tuple[CompareConfig, dict]:
    """The comparison, and the flags of its script that are given for all its runs. Raises BadInput."""
    script_parser = Parser(None)
    script_parser.add_argument("--script", choices=(*SCRIPTS, "adapt"), default="train")
    script = script_parser.parse_known_args([text for text in (sys.argv[1:] if argv is None else argv)
                                             if text not in ("-h", "--help")])[0].script
    parser = Parser(main.__doc__)
    add_flags(parser, CompareConfig, suppress=script in ("adapt", "selfplay", "think"))
    add_arm_flags(parser, script, without=flag_names(*script_flags(script)[0], scope="run"))
    values = vars(parser.parse_args(argv))
    if script == "adapt":
        return read_adapt_flags(values)
    if script == "selfplay":
        values = {"budget": f"games={load_game(values).game.default_games}"} | values
    if script == "think":
        values = {"budget": f"problems={ThinkLoop.max_iter * ThinkConfig.batch_size}"} | values
    own = declared_flags(CompareConfig)
    return read_flags(CompareConfig, values), {name: value for name, value in values.items() if name not in own}


def make_plan(config: CompareConfig, common: dict, data: TrainingData) -> dict:
    """What makes it this comparison rather than another, as JSON: not the number of seeds, nor how or where it is run."""
    own = {name: value for name, value in vars(config).items() if name not in flag_names(CompareConfig, scope="run")
           and (value or name not in ("lengths", "epochs"))}  # plans of earlier versions have neither
    fields = declared_flags(*config.spec.command.classes, *config.spec.vocabulary)
    is_data = lambda name: value_type(fields[name]) is Path and fields[name].metadata["flag"].scope == "shared"
    shared = {name: value for name, value in common.items() if not is_data(name)}
    return json.loads(json.dumps(own | {"data": data.fingerprint, f"flags of {config.script}.py": shared}, default=str))


@command
def main(argv=None):
    """Compares architectures, recipes or vocabularies at an equal budget."""
    ignore_output_errors()
    config, common = read_command_line(argv)
    line = command_line("compare.py", argv)
    cluster = Cluster(config.cluster) if config.cluster else None
    if config.jobs is None:
        config = dataclasses.replace(config, jobs=cluster.slots)
    if config.script == "adapt":
        compare_adaptation(config, common, line, cluster)
        return
    data = config.spec.load_data(common)
    arms = build_arms(config, common, data)
    environment = detect_environment(config, common, data, cluster)
    check_budget(arms, config, environment)
    device = read_flags(config.spec.device, select_fields(config.spec.device, common))
    if config.dry_run:
        print_forecast(arms, config, environment, device)
        return
    with folder_lock(config.out_path, f"--out_path={config.out_path}"):
        save_plan(config.out_path, make_plan(config, common, data), config.overwrite, "a comparison")
        start = time.perf_counter()
        arms = build_arms(config, common, data, Vocabularies(data, config.out_path / "data").prepared)
        check_budget(arms, config, environment)
        with StopSignals() as stop:
            results, screened = run_all(arms, config, environment, stop, cluster)
            contexts = measure_decoding(results, config, environment, device, stop) if config.lengths else None
        exit_if_stopped(stop, line)
        conditions = lambda group: describe_conditions(group, config, environment)
        if config.target:
            write_to_loss(results, config.target, conditions, line, config.out_path)
        else:
            write_comparison(results, conditions, line, config.out_path, config.null, screened, contexts)
        print(f"{time.perf_counter() - start:,.0f} s")
    exit_if_failed(result.status for arm_results in (*results, *screened) for result in arm_results.results())


def exit_if_stopped(stop: StopSignals, line: str):
    if stop.signal:
        print(f"stopped, all runs are saved: the same command continues: {line}", file=sys.stderr)
        raise SystemExit(128 + stop.signal)


def exit_if_failed(statuses: Iterable[str]):
    if not {"failed", "killed"}.isdisjoint(statuses):
        raise OSError("some runs failed, see above; the same command runs them again")


if __name__ == "__main__":
    main()
