"""The statistics of comparisons, on made-up runs whose numbers can be worked out by hand."""
import dataclasses
import math
from pathlib import Path

import pytest

from experiments.analysis import (
    BPB,
    Arm,
    ArmResults,
    Cell,
    CellResult,
    add_significance,
    best_vocabulary,
    by_vocabulary,
    describe_best,
    fit_scaling,
    short_verdict,
    table_rows,
    verdict,
)
from experiments.comparison import make_columns, short_table, size_section, table_of_columns
from experiments.runner import TrainingJob


def format_row(row: dict) -> dict[str, str]:
    """The cells of a row of the table, by the first words of their columns."""
    return {column.head.split(" (")[0]: column.cell(row) for column in make_columns(BPB)}


def make_rows(*results: ArmResults) -> list[dict]:
    return add_significance(table_rows(list(results)))


def make_results(name: str, bpb: list[float | None], grid_bpb: float = 2.0, speed: float = 1000.0) -> ArmResults:
    """An arm whose runs of 10,000 tokens ended with these bits per byte (None: diverged), its grid run on a quarter of the
    budget with `grid_bpb`."""
    arm = Arm(name, "", {}, tuple(range(1, len(bpb) + 1)), 100, (4, 25), 0.02, 1000, 600, 40)
    return ArmResults(arm, grid=[make_result(arm, "lr_grid", 1, 0.25, grid_bpb, speed)],
                      runs=[make_result(arm, "run", i + 1, 1.0, value, speed) for i, value in enumerate(bpb)],
                      speeds=[make_result(arm, "speed", 0, 0.0, 1.0, speed)])


def make_result(arm: Arm, stage: str, seed: int, budget_frac: float, bpb: float | None, speed: float = 1000.0,
                lr_multiple: float = 1.0) -> CellResult:
    cell = Cell(arm, stage, lr_multiple, seed, budget_frac, TrainingJob(Path("train.py"), Path("none.pt"), ()))
    if bpb is None:
        return CellResult(cell, "diverged", "loss is nan at step 7: lower --learning_rate", [])
    rows = [{"step": step, "tokens": step * 100 * budget_frac, "seconds": 1.0, "val_loss": 2 * bpb, "val_bpb": bpb,
             "tok_per_sec": speed, "peak_memory": 2**20, "flops": 1} for step in (50, 100)]
    return CellResult(cell, "finished", "", rows)


# -- table and verdicts -----------------------------------------------------------------------------------------------

def test_table_by_hand():
    """The first arm gains 0.4 bits by four times the budget; the second is 0.1 better, and half as fast."""
    first, second = make_rows(make_results("a", [1.60, 1.62, 1.61], grid_bpb=2.0),
                              make_results("b", [1.50, 1.522, 1.508], grid_bpb=1.9, speed=500.0))
    assert first["bpb"] == pytest.approx(1.61) and first["bpb_margin"] == pytest.approx(4.303 * 0.01 / 3**0.5, rel=1e-3)
    assert second["difference"] == pytest.approx(-0.1) and second["difference_margin"] < 0.02
    assert second["significance"] == "corrected" and second["p"] == second["p_holm"] < 0.01
    assert second["steps_equivalent"] == pytest.approx(4 ** (0.1 / 0.4) - 1)
    assert second["steps_equivalent_low"] < second["steps_equivalent"] < second["steps_equivalent_high"]
    assert (first["seconds"], second["seconds"]) == (10, 20)
    # b loses log_4(2) = half of the 0.4 that it gains by four times the budget
    assert second["bpb_equal_seconds"] == pytest.approx(1.51 + 0.2) and first["bpb_equal_seconds"] == first["bpb"]
    assert verdict(second, first).startswith("b: better than a by 0.1000 bits/byte (95 % interval -0.1")
    assert "; equivalent to +41% (+3" in verdict(second, first) and "steps of a." in verdict(second, first)


def test_no_arm_gets_better_than_measured_at_equal_seconds():
    """The second arm is twice as fast: the first one is scored as of half its time."""
    first, second = make_rows(make_results("a", [1.61], grid_bpb=2.01), make_results("b", [1.51], speed=2000.0))
    assert second["bpb_equal_seconds"] == second["bpb"] and first["bpb_equal_seconds"] == pytest.approx(1.61 + 0.2)
    first, _ = make_rows(make_results("a", [1.61]), make_results("b", [1.51], speed=8000.0))
    assert "bpb_equal_seconds" not in first  # a part of the budget shorter than was measured


def test_seconds_budget_uses_the_runs_own_speed():
    results = make_results("a", [1.6], speed=500.0)
    assert results.speed() == 500
    assert dataclasses.replace(results, timed_budget=True).speed() == 10_000 / 1.0


