"""Comparisons: arms, matching, statistics on runs that are made up, and the command with a train.py that only pretends."""
import csv
import dataclasses
import html.parser
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import compare
import train
from compare import CompareConfig, Place, arms_of, cell_of, matched, read_arm
from conftest import REPO, TINY_MODEL, rows_of
from experiments.analysis import Arm, ArmResults, Cell, Result, corrected, scaling, table_rows, verdict
from experiments.report import shown
from experiments.runner import Run, reason_of
from layers import MLPS
from runtime.checkpoint import load_checkpoint
from runtime.config import BadInput
from shards import open_data

SHAPE = {"n_layer": 2, "n_head": 4, "head_size": 32, "block_size": 64, "batch_size": 8, "num_batch_accum": 1}


@pytest.fixture(scope="module")
def data(data_path):
    return open_data(data_path)


@pytest.fixture(scope="module")
def place(data):
    return Place(data, "cpu, fp32", "a machine", "0123")


# -- arms -------------------------------------------------------------------------------------------------------------

def test_an_arm_is_flags_of_train_py():
    assert read_arm("mlp=grkan, n_layer=4,bias", "--arms") == {"mlp": "grkan", "n_layer": 4, "bias": True}
    for text, words in (("mlp=no", "choose one of"), ("mpl=gelu", "did you mean --mlp"), ("n_layer", "give it a value"),
                        ("mixer=DDX", "a pattern"), ("seed=3", "seed is no part"), ("n_layer=0", "at least 1"),
                        ("", "no such")):
        with pytest.raises(BadInput, match=words) as error:
            read_arm(text, "--arms")
        assert str(error.value).startswith(f"--arms {text!r}")


ARMS = (*(f"mlp={mlp}" for mlp in MLPS), "linear=grkan", "mixer=DA", "mixer=gated_delta", "bias=1", "norm=layer",
        "linear=grkan,mlp=swiglu")


@pytest.mark.parametrize("shape", [SHAPE, SHAPE | {"n_head": 8, "head_size": 64, "n_layer": 6}])
def test_arms_have_the_parameters_of_the_first(data, shape):
    arms = arms_of(CompareConfig(arms=ARMS), shape, data)
    for arm in arms:
        assert abs(arm.n_parameters - arms[0].n_parameters) <= 0.01 * arms[0].n_parameters, arm.name
        assert arm.n_parameters == compare.model_of(arm.values, data.manifest.vocab_size).n_parameters()
    assert arms[0].values == shape | {"mlp": "relu2"}  # the first stays as it is


def test_a_hidden_layer_is_solved_for():
    """SwiGLU with three matrices has 3 * width * n_hidden parameters, ReLU² 2 * width * n_hidden."""
    target = compare.model_of(SHAPE | {"mlp": "relu2", "n_hidden": 480}, 512).n_parameters()
    assert matched(SHAPE | {"mlp": "swiglu"}, target, 512)["n_hidden"] == 320
    halved = compare.model_of(SHAPE | {"mlp": "relu2", "n_hidden": 256}, 512).n_parameters()
    assert matched(SHAPE | {"mlp": "relu2"}, halved, 512)["n_hidden"] == 256


def test_what_cannot_be_matched_is_refused(data):
    for arm, words in (("linear=chebkan", "change its shape"), ("n_hidden=32", "--match=none"), ("n_layer=9", "parameters")):
        with pytest.raises(BadInput, match=words):
            arms_of(CompareConfig(arms=("mlp=gelu", arm)), SHAPE, data)
        assert len(arms_of(CompareConfig(arms=("mlp=gelu", arm), match="none"), SHAPE, data)) == 2


def test_arms_that_would_see_other_data_are_refused(data):
    for arm in ("batch_size=4", "block_size=32", "preset=gpt2"):
        shape = {name: value for name, value in SHAPE.items() if arm != "preset=gpt2" or name != "batch_size"}
        with pytest.raises(BadInput, match="other data"):
            arms_of(CompareConfig(arms=("mlp=gelu", arm), match="none"), shape, data)
    assert len(arms_of(CompareConfig(arms=("mlp=gelu", "preset=gpt2"), match="none"), SHAPE, data)) == 2


