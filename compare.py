"""Compares architectures or recipes at an equal budget, with several seeds.

    python compare.py --data_path=data --arms "mlp=relu2" "mlp=grkan" "mixer=DDDA" --budget tokens=3e6

    python compare.py --script=finetune --dataset=builtin --arms checkpoint_path=a.pt checkpoint_path=b.pt

An arm is flags of train.py, or of finetune.py, where arms may also start from different models. Arms of train.py get as
many parameters as the first one: the width of the hidden layer is solved for. All arms see the same data in the same order.
Each tries the same grid of learning rates on a part of the budget; from the best one the rate then falls, on the whole
budget, for as long as that helps; at the best rate every seed is trained. Each of these runs, a cell, has its full cooldown
and is a process that checkpoints: the same command continues where it was stopped, and never repeats a finished cell.

Writes comparison.md, comparison.csv, a page (comparison.html) and its pictures into --out_path; the metrics of the cells
stay in its folder `runs`.
"""
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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from experiments.analysis import SPEED_WARMUP, Arm, ArmResults, Cell, CellResult
from experiments.code_hash import code_hash
from experiments.comparison import write_report
from experiments.runner import JobResult, Runner, TrainingJob
from finetune import FINETUNING, FinetuneConfig, FinetuneLoop, FinetuneOptimizer
from model import GPT, GPTConfig
from optimizer import OptimizerConfig
from runtime.checkpoint import load_checkpoint, reading
from runtime.cli import Parser, add_flags, command
from runtime.config import BadInput, check_flags, flag, flags_of, read_flags, value_type
from runtime.device import DeviceConfig, describe_hardware, open_machine
from runtime.files import atomic_write, check_writable, folder_lock
from runtime.signals import StopSignals
from shards import Data, open_data, require_block
from tasks.conversations import ConversationConfig, read_conversations
from tokenizer import check_chat
from train import PRESETS, PRETRAINING, RunConfig
from trainer import LoopConfig

REPO = Path(__file__).parent
COMMANDS = {"train": PRETRAINING, "finetune": FINETUNING}
MATCH_TOLERANCE = 0.01     # largest relative difference in parameters between matched arms
CLOSE_MATCH = 0.0025       # near enough to change nothing, or to prefer a hidden width that is a multiple of 8
NULL_SEED_OFFSET = 1000    # the null arm's seeds are the first arm's plus this
VALIDATIONS = 10           # per run, for its curve
SPEED_ROUNDS = 3           # of timing, in which the arms take turns
SPEED_STEPS = SPEED_WARMUP + 10


