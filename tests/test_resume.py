"""Resuming: bit for bit, with changed flags, from other formats, and which checkpoints are refused."""
import copy
import json
import math
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

import finetune
import generate
import train
from conftest import assert_same, run_rows, saved_training, signal_in_step, train_tiny
from layers import LINEARS, MIXERS, MLPS
from model import GPT
from runtime.checkpoint import load_checkpoint, run_folder, save_checkpoint
from runtime.config import BadInput, declared_flags, flag_names, value_type
from runtime.run import STOP_FLAGS, is_finished, override_horizon
from runtime.signals import StopSignals
from trainer import LoopConfig

# the parts of the preset that a tiny model can have
GPT2 = [f"--{name}={int(value) if isinstance(value, bool) else value}" for name, value in train.PRESETS["gpt2"].items()
        if name in ("mlp", "norm", "positions", "qk_norm", "value_residual", "x0_residual", "token_shift", "softcap",
                    "bias", "init", "optimizer", "weight_decay", "schedule", "grad_clip")]
WRONG_VALUES = {
    "step": [None, "3", 1.5, True, -1, 10**30, math.nan], "tokens": [None, "3", 1.5, -1, [3]],
    "seconds": [None, "3", math.nan, -1.0], "best": ["3", math.inf, [3]], "machine": [3], "dtype": [3, ["fp32"]],
    "settings": [None, 3, [], {"seed": 1}],
    "script": [None, 3, ["train.py"]], "loader": [None, 3, {}], "rng": [None, {}], "guard": [None, 3, torch.zeros(2)],
    "optimizer": [None, {}, {"muon": 3}]}
WRONG_SETTINGS = {
    "seed": [None, "1", 1.5, True, 10**30, 10**400], "val_iter": [[20], "20", math.nan],
    "softcap": ["15", True, math.nan, 10**400],
    "mlp": [3, None, ["gelu"]], "tied": [1, None, "yes"], "n_layer": [2.0, "2", [2]], "data_path": [3, None],
    "preset": [3, "x"], "learning_rate": ["high", True, []], "val_batch": ["4", 4.5, True]}
COMMANDS = {command.script: command for command in (train.PRETRAINING, finetune.FINETUNING)}


def flag_cases(*on_resume: str) -> list:
    """(command, flag) for every flag of train.py and finetune.py that is declared so."""
    return [pytest.param(command, name, id=f"{script}-{name}") for script, command in COMMANDS.items()
            for kind in on_resume for name in sorted(flag_names(*command.classes, on_resume=kind))]


# -- what a checkpoint says of its run --------------------------------------------------------------------------------

@pytest.mark.parametrize("part, name, value", [
    *((None, name, value) for name, values in WRONG_VALUES.items() for value in values),
    *(("settings", name, value) for name, values in WRONG_SETTINGS.items() for value in values)],
    ids=lambda value: str(value)[:20])
def test_a_checkpoint_with_values_of_wrong_types_is_refused(trained, refused, data_path, tmp_path, part, name, value):
    path = tmp_path / "gpt.pt"
    checkpoint = load_checkpoint(trained)
    training = checkpoint["training"]
    (training[part] if part else training)[name] = value
    save_checkpoint(path, checkpoint)
    shutil.copytree(run_folder(trained), run_folder(path))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    refused(train.main, [f"--checkpoint_path={path}", "--resume_checkpoint", f"--data_path={data_path}", "--max_iter=4",
                         "--verbose=0"], "gpt.pt")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


# -- bit for bit ------------------------------------------------------------------------------------------------------

def case(name: str, steps: tuple[int, ...], *flags: str, marks=()):
    return pytest.param(steps, flags, id=name, marks=marks)


def more(name: str, *flags: str, steps=(1,)):
    return case(name, steps, *flags, marks=pytest.mark.integration)