def test_cells_of_a_seed_differ_in_nothing_but_the_arm(data, place):
    arms = arms_of(CompareConfig(), SHAPE, data)
    cells = [cell_of(arm, CompareConfig(), place, "run", 2.0, 3) for arm in arms]
    a, b = (set(cell.run.flags) for cell in cells)
    assert a ^ b == {"--mlp=gelu", "--mlp=relu2"} and {"--seed=3", "--max_tokens=10000000"} <= a
    assert cells[0].run.checkpoint != cells[1].run.checkpoint


def test_a_cell_is_another_where_its_numbers_would_be(data, place, tmp_path, monkeypatch):
    """Its name is not changed by how many seeds there are, how many run at a time, or how the data's folder is spelled."""
    arm, config = arms_of(CompareConfig(), SHAPE, data)[0], CompareConfig()

    def name(arm=arm, config=config, place=place, what="run"):
        return cell_of(arm, config, place, what, 1.0, 1).run.checkpoint.name
    assert name(config=CompareConfig(seeds=5, jobs=2)) == name()
    spelled = [dataclasses.replace(arm, values=arm.values | {"data_path": path}) for path in ("data", "/home/data")]
    assert name(arm=spelled[0]) == name(arm=spelled[1])
    for changed in ({"machine": "cpu, bf16"}, {"code": "4567"}):
        assert name(place=dataclasses.replace(place, **changed)) != name()
    elsewhere = dataclasses.replace(place, hardware="another")
    assert name(place=elsewhere) == name() and name(place=elsewhere, what="speed") != name(what="speed")
    shards = {"train": data.manifest.shards["train"], "val": data.manifest.shards["val"][:0]}
    other_text = dataclasses.replace(data, manifest=dataclasses.replace(data.manifest, shards=shards))
    assert name(place=dataclasses.replace(place, data=other_text)) != name()


def test_comments_are_no_part_of_the_code_that_numbers_come_from(tmp_path, monkeypatch):
    for name in ("train", "finetune", "model", "optimizer", "dataloader"):
        (tmp_path / f"{name}.py").write_text("x = 1\n")
    monkeypatch.setattr(compare, "REPO", tmp_path)
    before = compare.code_hash()
    (tmp_path / "model.py").write_text('"""What it is."""\nx = 1  # why\n')
    assert compare.code_hash() == before
    (tmp_path / "model.py").write_text("x = 2\n")
    assert compare.code_hash() != before


def test_budgets(data, place):
    gelu, deep = arms_of(CompareConfig(arms=("mlp=gelu", "n_layer=4"), match="none"), SHAPE, data)
    def flags(arm, budget, what="run"):
        return cell_of(arm, CompareConfig(budget=budget), place, what, 1.0, 1).run.flags
    assert "--max_seconds=7.5" in flags(gelu, "seconds=30", "rate")
    assert "--max_tokens=25000" in flags(gelu, "tokens=1e5", "rate")
    ends = [int(flag.split("=")[1]) for arm in (gelu, deep) for flag in flags(arm, "flops=1e12") if "max_tokens" in flag]
    for arm, tokens in zip((gelu, deep), ends):
        assert tokens * (arm.flops + arm.elementwise_flops) == pytest.approx(1e12, rel=1e-4)
    assert ends[0] > 1.3 * ends[1]
    with pytest.raises(BadInput, match="less than a step of 512"):
        flags(gelu, "tokens=2000", "rate")
    for budget in ("tokens", "steps=10", "tokens=-1", "tokens=nan", "flops=many"):
        with pytest.raises(BadInput, match=f"--budget={budget}: give tokens=N"):
            CompareConfig(budget=budget)


def test_null_has_other_seeds(data):
    first, again = arms_of(CompareConfig(arms=("mlp=gelu",), null=True, seeds=2), SHAPE, data)
    assert first.values == again.values and first.seeds == (1, 2) and again.seeds == (1001, 1002)
    assert [arm.name for arm in arms_of(CompareConfig(null=True), SHAPE, data)] == ["mlp=gelu", "mlp=gelu again"]


# -- what it says -----------------------------------------------------------------------------------------------------

def rows_of_arms(*outcomes: ArmResults) -> list[dict]:
    return corrected(table_rows(list(outcomes)))