@dataclass(frozen=True)
class CompareConfig:
    """The comparison."""
    arms: tuple[str, ...] = flag(("mlp=gelu", "mlp=relu2"), "architectures or recipes, each some flags of train.py (or of "
                                                            "--script) separated by commas; the first is the reference")
    script: str = flag("train", "what a run is: train.py, or finetune.py, where an arm may be the model to start from: "
                                "checkpoint_path=a.pt", choices=tuple(COMMANDS), scope="run")
    budget: str = flag("tokens=1e7", "budget of a run: tokens=N, flops=N or seconds=N; flops count matrix products, "
                                     "activations and bases")
    seeds: int = flag(3, "runs of each arm, which differ in initial weights and order of data; the same seeds for all arms",
                      at_least=1, at_most=NULL_SEED_OFFSET, scope="run")
    sizes: tuple[str, ...] = flag((), "compare at several sizes, each some flags of train.py: n_layer=4,n_head=4")
    rates: tuple[float, ...] = flag((0.5, 1.0, 2.0), "learning rates to try, as multiples of --learning_rate", above=0)
    grid_share: float = flag(0.25, "fraction of the budget on which the learning rates are tried", above=0, at_most=1)
    match: str = flag("parameters", "what arms of train.py have in common beside the budget", choices=("parameters", "none"))
    null: bool = flag(False, "run only the first arm, against itself with other seeds: how large are chance differences?")
    jobs: int = flag(1, "runs at a time, which share the cores; speed is measured afterwards, one run at a time",
                     at_least=1, at_most=1000, scope="run")
    out_path: Path = flag(Path("studies/comparison"), "folder for the results", scope="run")
    overwrite: bool = flag(False, "let another comparison replace the results in --out_path", scope="run")

    def __post_init__(self):
        check_flags(self)
        if not self.null and len(self.arms) < 2:
            raise BadInput(f"--arms {' '.join(map(repr, self.arms))}: give two or more, or one and --null")
        for name in ("arms", "sizes", "rates"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise BadInput(f"--{name} {' '.join(map(repr, getattr(self, name)))}: has a duplicate: give each once")
        if self.limit[0] == "seconds" and self.jobs > 1:
            raise BadInput(f"--jobs={self.jobs}: with a budget in seconds only one run at a time is fair: leave it out")

    @property
    def limit(self) -> tuple[str, float]:
        """--budget as unit and amount: ("tokens", 1e7). Raises BadInput."""
        unit, _, amount = self.budget.partition("=")
        with suppress(ValueError):
            if unit in ("tokens", "flops", "seconds") and 0 < float(amount) < math.inf:
                return unit, float(amount)
        raise BadInput(f"--budget={self.budget}: give tokens=N, flops=N or seconds=N")


# -- the environment: what numbers depend on beside flags -------------------------------------------------------------

@dataclass(frozen=True)
class ConversationSet:
    """What finetuning runs learn from, as Data is for pretraining. fingerprint: 16 hex digits of its content."""
    name: str
    fingerprint: str


@dataclass(frozen=True)
class RunEnvironment:
    """What a cell's numbers depend on beside its flags."""
    data: Data | ConversationSet
    machine: str     # device and dtype
    hardware: str    # processor, card and versions
    code: str        # hash of the source, see experiments/code_hash.py


def detect_environment(config: CompareConfig, common: dict, data: Data | ConversationSet) -> RunEnvironment:
    """Raises BadInput when the device does not exist."""
    device = read_flags(DeviceConfig, select_fields(DeviceConfig, common))
    return RunEnvironment(data, *query_device(device), code_hash(REPO / COMMANDS[config.script].script))


def query_device(config: DeviceConfig) -> tuple[str, str]:
    """Machine and hardware, in words. A GPU is queried in another process: its context would take memory from the runs."""
    if not torch.cuda.is_available():
        return describe_device(config)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(describe_device, (config,))


def describe_device(config: DeviceConfig) -> tuple[str, str]:
    machine = open_machine(config)
    return str(machine), describe_hardware(machine.device)


def load_data(config: CompareConfig, common: dict) -> Data | ConversationSet:
    """What all runs learn from. Raises BadInput."""
    if config.script == "train":
        return open_data(common.get("data_path", RunConfig.data_path))
    source = read_flags(ConversationConfig, select_fields(ConversationConfig, common))
    splits = []
    for conversations in read_conversations(source):
        for conversation in conversations:  # now, rather than in every run
            try:
                check_chat(conversation.messages)
            except BadInput as error:
                raise BadInput(f"{conversation.where}: {error}") from None
        splits.append([conversation.messages for conversation in conversations])
    return ConversationSet(source.dataset, hashlib.sha256(json.dumps(splits).encode()).hexdigest()[:16])


def data_digests(data: Data | ConversationSet) -> list[str]:
    """Digests of everything that a run reads from the data."""
    if isinstance(data, ConversationSet):
        return [data.fingerprint]
    shards = [shard.sha256 for split in ("train", "val") for shard in data.manifest.shards[split]]
    return [data.manifest.tokenizer, *shards]


@dataclass(frozen=True)
class BaseModel:
    """A model that finetuning starts from. trained_with: the flags of its own run. digest: of the file."""
    config: GPTConfig
    trained_with: dict
    digest: str


@functools.cache
def load_base_model(path: Path) -> BaseModel:
    """Raises BadInput."""
    checkpoint = load_checkpoint(path)
    with reading(path):
        trained_with = checkpoint.get("training", {}).get("settings", {})
        return BaseModel(GPTConfig(**checkpoint["config"]), trained_with, hashlib.sha256(path.read_bytes()).hexdigest())


# -- arms -------------------------------------------------------------------------------------------------------------

def parse_arm(text: str, given: str, script: str = "train") -> dict:
    """The flags of `script` that an arm sets: "mlp=grkan,n_layer=4" -> {"mlp": "grkan", "n_layer": 4}.

    given: the flag that `text` was a value of, for the message. Raises BadInput.
    """
    classes = COMMANDS[script].classes
    parser = Parser(None)
    add_flags(parser, *classes, suppress=True)
    if set(text.split(",")) & {"help", "h"}:
        raise BadInput(f"{given} {text!r}: give flags of {script}.py, such as mlp=relu2; `python {script}.py --help` lists "
                       f"them")
    try:
        values = vars(parser.parse_args([f"--{part.strip()}" for part in text.split(",")]))
        for config in classes:
            read_flags(config, select_fields(config, values))
    except BadInput as error:
        raise BadInput(f"{given} {text!r}: {error}") from None
    if not_of_an_arm := values.keys() - flags_with_scope("arm", *classes):
        raise BadInput(f"{given} {text!r}: {min(not_of_an_arm)} is not part of an architecture or recipe: leave it out")
    return values


def flags_with_scope(scope: str, *configs: type) -> set[str]:
    """The names of the flags that are declared with it."""
    return {name for name, field in flags_of(*configs).items() if field.metadata["flag"].scope == scope}


def select_fields(config: type, values: dict) -> dict:
    """The entries of `values`, and of the preset that they name, that are fields of `config`."""
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in (PRESETS.get(values.get("preset"), {}) | values).items() if name in names}


