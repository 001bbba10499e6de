"""Compares architectures at an equal budget, with several seeds, and says what can be believed of it.

    python compare.py --data_path=data --arms "mlp=relu2" "mlp=grkan" "mixer=DDDA" --budget tokens=3e6

    python compare.py --script=finetune --dataset=builtin --arms checkpoint_path=a.pt checkpoint_path=b.pt

An arm is flags of train.py, or of finetune.py, which may begin with different models. All arms of train.py get as many
parameters as the first (the width of the hidden layer is solved for); all arms get the same data in the same order, and the
same grid of learning rates, tried on a part of the budget. From the best of it the rate falls, on the whole budget, as long
as that is better; then each arm is trained at its best rate with every seed. Each such run, a cell, has its full cooldown
and is a process that checkpoints: the same command goes on where it was stopped, and what is finished is not run again.

Writes comparison.md, comparison.csv, a page (comparison.html) and its pictures into --out_path; the runs' metrics stay in
its folder `runs`.
"""
import ast
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import shlex
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

import finetune
from experiments.analysis import SPEED_WARMUP, Arm, ArmResults, Cell, Result, told
from experiments.report import report
from experiments.runner import Run, Runner
from model import GPT, GPTConfig
from optimizer import OptimizerConfig
from runtime.checkpoint import load_checkpoint, reading
from runtime.cli import Parser, add_flags, command
from runtime.config import BadInput, check_flags, flag, read_flags
from runtime.device import DeviceConfig, hardware, open_machine
from runtime.files import atomic_write, check_writable, folder_lock
from runtime.signals import StopSignals
from shards import Data, open_data, require_a_block
from tasks.conversations import ConversationConfig, read_conversations
from train import PRESETS, PRETRAINING, RunConfig
from trainer import DIVERGED, LoopConfig

REPO = Path(__file__).parent
# Flags of train.py that are the comparison's own business, and those that an arm or a size cannot set for itself either.
OWN = {"checkpoint_path", "resume_checkpoint", "overwrite", "plot", "seed", "max_iter", "max_tokens", "max_seconds",
       "vocab_size", "verbose", "sample_tokens"}
NOT_OF_AN_ARM = OWN | {"data_path", "device", "val_iter", "val_intervals", "log_intervals"}
# The same of finetune.py.
OWN_FINETUNING = {"out_path", "resume_checkpoint", "overwrite", "seed", "max_iter", "max_tokens", "max_seconds", "epochs",
                  "verbose"}
NOT_OF_A_FINETUNING = OWN_FINETUNING | {"device", "val_intervals", "log_intervals", *(
    field.name for field in dataclasses.fields(ConversationConfig))}
COMMANDS = {"train": (PRETRAINING, OWN, NOT_OF_AN_ARM),
            "finetune": (finetune.FINETUNING, OWN_FINETUNING, NOT_OF_A_FINETUNING)}
TOLERANCE = 0.01        # of parameters, between arms that are matched
CLOSE = 0.0025          # near enough to stay as it is, or to take a hidden layer whose width is a multiple of 8
NULL_SEEDS = 1000       # of the first arm against itself: seeds from here on
VALIDATIONS = 10        # of a run, for its curve
SPEED_ROUNDS = 3        # in which the arms take turns
SPEED_STEPS = SPEED_WARMUP + 10  # of each