def outcome_of(name: str, losses: list[float | None], grid: float = 2.0, speed: float = 1000.0) -> ArmResults:
    """An arm whose runs of 10,000 tokens ended at such bits per byte; None diverged. That on a quarter ended at `grid`."""
    arm = Arm(name, "", {}, tuple(range(1, len(losses) + 1)), 100, (4, 25), 0.02, 1000, 600, 40)

    def result(what: str, seed: int, share: float, bpb: float | None) -> Result:
        cell = Cell(arm, what, 1.0, seed, share, Run(Path("train.py"), Path("none.pt"), ()))
        if bpb is None:
            return Result(cell, "diverged", "loss is nan at step 7: lower --learning_rate", [])
        rows = [{"step": step, "tokens": step * 100 * share, "seconds": 1.0, "val_loss": 2 * bpb, "val_bpb": bpb,
                 "tok_per_sec": speed, "peak_memory": 2**20, "flops": 1} for step in (50, 100)]
        return Result(cell, "finished", "", rows)
    return ArmResults(arm, [result("rate", 1, 0.25, grid)], [result("run", i + 1, 1.0, bpb) for i, bpb in enumerate(losses)],
                   [result("speed", 0, 0.0, 1.0)])


def test_a_table_by_hand():
    """The first arm gains 0.4 bits by a budget of four times; the second is 0.1 better, and half as fast."""
    first, second = rows_of_arms(*[outcome_of("a", [1.60, 1.62, 1.61], grid=2.0),
                                outcome_of("b", [1.50, 1.522, 1.508], grid=1.9, speed=500.0)])
    assert first["bpb"] == pytest.approx(1.61) and first["bpb_margin"] == pytest.approx(4.303 * 0.01 / 3**0.5, rel=1e-3)
    assert second["difference"] == pytest.approx(-0.1) and second["difference_margin"] < 0.02
    assert second["significant"] == "yes" and second["p"] == second["p_holm"] < 0.01
    assert second["worth"] == pytest.approx(4 ** (0.1 / 0.4) - 1)
    assert (first["seconds"], second["seconds"]) == (10, 20)
    # b loses log_4(2) = half of the 0.4 that it gains by four times the budget
    assert second["bpb_equal_seconds"] == pytest.approx(1.51 + 0.2) and first["bpb_equal_seconds"] == first["bpb"]
    assert verdict(second, first).startswith("b: better than a by 0.1000 bits/byte (95 % interval -0.1")
    assert second["worth_low"] < second["worth"] < second["worth_high"]
    assert "; in steps of a that is +41% (+3" in verdict(second, first)


def test_what_is_not_significant_is_not_said():
    first, second = rows_of_arms(*[outcome_of("a", [1.60, 1.62, 1.61]), outcome_of("b", [1.58, 1.63, 1.60])])
    assert second["significant"] == "no"
    assert verdict(second, first).startswith("b: no difference to a is shown (95 % interval -0.0")
    assert not any(word in verdict(second, first) for word in ("better", "worse", "worth"))


def test_one_of_many_that_looks_good_by_itself():
    base, noise = [1.60, 1.62, 1.61], [[1.58, 1.63, 1.60], [1.64, 1.60, 1.62], [1.61, 1.60, 1.63]]
    first, lucky, *_ = rows_of_arms(*[outcome_of("a", base), outcome_of("b", [1.59, 1.604, 1.602]),
                                   *(outcome_of(str(i), losses) for i, losses in enumerate(noise))])
    assert lucky["p"] < 0.05 < lucky["p_holm"] and lucky["significant"] == "only by itself"
    assert "if it were the only comparison" in verdict(lucky, first)
    assert "but not as one of 4 (p = 0.1" in verdict(lucky, first) and "better" not in verdict(lucky, first)


def test_worth_ends_where_the_budgets_do():
    """Differences of a thousand times what a larger budget gains, up and down."""
    first, better, worse = rows_of_arms(outcome_of("a", [1.60, 1.61], grid=1.6001), outcome_of("b", [1.50, 1.511]),
                                        outcome_of("c", [1.70, 1.711]))
    assert better["worth"] == pytest.approx(3) and worse["worth"] == pytest.approx(-0.75)
    assert "-75% (-75% to -75%)" in shown(worse)[5]
    first, other = rows_of_arms(outcome_of("a", [1.60, 1.61], grid=1.5), outcome_of("b", [1.50, 1.511], 1.4, speed=500.0))
    assert "worth" not in other and "bpb_equal_seconds" not in other  # a larger budget was worse: nothing follows
    assert verdict(other, first).endswith("2 seeds).")