def build_arms(config: CompareConfig, common: dict, data: Data | ConversationSet) -> list[Arm]:
    """Every arm at every size, matched to the first of that size. Raises BadInput."""
    seeds = tuple(range(1, config.seeds + 1))
    wanted = [(text, text, seeds) for text in config.arms]
    if config.null:
        text = config.arms[0]
        wanted = [wanted[0], (f"{text} again", text, tuple(NULL_SEED_OFFSET + seed for seed in seeds))]
    if config.script == "finetune":
        common = {"checkpoint_path": FinetuneConfig.checkpoint_path} | common
    arms = []
    for size in config.sizes or ("",):
        shared, reference = common | (parse_arm(size, "--sizes", config.script) if size else {}), None
        for name, text, seeds in wanted:
            values = shared | parse_arm(text, "--arms", config.script)
            try:
                if reference and config.match == "parameters" and config.script == "train":
                    values = match_parameters(values, reference.n_parameters, data.manifest.vocab_size)
                arm = build_arm(name, size, values, seeds, data)
                if reference and arm.batch_shape != reference.batch_shape:
                    own, other = (f"{batch_size} x {block_size}" for batch_size, block_size in (
                        arm.batch_shape, reference.batch_shape))
                    raise BadInput(f"has batches of {own} tokens, the first arm {other}: they would see other data: give "
                                   f"both the same --batch_size and --block_size")
            except BadInput as error:
                raise BadInput(f"--arms {name!r}: {error}") from None
            reference = reference or arm
            arms.append(arm)
    return arms


def build_arm(name: str, size: str, values: dict, seeds: tuple[int, ...], data: Data | ConversationSet) -> Arm:
    """values: all flags of its runs that are the same in each. Raises BadInput."""
    is_pretraining = isinstance(data, Data)
    model = build_meta_model(values, get_vocab_size(data))
    configs = (LoopConfig, RunConfig, OptimizerConfig) if is_pretraining else (
        FinetuneLoop, FinetuneConfig, FinetuneOptimizer)
    loop, run, schedule = (read_flags(config, select_fields(config, values)) for config in configs)
    if run.batch_size == "auto":
        raise BadInput("--batch_size=auto: give a number, so that steps of all arms see the same tokens")
    block_size = model.config.block_size
    if is_pretraining:
        for split in ("train", "val"):
            require_block(data, split, block_size)
    else:
        schedule = schedule.for_model(load_base_model(values["checkpoint_path"]).trained_with)
    step_tokens = run.batch_size * loop.num_batch_accum * block_size
    return Arm(name, size, values, seeds, step_tokens, (run.batch_size, block_size), schedule.peak_lr(step_tokens),
               model.n_parameters(), model.flops_per_token(), model.elementwise_flops_per_token())