@dataclass(frozen=True)
class CompareConfig:
    """The comparison."""
    arms: tuple[str, ...] = flag(("mlp=gelu", "mlp=relu2"),
                                 "architectures or recipes, each some flags of train.py (or of --script) with commas "
                                 "between; the others\nare compared with the first")
    script: str = flag("train", "what a run is: train.py, or finetune.py, of which an arm may be a model to begin with: "
                                "checkpoint_path=a.pt", choices=tuple(COMMANDS))
    budget: str = flag("tokens=1e7", "what a run may use: tokens=N, flops=N or seconds=N; flops are those of matrix "
                                     "products,\nactivations and bases")
    seeds: int = flag(3, "runs of each arm, of initial weights and order of data; the same for all arms", at_least=1,
                      at_most=NULL_SEEDS)
    sizes: tuple[str, ...] = flag((), "compare at several sizes, each some flags of train.py: n_layer=4,n_head=4")
    rates: tuple[float, ...] = flag((0.5, 1.0, 2.0), "learning rates to try, as multiples of what --learning_rate says",
                                    above=0)
    grid_share: float = flag(0.25, "part of the budget on which they are tried", above=0, at_most=1)
    match: str = flag("parameters", "what arms of train.py are given alike, beside the budget",
                      choices=("parameters", "none"))
    null: bool = flag(False, "run the first arm against itself, with other seeds, and no other arm: what a difference of "
                              "nothing looks like")
    jobs: int = flag(1, "runs at a time, which share the cores; the speed of arms is measured afterwards, one at a time",
                     at_least=1, at_most=1000)
    out_path: Path = flag(Path("studies/comparison"), "folder for the results")
    overwrite: bool = flag(False, "let another comparison replace the results in --out_path")

    def __post_init__(self):
        check_flags(self)
        if not self.null and len(self.arms) < 2:
            raise BadInput(f"--arms {' '.join(map(repr, self.arms))}: give two or more, or one and --null")
        for name in ("arms", "sizes", "rates"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise BadInput(f"--{name} {' '.join(map(repr, getattr(self, name)))}: one of them is there twice")
        if self.limit[0] == "seconds" and self.jobs > 1:
            raise BadInput(f"--jobs={self.jobs}: runs that end by seconds must have the machine to themselves")

    @property
    def limit(self) -> tuple[str, float]:
        """("tokens", 1e7). Raises BadInput."""
        kind, _, number = self.budget.partition("=")
        with suppress(ValueError):
            if kind in ("tokens", "flops", "seconds") and 0 < float(number) < math.inf:
                return kind, float(number)
        raise BadInput(f"--budget={self.budget}: give tokens=N, flops=N or seconds=N")


# -- what is to be run ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Conversations:
    """What finetunings learn, in place of shards. fingerprint: 16 hex digits that change with any of it."""
    name: str
    fingerprint: str


@dataclass(frozen=True)
class Place:
    """Where cells run, and on what: a cell's numbers depend on all of it."""
    data: Data | Conversations
    machine: str          # device and dtype
    hardware: str
    code: str             # hash of the source


@dataclass(frozen=True)
class Base:
    """A model that finetunings begin with. trained_with: the flags of its own run. digest: of the file."""
    config: GPTConfig
    trained_with: dict
    digest: str


@functools.cache
def base_of(path: Path) -> Base:
    """Raises BadInput."""
    blob = load_checkpoint(path)
    with reading(path):
        trained_with = blob.get("training", {}).get("settings", {})
        return Base(GPTConfig(**blob["config"]), trained_with, hashlib.sha256(path.read_bytes()).hexdigest())


def open_subject(config: CompareConfig, common: dict) -> Data | Conversations:
    """What all runs learn from. Raises BadInput."""
    if config.script == "train":
        return open_data(common.get("data_path", RunConfig.data_path))
    source = read_flags(ConversationConfig, of_config(ConversationConfig, common))
    parts = [[one.messages for one in part] for part in read_conversations(source)]
    return Conversations(source.dataset, hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16])


def facts_of(data: Data | Conversations) -> list[str]:
    """All that a run's numbers take from it."""
    if isinstance(data, Conversations):
        return [data.fingerprint]
    shards = [shard.sha256 for split in ("train", "val") for shard in data.manifest.shards[split]]
    return [data.manifest.tokenizer, *shards]


