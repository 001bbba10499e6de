"""Comparisons over several budgets, what it takes to reach a loss and IsoFLOP grids, and on repeated text. By hand, and as a
command whose train.py pretends."""
import csv
import dataclasses
import json
import math

import pytest
from test_report import parse_page

import compare
from conftest import REPO
from experiments.analysis import Arm, ArmResults, Cell, CellResult
from experiments.epochs import describe_cost, epoch_rows, epochs_section
from experiments.isoflop import describe_multiplier, find_optima, isoflop_section, multiplier_rows, optimum_rows
from experiments.runner import TrainingJob
from experiments.to_loss import (
    Target,
    add_significance,
    describe,
    ladders,
    needed,
    run_to_target,
    seed_rows,
    short_table,
    summary_rows,
    tokens_to_target,
)

TARGET = Target("to_loss", 3.0)


def make_run(arm: Arm, stage: str, seed: int, tokens: float, loss: float | None, speed: float = 1000.0) -> CellResult:
    """A run that ended with this loss in nats/token, half of it in bits/byte. None: it diverged."""
    cell = Cell(arm, stage, 1.0, seed, 1.0, TrainingJob(REPO / "train.py", REPO / "none.pt", ()))
    rows = [{"step": step, "tokens": tokens * step / 100, "seconds": 1.0, "val_loss": loss, "val_bpb": loss and loss / 2,
             "tok_per_sec": speed, "flops": 1, "peak_memory": 1} for step in (50, 100)]
    return CellResult(cell, "diverged", "loss is nan", []) if loss is None else CellResult(cell, "finished", "", rows)


def make_arm(name: str, n_seeds: int = 3, size: str = "", **more) -> Arm:
    return Arm(name, size, {}, tuple(range(1, n_seeds + 1)), 100, (4, 25), 0.02, 1000, 600, 40, bytes_per_token=4.0, **more)


# -- to a target ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("losses, expected", [
    ((6.0, 4.0, 2.0, 1.0), ("reached", 2e6 * 2**0.415037)),  # 2e6 -> 4 and 4e6 -> 2 are on 8e6 / tokens, but 1e6 is not
    ((4.0, 3.0, 2.5, 2.0), ("reached", 2e6)), ((4.0, 3.5, 3.2, 3.1), ("not reached", 8e6)),
    ((2.9, 2.0, 1.9, 1.8), ("within", 1e6)), ((4.0, 2.0, 3.5, 1.0), ("reached", 1e6 * 4 / 3)),
    ((), ("not reached", math.nan))])
def test_tokens_to_a_target_by_hand(losses, expected):
    status, tokens = tokens_to_target([(1e6 * 2**i, loss) for i, loss in enumerate(losses)], 3.0)
    assert status == expected[0] and tokens == pytest.approx(expected[1], rel=1e-5, nan_ok=True)


def make_ladder(name: str, efficiency: float, scales: list[float | None],
                speeds: tuple[float, ...] = (1000.0, 1000.0)) -> list[ArmResults]:
    """Runs on 10,000 to 80,000 tokens, whose losses fall as the root of efficiency * tokens. scales: of the seeds' losses.
    speeds: of the rounds of timing."""
    ladder = []
    for n in (1e4, 2e4, 4e4, 8e4):
        arm = make_arm(name, len(scales), budget=("tokens", n))
        loss = lambda scale, n=n: scale and scale * 3.0 * (efficiency * n / 3e4) ** -0.5
        ladder.append(ArmResults(arm, runs=[make_run(arm, "run", i + 1, n, loss(scale)) for i, scale in enumerate(scales)],
                                 speeds=[make_run(arm, "speed", i, n, 1.0, speed) for i, speed in enumerate(speeds)]
                                 if n == 8e4 else []))
    return ladder


def make_rows(*by_arm: list[ArmResults]) -> list[dict]:
    return add_significance(summary_rows(list(by_arm), [seed_rows(ladder, TARGET) for ladder in by_arm]))