def build_meta_model(values: dict, vocab_size: int | None) -> GPT:
    """The model of these flags on torch's meta device, without weights. vocab_size: None where the model exists, as the
    checkpoint that finetuning starts from."""
    with torch.device("meta"):
        if vocab_size is None:
            return GPT(load_base_model(values["checkpoint_path"]).config)
        return GPT(read_flags(GPTConfig, select_fields(GPTConfig, values) | {"vocab_size": vocab_size}))


def get_vocab_size(data: Data | ConversationSet) -> int | None:
    return data.manifest.vocab_size if isinstance(data, Data) else None


def match_parameters(values: dict, target: int, vocab_size: int) -> dict:
    """`values` with the n_hidden that gives the model `target` parameters, which are linear in it. Raises BadInput when none
    comes within MATCH_TOLERANCE."""
    count = lambda **changed: build_meta_model(values | changed, vocab_size).n_parameters()
    n_parameters, n_hidden = count(), None
    if abs(n_parameters - target) > CLOSE_MATCH * target and "n_hidden" not in values:
        at_8, at_16 = count(n_hidden=8), count(n_hidden=16)
        exact = 8 + 8 * (target - at_8) / (at_16 - at_8)
        n_hidden, multiple_of_8 = max(1, round(exact)), max(8, 8 * round(exact / 8))
        if abs(count(n_hidden=multiple_of_8) - target) <= CLOSE_MATCH * target:
            n_hidden = multiple_of_8  # suits a processor's vectors and a GPU's tiles
        n_parameters = count(n_hidden=n_hidden)
    if abs(n_parameters - target) > MATCH_TOLERANCE * target:
        raise BadInput(f"has {n_parameters:,} parameters, the first arm {target:,}: change its shape, or compare them "
                       f"as they are by --match=none")
    return values if n_hidden is None else values | {"n_hidden": n_hidden}


# -- cells ------------------------------------------------------------------------------------------------------------

def make_cell(arm: Arm, config: CompareConfig, environment: RunEnvironment, stage: str, lr_multiple: float,
              seed: int) -> Cell:
    """stage: "rate", "run" or "speed", see Cell. Raises BadInput when its part of the budget is less than one step."""
    budget_frac, own = stage_flags(arm, config, stage)
    training = COMMANDS[config.script]
    values = arm.flags | own | {"learning_rate": arm.base_lr * lr_multiple, "seed": seed}
    if config.script == "train":
        values = {"dataloader_num_workers": 0} | values
    digest = cell_digest(values, config.script, environment, stage)
    readable = "".join(c if c.isalnum() or c in "=.-" else "_" for c in f"{arm.name}-{arm.size}".strip("-"))[:80]
    checkpoint = config.out_path / "runs" / f"{readable}-{stage}-{lr_multiple:g}-{seed}-{digest}.pt"
    job = TrainingJob(REPO / training.script, checkpoint, flag_texts(values), training.out)
    return Cell(arm, stage, lr_multiple, seed, budget_frac, job)


def stage_flags(arm: Arm, config: CompareConfig, stage: str) -> tuple[float, dict]:
    """The fraction of the budget that a cell of this stage gets, and the flags that limit it. Raises BadInput."""
    if stage == "speed":
        shortest_validation = {"val_iter": 1} if config.script == "train" else {"answer_tokens": 1}
        return 0.0, shortest_validation | {"max_iter": SPEED_STEPS, "log_intervals": 1, "val_intervals": SPEED_STEPS}
    budget_frac = config.grid_share if stage == "rate" else 1.0
    unit, amount = config.limit
    amount *= budget_frac
    if unit == "seconds":
        return budget_frac, {"max_seconds": amount}
    tokens = amount if unit == "tokens" else amount / (arm.flops_per_token + arm.elementwise_flops_per_token)
    if tokens < arm.step_tokens:
        raise BadInput(f"--budget={config.budget}: {budget_frac:g} of it gives a run of {arm.name!r} {tokens:,.0f} tokens, "
                       f"less than a step of {arm.step_tokens:,}: give more")
    flags = {"max_tokens": int(tokens)}
    if "val_intervals" not in arm.flags:
        flags["val_intervals"] = max(1, math.ceil(tokens / arm.step_tokens / VALIDATIONS))
    return budget_frac, flags