def read_arm(text: str, given: str, script: str = "train") -> dict:
    """What flags of `script` an arm sets: "mlp=grkan,n_layer=4" -> {"mlp": "grkan", "n_layer": 4}. given: the flag it was
    given by, for the message. Raises BadInput."""
    training, _, not_of_an_arm = COMMANDS[script]
    parser = Parser(None)
    add_flags(parser, *training.configs, suppress=True)
    if set(text.split(",")) & {"help", "h"}:
        raise BadInput(f"{given} {text!r}: give flags of {script}.py, such as mlp=relu2; `python {script}.py --help` lists "
                       f"them")
    try:
        values = vars(parser.parse_args([f"--{part.strip()}" for part in text.split(",")]))
        for config in training.configs:
            read_flags(config, of_config(config, values))
    except BadInput as error:
        raise BadInput(f"{given} {text!r}: {error}") from None
    if foreign := values.keys() & not_of_an_arm:
        raise BadInput(f"{given} {text!r}: {min(foreign)} is no part of an architecture or recipe")
    return values


def of_config(config: type, values: dict) -> dict:
    """The entries that are its fields, over the preset's and the defaults."""
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in (PRESETS.get(values.get("preset"), {}) | values).items() if name in names}


def arms_of(config: CompareConfig, common: dict, data: Data | Conversations) -> list[Arm]:
    """Every arm at every size, the arms of a size matched. Raises BadInput."""
    names = [(name, tuple(range(1, config.seeds + 1))) for name in (config.arms[:1] if config.null else config.arms)]
    if config.null:
        names.append((f"{config.arms[0]} again", tuple(range(NULL_SEEDS + 1, NULL_SEEDS + config.seeds + 1))))
    arms = []
    if config.script == "finetune":
        common = {"checkpoint_path": finetune.FinetuneConfig.checkpoint_path} | common
    for size in config.sizes or ("",):
        shape, first = common | (read_arm(size, "--sizes", config.script) if size else {}), None
        for name, seeds in names:
            values = shape | read_arm(name.removesuffix(" again"), "--arms", config.script)
            try:
                if first and config.match == "parameters" and config.script == "train":
                    values = matched(values, first.n_parameters, data.manifest.vocab_size)
                arm = measured(name, size, values, seeds, data)
                if first and arm.batch != first.batch:
                    theirs, ours = (f"{blocks} x {tokens}" for blocks, tokens in (first.batch, arm.batch))
                    raise BadInput(f"has batches of {ours} tokens, the first arm {theirs}: they would be trained and "
                                   f"validated on other data: give both the same --batch_size and --block_size")
            except BadInput as error:
                raise BadInput(f"--arms {name!r}: {error}") from None
            first = first or arm
            arms.append(arm)
    return arms


def model_of(values: dict, vocab_size: int | None) -> GPT:
    """Without its weights: on torch's meta device nothing is computed. vocab_size: None where the model exists."""
    with torch.device("meta"):
        if vocab_size is None:
            return GPT(base_of(values["checkpoint_path"]).config)
        return GPT(read_flags(GPTConfig, of_config(GPTConfig, values) | {"vocab_size": vocab_size}))


def vocab_size_of(data: Data | Conversations) -> int | None:
    return data.manifest.vocab_size if isinstance(data, Data) else None


def measured(name: str, size: str, values: dict, seeds: tuple[int, ...], data: Data | Conversations) -> Arm:
    model, is_new = model_of(values, vocab_size_of(data)), isinstance(data, Data)
    kinds = (LoopConfig, RunConfig, OptimizerConfig) if is_new else (
        finetune.FinetuneLoop, finetune.FinetuneConfig, finetune.FinetuneOptimizer)
    loop, run, schedule = (read_flags(kind, of_config(kind, values)) for kind in kinds)
    if run.batch_size == "auto":
        raise BadInput("--batch_size=auto: give a number: a step must see the same tokens whatever the arm")
    step_tokens = run.batch_size * loop.num_batch_accum * model.config.block_size
    if is_new:
        for split in ("train", "val"):
            require_a_block(data, split, model.config.block_size)
    else:
        schedule = schedule.of_model(base_of(values["checkpoint_path"]).trained_with)
    rate = schedule.peak_lr(step_tokens)
    return Arm(name, size, values, seeds, step_tokens, (run.batch_size, model.config.block_size), rate,
               model.n_parameters(), model.flops_per_token(), model.elementwise_flops_per_token())