@pytest.mark.parametrize("steps, flags", [
    case("in the first step", (0,)), case("before a validation", (1,)), case("at a validation", (2,)),
    case("three times", (1, 2, 4)), case("fp16", (1, 3), "--dtype=fp16", "--batch_size=2"), case("gpt2", (1, 4), *GPT2),
    case("recurrent and attention layers", (1,), "--mixer=DA", "--linear=grkan"),
    case("sampled loops", (1, 3), "--loops=3", "--sampled_loops"), more("loops", "--loops=3", "--mixer=DA"),
    more("after a validation", steps=(3,)), more("late", steps=(4,)), more("workers", "--dataloader_num_workers=2"),
    more("bf16", "--dtype=bf16", "--batch_size=2", steps=(3,)), more("gradient checkpointing", "--gradient_checkpointing"),
    more("adamw", "--optimizer=adamw", "--tied=0", steps=(3,)), more("fp32 momentum", "--momentum_dtype=fp32"),
    more("nanochat", "--optimizer=nanochat", "--init=nanochat", "--value_embeddings", "--smear", "--backout", "--tied=0"),
    more("a memory of pairs", "--ngram_rows=40"), more("dense connections", "--dense_blocks=1"),
    more("cosine", "--schedule=cosine", "--grad_clip=0.1", "--weight_decay=0.1"),
    more("fp16 with grkan", "--linear=grkan", "--mixer=AD", "--dtype=fp16"),
    *(more(mlp, f"--mlp={mlp}") for mlp in MLPS), *(more(mixer, f"--mixer={mixer}") for mixer in (*MIXERS, "DA")),
    *(more(linear, f"--linear={linear}") for linear in LINEARS)])
def test_a_stopped_run_resumes_bit_for_bit(run_train, tmp_path, monkeypatch, capsys, steps, flags):
    """Stopped by signals in the middle of steps; validations are every 3 steps, and the run has several epochs."""
    flags = ["--batch_size=150", *flags]  # two batches are more than half an epoch
    expected, path, done = run_train(*flags, checkpoint="whole/gpt.pt"), tmp_path / "stopped" / "gpt.pt", 0
    for step in steps:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            signal_in_step(patch, step - done, batch=step % 2)
            run_train(*(["--resume_checkpoint"] if done else flags), checkpoint="stopped/gpt.pt")
        assert stop.value.code == 128 + signal.SIGTERM
        assert f"train.py --checkpoint_path={path} --resume_checkpoint" in capsys.readouterr().err
        done = load_checkpoint(path)["training"]["step"]
        assert done == step + 1
    run_train("--resume_checkpoint", checkpoint="stopped/gpt.pt")
    assert_same(saved_training(path), saved_training(expected))
    assert run_rows(path) == run_rows(expected) and len(run_rows(path)) == 7


