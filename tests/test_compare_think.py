"""compare.py --script=think: arms that think, the part of the curriculum that a run has, what accuracy costs each arm."""
import csv
import dataclasses
import math
import re

import pytest
from test_analysis import make_result, make_results
from test_compare_selfplay import runs  # noqa: F401 (a fixture)
from test_report import parse_page

import compare
import trainer
from compare import CompareConfig, RunEnvironment, build_arms, load_problems, make_cell
from conftest import run_rows
from experiments.analysis import WRONG_ANSWERS, ArmResults, thought_rows
from experiments.budget_plots import draw_budgets
from experiments.comparison import make_notes, short_thoughts, thought_section
from runtime.config import BadInput
from think import ThinkConfig, byte_tokenizer, typical_batch

SUMS = {"task": "addition", "size": 3}
ENVIRONMENT = RunEnvironment(load_problems(SUMS), "cpu, fp32", "a machine", "0123")
TINY = ["--script=think", "--task=addition", "--size=2", "--n_layer=1", "--n_head=2", "--head_size=8", "--batch_size=4",
        "--eval_questions=2", "--warmup_iter=1", "--device=cpu", "--threads=0"]


def think_arms(*arms: str, common: dict = SUMS, **flags) -> list:
    return build_arms(CompareConfig(script="think", arms=arms, budget="problems=64_000", **flags), common,
                      load_problems(common))


# -- arms and cells ---------------------------------------------------------------------------------------------------

def test_arms_think_with_the_parameters_of_the_first():
    arms = think_arms("loops=1", "loops=4", "loops=2,sampled_loops=1", "mixer=gated_delta", "mlp=grkan", "thoughts=0")
    assert {arm.vocab_size for arm in arms} == {byte_tokenizer().vocab_size}
    for arm in arms:
        assert abs(arm.n_parameters - arms[0].n_parameters) <= 0.01 * arms[0].n_parameters, arm.name
        assert arm.metric == WRONG_ANSWERS and arm.base_lr == 0.02 and arm.batch_shape == arms[0].batch_shape
    assert arms[1].n_parameters == arms[0].n_parameters and arms[1].flops_per_token > 1.5 * arms[0].flops_per_token
    assert {name: arms[0].flags[name] for name in ("n_layer", "n_head", "head_size")} == {
        "n_layer": 4, "n_head": 4, "head_size": 16}
    assert arms[0].step_tokens == typical_batch(ThinkConfig(**SUMS))[0].numel()


@pytest.mark.parametrize("budget, given, steps, curriculum", [
    ("problems=64_000", {}, 1000, 500), ("problems=64_000", {"curriculum_iter": 100}, 1000, 100),
    ("problems=64_000", {"num_batch_accum": 2}, 500, 250), ("problems=64_000", {"curriculum_iter": 0}, 1000, 0)])
def test_every_run_has_all_of_the_curriculum(budget, given, steps, curriculum):
    config = CompareConfig(script="think", budget=budget)
    arm, *_ = think_arms("loops=2", "loops=3", common=SUMS | given)
    for stage, part in (("run", 1), ("lr_grid", 0.25)):
        cell = make_cell(arm, config, ENVIRONMENT, stage, 2.0, 3)
        assert cell.limit == ("step", steps * part)
        assert {f"--max_iter={steps * part:.0f}", f"--curriculum_iter={curriculum * part:.0f}", "--learning_rate=0.04",
                "--seed=3", "--task=addition", "--size=3", "--loops=2"} <= {*cell.job.flags}
        assert cell.job.outcome == ("exact_match",) and cell.job.script.name == "think.py"


@pytest.mark.parametrize("unit", ["tokens", "flops"])
def test_the_curriculum_fits_budgets_in_tokens_and_flops(unit):
    """50 steps of the first arm; more FLOPs per token leave fewer steps."""
    arms = think_arms("loops=1", "loops=4")
    per_step = arms[0].step_tokens * (1 if unit == "tokens" else
                                      arms[0].flops_per_token + arms[0].elementwise_flops_per_token)
    curriculum = []
    for arm in arms:
        flags = " ".join(make_cell(arm, CompareConfig(script="think", budget=f"{unit}={50 * per_step}"), ENVIRONMENT, "run",
                                   1.0, 1).job.flags)
        n_steps = int(re.search(r"--max_tokens=(\d+)", flags)[1]) / arm.step_tokens
        curriculum.append(int(re.search(r"--curriculum_iter=(\d+)", flags)[1]))
        assert curriculum[-1] == pytest.approx(n_steps / 2, abs=1)
    assert curriculum[0] == 25 and (curriculum[1] == 25) == (unit == "tokens")