def matched(values: dict, target: int, vocab_size: int) -> dict:
    """`values` with the width of the hidden layer at which the model has `target` parameters, whose number grows evenly with
    it. Raises BadInput when none comes within 1 %."""
    count = lambda **changed: model_of(values | changed, vocab_size).n_parameters()
    found, n = count(), None
    if abs(found - target) > CLOSE * target and "n_hidden" not in values:
        low, high = count(n_hidden=8), count(n_hidden=16)
        exact = 8 + 8 * (target - low) / (high - low)
        n = max(1, round(exact))
        if abs(count(n_hidden=max(8, 8 * round(exact / 8))) - target) <= CLOSE * target:
            n = max(8, 8 * round(exact / 8))  # which suits a processor's vectors and a GPU's tiles
        found = count(n_hidden=n)
    if abs(found - target) > TOLERANCE * target:
        raise BadInput(f"has {found:,} parameters, the first arm {target:,}: change its shape, or compare as they are with "
                       f"--match=none")
    return values if n is None else values | {"n_hidden": n}


def cell_of(arm: Arm, config: CompareConfig, place: Place, what: str, multiple: float, seed: int) -> Cell:
    """A run on the whole budget, on the part of it that rates are tried on, or of a few steps. Raises BadInput when that is
    less than one."""
    if what == "speed":
        own = {"val_iter": 1} if config.script == "train" else {"answer_tokens": 1}
        return named_cell(arm, config, place, what, multiple, seed, 0.0, own | {
            "max_iter": SPEED_STEPS, "log_intervals": 1, "val_intervals": SPEED_STEPS})
    kind, amount = config.limit
    share = config.grid_share if what == "rate" else 1.0
    amount *= share
    if kind == "flops":
        kind, amount = "tokens", amount / (arm.flops + arm.elementwise_flops)
    if kind == "tokens" and amount < arm.step_tokens:
        raise BadInput(f"--budget={config.budget}: {share:g} of it, which a run of {arm.name!r} gets, is {amount:,.0f} "
                       f"tokens, less than a step of {arm.step_tokens:,}: give more")
    own = {f"max_{kind}": int(amount) if kind == "tokens" else amount}
    if kind == "tokens" and "val_intervals" not in arm.values:
        own["val_intervals"] = max(1, math.ceil(amount / arm.step_tokens / VALIDATIONS))
    return named_cell(arm, config, place, what, multiple, seed, share, own)


def named_cell(arm: Arm, config: CompareConfig, place: Place, what: str, multiple: float, seed: int, share: float,
               own: dict) -> Cell:
    """Its name says what it is, and holds a hash of everything that determines its numbers. own: flags of its own."""
    training, is_new = COMMANDS[config.script][0], config.script == "train"
    values = arm.values | own | {"learning_rate": arm.rate * multiple, "seed": seed}
    values = {"dataloader_num_workers": 0} | values if is_new else values
    flags = tuple(f"--{name}={int(value) if isinstance(value, bool) else value}" for name, value in sorted(values.items()))
    base = [] if is_new else [base_of(values["checkpoint_path"]).digest]
    told = [text for text in flags if not text.startswith(("--data_path", "--checkpoint_path"))]
    known = [*facts_of(place.data), *base, place.machine, torch.__version__, place.code, *told,
             place.hardware if what == "speed" else ""]
    digest = hashlib.sha256("\n".join(known).encode()).hexdigest()[:10]
    words = "".join(c if c.isalnum() or c in "=.-" else "_" for c in f"{arm.name}-{arm.size}".strip("-"))[:80]
    name = f"{words}-{what}-{multiple:g}-{seed}-{digest}"
    run = Run(REPO / training.script, config.out_path / "runs" / f"{name}.pt", flags, training.out)
    return Cell(arm, what, multiple, seed, share, run)