def test_an_arm_that_needs_fewer_tokens_but_more_seconds():
    """A quarter more from each token, at half the speed: 0.8 times the tokens, 1.6 times the seconds."""
    scales = [1.0, 1.1, 1 / 1.1]
    first, second = make_rows(make_ladder("a", 1.0, scales), make_ladder("b", 1.25, scales, (500.0, 500.0)))
    assert first["tokens"] == pytest.approx(3e4) and first["seconds"] == pytest.approx(30)
    assert first["bytes"] == pytest.approx(12e4) and first["flops"] == pytest.approx(3e4 * 640)
    deviation = 2 * math.log(1.1)  # of the logarithms of tokens over seeds, as tokens are as the scale squared
    assert first["tokens_high"] == pytest.approx(3e4 * math.exp(4.3027 * deviation / 3**0.5), rel=1e-4)
    assert second["tokens_ratio"] == pytest.approx(0.8) and second["tokens_ratio_high"] == pytest.approx(0.8)
    assert second["seconds_ratio"] == pytest.approx(1.6) and second["flops_ratio"] == pytest.approx(0.8)
    assert second["comparisons"] == 2 and second["tokens_p_holm"] < 0.001
    sentence = describe(second, first)
    assert sentence.startswith("b: 0.024 (")
    assert "; 0.800 (0.800 to 0.800) times the tokens of a (fewer, p = 0.000)" in sentence
    assert "1.600 (1.600 to 1.600) times the seconds of a (more" in sentence
    assert [line.split()[0] for line in short_table([first, second])[:3]] == ["arm", "a", "b"]


def test_the_interval_of_seconds_covers_the_rounds_of_timing():
    """Tokens are equal for all seeds; b takes 1.1 and 1.3 times as long in the two rounds, in which both differ by far."""
    slower = [math.log(1.1), math.log(1.3)]
    _, second = make_rows(make_ladder("a", 1.0, [1.0, 1.1], (1000.0, 200.0)),
                          make_ladder("b", 1.0, [1.0, 1.1], (1000 / 1.1, 200 / 1.3)))
    assert second["seconds_ratio"] == pytest.approx(math.exp(sum(slower) / 2)) and second["tokens_p"] == 1
    assert second["seconds_ratio_high"] == pytest.approx(math.exp(sum(slower) / 2 + 12.706 * (slower[1] - slower[0]) / 2),
                                                         rel=1e-3)
    assert "(no significant difference, p = 0.5" in describe(second, second | {"arm": "a"})


def test_ratios_are_paired_and_may_show_nothing():
    """Between seeds tokens differ by 20 %, within pairs by a third of that, in either direction."""
    first, second = make_rows(make_ladder("a", 1.0, [1.0, 1.1, 1 / 1.1]), make_ladder("b", 1.0, [1.01, 1.09, 1 / 1.1]))
    logs = [2 * math.log(1.01), 2 * math.log(1.09 / 1.1), 0.0]
    assert second["tokens_ratio"] == pytest.approx(math.exp(sum(logs) / 3))
    assert second["tokens_ratio_low"] < 1 < second["tokens_ratio_high"] < first["tokens_high"] / first["tokens"]
    assert "no significant difference" in describe(second, first)


def test_an_arm_of_which_a_seed_misses_the_target_has_no_mean():
    first, misses, early, diverged = make_rows(make_ladder("a", 1.0, [1.0, 1.1]), make_ladder("b", 0.4, [1.0, 1.3]),
                                               make_ladder("c", 2.9, [1.0, 0.7]), make_ladder("d", 1.0, [None, None]))
    assert not any("tokens" in row or "tokens_ratio" in row for row in (misses, early, diverged))
    assert describe(misses, first) == "b: 1 of 2 seeds did not reach it in 0.08 M tokens, the most tried."
    assert describe(early, first) == ("c: 1 of 2 seeds reached it within 0.01 M tokens, the least tried: give fewer "
                                      "--most_tokens.")
    assert describe(diverged, first) == "d: no run has finished."
    _, other = make_rows(make_ladder("b", 0.4, [1.0, 1.3]), make_ladder("a", 1.0, [1.0, 1.1]))
    assert "tokens" in other and "tokens_ratio" not in other


