"""Compares architectures or recipes at an equal budget, with several seeds.

    python compare.py --data_path=data --arms "mlp=relu2" "mlp=grkan" "mixer=DDDA" --budget tokens=3e6

    python compare.py --script=finetune --dataset=builtin --arms checkpoint_path=a.pt checkpoint_path=b.pt

An arm is flags of train.py, or of finetune.py, where arms may also start from different models. Arms of train.py get as
many parameters as the first one: the width of the hidden layer is solved for. All arms see the same data in the same order.
Each arm tries the same learning rates on part of the budget. Starting from the best, lower rates are tried on the full
budget while they improve; then every seed is trained at the best rate. Each of these runs, a cell, has its full cooldown and
is a process that checkpoints: the same command continues where it was stopped, and never repeats a finished cell.

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
from experiments.comparison import write_comparison
from experiments.runner import JobResult, Runner, TrainingJob, flag_texts
from finetune import FINETUNING, FinetuneConfig, FinetuneLoop, FinetuneOptimizer
from model import GPT, GPTConfig, upgrade_config
from optimizer import OptimizerConfig
from runtime.checkpoint import explain_damage, load_checkpoint
from runtime.cli import Parser, add_flags, command, command_line, ignore_output_errors, parse_float
from runtime.config import BadInput, check_flags, declared_flags, flag, flag_names, read_flags, shorten, value_type
from runtime.device import DeviceConfig, describe_hardware, open_machine
from runtime.files import atomic_write, check_writable, folder_lock
from runtime.run import TrainingCommand
from runtime.signals import StopSignals
from sampling import pretraining_flags
from shards import DataFolder, open_data, require_block
from tasks.conversations import ConversationConfig, read_conversations
from tokenizer import ROLES
from train import PRESETS, PRETRAINING, RunConfig
from trainer import LoopConfig

REPO = Path(__file__).parent
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
                                "checkpoint_path=a.pt", choices=("train", "finetune"), scope="run")
    budget: str = flag("tokens=1e7", "budget of a run: tokens=N, flops=N or seconds=N; flops count matrix products, "
                                     "activations and bases")
    seeds: int = flag(3, "runs of each arm, which differ in initial weights and order of data; the same seeds for all arms",
                      at_least=1, at_most=NULL_SEED_OFFSET, scope="run")
    sizes: tuple[str, ...] = flag((), "compare at several sizes, each some flags of train.py: n_layer=4,n_head=4")
    rates: tuple[float, ...] = flag((0.5, 1.0, 2.0), "learning rates to try, as multiples of --learning_rate", above=0)
    grid_share: float = flag(0.25, "fraction of the budget on which the learning rates are tried", above=0, at_most=1)
    match: str = flag("parameters", "what arms of train.py have in common besides the budget",
                      choices=("parameters", "none"))
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
        with suppress(argparse.ArgumentTypeError):
            if unit in ("tokens", "flops", "seconds") and 0 < parse_float(amount) < math.inf:
                return unit, parse_float(amount)
        raise BadInput(f"--budget={shorten(self.budget)}: give tokens=N, flops=N or seconds=N")

    @property
    def spec(self) -> "ScriptSpec":
        return SCRIPTS[self.script]

    @property
    def matches_parameters(self) -> bool:
        return self.match == "parameters" and not self.spec.starts_from_checkpoint


# -- data, and models to start from -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class TrainingData:
    """What all runs learn from. fingerprint: hex digits of its content. digests: of everything that a run reads from it.
    shards: the data of pretraining; None for conversations."""
    description: str
    fingerprint: str
    digests: tuple[str, ...]
    shards: DataFolder | None = None

    @classmethod
    def from_shards(cls, shards: DataFolder) -> "TrainingData":
        manifest = shards.manifest
        digests = [shard.sha256 for split in ("train", "val") for shard in manifest.shards[split]]
        return cls(manifest.source.get("dataset", "text"), manifest.fingerprint(), (manifest.tokenizer, *digests), shards)

    @property
    def vocab_size(self) -> int | None:
        """None where the model to start from has its own."""
        return self.shards and self.shards.manifest.vocab_size


def load_shards(common: dict) -> TrainingData:
    """common: the flags that all runs share. Raises BadInput."""
    return TrainingData.from_shards(open_data(common.get("data_path", RunConfig.data_path)))


def load_conversations(common: dict) -> TrainingData:
    """common: the flags that all runs share. Raises BadInput."""
    source = read_flags(ConversationConfig, select_fields(ConversationConfig, common))
    splits = [[conversation.messages for conversation in part] for part in read_conversations(source, ROLES)]
    fingerprint = hashlib.sha256(json.dumps(splits).encode()).hexdigest()[:16]
    return TrainingData(f"conversations of {source.dataset}", fingerprint, (fingerprint,))


@dataclass(frozen=True)
class PretrainedModel:
    """A model that finetuning starts from. pretraining_flags: the flags of its own run. digest: of the file."""
    config: GPTConfig
    pretraining_flags: dict
    digest: str


@functools.cache
def read_pretrained(path: Path) -> PretrainedModel:
    """Raises BadInput."""
    checkpoint = load_checkpoint(path)
    with explain_damage(path):
        flags = pretraining_flags(checkpoint)
        config = GPTConfig(**upgrade_config(checkpoint["config"]))
        return PretrainedModel(config, flags, hashlib.sha256(path.read_bytes()).hexdigest())


# -- scripts ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ScriptSpec:
    """What differs between the scripts whose runs are compared."""
    command: TrainingCommand
    loop: type[LoopConfig]
    run: type
    optimizer: type[OptimizerConfig]
    load_data: Callable[[dict], TrainingData]
    starts_from_checkpoint: bool  # the flag checkpoint_path names the model of an arm
    arm_defaults: dict            # flags that an arm has unless they are given
    cell_defaults: dict           # the same, of each of its runs
    shortest_validation: dict     # flags of a run that is only timed


SCRIPTS = {
    "train": ScriptSpec(PRETRAINING, LoopConfig, RunConfig, OptimizerConfig, load_shards, starts_from_checkpoint=False,
                        arm_defaults={}, cell_defaults={"dataloader_num_workers": 0}, shortest_validation={"val_iter": 1}),
    "finetune": ScriptSpec(FINETUNING, FinetuneLoop, FinetuneConfig, FinetuneOptimizer, load_conversations,
                           starts_from_checkpoint=True, arm_defaults={"checkpoint_path": FinetuneConfig.checkpoint_path},
                           cell_defaults={}, shortest_validation={"answer_tokens": 1})}


# -- the environment: what numbers depend on besides flags ------------------------------------------------------------

@dataclass(frozen=True)
class RunEnvironment:
    """What a cell's numbers depend on besides its flags."""
    data: TrainingData
    machine: str     # device and dtype
    hardware: str    # processor, card and versions
    code: str        # hash of the source, see experiments/code_hash.py