def test_a_speed_run_is_of_typical_batches():
    arm, *_ = think_arms("loops=1", "loops=2")
    flags = make_cell(arm, CompareConfig(script="think", budget="problems=6400"), ENVIRONMENT, "speed", 1.0, 0).job.flags
    assert {"--curriculum_iter=0", "--eval_questions=1", "--log_intervals=1", "--max_iter=15"} <= {*flags}


def test_cells_of_another_task_or_size_are_others():
    names = set()
    for common in (SUMS, {"task": "addition"}, {"task": "multiplication"}):
        arm, *_ = think_arms("loops=1", "loops=2", common=common)
        config = CompareConfig(script="think", budget="problems=64_000")
        names.add(make_cell(arm, config, ENVIRONMENT, "run", 1.0, 1).job.checkpoint.name)
    assert len(names) == 3
    assert load_problems({"task": "addition"}).description == "problems of addition with up to 12 digits"


# -- what is said -----------------------------------------------------------------------------------------------------

def make_thinking(name: str, right: list[dict]) -> ArmResults:
    """An arm whose runs ended with these fractions of right answers: thought -> fraction."""
    results = make_results(name, [1.0] * len(right))
    results.arm = dataclasses.replace(results.arm, metric=WRONG_ANSWERS)
    row = lambda own: {"exact_match": next(iter(own.values()))} | {
        name: value for level, accuracy in own.items() for name, value in (
            (f"exact_match/{level}", accuracy), (f"tokens/{level}", 8.0), (f"flops/{level}", 2e6))}
    results.runs = [dataclasses.replace(make_result(results.arm, "run", seed, 1.0, 1.0), rows=[row(own)])
                    for seed, own in enumerate(right, 1)]
    return results


def test_rows_of_thoughts_by_hand():
    first = make_thinking("a", [{"every 1": 1.0, "at once": 0.25}, {"every 1": 0.5, "at once": 0.25}])
    second = make_thinking("b", [{"every 1": 0.5, "at once": 0.5}, {"every 1": 0.25, "at once": 0.25}])
    control = make_thinking("c", [{"at once": 0.5}, {"at once": 0.5}])
    rows = thought_rows([first, second, control])
    assert [(row["arm"], row["thought"], row["accuracy"], row.get("difference")) for row in rows] == [
        ("a", "every 1", 0.75, None), ("a", "at once", 0.25, None), ("b", "every 1", 0.375, -0.375),
        ("b", "at once", 0.375, 0.125), ("c", "at once", 0.5, 0.25)]
    assert rows[2]["difference_margin"] == pytest.approx(12.706 * 0.125, rel=1e-3)  # t of 1 degree of freedom
    assert {(row["tokens"], row["flops"], row["runs"]) for row in rows} == {(8.0, 2e6, 2)}
    lines = short_thoughts(rows)
    assert lines[0].split() == ["right", "answers,", "%", "every", "1", "at", "once"]
    assert lines[3].startswith("c ") and lines[3].split()[1:] == ["50.0", "±", "0.0"] and max(map(len, lines)) <= 80
    heading, note, table, figure = thought_section(rows)
    assert table.rows[3] == ("b", "at once", "37.5% ± 158.8%", "+12.5% ± 158.8%", "8.0", "2.00")
    assert figure.name == "thoughts" and len(figure.panels) == 2
    assert "Accuracy against FLOPs" in figure.panels[1] and ">b<" in figure.panels[0]
    assert "fraction of held-out problems" in make_notes(WRONG_ANSWERS, False, True)[1]


def test_one_seed_and_no_finished_run_have_no_interval():
    one, none = make_thinking("a", [{"at once": 0.5}]), make_thinking("b", [])
    row, = thought_rows([one, none])
    assert math.isinf(row["accuracy_margin"]) and "±" not in str(thought_section([row])[2])
    assert len(draw_budgets([row | {"way": "a"}])) == 2
    assert thought_rows([none, one])[0].keys() == row.keys()  # without a difference
    assert thought_rows([none]) == [] == short_thoughts([]) == thought_section([])


# -- whole comparisons ------------------------------------------------------------------------------------------------