@pytest.mark.parametrize("step, saved_step", [(0, 0), (5, 3)])
def test_a_killed_run_resumes_from_its_last_validation(run_train, tmp_path, monkeypatch, step, saved_step):
    """metrics.jsonl has rows of later steps than the checkpoint, and ends in the middle of one."""
    expected, path = run_train(checkpoint="whole/gpt.pt"), tmp_path / "killed" / "gpt.pt"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        signal_in_step(patch, step, times=2)
        patch.setattr(StopSignals, "DEBOUNCE_SECONDS", 0)  # a second signal does not wait for the step to end
        run_train(checkpoint="killed/gpt.pt")
    assert load_checkpoint(path)["training"]["step"] == saved_step
    with open(run_folder(path) / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "tok')
    run_train("--resume_checkpoint", checkpoint="killed/gpt.pt")
    assert_same(saved_training(path), saved_training(expected))
    assert run_rows(path) == run_rows(expected)
    lines = (run_folder(path) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(7))  # each once


def test_a_repeated_signal_within_the_debounce_time_counts_once(run_train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        signal_in_step(patch, 1, number=signal.SIGINT, times=2)
        run_train(checkpoint="a/gpt.pt")
    assert stop.value.code == 130 and load_checkpoint(tmp_path / "a" / "gpt.pt")["training"]["step"] == 2


def test_a_signal_in_the_last_step_changes_nothing(run_train, monkeypatch):
    signal_in_step(monkeypatch, 5)
    assert load_checkpoint(run_train())["training"]["step"] == 6


def test_a_skipped_step_is_reported_once_over_a_resumption(run_train, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        loss_fn = train.next_token_loss
        calls = iter(range(10**6))
        patch.setattr(train, "next_token_loss",
                      lambda model, batch: loss_fn(model, batch) * (math.nan if next(calls) == 2 else 1))
        run_train("--max_iter=3")
    assert "up to step 2: skipped 1 step whose loss or gradient was not finite" in capsys.readouterr().err
    run_train("--resume_checkpoint", "--max_iter=6")
    assert capsys.readouterr().err == ""


def test_resuming_needs_no_flags_and_may_write_elsewhere(run_train, tmp_path):
    first = run_train("--max_iter=3", "--mlp=gelu", "--learning_rate=0.003")
    second = tmp_path / "second" / "gpt.pt"
    train.main([f"--resume_checkpoint={first}", f"--checkpoint_path={second}", "--max_iter=6", "--verbose=0"])
    assert load_checkpoint(first)["training"]["step"] == 3
    checkpoint = load_checkpoint(second)
    assert checkpoint["training"]["step"] == 6 and checkpoint["config"]["mlp"] == "gelu"
    assert checkpoint["training"]["settings"]["learning_rate"] == 0.003
    assert [row["step"] for row in run_rows(second)] == list(range(7))


def test_a_changed_batch_size_continues_with_the_next_blocks(run_train):
    """4 x 2 or 8 x 1 blocks a step: the same data, so nearly the same losses."""
    first = run_train("--max_iter=3", "--cooldown_frac=0", checkpoint="a/gpt.pt")
    flags = "--resume_checkpoint", "--max_iter=6", "--cooldown_frac=0.6"
    second = first.parents[1] / "b" / "gpt.pt"
    shutil.copytree(first.parent, second.parent)
    run_train(*flags, checkpoint="a/gpt.pt")
    run_train(*flags, "--batch_size=8", "--num_batch_accum=1", "--val_iter=1", checkpoint="b/gpt.pt")
    assert [row["tokens"] for row in run_rows(second)] == [128 * step for step in range(7)]
    for a, b in zip(run_rows(first)[1:], run_rows(second)[1:]):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-3) and a["tokens"] == b["tokens"]


# -- the horizon and other changes ------------------------------------------------------------------------------------

@pytest.mark.parametrize("given, expected", [
    ({}, (9, None, 2.0)), ({"max_iter": 7}, (7, None, None)), ({"max_tokens": 5}, (None, 5, None)),
    ({"max_iter": 7, "max_seconds": 1.0}, (7, None, 1.0)), ({"seed": 1}, (9, None, 2.0))])
def test_a_given_stop_flag_replaces_all_saved_ones(given, expected):
    values = override_horizon({"max_iter": 9, "max_tokens": None, "max_seconds": 2.0, "seed": 0}, given)
    assert tuple(values[name] for name in ("max_iter", "max_tokens", "max_seconds")) == expected
    assert values["seed"] == given.get("seed", 0)


@pytest.mark.parametrize("counter, name", [(counter, name) for name, counter in STOP_FLAGS.items()])
@pytest.mark.parametrize("limit, saved_limit, expected", [
    (11, 10, False), (10, 10, True), (9, 10, "give more"), (10, 99, "give more"), (11, None, False)])
def test_is_finished_by_each_stop_flag(capsys, name, counter, limit, saved_limit, expected):
    training = {"step": 1, "tokens": 1, "seconds": 1, "settings": dict.fromkeys(STOP_FLAGS) | {name: saved_limit},
                counter: 10}
    loop = LoopConfig(**{name: limit})
    if expected == "give more":
        with pytest.raises(BadInput, match=f"--{name}={limit}.*: .*give more"):
            is_finished(loop, training, Path("gpt.pt"))
    else:
        assert is_finished(loop, training, Path("gpt.pt")) is expected
        assert (f"a larger --{name} trains on" in capsys.readouterr().out) is expected


def test_a_changed_horizon_refits_the_schedule(run_train, capsys):
    path = run_train("--max_iter=4", "--warmup_iter=0", "--cooldown_frac=0.5", "--learning_rate=0.001")
    run_train("--resume_checkpoint", "--max_iter=8", "--verbose=1", "--sample_tokens=0")
    assert "max_iter 4 -> 8; the schedule now fits the new one" in capsys.readouterr().out
    rates = [row["lr"] for row in run_rows(path)[1:]]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 0.5e-3] + [1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_another_kind_of_horizon(run_train, capsys):
    path = run_train("--max_iter=3")
    run_train("--resume_checkpoint", f"--max_tokens={5 * 128}", "--verbose=1", "--sample_tokens=0")
    out = capsys.readouterr().out
    assert "max_iter 3 -> None" in out and "max_tokens None -> 640; the schedule now fits" in out
    assert run_rows(path)[-1]["step"] == 5
    assert [load_checkpoint(path)["training"]["settings"][name] for name in ("max_iter", "max_tokens")] == [None, 640]
    run_train("--resume_checkpoint", "--verbose=1")
    assert "already finished at step 5; a larger --max_tokens trains on" in capsys.readouterr().out


def test_a_changed_learning_rate_is_used_and_reported(run_train, capsys):
    path = run_train("--max_iter=4", "--warmup_iter=0", "--cooldown_frac=0")
    run_train("--resume_checkpoint", "--max_iter=5", "--learning_rate=0.5", "--verbose=1", "--sample_tokens=0")
    assert "changed on resuming: learning_rate auto -> 0.5\n" in capsys.readouterr().out
    assert run_rows(path)[-1]["lr"] == 0.5


def test_a_finished_run_is_left_alone(trained, capsys, refused):
    before = trained.read_bytes()
    train.main(["--resume_checkpoint", f"--checkpoint_path={trained}"])
    assert capsys.readouterr().out == f"{trained}: already finished at step 3; a larger --max_iter trains on\n"
    train.main(["--resume_checkpoint", f"--checkpoint_path={trained}", "--verbose=0"])
    assert capsys.readouterr().out == ""
    refused(train.main, ["--resume_checkpoint", f"--checkpoint_path={trained}", "--max_iter=2"], "--max_iter=2", "step 3")
    assert trained.read_bytes() == before


# -- what flags declare -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, data_path) -> Path:
    folder = tmp_path_factory.mktemp("finetuned")
    base = train_tiny(folder / "gpt.pt", data_path, "--max_iter=1", "--block_size=64")
    dataset = folder / "conversations.jsonl"
    dataset.write_text("".join(json.dumps({"question": f"{i}?", "answer": "yes"}) + "\n" for i in range(20)))
    finetune.main([f"--checkpoint_path={base}", f"--dataset={dataset}", f"--out_path={folder / 'chat.pt'}", "--max_iter=1",
                   "--batch_size=2", "--val_conversations=3", "--device=cpu", "--dtype=fp32", "--verbose=0"])
    return folder / "chat.pt"


@pytest.fixture
def saved(trained, finetuned):
    """saved(command) -> its checkpoint's path and "training" part."""
    paths = {"train.py": trained, "finetune.py": finetuned}
    return lambda command: (paths[command.script], load_checkpoint(paths[command.script])["training"])


def another_value(command, name: str, value):
    """A value of the flag that is not `value`."""
    field = declared_flags(*command.classes)[name]
    if choices := field.metadata["flag"].choices:
        return next(choice for choice in choices if choice != value)
    kind = value_type(field)
    if kind is bool:
        return value is not True
    if kind in (int, float):
        return kind(1) if value is None or value == "auto" else value + kind(1)
    return kind("other")


def test_every_flag_is_saved_or_declared_unsaved():
    for command in COMMANDS.values():
        kinds = [flag_names(*command.classes, on_resume=kind) for kind in ("fixed", "warn", "free", "unsaved")]
        assert sum(map(len, kinds)) == len(set().union(*kinds)) == len(declared_flags(*command.classes))
        assert {"resume_checkpoint", "overwrite", "verbose", command.out_flag} <= kinds[-1]
        assert set(STOP_FLAGS) <= kinds[1]


@pytest.mark.parametrize("command, name", flag_cases("fixed"))
def test_a_fixed_flag_keeps_its_value(saved, command, name):
    path, training = saved(command)
    value = training["settings"][name]
    given = {name: Path(value) if name == "checkpoint_path" else value}
    command.read_checkpoint(path, given)  # the value that it has anyway
    other = another_value(command, name, value)
    with pytest.raises(BadInput) as refusal:
        command.read_checkpoint(path, {name: other})
    assert str(refusal.value).startswith(f"--{name}={other}: {path} was trained with {name}={value}, ")


@pytest.mark.parametrize("command, name", flag_cases("warn"))
def test_a_changed_flag_that_matters_is_reported(saved, capsys, command, name):
    path, training = saved(command)
    before, other = training["settings"][name], another_value(command, name, training["settings"][name])
    start, _ = command.read_checkpoint(path, {name: other})
    assert start[name] == before
    command.report_changes(training["settings"] | {name: other}, training["machine"], training)
    assert re.fullmatch(rf"changed on resuming: {name} {before} -> {other}(; the schedule now fits the new one)?\n",
                        capsys.readouterr().out)


@pytest.mark.parametrize("command, name", flag_cases("free"))
def test_a_changed_flag_that_does_not_matter_is_silent(saved, capsys, command, name):
    path, training = saved(command)
    other = another_value(command, name, training["settings"][name])
    command.read_checkpoint(path, {name: other})
    command.report_changes(training["settings"] | {name: other}, training["machine"], training)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("command, name", flag_cases("unsaved"))
def test_an_unsaved_flag_is_not_in_the_checkpoint(saved, command, name):
    assert name not in saved(command)[1]["settings"]


# Of train.py's free flags: values that must leave the weights as they are. Not device and dtype, which choose the machine;
# a resumed run reports when that has changed.
FREE = {"data_path": None, "dataloader_num_workers": 1, "gradient_checkpointing": 1, "log_intervals": 2, "sample_tokens": 0,
        "shard": "optimizer"}


@pytest.mark.parametrize("name", FREE)
def test_a_free_flag_does_not_change_the_numbers(run_train, trained, tmp_path, data_path, name):
    assert flag_names(*train.PRETRAINING.classes, on_resume="free") == {*FREE, "device", "dtype", "threads"}
    value = FREE[name] if name != "data_path" else shutil.copytree(data_path, tmp_path / "moved")
    runs = []
    for flags in ([], [f"--{name}={value}"]):
        shutil.copytree(trained.parent, tmp_path / f"run{len(runs)}")
        runs.append(tmp_path / f"run{len(runs)}" / trained.name)
        train.main(["--resume_checkpoint", f"--checkpoint_path={runs[-1]}", "--max_iter=5", "--verbose=0", *flags])
    (weights, training), (expected_weights, expected) = map(saved_training, runs)
    if name == "log_intervals":
        training.pop("guard"), expected.pop("guard")  # holds the largest loss since the last row
    assert_same(weights, expected_weights)
    assert_same(training, expected)


# -- dtype ------------------------------------------------------------------------------------------------------------

def test_a_resumed_run_keeps_the_dtype_that_was_chosen(run_train, monkeypatch, capsys):
    """Even where timing matrix products again would choose another one."""
    monkeypatch.setattr("runtime.device.x86_dtype", lambda: None)

    def fastest(dtype):
        monkeypatch.setattr("runtime.device.measure_flops", lambda device, name, n: 9e9 if name == dtype else 1e9)
    fastest("bf16")
    path = run_train("--dtype=auto", "--max_iter=2")
    fastest("fp32")
    run_train("--resume_checkpoint", "--max_iter=3", "--verbose=1", "--sample_tokens=0")
    out = capsys.readouterr().out
    assert "cpu, bf16" in out and "machine cpu" not in out
    assert load_checkpoint(path)["training"]["dtype"] == "bf16"
    run_train("--resume_checkpoint", "--max_iter=4", "--dtype=fp32", "--verbose=1", "--sample_tokens=0")
    assert "changed on resuming: machine cpu, bf16 -> cpu, fp32" in capsys.readouterr().out
    assert load_checkpoint(path)["training"]["dtype"] == "fp32"


def test_the_dtype_of_a_resumed_run_is_a_field_of_its_checkpoint(run_train, monkeypatch):
    """The line that describes the machine is for people, and is not read."""
    monkeypatch.setattr("runtime.device.x86_dtype", lambda: None)
    monkeypatch.setattr("runtime.device.measure_flops", lambda device, name, n: 9e9 if name == "fp32" else 1e9)
    path = run_train("--dtype=auto", "--max_iter=2")
    checkpoint = load_checkpoint(path)
    assert checkpoint["training"]["dtype"] == "fp32"
    checkpoint["training"] |= {"dtype": "bf16", "machine": "a toaster, fp32"}
    save_checkpoint(path, checkpoint)
    run_train("--resume_checkpoint", "--max_iter=3")
    assert load_checkpoint(path)["training"]["dtype"] == "bf16"


# -- format 2 ---------------------------------------------------------------------------------------------------------

def downgrade(checkpoint: dict) -> dict:
    """A checkpoint of format 3 as format 2 would hold it."""
    old_flag = lambda name: "embed_shortcut" if name == "x0_residual" else name
    old_weight = lambda name: re.sub(r"x0_mix$", "shortcut", re.sub(r"shift_coeff$", "share", name))
    old = checkpoint | {"format": "gpt-workbench checkpoint 2",
                        "config": {old_flag(name): value for name, value in checkpoint["config"].items()},
                        "model": {old_weight(name): value for name, value in checkpoint["model"].items()}}
    if "training" in checkpoint:
        training = dict(checkpoint["training"])
        del training["dtype"]
        training["watch"] = training.pop("guard")
        training["settings"] = {old_flag(name): value for name, value in training["settings"].items()}
        old["training"] = training
    return old


@pytest.mark.parametrize("flags", [[], ["--dtype=fp16", "--mixer=AD", "--n_layer=3"], GPT2], ids=["default", "fp16", "gpt2"])
def test_format_2_resumes_bit_for_bit(run_train, flags):
    expected = run_train("--max_iter=3", *flags, checkpoint="new/gpt.pt")
    path = expected.parents[1] / "old" / "gpt.pt"
    shutil.copytree(expected.parent, path.parent)
    old = downgrade(load_checkpoint(path))
    if not flags:  # every renamed part is there
        assert {name.rpartition(".")[2] for name in old["model"]} >= {"share", "shortcut"}
        assert "embed_shortcut" in old["config"].keys() & old["training"]["settings"].keys()
    torch.save(old, path)
    for name in ("new", "old"):
        run_train("--resume_checkpoint", "--max_iter=6", checkpoint=f"{name}/gpt.pt")
    assert_same(saved_training(path), saved_training(expected))
    assert run_rows(path) == run_rows(expected)
    assert load_checkpoint(path).keys() == load_checkpoint(expected).keys()


def test_format_2_without_training_state_is_a_model(trained, tmp_path, refused):
    checkpoint = load_checkpoint(trained)
    del checkpoint["training"]
    torch.save(downgrade(checkpoint), tmp_path / "old.pt")
    assert_same(GPT.from_checkpoint(load_checkpoint(tmp_path / "old.pt")).to_checkpoint(),
                {"config": checkpoint["config"], "model": dict(checkpoint["model"])})
    refused(train.main, [f"--resume_checkpoint={tmp_path / 'old.pt'}"], "old.pt", "no training state")


def test_a_damaged_checkpoint_of_format_2_is_refused(trained, tmp_path, refused):
    old = downgrade(load_checkpoint(trained))
    del old["training"]["watch"]
    torch.save(old, tmp_path / "old.pt")
    refused(train.main, [f"--resume_checkpoint={tmp_path / 'old.pt'}"], "old.pt: a part of it is missing", "watch")


# -- refused checkpoints ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flag", [
    "--n_layer=3", "--n_head=1", "--head_size=16", "--block_size=8", "--mlp=relu2", "--seed=1", "--vocab_size=500",
    "--optimizer=adamw", "--softcap=10.0", "--tied=False", "--preset=cpu"])