class FakeRunner:
    """Gives the arms runs of a ladder, and remembers which were asked for."""

    def __init__(self, known: list[list[ArmResults]]):
        self.known = {(own.arm.name, own.arm.budget): own.runs for ladder in known for own in ladder}
        self.tuned, self.timed = [], []

    def tune(self, selected, rates):
        self.tuned += [(results.arm.name, results.arm.budget[1], len(results.grid)) for results in selected]
        for results in selected:
            results.full_budget_lr_runs = self.known[results.arm.name, results.arm.budget][:1]

    def run_seeds(self, selected):
        for results in selected:
            results.runs = self.known[results.arm.name, results.arm.budget]

    def measure_speed(self, selected, n_rounds):
        self.timed += [(results.arm.name, results.arm.budget[1]) for results in selected]


def test_an_arm_climbs_until_all_its_seeds_reach_the_target():
    """b reaches it on 20,000 tokens, a with one seed on 40,000 and with both on 80,000; each budget knows the rates that the
    smaller ones tried."""
    known = [make_ladder("a", 1.0, [1.0, 1.3]), make_ladder("b", 1.6, [1.0, 1.0])]
    results = [ArmResults(own.arm) for pair in zip(*known) for own in pair]
    assert len(needed(results, TARGET)) == 8
    runner = FakeRunner(known)
    run_to_target(results, TARGET, runner, (1.0,), 3)
    assert runner.tuned == [("a", 1e4, 0), ("b", 1e4, 0), ("a", 2e4, 1), ("b", 2e4, 1), ("a", 4e4, 2), ("a", 8e4, 3)]
    assert runner.timed == [("a", 8e4), ("b", 2e4)] and len(needed(results, TARGET)) == 6
    assert [len(ladder) for ladder in ladders(results)] == [4, 4]


# -- IsoFLOP grids ----------------------------------------------------------------------------------------------------

BUDGETS = 1e12, 4e12, 16e12


def make_grid(name: str, compute: float, scales: list[float | None], exponent: float = 0.1, best: float = 2000.0,
              sizes=(500, 1000, 2000, 4000, 8000)) -> list[ArmResults]:
    """Bits per byte are a parabola in log(parameters), whose minimum is 2 (compute * FLOPs / 1e12)^-exponent, at `best`
    times the root of FLOPs / 1e12. scales: of the seeds' minima."""
    results = []
    for size, flops in ((size, flops) for size in sizes for flops in BUDGETS):
        arm = dataclasses.replace(make_arm(name, len(scales), f"n={size}", budget=("flops", flops)), n_parameters=size)
        away = math.log(size / best / (flops / 1e12) ** 0.5)
        lowest = 2 * (compute * flops / 1e12) ** -exponent
        results.append(ArmResults(arm, runs=[make_run(arm, "run", i, 1e4, scale and 2 * (scale * lowest + 0.05 * away**2))
                                             for i, scale in enumerate(scales)]))
    return results