def cell_digest(values: dict, script: str, environment: RunEnvironment, stage: str) -> str:
    """10 hex digits that change with everything a cell's numbers depend on. Paths count by the content behind them."""
    paths = {name for name, field in flags_of(*COMMANDS[script].classes).items() if value_type(field) is Path}
    base = [load_base_model(values["checkpoint_path"]).digest] if script == "finetune" else []
    inputs = [*data_digests(environment.data), *base, environment.machine, torch.__version__, environment.code,
              *flag_texts({name: value for name, value in values.items() if name not in paths}),
              environment.hardware if stage == "speed" else ""]
    return hashlib.sha256("\n".join(inputs).encode()).hexdigest()[:10]


def flag_texts(values: dict) -> tuple[str, ...]:
    """{"bias": True, "mlp": "gelu"} -> ("--bias=1", "--mlp=gelu"), sorted."""
    return tuple(f"--{name}={int(value) if isinstance(value, bool) else value}" for name, value in sorted(values.items()))


# -- running them -----------------------------------------------------------------------------------------------------

def run_all(arms: list[Arm], config: CompareConfig, environment: RunEnvironment, stop: StopSignals) -> list[ArmResults]:
    """Runs every arm's learning-rate grid, then lower rates on the whole budget for as long as they help, then every seed at
    the best rate, and times the arms at the end."""
    everything = [ArmResults(arm, timed_budget=config.limit[0] == "seconds") for arm in arms]
    first_seed = lambda one: one.arm.seeds[:1]
    best_multiple = lambda one: [one.best().cell.lr_multiple]

    def run(stage: str, arms: list[ArmResults], multiples: Callable, seeds: Callable) -> list[list[CellResult]]:
        return run_stage(stage, [[make_cell(one.arm, config, environment, stage, multiple, seed) for multiple in
                                  multiples(one) for seed in seeds(one)] for one in arms], config.jobs, stop)
    for one, results in zip(everything, run("rate", everything, lambda one: config.rates, first_seed)):
        one.grid = results
    while not stop.signal and (searching := [one for one in everything if one.next_lr_multiple()]):
        for one, results in zip(searching, run("run", searching, lambda one: [one.next_lr_multiple()], first_seed)):
            one.full_budget_lr_runs += results
    tuned = [one for one in everything if one.best()]
    for one, results in zip(tuned, run("run", tuned, best_multiple, lambda one: one.arm.seeds)):
        one.runs = results
    if config.limit[0] != "seconds":
        trained = [one for one in tuned if one.finished()]
        for one, results in zip(trained, run("speed", trained, best_multiple, lambda one: range(SPEED_ROUNDS))):
            one.speeds = results
    return everything


def run_stage(stage: str, cells: list[list[Cell]], jobs: int, stop: StopSignals) -> list[list[CellResult]]:
    """The results of `cells`, a list per arm, which take turns: the first cell of each arm, then the second of each. Speeds
    are measured one at a time."""
    if stop.signal:
        return [[] for _ in cells]
    order = [cell for turn in itertools.zip_longest(*cells) for cell in turn if cell is not None]
    all_ended = Runner(1 if stage == "speed" else jobs, stop).run(
        [cell.job for cell in order], f"{stage}s",
        lambda i, ended: tqdm.write(cell_result(order[i], ended).describe()), [cell.budget_frac or 1.0 for cell in order])
    results = {cell.job.checkpoint: cell_result(cell, ended) for cell, ended in zip(order, all_ended)}
    return [[results[cell.job.checkpoint] for cell in own] for own in cells]


def cell_result(cell: Cell, ended: JobResult) -> CellResult:
    return CellResult(cell, ended.status, ended.reason, cell.job.rows())


def describe_conditions(results: list[ArmResults], config: CompareConfig, environment: RunEnvironment) -> str:
    """Under what conditions the arms were compared, beyond which no verdict holds."""
    reference, data = results[0].arm, environment.data
    model = build_meta_model(reference.flags, get_vocab_size(data)).config
    tokens = sorted({run.rows[-1]["tokens"] for one in results for run in one.finished()}) or [0]
    span = " to ".join(f"{n / 1e6:.2f}" for n in dict.fromkeys((tokens[0], tokens[-1])))
    matched = config.match == "parameters" and config.script == "train"
    if isinstance(data, Data):
        source = (f"{data.manifest.source.get('dataset', 'text')}, "
                  f"{tokens[-1] / data.manifest.total('train', 'tokens'):.2f} epochs")
    else:
        source = f"conversations of {data.name}"
    return (f"First arm: {model.n_layer} layers x {model.n_embd}, blocks of {model.block_size}, vocabulary "
            f"{model.vocab_size:,}, {reference.n_parameters / 1e6:.2f} M parameters, steps of {reference.step_tokens:,} "
            f"tokens; the others: {'as many parameters as the first' if matched else 'parameters not matched'}. {span} M "
            f"tokens of {source}; budget {config.budget}, {config.seeds} seeds; {environment.hardware}, "
            f"{environment.machine}")