def test_diverged_runs_are_told_and_not_averaged():
    a, b, c = outcome_of("a", [1.60, 1.62, 1.61]), outcome_of("b", [1.50, None, 1.51]), outcome_of("c", [None, None, None])
    first, some, none = rows_of_arms(a, b, c)
    assert (some["runs"], some["runs_wanted"], some["pairs"]) == (2, 3, 2)
    assert some["bpb"] == pytest.approx(1.505) and some["difference"] == pytest.approx(-0.1)  # of the seeds that both have
    assert none["runs"] == 0 and "bpb" not in none
    assert verdict(none, first) == "c: no run that could be compared was finished."
    assert verdict(some, first).endswith("b finished only 2 of 3 runs, and what the others would have been is not known.")
    assert list(b.problems()) == ["b, rate x 1, seed 2: diverged: loss is nan at step 7: lower --learning_rate"]
    assert shown(none)[0] == "c" and shown(none)[-1] == "0 of 3"


def test_one_seed_says_nothing():
    first, second = rows_of_arms(*[outcome_of("a", [1.6]), outcome_of("b", [1.2])])
    assert second["significant"] == "no" and second["difference_margin"] == math.inf
    assert verdict(second, first) == "b: -0.4000 bits/byte against a with one seed, of which nothing follows."


def test_a_rate_at_the_edge_of_the_grid_is_marked():
    outcome = outcome_of("a", [1.6])
    outcome.rates = [dataclasses.replace(run, cell=dataclasses.replace(run.cell, multiple=multiple),
                                         rows=[row | {"val_bpb": bpb} for row in run.rows])
                     for run in outcome.rates for multiple, bpb in ((0.5, 2.0), (1.0, 1.9), (2.0, 1.8))]
    assert outcome.edge() == "edge" and outcome.best().cell.multiple == 2.0
    assert "(edge)" in shown(rows_of_arms(outcome)[0])[7]
    outcome.rates[1] = dataclasses.replace(outcome.rates[1], rows=[row | {"val_bpb": 1.7} for row in outcome.rates[1].rows])
    assert outcome.edge() == ""
    assert outcome_of("a", [1.6]).edge() == "only one tried"


def test_a_rate_that_failed_holds_up_the_runs():
    outcome = outcome_of("a", [])
    outcome.rates.append(dataclasses.replace(outcome.rates[0], status="diverged", rows=[]))
    assert outcome.best() is outcome.rates[0]
    outcome.rates.append(dataclasses.replace(outcome.rates[0], status="failed", rows=[]))
    assert outcome.best() is None


def test_scaling_through_two_sizes():
    small, large = outcome_of("a", [2.0]), outcome_of("a", [1.0])
    small.arm, large.arm = (dataclasses.replace(small.arm, size=size, flops=n) for size, n in (("s", 60), ("l", 9960)))
    (points, a, b), = scaling([[small], [large]]).values()
    assert not scaling([[small], [small]])  # as with a budget of FLOPs: nothing can be fitted
    assert [x for x, _ in points] == [1e6, 1e8] and a * 1e6**-b == pytest.approx(2) and a * 1e8**-b == pytest.approx(1)


# -- the command, with a train.py that pretends -----------------------------------------------------------------------

PRETENDS = """
import json, os, signal, sys, time
from pathlib import Path
flags = dict(flag.lstrip("-").split("=", 1) if "=" in flag else (flag.lstrip("-"), "1") for flag in sys.argv[1:])
path = Path(flags["checkpoint_path"]); folder = path.with_suffix(""); folder.mkdir(parents=True, exist_ok=True)
with open(Path(__file__).parent / "log", "a") as log:
    log.write(path.stem + (" again" if "resume_checkpoint" in flags else "") + chr(10))
mode = Path(__file__).with_name("mode").read_text()
if mode in ("damaged", "unreadable"):
    path.write_text("half")
    print("train.py: " + ("the disk is full" if mode == "damaged" else "damaged, or not a checkpoint"), file=sys.stderr)
    sys.exit(1 if mode == "damaged" else 2)
if mode == "slow":
    path.write_text("checkpoint")
    signal.signal(signal.SIGTERM, lambda *args: sys.exit(143))
    time.sleep(60)
if "run" in path.stem and "relu2" in path.stem and path.stem.split("-")[-2] == "2" and mode in ("dies", "diverges", "fails"):
    if mode == "dies":
        path.write_text("checkpoint")
        os.kill(os.getpid(), signal.SIGKILL)
    print("train.py: " + ("loss is nan at step 3: lower --learning_rate, which is 1" if mode == "diverges" else "disk full"),
          file=sys.stderr)
    sys.exit(1)
bpb = 1.5 + (0.1 if "relu2" in path.stem else 0) + (0.4 if "rate" in path.stem else 0) + int(path.stem.split("-")[-2]) / 1e3
best = 0.01 if mode == "long" and "run" in path.stem else 0.02
bpb += abs(float(flags.get("learning_rate", 1)) - best) + (sum(map(ord, path.stem)) % 7) * 1e-5
rows = [{"step": n, "tokens": n * 512, "seconds": n / 10, "flops": n, "val_loss": 2 * bpb + 9 / n, "val_bpb": bpb,
         "tok_per_sec": 100.0, "peak_memory": 2**28} for n in (10, 20, 30)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
path.write_text("checkpoint")
"""