def test_optima_and_multiplier_by_hand():
    """The first arm needs 1.5 times the FLOPs of the second at every loss."""
    scales = [1.0, 1.01, 0.99]
    optima = find_optima(make_grid("a", 1.0, scales) + make_grid("b", 1.5, scales))
    rows = optimum_rows(optima)
    assert [(row["arm"], row["flops"]) for row in rows] == [(name, flops) for name in "ab" for flops in BUDGETS]
    for row, compute in zip(rows, [1, 4, 16, 1, 4, 16]):
        if row["seeds"]:
            assert row["parameters"] == pytest.approx(2000 * compute**0.5) and row["parameters_low"] <= row["parameters"]
            assert row["bpb"] == pytest.approx(2 * (compute * (1.5 if row["arm"] == "b" else 1)) ** -0.1)
    assert [row["seeds"] for row in rows] == [3, 3, 0] * 2  # the best for the largest budget is the largest size
    assert rows[2]["problem"] == "lowest at the largest size, 8,000 parameters: it may lie beyond"
    row, = multiplier_rows(optima, "a")
    assert row["multiplier"] == pytest.approx(1.5) and row["multiplier_high"] == pytest.approx(1.5)
    # a's line has 2 to 2 * 4^-0.1, b's starts 1.5^-0.1 lower: the middle of what both have
    assert row["loss"] == pytest.approx(2 * (4 * 1.5) ** -0.05, rel=1e-4)
    assert row["flops"] == pytest.approx(1e12 * 6**0.5, rel=1e-3)
    sentence = describe_multiplier(row, "a")
    assert sentence.startswith("b: multiplier of compute 1.500 (95 % interval 1.500 to 1.500, 3 seeds, p = 0.000)")
    assert sentence.endswith("bits/byte, which take a 2.45e+12 FLOPs: better.")


def test_multiplier_is_paired_by_seed_and_has_an_interval():
    """A loss that is 1 % lower is worth 1.01^10 of the FLOPs: logarithms of 0.05, 0.15 and 0.25 of them."""
    scales = [math.exp(-0.005), math.exp(-0.015), math.exp(-0.025)]
    first, second = (make_grid(name, 1.0, own, best=1000.0) for name, own in (("a", [1.0] * 3), ("b", scales)))
    row, = multiplier_rows(find_optima(first + second), "a")
    assert row["multiplier"] == pytest.approx(math.exp(0.15), rel=1e-6)
    assert row["multiplier_low"] == pytest.approx(math.exp(0.15 - 4.3027 * 0.1 / 3**0.5), rel=1e-4)
    assert "not shown to differ from 1" in describe_multiplier(row, "a")


@pytest.mark.parametrize("second, words", [
    ({"compute": 1.0, "scales": [0.5, 0.51]}, "no loss that both it and the first arm reach"),
    ({"compute": 1.0, "scales": [1.0, 1.0], "best": 9e4}, "needs optima for two budgets"),
    ({"compute": 1.0, "scales": [1.0, 1.0], "exponent": -0.1}, "needs optima"),
    ({"compute": 1.0, "scales": [None, None]}, "")])
def test_what_has_no_multiplier_says_so(second, words):
    optima = find_optima(make_grid("a", 1.0, [1.0, 1.01]) + make_grid("b", **second))
    parts, tables, sentences = isoflop_section(optima, "a")
    if words:
        sentence, = sentences
        assert words in sentence and "multiplier" not in tables["multipliers"][0] and "problem" in tables["isoflop"][0]
    else:
        assert not sentences and len(tables["isoflop"]) == 3  # of the first arm
    assert parts[0][1].startswith("IsoFLOP")


# -- repeated text ----------------------------------------------------------------------------------------------------

def make_repeated(name: str, bpb: dict[float, list[float | None]]) -> list[ArmResults]:
    """bpb: epochs -> bits per byte of each seed."""
    return [ArmResults(arm, runs=[make_run(arm, "run", i, 1e4, value and 2 * value) for i, value in enumerate(values)])
            for epochs, values in bpb.items() for arm in [make_arm(name, len(values), epochs=epochs)]]