def test_the_command_refuses_to_change_a_fixed_flag(trained, refused, flag):
    before = trained.read_bytes()
    refused(train.main, ["--resume_checkpoint", f"--checkpoint_path={trained}", "--max_iter=9", flag], flag,
            f"{flag.split('=')[0].strip('-')}=", "drop the flag")
    assert trained.read_bytes() == before


def test_a_missing_checkpoint_is_refused(trained, refused):
    refused(train.main, ["--resume_checkpoint=none.pt"], "none.pt: no checkpoint")
    refused(train.main, [f"--checkpoint_path={trained}", "--resume_checkpoint="], "--resume_checkpoint=: is empty")


@pytest.mark.parametrize("damage", [lambda data: data[:-1000], lambda data: b"hello", lambda data: b""],
                         ids=["truncated", "text", "empty"])
def test_a_file_that_is_no_checkpoint_is_refused(trained, tmp_path, refused, damage):
    (tmp_path / "broken.pt").write_bytes(damage(trained.read_bytes()))
    refused(train.main, [f"--resume_checkpoint={tmp_path / 'broken.pt'}"], "broken.pt: damaged")


@pytest.mark.parametrize("name", ["gpt-workbench checkpoint 0", "gpt-workbench checkpoint 1", "gpt-workbench checkpoint 4",
                                  "another"])