def detect_environment(config: CompareConfig, common: dict, data: TrainingData) -> RunEnvironment:
    """Raises BadInput when the device does not exist."""
    device = read_flags(DeviceConfig, select_fields(DeviceConfig, common))
    return RunEnvironment(data, *query_device(device), code_hash(REPO / config.spec.command.script))


def query_device(config: DeviceConfig) -> tuple[str, str]:
    """Machine and hardware, as text. A GPU is queried in another process: its context would take memory from the runs."""
    if not torch.cuda.is_available():
        return describe_device(config)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(describe_device, (config,))


def describe_device(config: DeviceConfig) -> tuple[str, str]:
    machine = open_machine(config)
    return str(machine), describe_hardware(machine.device)


# -- arms -------------------------------------------------------------------------------------------------------------

def parse_arm(text: str, given: str, script: str = "train") -> dict:
    """The flags of `script` that an arm sets: "mlp=grkan,n_layer=4" -> {"mlp": "grkan", "n_layer": 4}.

    given: the flag that `text` was a value of, for the message. Raises BadInput.
    """
    classes = SCRIPTS[script].command.classes
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
    if not_of_an_arm := values.keys() - flag_names(*classes, scope="arm"):
        raise BadInput(f"{given} {text!r}: {min(not_of_an_arm)} is not part of an architecture or recipe: leave it out")
    return values


def select_fields(config: type, values: dict) -> dict:
    """The entries of `values`, and of the preset that they name, that are fields of `config`."""
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in (PRESETS.get(values.get("preset"), {}) | values).items() if name in names}