def test_cost_of_repetition_by_hand():
    """4 epochs cost the first arm 0.10 and 0.12, the second 0.05 and 0.06, which is 0.05 and 0.06 less."""
    rows = epoch_rows(make_repeated("a", {1: [1.5, 1.6], 4: [1.6, 1.72]})
                      + make_repeated("b", {1: [1.4, 1.5], 4: [1.45, 1.56]}))
    assert [(row["arm"], row["epochs"]) for row in rows] == [("a", 1), ("a", 4), ("b", 1), ("b", 4)]
    first, second = rows[1], rows[3]
    assert (first["cost"], second["cost"], second["more"]) == pytest.approx((0.11, 0.055, -0.055))
    assert first["cost_margin"] == pytest.approx(12.706 * 0.01, rel=1e-3) and "more" not in first
    assert second["more_margin"] == pytest.approx(12.706 * 0.005, rel=1e-3) and second["p"] == second["p_holm"] > 0.05
    assert describe_cost(first, "a", 1) == "a: 4 epochs cost +0.1100 ± 0.1271 bits/byte against 1."
    assert "-0.0550 ± 0.0635 more than a (not shown to differ, p = 0.0" in describe_cost(second, "a", 1)


def test_repeated_text_where_runs_are_missing():
    results = make_repeated("a", {1: [1.5, 1.6], 4: [None, None]}) + make_repeated("b", {1: [1.5, None], 4: [1.6, 1.7]})
    parts, tables, sentences = epochs_section(results)
    assert sentences == ["a: 4 epochs: no comparable run finished.", "b: 4 epochs cost +0.1000 bits/byte against 1."]
    assert tables["epochs"][3]["runs"] == 2 and parts[0] == ("h2", "Repeated text")


# -- the command ------------------------------------------------------------------------------------------------------

# Losses in nats/token fall with the fourth root of tokens, and relu2 needs half of gelu's.
FAKE_TRAIN = """
import json, sys
from pathlib import Path
flags = dict(flag.lstrip("-").split("=", 1) if "=" in flag else (flag.lstrip("-"), "1") for flag in sys.argv[1:])
path = Path(flags["checkpoint_path"]); folder = path.with_suffix(""); folder.mkdir(parents=True, exist_ok=True)
with open(Path(__file__).with_name("log"), "a") as log:
    log.write(path.stem + chr(10))
tokens = int(flags.get("max_tokens", 15 * 512))
gain = 2 if flags["mlp"] == "relu2" else 1
loss = 3 * (gain * tokens / 1e5) ** -0.25 * (1 + 0.02 * int(flags["seed"]))
if "train_tokens" in flags:
    loss += 0.1 * gain * (int(flags.get("max_tokens", 1)) / int(flags["train_tokens"])) ** 0.5
if "flops" in path.stem:  # the best head_size is 16
    flops = float(path.stem.split("flops=")[1].split("-")[0].replace("_", "+"))
    loss = 4 * (gain * flops / 1e12) ** -0.1 + 0.01 * int(flags["seed"]) + 0.1 * abs(int(flags["head_size"]) - 16) / 8
rows = [{"step": n, "tokens": tokens * n // 30, "seconds": n / 10, "flops": n, "val_loss": loss, "val_bpb": loss / 2,
         "tok_per_sec": 1000.0 / gain, "peak_memory": 2**28} for n in (10, 20, 30)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
path.write_text("checkpoint")
"""


@pytest.fixture
def fake_train(tmp_path, monkeypatch):
    """compare.py runs FAKE_TRAIN instead of train.py. fake_train() lists what has run since it was last called."""
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "train.py").write_text(FAKE_TRAIN)
    log = folder / "log"
    log.write_text("")
    monkeypatch.setattr(compare, "REPO", folder)

    def read_log() -> list[str]:
        names = log.read_text().split("\n")[:-1]
        log.write_text("")
        return names
    return read_log


@pytest.fixture
def flags(data_path, tmp_path):
    return [f"--data_path={data_path}", f"--out_path={tmp_path / 'out'}", "--arms", "mlp=gelu", "mlp=relu2", "--seeds=2",
            "--device=cpu", "--dtype=fp32", "--n_layer=2", "--n_head=4", "--head_size=32", "--block_size=64",
            "--batch_size=8", "--num_batch_accum=1", "--jobs=2", "--rates", "1"]