def test_an_unknown_format_is_refused_by_name(trained, tmp_path, refused, name):
    torch.save(load_checkpoint(trained) | {"format": name}, tmp_path / "other.pt")
    refused(train.main, [f"--resume_checkpoint={tmp_path / 'other.pt'}"], "other.pt", repr(name), "checkpoint 3")


def test_weights_of_another_shape_are_refused(trained, tmp_path, refused):
    checkpoint = load_checkpoint(trained)
    save_checkpoint(tmp_path / "shape.pt", checkpoint | {"config": checkpoint["config"] | {"n_layer": 5}})
    refused(train.main, [f"--resume_checkpoint={tmp_path / 'shape.pt'}", "--max_iter=9"], "shape.pt: ", "shape")


def test_a_checkpoint_of_another_command_is_refused(trained, finetuned, refused, tmp_path):
    refused(train.main, [f"--resume_checkpoint={finetuned}"], "is a checkpoint of finetune.py")
    refused(finetune.main, [f"--resume_checkpoint={trained}", f"--out_path={tmp_path / 'a.pt'}"],
            "is a checkpoint of train.py")


@pytest.mark.parametrize("main, flag, part, words", [
    *((main, flag, part, "missing or damaged") for main, flag in ((train.main, "resume_checkpoint"),
                                                                  (generate.main, "checkpoint_path"))
      for part in ("model", "config")),
    # A model of rules has no tokenizer: the file is whole, and there is still nothing to write text with.
    (generate.main, "checkpoint_path", "tokenizer", "holds no tokenizer: give a model of text")],
    ids=["train-model", "train-config", "generate-model", "generate-config", "generate-tokenizer"])