def test_insignificant_difference_is_not_called_better_or_worse():
    first, second = make_rows(make_results("a", [1.60, 1.62, 1.61]), make_results("b", [1.58, 1.63, 1.60]))
    assert second["significance"] == "none"
    assert verdict(second, first).startswith("b: no significant difference from a (95 % interval -0.0")
    assert not any(word in verdict(second, first) for word in ("better", "worse", "equivalent"))


def test_one_of_many_that_is_significant_only_by_itself():
    base, noise = [1.60, 1.62, 1.61], [[1.58, 1.63, 1.60], [1.64, 1.60, 1.62], [1.61, 1.60, 1.63]]
    first, lucky, *_ = make_rows(make_results("a", base), make_results("b", [1.59, 1.604, 1.602]),
                                 *(make_results(str(i), bpb) for i, bpb in enumerate(noise)))
    assert lucky["p"] < 0.05 < lucky["p_holm"] and lucky["significance"] == "uncorrected"
    assert format_row(lucky)["significant"] == "only by itself" and short_verdict(lucky) == "significant only by itself"
    assert "if it were the only comparison" in verdict(lucky, first)
    assert "is not as one of 4 (p = 0.1" in verdict(lucky, first) and "better" not in verdict(lucky, first)


def test_steps_equivalent_is_never_extrapolated():
    """Differences of a thousand times what a larger budget gains, up and down."""
    _, better, worse = make_rows(make_results("a", [1.60, 1.61], grid_bpb=1.6001), make_results("b", [1.50, 1.511]),
                                 make_results("c", [1.70, 1.711]))
    assert better["steps_equivalent"] == pytest.approx(3) and worse["steps_equivalent"] == pytest.approx(-0.75)
    assert "-75% (-75% to -75%)" in format_row(worse)["steps equivalent, relative to the first arm"]


def test_larger_budget_that_is_worse_gives_no_equivalents():
    first, other = make_rows(make_results("a", [1.60, 1.61], grid_bpb=1.5),
                             make_results("b", [1.50, 1.511], grid_bpb=1.4, speed=500.0))
    assert "steps_equivalent" not in other and "bpb_equal_seconds" not in other
    assert verdict(other, first).endswith("2 seeds).")


def test_diverged_runs_are_reported_and_not_averaged():
    a, b, c = make_results("a", [1.60, 1.62, 1.61]), make_results("b", [1.50, None, 1.51]), make_results("c", [None] * 3)
    first, some, none = make_rows(a, b, c)
    assert (some["runs"], some["runs_wanted"], some["pairs"]) == (2, 3, 2)
    assert some["bpb"] == pytest.approx(1.505) and some["difference"] == pytest.approx(-0.1)  # of the seeds both have
    assert none["runs"] == 0 and "bpb" not in none
    assert verdict(none, first) == "c: no comparable run finished."
    assert verdict(some, first).endswith("b finished only 2 of 3 runs; how the others would have ended is unknown.")
    assert list(b.problems()) == ["b, learning rate x 1, seed 2: diverged: loss is nan at step 7: lower --learning_rate"]
    assert format_row(none)["arm"] == "c" and format_row(none)["runs finished"] == "0 of 3"
    assert short_verdict(none) == "no comparable run finished"


def test_one_seed_shows_nothing():
    first, second = make_rows(make_results("a", [1.6]), make_results("b", [1.2]))
    assert second["significance"] == "none" and second["difference_margin"] == math.inf
    assert verdict(second, first) == "b: -0.4000 bits/byte against a with one seed, which shows nothing."


def test_cells_of_the_table():
    row, = make_rows(make_results("a", [1.6, 1.7]))
    shown = format_row(row)
    assert shown["bits/byte"].startswith("1.6500 ± ") and shown["parameters"] == "1,000"
    assert shown["tokens/s"] == "1,000" and shown["peak memory, MiB"] == "1"
    assert shown["MFLOP/token, matrix products"] == "0.00" and shown["runs finished"] == "2 of 2"


def test_table_has_the_columns_in_which_arms_differ():
    table, same = table_of_columns(make_rows(make_results("a", [1.6, 1.7]), make_results("b", [1.6, 1.8], speed=500.0)))
    assert [head.split(" (")[0] for head in table.head] == [
        "arm", "bits/byte", "difference from the first arm", "p", "significant",
        "steps equivalent, relative to the first arm", "bits/byte at equal seconds", "tokens/s", "seconds"]
    assert "parameters 1,000" in same and "runs finished 2 of 2" in same and not any("bytes" in text for text in same)
    assert all(len(row) == len(table.head) for row in table.rows)