def build_arms(config: CompareConfig, common: dict, data: TrainingData) -> list[Arm]:
    """Every arm at every size, matched to the first of that size. Raises BadInput."""
    arms = []
    for size in config.sizes or ("",):
        shared = config.spec.arm_defaults | common | (parse_arm(size, "--sizes", config.script) if size else {})
        reference = None
        for name, text, seeds in arm_texts(config):
            values = shared | parse_arm(text, "--arms", config.script)
            try:
                if reference and config.matches_parameters:
                    values = match_parameters(values, reference.n_parameters, data.vocab_size)
                arm = build_arm(config.spec, name, size, values, seeds, data)
                check_same_batches(arm, reference or arm)
            except BadInput as error:
                raise BadInput(f"--arms {name!r}: {error}") from None
            reference = reference or arm
            arms.append(arm)
    return arms


def arm_texts(config: CompareConfig) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, flags as text, seeds) of each arm; with --null, of the first one twice."""
    seeds = tuple(range(1, config.seeds + 1))
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


def build_arm(spec: ScriptSpec, name: str, size: str, values: dict, seeds: tuple[int, ...], data: TrainingData) -> Arm:
    """values: all flags of its runs that are the same in each. Raises BadInput."""
    model = build_meta_model(values, data.vocab_size)
    loop, run, schedule = (read_flags(config, select_fields(config, values)) for config in (
        spec.loop, spec.run, spec.optimizer))
    if run.batch_size == "auto":
        raise BadInput("--batch_size=auto: give a number, so that steps of all arms see the same tokens")
    block_size = model.config.block_size
    if data.shards:
        for split in ("train", "val"):
            require_block(data.shards, split, block_size)
    if spec.starts_from_checkpoint:
        schedule = schedule.for_model(read_pretrained(values["checkpoint_path"]).pretraining_flags)
    step_tokens = run.batch_size * loop.num_batch_accum * block_size
    return Arm(name, size, values, seeds, step_tokens, (run.batch_size, block_size), schedule.peak_lr(step_tokens),
               model.n_parameters(), model.flops_per_token(), model.elementwise_flops_per_token())


def build_meta_model(values: dict, vocab_size: int | None) -> GPT:
    """The model of these flags on torch's meta device, without weights. vocab_size: None where the model exists, as the
    checkpoint that finetuning starts from."""
    if vocab_size is None:
        config = read_pretrained(values["checkpoint_path"]).config
    else:
        config = read_flags(GPTConfig, select_fields(GPTConfig, values) | {"vocab_size": vocab_size})
    with torch.device("meta"):
        return GPT(config)


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
                       f"as they are with --match=none")
    return values if n_hidden is None else values | {"n_hidden": n_hidden}


# -- cells ------------------------------------------------------------------------------------------------------------

def make_cell(arm: Arm, config: CompareConfig, environment: RunEnvironment, stage: str, lr_multiple: float,
              seed: int) -> Cell:
    """stage: "lr_grid", "run" or "speed", see Cell. Raises BadInput when its part of the budget is less than one step."""
    budget_frac, own = stage_flags(arm, config, stage)
    command = config.spec.command
    values = config.spec.cell_defaults | arm.flags | own | {"learning_rate": arm.base_lr * lr_multiple, "seed": seed}
    digest = cell_digest(values, config.spec, environment, stage)
    readable = re.sub(r"[^a-zA-Z0-9=.-]", "_", f"{arm.name}-{arm.size}".strip("-"))[:80]  # bytes: names have up to 255
    checkpoint = config.out_path / "runs" / f"{readable}-{stage}-{lr_multiple:g}-{seed}-{digest}.pt"
    job = TrainingJob(REPO / command.script, checkpoint, flag_texts(values), command.out_flag)
    return Cell(arm, stage, lr_multiple, seed, budget_frac, job)


def stage_flags(arm: Arm, config: CompareConfig, stage: str) -> tuple[float, dict]:
    """The fraction of the budget that a cell of this stage gets, and the flags that limit it. Raises BadInput."""
    if stage == "speed":
        steps = {"max_iter": SPEED_STEPS, "log_intervals": 1, "val_intervals": SPEED_STEPS}
        return 0.0, config.spec.shortest_validation | steps
    budget_frac = config.grid_share if stage == "lr_grid" else 1.0
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


def cell_digest(values: dict, spec: ScriptSpec, environment: RunEnvironment, stage: str) -> str:
    """10 hex digits that change with everything a cell's numbers depend on. Paths count by the content behind them."""
    paths = {name for name, field in declared_flags(*spec.command.classes).items() if value_type(field) is Path}
    model = [read_pretrained(values["checkpoint_path"]).digest] if spec.starts_from_checkpoint else []
    inputs = [*environment.data.digests, *model, environment.machine, torch.__version__, environment.code,
              *flag_texts({name: value for name, value in values.items() if name not in paths}),
              environment.hardware if stage == "speed" else ""]
    return hashlib.sha256("\n".join(inputs).encode()).hexdigest()[:10]