def code_hash() -> str:
    """Of the source that a run's numbers come from, without its comments and docstrings."""
    files = [*(REPO / f"{name}.py" for name in ("train", "finetune", "model", "optimizer", "dataloader")),
             *sorted(REPO.glob("layers/*.py")), *sorted(REPO.glob("kernels/rational*.py"))]
    digest = hashlib.sha256()
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def open_place(data: Data | Conversations, common: dict) -> Place:
    """Raises BadInput when the device is not there. A GPU is asked in a process of its own: the memory that one holds would
    be missing to the runs."""
    config = read_flags(DeviceConfig, of_config(DeviceConfig, common))
    if not torch.cuda.is_available():
        return Place(data, *machine_of(config), code_hash())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return Place(data, *pool.apply(machine_of, (config,)), code_hash())


def machine_of(config: DeviceConfig) -> tuple[str, str]:
    machine = open_machine(config)
    return str(machine), hardware(machine.device)


# -- running it -------------------------------------------------------------------------------------------------------

def run_all(arms: list[Arm], config: CompareConfig, place: Place, stop: StopSignals) -> list[ArmResults]:
    """The grid of every arm; from its best downwards on the whole budget; every seed at the best rate; and, one at a time
    and in turns, how fast the arms are."""
    outcomes = [ArmResults(arm) for arm in arms]

    def run(what: str, wanted: list[ArmResults], multiples, seeds, jobs: int = config.jobs) -> list[list[Result]]:
        """The results of each of `wanted`: in rounds, the first cell of each, then the second of each. multiples(outcome),
        seeds(outcome): what its cells have."""
        if stop.signal:
            return [[] for _ in wanted]
        cells = [[cell_of(outcome.arm, config, place, what, multiple, seed) for multiple in multiples(outcome)
                  for seed in seeds(outcome)] for outcome in wanted]
        order = [cell for rank in itertools.zip_longest(*cells) for cell in rank if cell is not None]
        result_of = lambda i, ended: Result(order[i], *ended, order[i].run.rows())
        ended = Runner(jobs, stop, DIVERGED).run([cell.run for cell in order], [cell.share or 1.0 for cell in order],
                                                 f"{what}s", lambda i, ended: told(result_of(i, ended)))
        results = {cell.run.checkpoint: result_of(i, how) for i, (cell, how) in enumerate(zip(order, ended))}
        return [[results[cell.run.checkpoint] for cell in own] for own in cells]

    def best_multiple(outcome: ArmResults) -> list[float]:
        return [outcome.best().cell.multiple]

    def first_seed(outcome: ArmResults) -> tuple[int, ...]:
        return outcome.arm.seeds[:1]

    for outcome, results in zip(outcomes, run("rate", outcomes, lambda outcome: config.rates, first_seed)):
        outcome.rates = results
    while not stop.signal and (falling := [outcome for outcome in outcomes if outcome.candidate()]):
        for outcome, results in zip(falling, run("run", falling, lambda outcome: [outcome.candidate()], first_seed)):
            outcome.full_budget_lr_runs += results
    tuned = [outcome for outcome in outcomes if outcome.best()]
    for outcome, results in zip(tuned, run("run", tuned, best_multiple, lambda outcome: outcome.arm.seeds)):
        outcome.runs = results
    if config.limit[0] == "seconds":
        return outcomes
    trained = [outcome for outcome in tuned if outcome.finished()]
    for outcome, results in zip(trained, run("speed", trained, best_multiple, lambda outcome: range(SPEED_ROUNDS), 1)):
        outcome.speeds = results
    return outcomes


def regime(outcomes: list[ArmResults], config: CompareConfig, place: Place) -> str:
    """In what circumstances all this was measured: no verdict reaches beyond."""
    runs = [run for outcome in outcomes for run in outcome.finished()]
    first = outcomes[0].arm
    model = model_of(first.values, vocab_size_of(place.data)).config
    tokens = sorted({run.rows[-1]["tokens"] for run in runs}) or [0]
    span = " to ".join(f"{n / 1e6:.2f}" for n in dict.fromkeys((tokens[0], tokens[-1])))
    is_new = isinstance(place.data, Data)
    alike = "as many parameters as the first" if config.match == "parameters" and is_new else "parameters as they come"
    text = f"conversations of {place.data.name}" if not is_new else (
        f"{place.data.manifest.source.get('dataset', 'text')}, "
        f"{tokens[-1] / place.data.manifest.total('train', 'tokens'):.2f} epochs")
    return (f"First arm: {model.n_layer} layers x {model.n_embd}, blocks of {model.block_size}, vocabulary "
            f"{model.vocab_size:,}, {first.n_parameters / 1e6:.2f} M parameters, steps of {first.step_tokens:,} tokens; the "
            f"others: {alike}. {span} M tokens of {text}; budget {config.budget}, {config.seeds} seeds; "
            f"{place.hardware}, {place.machine}")