def test_a_checkpoint_without_a_part_is_refused(trained, tmp_path, refused, main, flag, part, words):
    checkpoint = load_checkpoint(trained)
    del checkpoint[part]
    save_checkpoint(tmp_path / "part.pt", checkpoint)
    refused(main, [f"--{flag}={tmp_path / 'part.pt'}", *(["--max_iter=9"] if main is train.main else [])],
            "part.pt", words)


@pytest.mark.parametrize("damage", {
    "no step": lambda t: t.pop("step"), "negative step": lambda t: t.update(step=-3),
    "text step": lambda t: t.update(step="3"),
    "no scaler": lambda t: t.pop("scaler"), "no flag": lambda t: t["settings"].pop("grad_clip"),
    "text batch_size": lambda t: t["settings"].update(batch_size="x"),
    "batch_size 0": lambda t: t["settings"].update(batch_size=0), "another seed": lambda t: t["loader"].update(seed=5),
    "text position": lambda t: t["loader"].update(blocks_seen="x"), "no guard": lambda t: t.pop("guard"),
    "short guard": lambda t: t.update(guard=torch.zeros(2)), "no generator": lambda t: t["rng"].pop("torch"),
    "no optimizer": lambda t: t["optimizer"].pop("muon"), "no moments": lambda t: t["optimizer"]["adamw"]["state"].pop(0),
    "momentum of another shape": lambda t: t["optimizer"]["muon"]["state"][0].update(momentum=torch.zeros(3)),
    "moment of another shape": lambda t: t["optimizer"]["adamw"]["state"][0].update(exp_avg=torch.zeros(3)),
}.items(), ids=lambda item: item[0])
def test_a_damaged_training_state_is_refused(trained, tmp_path, refused, damage):
    checkpoint = copy.deepcopy(load_checkpoint(trained))
    damage[1](checkpoint["training"])
    save_checkpoint(tmp_path / "part.pt", checkpoint)
    refused(train.main, [f"--resume_checkpoint={tmp_path / 'part.pt'}", "--max_iter=9"], "part.pt: ")


def test_other_training_data_is_refused(trained, tmp_path, refused, data_path):
    before, other = trained.read_bytes(), shutil.copytree(data_path, tmp_path / "other")
    manifest = (other / "manifest.json").read_text()
    checksum = re.search('"sha256": "(.*?)"', manifest[manifest.index('"train"'):]).group(1)
    (other / "manifest.json").write_text(manifest.replace(checksum, "0" * 64))
    refused(train.main, ["--resume_checkpoint", f"--checkpoint_path={trained}", "--max_iter=9", f"--data_path={other}"],
            "--data_path", "what the checkpoint was trained on")
    assert trained.read_bytes() == before