def read_csv(folder, name: str) -> list[dict]:
    with open(folder / f"{name}.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.integration
def test_command_finds_what_a_target_takes(fake_train, flags, tmp_path, capsys):
    """With 75,000 to 2,400,000 tokens: all seeds of gelu end below 2.4 nats/token with 300,000, of relu2 with half."""
    flags, folder = [*flags, "--budget=to_loss=2.4", "--most_tokens=2.4e6"], tmp_path / "out"
    compare.main(flags)
    out, ran = capsys.readouterr().out, fake_train()
    n_runs = lambda arm, stage: sum(name.startswith(arm) and f"-{stage}-" in name for name in ran)
    assert [n_runs(f"mlp={arm}", "run") for arm in ("gelu", "relu2")] == [2 * 3, 2 * 2]
    assert [n_runs(f"mlp={arm}", "lr_grid") for arm in ("gelu", "relu2")] == [1, 1] and n_runs("mlp", "speed") == 2 * 3
    first, second = read_csv(folder, "comparison")
    seeds = [1e5 * (3 * (1 + 0.02 * seed) / 2.4) ** 4 for seed in (1, 2)]
    assert float(first["tokens"]) == pytest.approx(math.prod(seeds) ** 0.5, rel=1e-4)
    assert float(second["tokens_ratio"]) == pytest.approx(0.5, rel=1e-4)
    assert float(second["seconds_ratio"]) == pytest.approx(1.0, rel=1e-4)
    assert [float(row["tokens"]) for row in read_csv(folder, "seeds")[:2]] == pytest.approx(seeds, rel=1e-4)
    text, page = (folder / "comparison.md").read_text(encoding="utf-8"), parse_page(folder / "comparison.html").text
    assert "What it takes to reach 2.4 nats/token" in text and "0.500 (0.500 to 0.500) times the tokens of mlp=gelu" in page
    assert (folder / "to_target.svg").stat().st_size > 5000 and out.splitlines()[-5].split()[0] == "mlp=gelu"
    compare.main(flags)
    assert not fake_train()
    compare.main([*flags, "--most_tokens=4.8e6"])  # the budgets stay, but for one more
    assert len([name for name in fake_train() if "-run-" in name]) == 0


@pytest.mark.integration
def test_dry_run_of_a_target_counts_every_budget(fake_train, flags, tmp_path, capsys):
    """A run on the part of the smallest, and two of each; speed once for each arm."""
    compare.main([*flags, "--budget=to_bpb=1.2", "--most_tokens=2.4e6", "--dry_run"])
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()[1:-2]]
    assert [row[1] for row in rows] == [f"tokens={n}" for n in ("75000", "150000", "300000", "600000", "1.2e+06", "2.4e+06")
                                        for _ in range(2)]
    assert [row[-3] for row in rows] == ["3"] * 2 + ["2"] * 10 and "26 processes included" in out and "at most" in out
    assert "and of 6 that measure speed" in out and not fake_train() and not (tmp_path / "out").exists()


@pytest.mark.integration
def test_command_with_an_isoflop_grid(fake_train, flags, tmp_path, capsys, monkeypatch):
    """Three sizes, two budgets: relu2 is worth twice the FLOPs. Speed is that of a size, not of a budget."""
    monkeypatch.setattr(compare, "SPEED_ROUNDS", 1)
    flags += ["--budget=flops=1e12,4e12", "--sizes", "head_size=8", "head_size=16", "head_size=24"]
    folder = tmp_path / "out"
    compare.main(flags)
    captured, ran = capsys.readouterr(), fake_train()
    assert sum("-run-" in name for name in ran) == 2 * 3 * 2 * 2 and sum("-speed-" in name for name in ran) == 3 * 2
    row, = read_csv(folder, "multipliers")
    assert float(row["multiplier"]) == pytest.approx(2, rel=0.02) and row["pairs"] == "2"
    assert [row["seeds"] for row in read_csv(folder, "isoflop")] == ["2"] * 4
    assert {row["budget"] for row in read_csv(folder, "comparison")} == {"1000000000000.0", "4000000000000.0"}
    assert "mlp=relu2: multiplier of compute 2.0" in captured.out
    text = (folder / "comparison.md").read_text(encoding="utf-8")
    assert text.index("IsoFLOP") < text.index("## head_size=8 flops=1e+12") and "Loss against FLOPs" not in text
    assert "multiplier of compute" in parse_page(folder / "comparison.html").text
    assert (folder / "isoflop.svg").stat().st_size > 5000
    compare.main(flags)
    assert not fake_train()