def test_terminal_shows_arm_result_difference_and_verdict():
    results = [make_results("a", [1.6, 1.7]), make_results("x" * 200, [1.5, 1.601]), make_results("c", [None] * 2)]
    lines = short_table(results, make_rows(*results))
    assert lines[0].split() == ["arm", "bits/byte", "difference", "verdict"] and all(len(line) <= 80 for line in lines[:4])
    assert lines[1].startswith("a   ") and lines[2].startswith("xxxx") and "… " in lines[2]
    assert lines[2].endswith("better") and "-0.0995 ± 0.006" in lines[2] and "no comparable run finished" in lines[3]
    assert lines[4] == "left out: c, learning rate x 1, seed 1: diverged: loss is nan at step 7: lower --learning_rate"


def test_best_arm_and_those_that_may_be_as_good():
    a, b, c = (make_results(name, bpb) for name, bpb in (
        ("a", [1.6, 1.61, 1.62]), ("b", [1.602, 1.605, 1.63]), ("c", [1.9, 1.91, 1.93])))
    assert "Lowest mean: a; not shown to be worse than it: b (paired by seed, p corrected for 2" in describe_best([b, a, c])
    assert "Lowest mean: a; all others are worse" in describe_best([a, c, make_results("d", [1.8, 1.815, 1.82])])
    assert describe_best([a, c]) == "" and describe_best([make_results(name, [1.6]) for name in "abc"]) == ""


# -- vocabularies -----------------------------------------------------------------------------------------------------