# -- running them -----------------------------------------------------------------------------------------------------

def run_all(arms: list[Arm], config: CompareConfig, environment: RunEnvironment, stop: StopSignals) -> list[ArmResults]:
    """Runs every arm's learning-rate grid, then lower rates on the full budget while they improve, then every seed at the
    best rate, and times the arms at the end."""
    all_results = [ArmResults(arm, timed_budget=config.limit[0] == "seconds") for arm in arms]
    first_seed = lambda arm_results: arm_results.arm.seeds[:1]
    next_multiple = lambda arm_results: [arm_results.next_lr_multiple()]
    best_multiple = lambda arm_results: [arm_results.best().cell.lr_multiple]

    def run(stage: str, selected: list[ArmResults], multiples: Callable, seeds: Callable) -> list[list[CellResult]]:
        cells = [[make_cell(arm_results.arm, config, environment, stage, multiple, seed)
                  for multiple in multiples(arm_results) for seed in seeds(arm_results)] for arm_results in selected]
        return run_stage(stage, cells, config.jobs, stop)
    for arm_results, grid in zip(all_results, run("lr_grid", all_results, lambda _: config.rates, first_seed)):
        arm_results.grid = grid
    while not stop.signal and (searching := [results for results in all_results if results.next_lr_multiple()]):
        for arm_results, runs in zip(searching, run("run", searching, next_multiple, first_seed)):
            arm_results.full_budget_lr_runs += runs
    tuned = [arm_results for arm_results in all_results if arm_results.best()]
    for arm_results, runs in zip(tuned, run("run", tuned, best_multiple, lambda arm_results: arm_results.arm.seeds)):
        arm_results.runs = runs
    if config.limit[0] != "seconds":
        trained = [arm_results for arm_results in tuned if arm_results.finished()]
        for arm_results, speeds in zip(trained, run("speed", trained, best_multiple, lambda _: range(SPEED_ROUNDS))):
            arm_results.speeds = speeds
    return all_results


def run_stage(stage: str, cells: list[list[Cell]], jobs: int, stop: StopSignals) -> list[list[CellResult]]:
    """The results of `cells`, a list per arm, which take turns: the first cell of each arm, then the second of each. Speeds
    are measured one at a time."""
    if stop.signal:
        return [[] for _ in cells]
    order = [cell for turn in itertools.zip_longest(*cells) for cell in turn if cell is not None]
    all_ended = Runner(1 if stage == "speed" else jobs, stop).run(
        [cell.job for cell in order], f"{stage} cells",
        lambda i, ended: tqdm.write(cell_result(order[i], ended).describe()), [cell.budget_frac or 1.0 for cell in order])
    results = {cell.job.checkpoint: cell_result(cell, ended) for cell, ended in zip(order, all_ended)}
    return [[results[cell.job.checkpoint] for cell in own] for own in cells]


def cell_result(cell: Cell, ended: JobResult) -> CellResult:
    return CellResult(cell, ended.status, ended.reason, cell.job.rows())