@pytest.mark.integration
def test_command_on_repeated_text(fake_train, flags, tmp_path, capsys):
    """The budget of 30,720 tokens on 480 and 120 blocks of text, for the runs on a part of it too."""
    flags, folder = [*flags, "--budget=tokens=30720", "--epochs", "4", "1"], tmp_path / "out"
    compare.main(flags)
    captured, ran = capsys.readouterr(), fake_train()
    results = [json.loads(path.read_text()) for path in folder.glob("runs/*/result.json")]
    texts = [(flag("max_tokens", result), flag("train_tokens", result)) for result in results if flag("max_tokens", result)]
    assert sorted(set(texts)) == [(7680, 7681), (7680, 30721), (30720, 7681), (30720, 30721)] and len(texts) == 2 * 2 * 3
    assert sum("-speed-" in name for name in ran) == 2 * 3
    rows = read_csv(folder, "epochs")
    assert [(row["arm"], row["epochs"]) for row in rows] == [
        (arm, n) for arm in ("mlp=gelu", "mlp=relu2") for n in ("1.0", "4.0")]
    assert [float(rows[1]["cost"]), float(rows[3]["more"])] == pytest.approx([0.05, 0.05], rel=1e-3)
    assert "mlp=relu2: 4 epochs cost +0.1000" in captured.out and (folder / "epochs.svg").stat().st_size > 5000
    text = (folder / "comparison.md").read_text(encoding="utf-8")
    assert "4 epochs of a part of it" in text and "## epochs=4" in text
    compare.main(flags)
    assert not fake_train()


def flag(name: str, result: dict) -> int | None:
    """Its value among the flags of a run."""
    return next((int(text.split("=")[1]) for text in result["flags"] if text.startswith(f"--{name}=")), None)


@pytest.mark.integration
@pytest.mark.parametrize("more, words", [
    (["--epochs", "1", "2", "--budget=seconds=9"], "--epochs 1 2: are of one --budget tokens=N"),
    (["--epochs", "1", "2", "--budget=tokens=1e6"], "training tokens in"), (["--epochs", "0.5"], "at least 1"),
    (["--epochs", "1", "1"], "has a duplicate"), (["--epochs", "2", "--budget=to_loss=3"], "--epochs 2: are of one"),
    (["--budget=flops=1e12,2e12"], "three or more --sizes"), (["--budget=tokens=1e6,2e6"], "for IsoFLOP grids of train.py"),
    (["--budget=flops=1e12,2e12,x"], "give tokens=N"),
    (["--lengths", "32", "64", "--epochs", "2"], "--lengths 32 64: needs one budget"),
    (["--most_tokens=1e6"], "--most_tokens=1e+06: has a meaning with --budget to_loss=X"),
    (["--budget=to_loss=2", "--screen"], "--screen: has one budget for all runs"),
    (["--budget=to_loss=0"], "give tokens=N"), (["--budget=to_loss=2", "--most_tokens=9000"], "gives the shortest run"),
    (["--budget=to_loss=2", "--arms", "mlp=gelu", "vocab_size=300"], "give --budget to_bpb=X"),
    (["--script=think", "--task=permutations", "--budget=to_loss=2"], "have no budget in to_loss")])
def test_bad_targets_are_refused_in_a_line(fake_train, refused, flags, tmp_path, more, words):
    given = [flag for flag in flags if more[0] != "--script=think" or "data_path" not in flag and "block_size" not in flag]
    refused(compare.main, [*given, *more], words)
    assert not fake_train() and not (tmp_path / "out").exists()