# -- the command ------------------------------------------------------------------------------------------------------

def read_command(argv) -> tuple[CompareConfig, dict]:
    """The comparison, and the flags of its script that all its runs have."""
    only_script = Parser(None)
    only_script.add_argument("--script", choices=tuple(COMMANDS), default="train")
    script = only_script.parse_known_args([text for text in (sys.argv[1:] if argv is None else argv)
                                           if text not in ("-h", "--help")])[0].script
    training, own, _ = COMMANDS[script]
    parser = Parser(main.__doc__)
    add_flags(parser, CompareConfig)
    add_flags(parser, *training.configs, suppress=True, without=own)
    values = vars(parser.parse_args(argv))
    names = {field.name for field in dataclasses.fields(CompareConfig)}
    common = {name: value for name, value in values.items() if name not in names}
    return read_flags(CompareConfig, values), common


def plan_of(config: CompareConfig, common: dict, data: Data | Conversations) -> dict:
    """What makes it this comparison, as JSON has it: not how many seeds there are, or how it is run."""
    kept = {name: value for name, value in dataclasses.asdict(config).items() if name not in (
        "script", "seeds", "jobs", "out_path", "overwrite")}  # the script is in the name of its flags
    shared = {name: value for name, value in common.items() if name != "data_path"}
    fingerprint = data.manifest.fingerprint() if isinstance(data, Data) else data.fingerprint
    return json.loads(json.dumps(kept | {"data": fingerprint, f"flags of {config.script}.py": shared}, default=str))


def require_place(config: CompareConfig, plan: dict):
    """Raises BadInput when --out_path holds the results of another comparison. More seeds are the same one."""
    path, before = config.out_path / "plan.json", plan
    check_writable(path, f"--out_path={config.out_path}")
    if path.exists() and not config.overwrite:
        with suppress(ValueError):  # a damaged one says nothing
            before = json.loads(path.read_text(encoding="utf-8"))
    if other := [name for name in {**before, **plan} if before.get(name) != plan.get(name)]:
        raise BadInput(f"--out_path={config.out_path}: holds a comparison with another {other[0]}: choose another path, or "
                       f"replace its results by --overwrite (runs that are the same are kept)")
    with atomic_write(path, "w") as file:
        json.dump(plan, file, indent=1)


@command
def main(argv=None):
    """Compares architectures at an equal budget."""
    config, common = read_command(argv)
    data = open_subject(config, common)
    arms = arms_of(config, common, data)
    place = open_place(data, common)
    for arm in arms:
        cell_of(arm, config, place, "rate", 1.0, 1)  # a budget too small says so now
    line = shlex.join(["python", "compare.py", *(sys.argv[1:] if argv is None else argv)])
    with folder_lock(config.out_path, f"--out_path={config.out_path}"), StopSignals() as stop:
        require_place(config, plan_of(config, common, data))
        start = time.perf_counter()
        outcomes = run_all(arms, config, place, stop)
        if stop.signal:
            print(f"stopped: every run is saved, and the same command goes on: {line}", file=sys.stderr)
            raise SystemExit(128 + stop.signal)
        report(outcomes, lambda group: regime(group, config, place), line, config.out_path, config.null)
        print(f"{time.perf_counter() - start:,.0f} s")
    if any(run.status == "failed" for outcome in outcomes for run in outcome.results()):
        raise OSError("some runs failed, see above; the same command tries them again")


if __name__ == "__main__":
    main()