@pytest.fixture
def pretending(tmp_path, monkeypatch):
    """compare.py runs this instead of train.py. pretending(mode) sets what it does; .log() says what ran since."""
    folder = tmp_path / "pretends"
    folder.mkdir()
    (folder / "train.py").write_text(PRETENDS)
    for name in ("finetune", "model", "optimizer", "dataloader"):
        (folder / f"{name}.py").write_text("")
    monkeypatch.setattr(compare, "REPO", folder)

    def set_mode(mode: str):
        (folder / "mode").write_text(mode)
        (folder / "log").write_text("")
    set_mode.log = lambda: (folder / "log").read_text().split("\n")[:-1]
    set_mode("well")
    return set_mode


@pytest.fixture
def flags(data_path, tmp_path):
    return [f"--data_path={data_path}", f"--out_path={tmp_path / 'out'}", "--budget=tokens=15360", "--arms", "mlp=gelu",
            "mlp=relu2", *(f"--{name}={value}" for name, value in SHAPE.items())]


def test_the_command_tunes_runs_and_times_every_arm(pretending, flags, tmp_path, capsys):
    compare.main(flags)
    out, folder = capsys.readouterr().out, tmp_path / "out"
    ran = pretending.log()
    assert [sum(f"-{what}-" in name for name in ran) for what in ("rate", "run", "speed")] == [2 * 3, 2 * (3 + 1), 2 * 3]
    runs = [name for name in ran if "-run-" in name]
    assert [name.split("-")[0] for name in runs[:4]] == ["mlp=gelu", "mlp=relu2"] * 2  # in turns
    assert [name.split("-")[2:4] for name in runs] == [[rate, seed] for rate, seed in zip("22112222", "11112233")]
    with open(folder / "comparison.csv", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert float(second["difference"]) == pytest.approx(0.1, abs=1e-3) and second["significant"] == "yes"
    assert second["parameters"] == first["parameters"] and second["runs"] == "3"
    assert float(first["tok_per_sec"]) == 100 and float(first["seconds"]) == pytest.approx(30 * 512 / 100)
    text = (folder / "comparison.md").read_text(encoding="utf-8")
    assert text in out and "mlp=relu2: worse than mlp=gelu by 0.10" in text and "2 layers x 128" in text
    assert not list(folder.glob("runs/*.pt"))  # what is finished needs no checkpoint
    assert (folder / "curves.svg").stat().st_size > 5000 and (folder / "front.svg").stat().st_size > 5000


def test_a_rate_that_is_too_high_for_the_whole_budget_is_found_out(pretending, flags, tmp_path):
    """0.025 is best on a part, 0.0125 on the whole, 0.00625 on neither."""
    pretending("long")
    compare.main(flags)
    runs = [name.split("-")[2:4] for name in pretending.log() if "-run-" in name]
    assert runs == [[rate, seed] for rate, seed in zip(["2", "2", "1", "1", "0.5", "0.5", "1", "1", "1", "1"], "1111112233")]
    with open(tmp_path / "out" / "comparison.csv", encoding="utf-8") as file:
        assert {(float(row["learning_rate"]), row["edge"]) for row in csv.DictReader(file)} == {(0.0125, "")}


@pytest.mark.parametrize("part, whole, tried", [
    ({0.5: 2.0, 1: 1.9, 2: 1.8}, {2: 1.6, 1: 1.7}, [2, 1]),
    ({2: 1.8, 0.5: 2.0, 1: 1.9}, {2: 1.6, 1: 1.5, 0.5: 1.4}, [2, 1, 0.5]),
    ({1: 1.7, 2: 1.8, 0.5: 1.9}, {1: 1.6, 0.5: 1.7}, [1, 0.5]),
    ({0.5: 1.7, 1: 1.8}, {0.5: 1.6}, [0.5]),
    ({1: 1.9, 2: 1.8}, {2: None, 1: None}, [2, 1]),
    ({1: 1.9, 2: None}, {1: 1.6}, [1]), ({1: None, 2: None}, {}, [])])
def test_rates_fall_on_the_whole_budget_as_long_as_it_gets_better(part, whole, tried):
    """None diverged."""
    outcome = outcome_of("a", [1.6])
    run = outcome.rates[0]

    def result(multiple: float, share: float, bpb: float | None) -> Result:
        cell = dataclasses.replace(run.cell, multiple=multiple, share=share)
        return Result(cell, "finished" if bpb else "diverged", "", [{"val_bpb": bpb}])
    outcome.rates = [result(multiple, 0.25, bpb) for multiple, bpb in part.items()]
    found = []
    while (multiple := outcome.candidate()) and len(found) < 9:
        found.append(multiple)
        outcome.full_budget_lr_runs.append(result(multiple, 1.0, whole[multiple]))
    assert found == tried
    # the grid had the whole budget
    outcome.rates, outcome.full_budget_lr_runs = [result(1, 1.0, 1.9), result(2, 1.0, 1.8)], []
    assert outcome.candidate() == 2
    outcome.full_budget_lr_runs = [result(2, 1.0, 1.8)]
    assert outcome.candidate() is None
    outcome.full_budget_lr_runs = [dataclasses.replace(outcome.full_budget_lr_runs[0], status="failed")]
    outcome.rates[0] = result(1, 0.25, 1.9)
    assert outcome.candidate() is None and outcome.best() is None


def test_what_is_finished_is_not_run_again(pretending, flags, capsys):
    compare.main(flags)
    before = capsys.readouterr().out
    pretending("well")
    compare.main(flags)
    again = capsys.readouterr().out
    assert not pretending.log() and again[again.index("# Comp"):].splitlines()[:-1] == \
        before[before.index("# Comp"):].splitlines()[:-1]
    compare.main([*flags, "--seeds=4"])
    assert len(pretending.log()) == 2 and all("-run-" in name for name in pretending.log())


class Page(html.parser.HTMLParser):
    """Checks that what is opened is closed, and collects tags, addresses and text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.addresses, self.text = [], [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_beside_it(pretending, flags, tmp_path):
    compare.main([*flags, "--sizes", "n_layer=1", "n_layer=2"])
    page = Page()
    page.feed((tmp_path / "out" / "comparison.html").read_text(encoding="utf-8"))
    assert not page.open and page.tags.count("svg") == 5 and page.tags.count("table") == 2
    assert all(address.startswith("#") for address in page.addresses)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    for words in ("mlp=relu2: worse than mlp=gelu", "Loss against FLOPs", "Pareto front", "n_layer=1", "95 %"):
        assert words in page.text, words


@pytest.mark.parametrize("mode, words", [("diverges", "diverged: loss is nan"), ("dies", "failed: killed by signal 9"),
                                         ("fails", "failed: disk full")])
def test_runs_that_end_badly_are_told(pretending, flags, tmp_path, capsys, mode, words):
    pretending(mode)
    if mode == "diverges":
        compare.main(flags)
    else:
        with pytest.raises(SystemExit) as stop:
            compare.main(flags)
        assert stop.value.code == 1 and "some runs failed" in capsys.readouterr().err
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert f"mlp=relu2, rate x 2, seed 2: {words}" in text and "| 2 of 3 |" in text and "2 seeds)" in text
    pretending("well")
    compare.main(flags)
    assert len(pretending.log()) == (0 if mode == "diverges" else 1)
    if mode == "dies":
        assert pretending.log()[0].endswith(" again")  # from its checkpoint


def test_ctrl_c_saves_what_is_under_way(flags, tmp_path, pretending):
    """As a terminal sends it: to the whole group, of which the runs are no part."""
    pretending("slow")
    program = f"""
import sys; sys.path.insert(0, {str(REPO)!r})
import compare; from pathlib import Path
compare.REPO = Path({str(compare.REPO)!r})
compare.main({[*flags, "--jobs=2"]!r})
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    end = time.monotonic() + 60
    while len(pretending.log()) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "the same command goes on" in error and "Traceback" not in error, error
    assert len(pretending.log()) == 2 and len(list((tmp_path / "out" / "runs").glob("*.pt"))) == 2
    pretending("well")
    compare.main(flags)
    assert sum(name.endswith(" again") for name in pretending.log()) == 2


@pytest.mark.parametrize("more, words", [
    (["--arms", "mlp=gelu"], "two or more"), (["--arms", "mlp=gelu", "mlp=gelu"], "one of them is there twice"),
    (["--rates", "1", "1.0"], "--rates 1.0 1.0: one of them is there twice"),
    (["--sizes", "n_layer=2", "n_layer=2"], "there twice"), (["--arms", "mlp=gelu", "help"], "'help': give flags"),
    (["--arms", "mlp=gelu", "mlp=what"], "'mlp=what': --mlp=what: choose one of"),
    (["--budget=tokens=600"], "less than a step"),
    (["--budget=cups=2"], "give tokens=N"), (["--budget=seconds=9", "--jobs=2"], "to themselves"),
    (["--data_path=/nowhere"], "no shards to read"), (["--batch_size=auto"], "give a number"), (["--rates", "0"], "above 0"),
    (["--max_iter=5"], "no such flag"), (["--block_size=100000"], "--block_size=100000"),
    (["--device=cuda:77"], "not on this")])
def test_bad_input_is_refused_in_a_line(pretending, refused, flags, tmp_path, more, words):
    refused(compare.main, [*flags, *more], words)
    assert not pretending.log() and not (tmp_path / "out").exists()


def test_another_comparisons_results_are_not_replaced(pretending, refused, flags, tmp_path):
    compare.main(flags)
    before = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    refused(compare.main, [*flags, "--budget=tokens=20480"], "holds a comparison with another budget", "--overwrite")
    refused(compare.main, [*flags, "--norm=layer"], "another flags of train.py")
    assert (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8") == before
    compare.main([*flags, "--budget=tokens=20480", "--overwrite"])


def test_the_command_with_the_real_train_py(data_path, tmp_path, monkeypatch, capsys):
    """Two arms end to end; what the table says is what their runs logged."""
    monkeypatch.setattr(compare, "SPEED_ROUNDS", 1)
    compare.main([f"--data_path={data_path}", f"--out_path={tmp_path / 'out'}", "--arms", "mlp=gelu",
                  "linear=grkan,mixer=DA", "--budget=tokens=1024", "--seeds=2", "--rates", "1", "--jobs=2", *TINY_MODEL,
                  "--batch_size=4", "--num_batch_accum=1", "--val_iter=2"])
    with open(tmp_path / "out" / "comparison.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row, name in zip(rows, ("mlp=gelu", "linear=grkan_mixer=DA")):
        ends = [rows_of(folder.with_suffix(".pt"))[-1] for folder in sorted(tmp_path.glob(f"out/runs/{name}-run-*"))]
        assert len(ends) == 2 and all(end["tokens"] == 1024 and end["step"] == 16 for end in ends)
        assert float(row["bpb"]) == pytest.approx(sum(end["val_bpb"] for end in ends) / 2)
    results = [json.loads(path.read_text()) for path in tmp_path.glob("out/runs/*/result.json")]
    assert len(results) == 2 * (1 + 2 + 1) and {result["status"] for result in results} == {"finished"}


def test_a_cell_is_the_run_that_its_flags_make(data, place, data_path, tmp_path):
    arm = arms_of(CompareConfig(out_path=tmp_path), SHAPE | {"data_path": data_path}, data)[0]
    run = cell_of(arm, CompareConfig(budget="tokens=1024", out_path=tmp_path), place, "run", 1.0, 7).run
    train.main([f"--checkpoint_path={run.checkpoint}", *run.flags, "--verbose=0", "--device=cpu", "--val_iter=1"])
    settings = load_checkpoint(run.checkpoint)["training"]["settings"]
    assert (settings["seed"], settings["mlp"], settings["max_tokens"]) == (7, "gelu", 1024)
    assert settings["learning_rate"] == pytest.approx(arm.rate)


# -- runs -------------------------------------------------------------------------------------------------------------

def test_the_line_that_a_command_ended_with():
    assert reason_of("a warning\ntrain.py: the disk\n  is full\nat exit: leaked\n", "train.py") == "the disk"
    assert reason_of("Killed", "train.py") == "Killed" and reason_of("", "train.py") == "it said nothing"


def test_a_result_without_its_rows_is_run_again(pretending, flags, tmp_path):
    """As a power cut may leave it: metrics are not brought to disk one by one."""
    compare.main(flags)
    first, second, third, *_ = sorted((tmp_path / "out" / "runs").iterdir())
    (first / "metrics.jsonl").unlink()
    lines = (second / "metrics.jsonl").read_text().splitlines()
    (second / "metrics.jsonl").write_text(lines[0].replace("val_bpb", "other"))
    (third / "result.json").write_text('{"status": "fin')
    pretending("well")
    compare.main(flags)
    assert sorted(pretending.log()) == sorted(folder.name for folder in (first, second, third))


def test_a_checkpoint_that_cannot_be_read_is_run_afresh(pretending, flags, tmp_path):
    """It is told once, and not for ever."""
    pretending("damaged")
    with pytest.raises(SystemExit):
        compare.main(flags)
    pretending("well")
    with pytest.raises(SystemExit):
        pretending("unreadable")
        compare.main(flags)
    assert all(name.endswith(" again") for name in pretending.log())
    pretending("well")
    compare.main(flags)
    assert not any(name.endswith(" again") for name in pretending.log())


def test_an_error_leaves_nothing_running(pretending, flags, monkeypatch):
    """A disk that is full when the first result is written, while another run is under way."""
    pretending("well")
    monkeypatch.setattr(Run, "remember", lambda *args: (_ for _ in ()).throw(OSError("no space left")))
    start = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        compare.main([*flags, "--jobs=2"])
    assert stop.value.code == 1 and time.monotonic() - start < 20 and len(pretending.log()) <= 4


# -- finetunings ------------------------------------------------------------------------------------------------------

def test_finetunings_are_compared(run_train, tmp_path, monkeypatch):
    """Two models to begin with, the whole way, with a page at its end."""
    monkeypatch.setattr(compare, "SPEED_ROUNDS", 1)
    monkeypatch.setattr(compare, "VALIDATIONS", 2)
    a, b = (run_train("--max_iter=1", f"--mlp={mlp}", checkpoint=f"{mlp}/gpt.pt") for mlp in ("gelu", "swiglu"))
    talks = tmp_path / "talks.jsonl"
    talks.write_text("".join(json.dumps({"question": f"{i}?", "answer": "yes"}) + "\n" for i in range(60)))
    flags = ["--script=finetune", f"--dataset={talks}", "--arms", f"checkpoint_path={a}", f"checkpoint_path={b}",
             "--budget=tokens=400", "--seeds=2", "--rates=1", "--grid_share=1", "--batch_size=4", "--device=cpu",
             "--val_conversations=4", f"--out_path={tmp_path / 'out'}"]
    compare.main(flags)
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert "conversations of" in page and "swiglu/gpt.pt" in page and "<svg" in page
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    assert len(rows) >= 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").rglob("metrics.jsonl")}
    assert len(before) == 2 * (1 + 2 + 1)  # of the rate, of each seed, of the speed
    compare.main([*flags, "--overwrite"])
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").rglob("metrics.jsonl")}


@pytest.mark.parametrize("arms, words", [
    (["mlp=gelu", "mlp=relu2"], ["--arms 'mlp=gelu'", "--mlp", "no such flag"]),
    (["checkpoint_path=none.pt", "checkpoint_path=other.pt"], ["none.pt", "no checkpoint"]),
    (["dataset=builtin", "learning_rate=1"], ["dataset is no part"])])
def test_bad_arms_of_finetunings(arms, words, tmp_path, refused):
    talks = tmp_path / "talks.jsonl"
    talks.write_text("".join(json.dumps({"question": f"{i}?", "answer": "yes"}) + "\n" for i in range(9)))
    flags = ["--script=finetune", f"--dataset={talks}", f"--out_path={tmp_path / 'out'}"]
    refused(compare.main, [*flags, "--arms", *arms], *words)