def describe_conditions(results: list[ArmResults], config: CompareConfig, environment: RunEnvironment) -> str:
    """The conditions that the verdicts hold for."""
    reference, data = results[0].arm, environment.data
    model = build_meta_model(reference.flags, data.vocab_size).config
    tokens = sorted({run.rows[-1]["tokens"] for arm_results in results for run in arm_results.finished()}) or [0]
    span = " to ".join(f"{n / 1e6:.2f}" for n in dict.fromkeys((tokens[0], tokens[-1])))
    epochs = f", {tokens[-1] / data.shards.manifest.total('train', 'tokens'):.2f} epochs" if data.shards else ""
    others = "as many parameters as the first" if config.matches_parameters else "parameters not matched"
    return (f"First arm: {model.n_layer} layers x {model.n_embd}, blocks of {model.block_size}, vocabulary "
            f"{model.vocab_size:,}, {reference.n_parameters / 1e6:.2f} M parameters, steps of {reference.step_tokens:,} "
            f"tokens; the others: {others}. {span} M tokens of {data.description}{epochs}; budget {config.budget}, "
            f"{config.seeds} seeds; {environment.hardware}, {environment.machine}")


# -- the command ------------------------------------------------------------------------------------------------------

def read_command_line(argv) -> tuple[CompareConfig, dict]:
    """The comparison, and the flags of its script that are given for all its runs. Raises BadInput."""
    script_parser = Parser(None)
    script_parser.add_argument("--script", choices=tuple(SCRIPTS), default="train")
    script = script_parser.parse_known_args([text for text in (sys.argv[1:] if argv is None else argv)
                                             if text not in ("-h", "--help")])[0].script
    classes = SCRIPTS[script].command.classes
    parser = Parser(main.__doc__)
    add_flags(parser, CompareConfig)
    add_flags(parser, *classes, suppress=True, without=flag_names(*classes, scope="run"))
    values = vars(parser.parse_args(argv))
    own = declared_flags(CompareConfig)
    return read_flags(CompareConfig, values), {name: value for name, value in values.items() if name not in own}


def make_plan(config: CompareConfig, common: dict, data: TrainingData) -> dict:
    """What makes it this comparison rather than another, as JSON: not the number of seeds, nor how or where it is run."""
    own = {name: value for name, value in vars(config).items() if name not in flag_names(CompareConfig, scope="run")}
    fields = declared_flags(*config.spec.command.classes)
    is_data = lambda name: value_type(fields[name]) is Path and fields[name].metadata["flag"].scope == "shared"
    shared = {name: value for name, value in common.items() if not is_data(name)}
    return json.loads(json.dumps(own | {"data": data.fingerprint, f"flags of {config.script}.py": shared}, default=str))


def save_plan(config: CompareConfig, plan: dict):
    """Writes plan.json. Raises BadInput when --out_path holds the results of another comparison."""
    path, before = config.out_path / "plan.json", plan
    check_writable(path, f"--out_path={config.out_path}")
    if path.exists() and not config.overwrite:
        with suppress(ValueError, RecursionError):  # damaged
            found = json.loads(path.read_text(encoding="utf-8"))
            before = found if isinstance(found, dict) else plan
    if different := [name for name in {**before, **plan} if before.get(name) != plan.get(name)]:
        raise BadInput(f"--out_path={config.out_path}: holds a comparison that differs in {shorten(different[0])}: choose "
                       f"another path, or replace its results with --overwrite (identical runs are kept)")
    with atomic_write(path, "w") as file:
        json.dump(plan, file, indent=1)


@command
def main(argv=None):
    """Compares architectures at an equal budget."""
    ignore_output_errors()
    config, common = read_command_line(argv)
    data = config.spec.load_data(common)
    arms = build_arms(config, common, data)
    environment = detect_environment(config, common, data)
    for arm in arms:
        make_cell(arm, config, environment, "lr_grid", 1.0, 1)  # raises now if the budget is too small
    line = command_line("compare.py", argv)
    with folder_lock(config.out_path, f"--out_path={config.out_path}"), StopSignals() as stop:
        save_plan(config, make_plan(config, common, data))
        start = time.perf_counter()
        results = run_all(arms, config, environment, stop)
        if stop.signal:
            print(f"stopped, all runs are saved: the same command continues: {line}", file=sys.stderr)
            raise SystemExit(128 + stop.signal)
        write_comparison(results, lambda group: describe_conditions(group, config, environment), line, config.out_path,
                     config.null)
        print(f"{time.perf_counter() - start:,.0f} s")
    if any(result.status in ("failed", "killed") for arm_results in results for result in arm_results.results()):
        raise OSError("some runs failed, see above; the same command runs them again")


if __name__ == "__main__":
    main()