# -- the command ------------------------------------------------------------------------------------------------------

def read_command_line(argv) -> tuple[CompareConfig, dict]:
    """The comparison, and the flags of its script that are given for all its runs. Raises BadInput."""
    script_parser = Parser(None)
    script_parser.add_argument("--script", choices=tuple(COMMANDS), default="train")
    script = script_parser.parse_known_args([text for text in (sys.argv[1:] if argv is None else argv)
                                             if text not in ("-h", "--help")])[0].script
    classes = COMMANDS[script].classes
    parser = Parser(main.__doc__)
    add_flags(parser, CompareConfig)
    add_flags(parser, *classes, suppress=True, without=flags_with_scope("run", *classes))
    values = vars(parser.parse_args(argv))
    own = flags_of(CompareConfig)
    return read_flags(CompareConfig, values), {name: value for name, value in values.items() if name not in own}


def make_plan(config: CompareConfig, common: dict, data: Data | ConversationSet) -> dict:
    """What makes it this comparison rather than another, as JSON: not the number of seeds, nor how or where it is run."""
    own = {name: value for name, value in vars(config).items() if name not in flags_with_scope("run", CompareConfig)}
    fields = flags_of(*COMMANDS[config.script].classes)
    is_data = lambda name: value_type(fields[name]) is Path and fields[name].metadata["flag"].scope == "shared"
    shared = {name: value for name, value in common.items() if not is_data(name)}
    fingerprint = data.manifest.fingerprint() if isinstance(data, Data) else data.fingerprint
    return json.loads(json.dumps(own | {"data": fingerprint, f"flags of {config.script}.py": shared}, default=str))


def save_plan(config: CompareConfig, plan: dict):
    """Writes plan.json. Raises BadInput when --out_path holds the results of another comparison."""
    path, before = config.out_path / "plan.json", plan
    check_writable(path, f"--out_path={config.out_path}")
    if path.exists() and not config.overwrite:
        with suppress(ValueError):  # damaged
            before = json.loads(path.read_text(encoding="utf-8"))
    if different := [name for name in {**before, **plan} if before.get(name) != plan.get(name)]:
        raise BadInput(f"--out_path={config.out_path}: holds a comparison that differs in {different[0]}: choose another "
                       f"path, or replace its results by --overwrite (identical runs are kept)")
    with atomic_write(path, "w") as file:
        json.dump(plan, file, indent=1)


@command
def main(argv=None):
    """Compares architectures at an equal budget."""
    config, common = read_command_line(argv)
    data = load_data(config, common)
    arms = build_arms(config, common, data)
    environment = detect_environment(config, common, data)
    for arm in arms:
        make_cell(arm, config, environment, "rate", 1.0, 1)  # raises now if the budget is too small
    line = shlex.join(["python", "compare.py", *(sys.argv[1:] if argv is None else argv)])
    with folder_lock(config.out_path, f"--out_path={config.out_path}"), StopSignals() as stop:
        save_plan(config, make_plan(config, common, data))
        start = time.perf_counter()
        results = run_all(arms, config, environment, stop)
        if stop.signal:
            print(f"stopped, all runs are saved: the same command continues: {line}", file=sys.stderr)
            raise SystemExit(128 + stop.signal)
        write_report(results, lambda group: describe_conditions(group, config, environment), line, config.out_path,
                     config.null)
        print(f"{time.perf_counter() - start:,.0f} s")
    if any(result.status in ("failed", "killed") for one in results for result in one.results()):
        raise OSError("some runs failed, see above; the same command runs them again")


if __name__ == "__main__":
    main()