@pytest.mark.integration
def test_command_compares_thinkers(runs, tmp_path, capsys):  # noqa: F811
    """Two arms end to end; the tables hold what their runs logged, and nothing is run twice."""
    flags = [*TINY, "--arms", "loops=1", "loops=3,sampled_loops=1", "--budget=problems=32", "--seeds=2", "--rates=2",
             f"--out_path={tmp_path / 'out'}"]
    compare.main(flags)
    out, folder = capsys.readouterr().out, tmp_path / "out"
    with open(folder / "comparison.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    with open(folder / "thoughts.csv", encoding="utf-8") as file:
        thoughts = list(csv.DictReader(file))
    assert len(thoughts) == 2 * 5 and "bpb" not in table[0] and table[0]["parameters"] == table[1]["parameters"]
    for row in thoughts:
        stem = row["arm"].replace(",", "_")
        ends = [run_rows(path.with_suffix(".pt"))[-1] for path in folder.glob(f"runs/{stem}-run-2-*")]
        assert len(ends) == 2 and {end["step"] for end in ends} == {8}
        for name, key in (("accuracy", "exact_match"), ("tokens", "tokens"), ("flops", "flops")):
            assert float(row[name]) == pytest.approx(sum(end[f"{key}/{row['thought']}"] for end in ends) / 2)
    costs = {(row["arm"], row["thought"]): float(row["flops"]) / float(row["tokens"]) for row in thoughts}
    assert costs["loops=3,sampled_loops=1", "every 1"] > costs["loops=1", "every 1"]
    page, text = parse_page(folder / "comparison.html").text, (folder / "comparison.md").read_text(encoding="utf-8")
    for shown in (page, text):
        assert "problems of addition with up to 2 digits; budget problems=32" in shown and "seeds, not the choice" in shown
        assert "What accuracy costs at inference" in shown and "tokens generated" in shown
        assert not [word for word in ("byte", "bits", "bpb") if word in shown.lower()]
    assert (folder / "thoughts.svg").exists() and "right answers, %" in out and not list(folder.glob("runs/*.pt"))
    before = list(runs.started)
    compare.main(flags)
    assert runs.started == before and len(before) == len({*before})


def test_dry_run_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare.subprocess, "run", lambda *args, **kwargs: None)
    monkeypatch.setattr(trainer, "MAX_TIMING_SECONDS", 0.0)
    compare.main([*TINY, "--arms", "loops=1", "loops=2,sampled_loops=1", "--budget=problems=64", "--seeds=2", "--dry_run",
                  f"--out_path={tmp_path / 'out'}"])
    head, *rows, time, memory = capsys.readouterr().out.splitlines()
    assert head.split() == ["arm", "parameters", "memory", "tokens/s", "runs", "time"]
    assert len(rows) == 2 and time.startswith("time    about") and not list(tmp_path.iterdir())


def test_as_many_problems_as_think_py_has_by_default():
    config, common = compare.read_command_line(["--script=think", "--task=addition", "--mlp=gelu"])
    assert config.budget == "problems=192000" and common == {"task": "addition", "mlp": "gelu"}


@pytest.mark.parametrize("flags, words", [
    (["--arms", "loops=1", "loops=2", "--budget=seconds=9"], ["no budget in seconds", "problems=N, tokens=N or flops=N"]),
    (["--arms", "loops=1", "size=4"], ["size is not part of an architecture or recipe"]),
    (["--arms", "loops=1", "batch_size=8"], ["other data"]),
    (["--arms", "loops=1", "sampled_loops=1"], ["--sampled_loops", "give 2 or more"]),
    (["--task=juggling"], ["--task=juggling: choose one of permutations, addition"]),
    (["--size=200"], ["--size=200", "at most"]),
    (["--block_size=9"], ["--block_size=9: problems of --size=2 take up to", "give more"]),
    (["--budget=problems=8"], ["0.25 of it gives a run of 'mlp=gelu' 2 problems, less than a step of 4"])])
def test_bad_input_is_one_line(refused, tmp_path, flags, words):
    refused(compare.main, [*TINY, *flags, f"--out_path={tmp_path / 'out'}"], *words)
    assert not (tmp_path / "out").exists()


def test_a_task_is_needed(refused):
    refused(compare.main, ["--script=think"], "--task: say what all arms learn: permutations, addition")


def test_problems_are_no_budget_of_text():
    with pytest.raises(BadInput, match="runs of train.py have no budget in problems: give tokens=N"):
        CompareConfig(budget="problems=64")