def make_vocabulary(vocab_size: int, bpb: list[float | None], name: str = "vocab_size={}", size: str = "") -> ArmResults:
    """Of arms whose bytes per token are vocab_size / 1000."""
    results = make_results(name.format(vocab_size), bpb)
    results.arm = dataclasses.replace(results.arm, size=size, vocab_size=vocab_size, bytes_per_token=vocab_size / 1000,
                                      vocabulary=str(vocab_size), embedding_parameters=vocab_size // 10)
    return results


def test_columns_of_different_vocabularies():
    first, second = make_rows(make_vocabulary(2000, [1.6, 1.7]), make_vocabulary(4000, [1.5, 1.65]))
    table, _ = table_of_columns([first, second])
    shown = dict(zip((head.split(" (")[0] for head in table.head), zip(*table.rows)))
    assert shown["vocabulary"] == ("2,000", "4,000") and shown["bytes per token"] == ("2.000", "4.000")
    assert shown["tokens per byte"] == ("0.5000", "0.2500") and shown["bytes per context"] == ("50", "100")
    assert shown["bytes/s"] == ("2,000", "4,000") and shown["embedding's share of parameters"] == ("20.0%", "40.0%")
    assert (second["bytes_per_sec"], second["tokens_per_byte"]) == (4000, 0.25)  # for the CSV
    assert {row["bytes"] for rows in make_vocabulary(2000, [1.6]).curves() for row in rows} == {10_000, 20_000}


def test_arms_that_differ_in_vocab_size_alone_are_a_series():
    arms = [make_vocabulary(n, [1.6], name, size) for size in ("n_layer=2", "n_layer=4") for n, name in (
        (4000, "vocab_size={},mlp=relu2"), (1000, "vocab_size={}"), (2000, "vocab_size={}"), (4000, "vocab_size={}"),
        (8000, "mlp=gelu, vocab_size={}"))]
    arms += [make_vocabulary(8000, [None], size="n_layer=2"), make_results("mlp=gelu", [1.6])]
    assert {name: [results.arm.vocab_size for results in found] for name, found in by_vocabulary(arms).items()} == {
        "n_layer=2": [1000, 2000, 4000], "n_layer=4": [1000, 2000, 4000]}


def test_optimum_of_the_vocabulary():
    """Bits per byte are a parabola in log(vocab_size), around a minimum that differs from seed to seed."""
    def arms(*minima, sizes=(1000, 2000, 4000, 8000)):
        return [make_vocabulary(n, [1.5 + 0.1 * math.log(n / minimum) ** 2 for minimum in minima]) for n in sizes]
    assert best_vocabulary(arms(3000, 3000)) == "optimum at about 3,000 tokens (95 % interval 3,000 to 3,000, 2 seeds)."
    assert "about 3,000 tokens (95 % interval 1,723 to 5,222, 3 seeds)" in best_vocabulary(arms(2400, 3000, 3750))
    assert best_vocabulary(arms(100, 100)) == "lowest at the smallest vocabulary, 1,000: the optimum may lie beyond."
    assert "lowest at the largest vocabulary, 8,000" in best_vocabulary(arms(9e4, 9e4))
    assert "too few runs" in best_vocabulary(arms(3000)) and "too noisy" in best_vocabulary(arms(3000, 3000, 1e4))


@pytest.mark.parametrize("n_bytes, is_said", [(5000, False), (4000, True), (None, True)])
def test_validation_on_different_text_is_said(n_bytes, is_said):
    results = [make_results("a", [1.5]), make_results("b", [1.6])]
    for arm_results, n in zip(results, (5000, n_bytes)):
        arm_results.runs[0].rows[-1].update({"val_bytes": n} if n else {})
    parts = size_section(results, table_rows(results), "conditions")
    assert any("Not validated on the same text" in str(part) for part in parts) == is_said


def test_scaling_fit_through_two_sizes():
    small, large = make_results("a", [2.0]), make_results("a", [1.0])
    small.arm, large.arm = (dataclasses.replace(small.arm, size=size, flops_per_token=n) for size, n in (
        ("s", 60), ("l", 9960)))
    (points, a, b), = fit_scaling([[small], [large]]).values()
    assert [x for x, _ in points] == [1e6, 1e8] and a * 1e6**-b == pytest.approx(2) and a * 1e8**-b == pytest.approx(1)


def test_no_scaling_fit_at_equal_flops():
    """As with a budget in FLOPs."""
    small = make_results("a", [2.0])
    assert not fit_scaling([[small], [small]])


# -- the search for the learning rate ---------------------------------------------------------------------------------

@pytest.mark.parametrize("grid, whole, tried", [
    ({0.5: 2.0, 1: 1.9, 2: 1.8}, {2: 1.6, 1: 1.7}, [2, 1]),
    ({2: 1.8, 0.5: 2.0, 1: 1.9}, {2: 1.6, 1: 1.5, 0.5: 1.4}, [2, 1, 0.5]),
    ({1: 1.7, 2: 1.8, 0.5: 1.9}, {1: 1.6, 0.5: 1.7}, [1, 0.5]),
    ({0.5: 1.7, 1: 1.8}, {0.5: 1.6}, [0.5]),
    ({1: 1.9, 2: 1.8}, {2: None, 1: None}, [2, 1]),
    ({1: 1.9, 2: None}, {1: 1.6}, [1]), ({1: None, 2: None}, {}, [])])
def test_learning_rate_falls_while_the_whole_budget_improves(grid, whole, tried):
    """grid, whole: multiple -> bits per byte on a part and on all of the budget; None: diverged."""
    arm = make_results("a", []).arm
    results = ArmResults(arm, grid=[make_result(arm, "lr_grid", 1, 0.25, bpb, lr_multiple=m) for m, bpb in grid.items()])
    found = []
    while (multiple := results.next_lr_multiple()) and len(found) < 9:
        found.append(multiple)
        results.full_budget_lr_runs.append(make_result(arm, "run", 1, 1.0, whole[multiple], lr_multiple=multiple))
    assert found == tried


def test_learning_rate_search_ends_at_once_when_the_grid_had_the_whole_budget():
    arm = make_results("a", []).arm
    grid = [make_result(arm, "lr_grid", 1, 1.0, bpb, lr_multiple=m) for m, bpb in ((1, 1.9), (2, 1.8))]
    results = ArmResults(arm, grid=grid)
    assert results.next_lr_multiple() == 2
    results.full_budget_lr_runs = [make_result(arm, "run", 1, 1.0, 1.8, lr_multiple=2)]
    assert results.next_lr_multiple() is None and results.best().cell.lr_multiple == 2


@pytest.mark.parametrize("stage", ["grid", "full_budget_lr_runs"])
def test_failed_run_holds_up_the_search(stage):
    """Unlike a diverged one: run again, it may be the best."""
    arm = make_results("a", []).arm
    results = make_results("a", [])
    results.grid.append(make_result(arm, "lr_grid", 1, 0.25, None, lr_multiple=2))
    if stage == "full_budget_lr_runs":
        results.full_budget_lr_runs = [make_result(arm, "run", 1, 1.0, 1.9)]
    assert results.best() is getattr(results, stage)[0]
    getattr(results, stage).append(dataclasses.replace(results.grid[0], status="failed", rows=[]))
    assert results.best() is None and results.next_lr_multiple() is None


def test_best_rate_at_the_edge_of_the_grid_is_marked():
    results = make_results("a", [1.6])
    results.grid = [make_result(results.arm, "lr_grid", 1, 0.25, bpb, lr_multiple=m) for m, bpb in (
        (0.5, 2.0), (1.0, 1.9), (2.0, 1.8))]
    assert results.at_grid_edge() and results.best().cell.lr_multiple == 2.0
    assert "(edge)" in format_row(make_rows(results)[0])["learning rate"]
    results.grid[1] = make_result(results.arm, "lr_grid", 1, 0.25, 1.7, lr_multiple=1.0)
    assert not results.at_grid_edge()
    one_rate, = make_rows(make_results("a", [1.6]))
    assert (one_rate["at_grid_edge"], one_rate["n_rates"]) == (True, 1)
    assert "(only one tried)" in format_row(one_rate)["learning rate"]
