"""Fuzzed: checkpoints, metrics.jsonl, finished cells, plans and flags, as a crash, another program or a hostile one may
leave them."""
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from fuzzing import FUZZ, damaged_bytes, damaged_json, ends_well, fuzz, json_values
from hypothesis import strategies as st

import chat
import compare
import download_data
import evaluate
import export
import finetune
import generate
import probes
import tokenizer
import train
from experiments.runner import JobResult, TrainingJob
from runtime.checkpoint import load_checkpoint, run_folder, save_checkpoint
from runtime.config import BadInput, declared_flags
from runtime.metrics import read_rows

# A resumed run of one more step, whatever a damaged checkpoint says of its length.
ONE_STEP = ["--max_iter=4", "--batch_size=4", "--num_batch_accum=1", "--val_iter=1", "--val_intervals=1",
            "--compile_model=0", "--dataloader_num_workers=0", "--sample_tokens=0", "--verbose=0"]


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the checkpoint of a finished run, with its folder."""
    shutil.copytree(trained.parent, tmp_path / "run")
    return tmp_path / "run" / trained.name


# -- checkpoints ------------------------------------------------------------------------------------------------------

def check_resuming(run: Path, data_path: Path):
    """A run that is refused leaves its files as they were, metrics.jsonl too."""
    rows = (run_folder(run) / "metrics.jsonl").read_bytes()
    content = run.read_bytes()
    code = ends_well(train.main, [f"--checkpoint_path={run}", "--resume_checkpoint", f"--data_path={data_path}", *ONE_STEP])
    if code == 2:
        assert run.read_bytes() == content and (run_folder(run) / "metrics.jsonl").read_bytes() == rows


@FUZZ
def test_damaged_checkpoints_are_refused_or_hold_what_was_written(n, run, tmp_path):
    """By whatever reads them."""
    original = load_checkpoint(run)
    path = tmp_path / "a.pt"

    def check(data):
        path.write_bytes(data)
        try:
            loaded = load_checkpoint(path)
        except BadInput:
            assert ends_well(generate.main, [f"--checkpoint_path={path}", "--max_new_tokens=1"], keep=[path]) == 2
        else:
            assert all(torch.equal(loaded["model"][name], weight) for name, weight in original["model"].items())
            assert loaded["training"]["settings"] == original["training"]["settings"]
    fuzz(n, check, data=damaged_bytes(run.read_bytes()))


def plain_values(checkpoint: dict) -> dict:
    """What a checkpoint holds besides tensors, as JSON."""
    training = checkpoint["training"]
    names = [name for name, value in training.items() if isinstance(value, (str, int, float, type(None)))]
    return {"config": checkpoint["config"], "settings": training["settings"], "loader": training["loader"],
            "tokenizer": checkpoint["tokenizer"], "values": {name: training[name] for name in names}}


def with_plain_values(checkpoint: dict, values) -> dict:
    """The checkpoint with `values`, see plain_values, some of which may be anything."""
    if not isinstance(values, dict):
        return checkpoint | {"training": values}
    own = {name: value for name, value in values.items() if name in ("config", "tokenizer")}
    training = checkpoint["training"] | {name: value for name, value in values.items() if name in ("settings", "loader")}
    counters = values.get("values")
    return checkpoint | own | {"training": training | counters if isinstance(counters, dict) else counters}


@FUZZ
def test_checkpoints_with_wrong_values_end_in_one_line(n, run, data_path):
    checkpoint, content = load_checkpoint(run), run.read_bytes()
    rows_path = run_folder(run) / "metrics.jsonl"
    rows = rows_path.read_bytes()

    def check(values):
        save_checkpoint(run, with_plain_values(checkpoint, values))
        check_resuming(run, data_path)
        save_checkpoint(run, with_plain_values(checkpoint, values))
        ends_well(generate.main, [f"--checkpoint_path={run}", "--max_new_tokens=1"], keep=[run])
        run.write_bytes(content)
        rows_path.write_bytes(rows)
    fuzz(n, check, values=damaged_json(plain_values(checkpoint)))


@FUZZ
def test_checkpoints_with_wrong_tensors_end_in_one_line(n, run, data_path):
    checkpoint, content = load_checkpoint(run), run.read_bytes()
    rows = (run_folder(run) / "metrics.jsonl").read_bytes()
    tensors = list(tensor_places(checkpoint))
    odd = [None, 0, "x", [], {}, torch.zeros(()), torch.zeros(0), torch.zeros(3), torch.full((2, 2), math.nan),
           torch.zeros(2, 3, dtype=torch.int64), torch.zeros(5, dtype=torch.bool), torch.zeros(1).expand(2**20, 2**20)]

    def check(place, i):
        holder, key = tensors[place % len(tensors)]
        before, holder[key] = holder[key], odd[i]
        torch.save(checkpoint, run)
        holder[key] = before
        ends_well(generate.main, [f"--checkpoint_path={run}", "--max_new_tokens=1"], keep=[run])
        check_resuming(run, data_path)
        run.write_bytes(content)
        (run_folder(run) / "metrics.jsonl").write_bytes(rows)
    fuzz(n, check, place=st.integers(0, 1000), i=st.sampled_from(range(len(odd))))


def tensor_places(container):
    """(container, key) of every tensor in nested dicts and lists."""
    for key, value in container.items() if isinstance(container, dict) else enumerate(container):
        if isinstance(value, torch.Tensor):
            yield container, key
        elif isinstance(value, (dict, list)):
            yield from tensor_places(value)


# -- metrics ----------------------------------------------------------------------------------------------------------

def lines_of(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@FUZZ
def test_damaged_metrics_are_read_as_far_as_they_are_numbers(n, run, tmp_path):
    path, rows = tmp_path / "metrics.jsonl", read_rows(run_folder(run) / "metrics.jsonl")

    def check(rows, data):
        for content in (lines_of(rows if isinstance(rows, list) else [rows]).encode(), data):
            path.write_bytes(content)
            found = read_rows(path)
            assert [row["step"] for row in found] == sorted({row["step"] for row in found})
            assert all(type(value) in (int, float) and math.isfinite(value) for row in found for value in row.values())
    fuzz(n, check, rows=damaged_json(rows), data=damaged_bytes(lines_of(rows).encode()))


@FUZZ
def test_runs_with_damaged_metrics_are_drawn_and_go_on(n, run, data_path, tmp_path):
    rows_path, content = run_folder(run) / "metrics.jsonl", run.read_bytes()
    rows = read_rows(rows_path)

    def check(rows):
        rows_path.write_text(lines_of(rows if isinstance(rows, list) else [rows]))
        assert ends_well(train.main, [f"--plot={run}"], keep=[rows_path]) in (0, 2)
        check_resuming(run, data_path)
        run.write_bytes(content)
    fuzz(max(5, n // 8), check, rows=damaged_json(rows))


# -- finished cells, and plans ----------------------------------------------------------------------------------------

@FUZZ
def test_a_finished_run_of_a_comparison_is_used_as_it_was_or_not_at_all(n, tmp_path):
    job = TrainingJob(Path("train.py"), tmp_path / "a.pt", ("--seed=1",))
    rows = [{"step": step, "tokens": 8 * step, "seconds": 1.0 * step, "flops": step, "val_loss": 5.0 - step, "val_bpb": 1.5,
             "tok_per_sec": 9.0} for step in (1, 2)]

    def finish() -> str:
        job.folder.mkdir(exist_ok=True)
        (job.folder / "metrics.jsonl").write_text(lines_of(rows))
        assert job.complete(JobResult("finished")) == job.previous_result() == JobResult("finished")
        return (job.folder / "result.json").read_text()
    saved = json.loads(finish())

    def check(result, changed_rows):
        finish()
        (job.folder / "result.json").write_text(json.dumps(result))
        assert (found := job.previous_result()) is None or found.status in ("finished", "diverged")
        finish()
        text = lines_of(changed_rows if isinstance(changed_rows, list) else [])
        (job.folder / "metrics.jsonl").write_text(text)
        assert (job.previous_result() is None) == (text != lines_of(rows))
    fuzz(n, check, result=damaged_json(saved), changed_rows=damaged_json(rows))


@FUZZ
def test_a_damaged_cell_of_probes_is_trained_again(n, tmp_path):
    common = probes.CellConfig()
    cell, = probes.build_cells(probes.ProbeConfig(tasks=("parity",), rates=(1.0,)), common, seed=0)
    row = probes.empty_row(cell) | {"status": "unsolved", "parameters": 100, "state_bytes": 10, "seconds": 1.0} | {
        f"accuracy_{scale}x": 0.5 for scale in probes.SCALES}
    path = tmp_path / "row.json"
    probes.write_cell_row(path, row)
    assert probes.read_cell_row(path, cell) == row
    saved = json.loads(path.read_text())

    def check(changed):
        path.write_text(json.dumps(changed))
        assert probes.read_cell_row(path, cell) in (row, None)
        if isinstance(changed, dict):  # of a version without a checksum
            path.write_text(json.dumps({name: value for name, value in changed.items() if name != "checksum"}))
            assert (found := probes.read_cell_row(path, cell)) is None or probes.is_finished_row(found, cell)
    fuzz(n, check, changed=st.one_of(damaged_json(saved), json_values()))


@FUZZ
def test_a_damaged_plan_is_refused_or_written_again(n, tmp_path):
    plan = {"arms": ["mlp=gelu", "mlp=relu2"], "budget": "tokens=1e7", "data": "0123", "flags of train.py": {"n_layer": 2}}

    def check(changed):
        (tmp_path / "plan.json").write_text(json.dumps(changed))
        try:
            compare.save_plan(tmp_path, plan, overwrite=False, what="a comparison")
            assert json.loads((tmp_path / "plan.json").read_text()) == plan
        except BadInput as error:
            assert "holds a comparison that differs in" in str(error)
    fuzz(n, check, changed=damaged_json(plan))


# -- flags ------------------------------------------------------------------------------------------------------------

# Each command, the dataclasses of its flags, and flags at the end that let nothing long begin.
COMMANDS = {
    train.main: (train.PRETRAINING.classes, ["--data_path=none"]),
    finetune.main: (finetune.FINETUNING.classes, ["--checkpoint_path=none.pt", "--out_path=b.pt"]),
    compare.main: ((compare.CompareConfig, *train.PRETRAINING.classes), ["--script=train", "--data_path=none"]),
    probes.main: ((probes.ProbeConfig, probes.CellConfig), ["--arms=mlp=none"]),
    generate.main: ((generate.GenerateConfig,), ["--checkpoint_path=none.pt"]),
    chat.main: ((chat.ChatConfig,), ["--checkpoint_path=none.pt"]),
    evaluate.main: ((evaluate.EvaluateConfig,), ["--checkpoint_path=none.pt"]),
    export.main: ((export.ExportConfig,), ["--checkpoint_path=none.pt", "--import_path=./none"]),
    tokenizer.main: ((tokenizer.TokenizerConfig,), ["--dataset=./none.txt"]),
    download_data.main: ((download_data.PrepareConfig,), ["--dataset=./none.txt"])}
ODD_VALUES = ["", "--", "-", "=3", "-1", "0", "1e400", "nan", "-inf", "1.5", "١٢", "1_0", "auto", "None", "a\0b", "\udcff",
              "x" * 300, "x/" * 2000, "9" * 5000, "~nosuchuser/x", "/dev/zero", ".", "..", "/", "$\\foo$", "a\nb",
              "%s %(x)s", "{}", ",", "=", "a=b,c", "mlp=", "tokens=٣"]


@pytest.mark.parametrize("main", COMMANDS, ids=lambda main: main.__module__)
@FUZZ
def test_odd_command_lines_end_in_one_line(n, main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", None)
    classes, last = COMMANDS[main]
    names = [name for name in declared_flags(*classes) if name not in ("verbose",)]
    value = st.one_of(st.sampled_from(ODD_VALUES), st.text(max_size=8), st.integers().map(str))
    pair = st.tuples(st.sampled_from([*names, "", "sise", "x\0", "é"]), value)
    shape = st.sampled_from(["--{0}={1}", "--{0} {1}", "--{0}", "-{0}", "{1}", "--{0}=={1}"])
    argument = st.tuples(shape, pair).map(lambda drawn: drawn[0].format(*drawn[1]))

    def check(argv):
        assert ends_well(main, [*(arg for text in argv for arg in text.split(" ", 1)), *last]) in (1, 2)
    fuzz(n, check, argv=st.lists(argument, max_size=4))
