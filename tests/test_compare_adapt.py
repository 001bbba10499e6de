"""compare.py --script=adapt: models of several seeds as arms, paired numbers, the page, resuming, bad input."""
import csv
import dataclasses
import json
import math
import re
import signal
import time
from pathlib import Path

import commands
import pytest

import adapt
import compare
from conftest import REPO, train_tiny
from experiments.adaptation_cells import AdaptArm, AdaptCell, AdaptJob, AdaptResult, AdaptResults
from experiments.adaptation_comparison import (
    common_documents,
    describe_best,
    describe_gain,
    short_table,
    table_rows,
    verdict,
    write_adaptation_comparison,
)
from experiments.runner import JobResult, Runner, interpret_exit

# -- the command ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def models(data_path, tmp_path_factory) -> Path:
    """A folder of tiny models: gelu, relu2 and looped of two seeds, a wide one, and one that is alone."""
    folder = tmp_path_factory.mktemp("models")
    for name, flags in {"gelu": ["--mlp=gelu"], "relu2": ["--mlp=relu2"],
                        "looped": ["--loops=2", "--sampled_loops=1"]}.items():
        for seed in (1, 2):
            train_tiny(folder / f"{name}_{seed}.pt", data_path, "--max_iter=3", f"--seed={seed}", *flags)
    for name, n_hidden in (("wide_1", 128), ("mixed_1", 64), ("mixed_2", 128)):
        train_tiny(folder / f"{name}.pt", data_path, "--max_iter=1", f"--n_hidden={n_hidden}")
    (folder / "text_1.pt").write_text("not a model")
    return folder


@pytest.fixture(scope="module")
def documents(tmp_path_factory, english) -> Path:
    path = tmp_path_factory.mktemp("documents") / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text[:300]}) + "\n" for text in english[60:68]), encoding="utf-8")
    return path


@pytest.fixture
def flags(models, documents, tmp_path) -> list[str]:
    return ["--script=adapt", "--arms", f"checkpoint_path={models}/gelu_{{seed}}.pt",
            f"checkpoint_path={models}/relu2_{{seed}}.pt", "--seeds=2", f"--dataset={documents}", "--limit=3",
            "--max_tokens=40", "--rates=1", "--device=cpu", "--dtype=fp32", f"--out_path={tmp_path / 'out'}"]


@pytest.fixture
def in_process(monkeypatch) -> list[list[str]]:
    """Cells run in this process, one after the other; returns the list of their command lines."""
    commands = []

    def run(self, jobs, desc, on_end, on_wait=None):
        results = []
        for job in jobs:
            result = job.previous_result()
            if result is None:
                commands.append(job.command()[2:])
                try:
                    adapt.main(commands[-1])
                    code = 0
                except SystemExit as stop:
                    code = stop.code
                result = job.complete(interpret_exit(code, "it said so"))
            results.append(result)
            on_end(len(results) - 1, result)
        return results
    monkeypatch.setattr(Runner, "run", run)
    return commands


def read_csv(folder) -> list[dict]:
    with open(folder / "comparison.csv", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if "seconds" not in name} for row in csv.DictReader(file)]


def summaries(out: Path, pattern: str) -> list[dict]:
    return [json.loads((folder / "adaptation.json").read_text()) for folder in sorted(out.glob(f"runs/{pattern}"))]


@pytest.mark.parametrize("other", ["relu2", "looped"])
def test_each_model_reads_the_same_documents(flags, in_process, tmp_path, capsys, other):
    """The table holds what the cells wrote; the same command runs none again and writes the same page."""
    flags = [flag.replace("/relu2_", f"/{other}_") for flag in flags]
    compare.main(flags)
    assert len(in_process) == 4
    out = tmp_path / "out"
    bits = lambda row, reading: sum(row[reading]) / math.log(2) / row["bytes"]
    rows = read_csv(out)
    assert [row["arm"] for row in rows] == ["gelu", other]
    gains = {}
    for row in rows:
        cells = summaries(out, f"{row['arm']}-runs-*")
        gains[row["arm"]] = [[bits(r, "static") - bits(r, "adapted") for r in cell["rows"]] for cell in cells]
        assert len(cells) == 2 and row["models"] == "2" and row["documents"] == "3"
        assert float(row["gain"]) == pytest.approx(sum(map(sum, gains[row["arm"]])) / 6)
    assert float(rows[1]["gain_difference"]) == pytest.approx(float(rows[1]["gain"]) - float(rows[0]["gain"]))
    page = (out / "comparison.md").read_text(encoding="utf-8")
    assert all(words in page for words in ("3 documents of", "adapted to another document", "static, longer overlap",
                                           "fourth", "no learning rate was chosen"))
    assert "<svg" in (out / "comparison.html").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert "not significant" in printed or "only these models" in printed or "gains " in printed
    compare.main(flags)
    assert len(in_process) == 4 and (out / "comparison.md").read_text(encoding="utf-8") == page


def test_learning_rate_is_chosen_on_other_documents(flags, in_process, tmp_path):
    """A rate that is far too high is not chosen; none of the documents that count is read to choose."""
    compare.main([*flags, "--seeds=1", "--rates", "0.001", "1", "1e30"])
    rows = read_csv(tmp_path / "out")
    assert all(0.001 < float(row["adapt_rate"]) / 6e-4 < 1e9 for row in rows), rows
    tried = [flag for command in in_process for flag in command if flag.startswith("--controls=0")]
    assert len(tried) >= 6
    read = {stage: {row["text_digest"] for cell in summaries(tmp_path / "out", f"gelu-{stage}-[!1]*") for row in
                    cell["rows"] if "diverged" not in row} for stage in ("rates", "runs")}
    chosen = {row["text_digest"] for cell in summaries(tmp_path / "out", "gelu-runs-*") for row in cell["rows"]}
    assert len(read["rates"]) == 2 and len(chosen) == 3 and not read["rates"] & chosen


def test_one_model_may_adapt_in_several_ways(flags, in_process, models, tmp_path, capsys):
    """Without {seed} in a path --seeds is 1, which shows nothing about other seeds."""
    compare.main(["--script=adapt", f"--checkpoint_path={models}/gelu_1.pt", "--arms", "adapt_scope=all",
                  "adapt_scope=last_half_mlps", *flags[5:]])
    rows = read_csv(tmp_path / "out")
    assert [row["models"] for row in rows] == ["1", "1"]
    assert rows[0]["trained_parameters"] == rows[0]["parameters"] != rows[1]["trained_parameters"]
    assert rows[1]["gain_significance"] in ("none", "documents")


def test_a_damaged_or_failed_cell_runs_again(flags, in_process, tmp_path, capsys):
    compare.main(flags)
    rows = read_csv(tmp_path / "out")
    path = sorted(tmp_path.glob("out/runs/gelu*/adaptation.json"))[0]
    path.write_text(path.read_text()[:100])
    compare.main(flags)
    assert len(in_process) == 5 and read_csv(tmp_path / "out") == rows


def test_forecast_runs_nothing(flags, in_process, tmp_path, capsys):
    compare.main([*flags, "--rates", "1", "2", "--dry_run"])
    printed = capsys.readouterr().out
    assert re.search(r"gelu +14,403 .* 4 ", printed) and "time    about" in printed  # two rates, two seeds
    assert not in_process and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_page(flags, in_process, tmp_path):
    """Stopped by Ctrl-C while a cell has read some documents, with the real adapt.py."""
    flags = [*flags, "--seeds=1"]
    compare.main(flags)
    rows, other = read_csv(tmp_path / "out"), tmp_path / "other"
    command = [REPO / "compare.py", *flags, f"--out_path={other}", "--jobs=2"]
    process = commands.start(command, start_new_session=True)
    end = time.monotonic() + 120
    while not list(other.glob("runs/*/documents.jsonl")) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command continues" in error and "Traceback" not in error, error
    assert not (other / "comparison.md").exists()
    assert 1 <= len(list(other.glob("runs/*/documents.jsonl"))) <= 2
    resumed = commands.run(command, timeout=300)
    assert resumed.returncode == 0, resumed.stderr
    assert read_csv(other) == rows


@pytest.mark.parametrize("arms, more, words", [
    (["gelu_{seed}", "relu2_{seed}"], ["--seeds=3"], ["gelu_3.pt: no such file", "give --seeds=2"]),
    (["gelu_1", "wide_1"], [], ["wide_1.pt", "has 18,499 parameters, the first arm 14,403", "--match=none"]),
    (["gelu_1", "text_1"], [], ["text_1.pt"]),
    (["gelu_1", "none"], [], ["none.pt", "no checkpoint"]),
    (["gelu_1", "mixed_{seed}"], ["--seeds=2", "--match=none"], ["mixed_2.pt has another shape than"]),
    (["gelu_1", "gelu_1,mlp=gelu"], [], ["--arms 'checkpoint_path", "--mlp", "no such flag"]),
    (["gelu_1", "relu2_1,adapt_scope=norms"], [], ["adapt_scope=norms: this model has no parameters there"]),
    (["gelu_1", "relu2_1,limit=3"], [], ["limit is not part of"]),
    (["gelu_1", "relu2_1,adapt_rate=0"], [], ["--adapt_rate=0", "above 0"]),
    (["gelu_1"], [], ["two or more"]),
    (["gelu_1", "relu2_1"], ["--seeds=2"], ["--seeds=2: no arm has {seed}"]),
    (["gelu_1", "relu2_1"], ["--budget=tokens=5"], ["--budget: has no meaning with --script=adapt"]),
    (["gelu_1", "relu2_1"], ["--sizes", "n_layer=2"], ["--sizes: has no meaning"]),
    (["gelu_1", "relu2_1"], ["--null"], ["--null: has no meaning"]),
    (["gelu_1", "relu2_1"], ["--grid_share=1"], ["--grid_share: has no meaning"]),
    (["gelu_1", "relu2_1"], ["--limit=7", "--rates", "1", "2"], ["leaves less than 2", "--rates 1"]),
    (["gelu_1", "relu2_1"], ["--skip=3"], ["--skip", "no such flag"]),
    (["gelu_1", "relu2_1"], ["--dataset=/nowhere/at.jsonl"], ["/nowhere/at.jsonl"])])
def test_bad_input_is_refused_in_a_line(arms, more, words, models, documents, tmp_path, refused, in_process):
    texts = [re.sub(r"^(\w+(\{seed\})?)", rf"checkpoint_path={models}/\1.pt", arm) for arm in arms]
    argv = ["--script=adapt", "--arms", *texts, f"--dataset={documents}", "--limit=2", "--rates=1", "--device=cpu",
            f"--out_path={tmp_path / 'out'}", *more]
    refused(compare.main, argv, *words)
    assert not in_process and not (tmp_path / "out").exists()


def test_the_same_model_is_not_two_seeds(models, documents, tmp_path, refused):
    for seed in (1, 2):
        (tmp_path / f"a_{seed}.pt").write_bytes((models / "gelu_1.pt").read_bytes())
    refused(compare.main, ["--script=adapt", "--arms", f"checkpoint_path={tmp_path}/a_{{seed}}.pt",
                           f"checkpoint_path={models}/relu2_{{seed}}.pt", "--seeds=2", f"--dataset={documents}"],
            "a_2.pt is the same file as")


def test_arms_are_called_by_what_differs():
    assert compare.short_names(("checkpoint_path=models/a_{seed}.pt", "checkpoint_path=b.pt,adapt_scope=lora")) == [
        "a", "b,adapt_scope=lora"]
    same = ("checkpoint_path=x/a.pt", "checkpoint_path=y/a.pt")
    assert compare.short_names(same) == list(same)


# -- the numbers ------------------------------------------------------------------------------------------------------

def make_results(name: str, gains: list[list[float]], static: float = 3.0, other: float | None = None,
                 parameters: int = 1000) -> AdaptResults:
    """An arm whose models gain so much (a list for each seed, a number for each document, None: diverged) from `static`."""
    seeds = range(1, len(gains) + 1)
    arm = AdaptArm(name, name, {seed: Path(f"{name}_{seed}.pt") for seed in seeds}, {}, {}, 6e-4, parameters, 16, "a", 1)
    runs = []
    for seed, own in zip(seeds, gains):
        nats = 8 * math.log(2)  # of 1 bit/byte in documents of 8 bytes, in four hops of 2
        rows = [{"text_digest": str(i), "diverged": "at step 3"} if gain is None else {
            "text_digest": str(i), "bytes": 8, "tokens": 8, "hop_tokens": [2] * 4, "hop_bytes": [2] * 4,
            "static": [static * nats / 4] * 4,
            "adapted": [(static - gain) * nats / 4] * 4, "static_seconds": 1.0, "adapted_seconds": 3.0,
            "other": None if other is None else (static + other) * nats} for i, gain in enumerate(own)]
        summary = {"hop": 2, "rate": 6e-4, "n_trained": 1000, "flops": {"static": 2.0, "adapted": 5.0}, "stride": 4,
                   "extra_bytes": 100, "rows": rows}
        cell = AdaptCell(arm, "runs", 1.0, seed, len(own), AdaptJob(Path("adapt.py"), Path("none"), ()), 1.0)
        runs.append(AdaptResult(cell, "finished", "", summary))
    return AdaptResults(arm, runs=runs)


def rows_of(*results: AdaptResults) -> list[dict]:
    return table_rows(list(results), common_documents(list(results)))


def test_paired_numbers_by_hand():
    """Differences of gains: seed 1: 0.1, 0.3; seed 2: 0.2, 0.4. By document 0.15, 0.35, by seed 0.2, 0.3: mean 0.25, and
    the intervals of two numbers, 12.706 times half their distance."""
    first, second = rows_of(make_results("a", [[0.5, 0.7], [0.5, 0.7]]),
                            make_results("b", [[0.6, 1.0], [0.7, 1.1]], static=3.1))
    assert first["gain"] == pytest.approx(0.6) and second["gain"] == pytest.approx(0.85)
    assert first["gain_margin_documents"] == pytest.approx(12.706 * 0.1, rel=1e-3)
    assert first["gain_margin_seeds"] == pytest.approx(0)
    assert second["gain_difference"] == pytest.approx(0.25)
    assert second["gain_difference_margin_documents"] == pytest.approx(12.706 * 0.1, rel=1e-3)
    assert second["gain_difference_margin_seeds"] == pytest.approx(12.706 * 0.05, rel=1e-3)
    assert second["adapted_difference"] == pytest.approx(0.1 - 0.25) and second["static_difference"] == pytest.approx(0.1)
    assert second["gain_p"] == pytest.approx(0.2422, abs=1e-3)  # t = 0.25 / 0.1 with one degree of freedom; seeds: t = 5
    assert second["gain_p_holm"] == pytest.approx(2 * second["gain_p"]) and second["gain_significance"] == "none"
    assert [second[f"{name}_quarter"] for name in ("first", "second", "third", "fourth")] == pytest.approx([0.85] * 4)
    assert second["seconds_ratio"] == 3 and second["adapted_flops_per_token"] == 5


NOISE = [0.001 * i for i in range(-4, 5)]


@pytest.mark.parametrize("gains, words, short", [
    ([[0.2 + x for x in NOISE]] * 3, "gains less than a, by 0.3000", "gains less"),
    ([[0.8 + x + s for x in NOISE] for s in (-0.01, 0, 0.01)], "gains more than a, by 0.3000", "gains more"),
    ([[0.5 + 50 * x for x in NOISE]] * 3, "no significant difference from a in gain", "not significant"),
    ([[0.5 + x + s for x in NOISE] for s in (-0.3, 0.1, 0.5)], "not shown for other seeds", "only these models"),
    ([[0.8 + 2 * x for x in NOISE]], "none over seeds, there is one", "only these models")])
def test_verdict_claims_no_more_than_the_intervals(gains, words, short):
    reference = make_results("a", [[0.5] * 9] * len(gains))
    rows = rows_of(reference, make_results("b", gains))
    assert words in verdict(rows[1], rows[0])
    lines = short_table(rows)
    assert short in lines[2] and all(len(line) <= 80 for line in lines)


def test_gain_from_the_kind_of_text_is_named():
    row, = rows_of(make_results("a", [[0.5, 0.6, 0.55]] * 2, other=-0.2))
    assert "gains 0.5500" in describe_gain(row) and "a part of the gain comes from the kind of text" in describe_gain(row)
    row, = rows_of(make_results("a", [[0.5, 0.6, 0.55]] * 2, other=0.2))
    assert "kind of text" not in describe_gain(row) and row["other"] == pytest.approx(0.2)


def test_documents_that_diverged_count_for_no_arm():
    results = [make_results("a", [[0.5, 0.7, 0.9]]), make_results("b", [[0.6, None, 1.0]])]
    assert common_documents(results) == ["0", "2"]
    assert table_rows(results, ["0", "2"])[0]["gain"] == pytest.approx(0.7)
    assert results[1].problems() == ["b, adapt_rate x 1, seed 1: gain +0.8000 bits/byte, 1 of 3 documents diverged"]


def test_page_says_what_does_not_compare_and_what_was_left_out(tmp_path, capsys):
    first, other = make_results("a", [[0.5, 0.7, 0.9]] * 2), make_results("b", [[0.6, None, 1.0], [0.6, 0.8, 1.0]])
    other.arm = dataclasses.replace(other.arm, tokenizer="another")
    write_adaptation_comparison([first, other], ["Conditions."], "python compare.py", tmp_path)
    page = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert "The arms do not share one tokenizer" in page and "Conditions." in page
    assert "1 of 3 documents count for no arm" in page and "1 of 3 documents diverged" in page
    assert {path.name for path in tmp_path.iterdir()} == {"adapting.svg", "comparison.md", "comparison.csv",
                                                          "comparison.html"}
    assert "left out: b, adapt_rate x 1, seed 1" in capsys.readouterr().out
    write_adaptation_comparison([first, first], [], "python compare.py", tmp_path)
    assert "do not share" not in (tmp_path / "comparison.md").read_text(encoding="utf-8")


def test_nothing_to_compare_is_an_error(tmp_path):
    results = [make_results("a", [[0.5, None]]), make_results("b", [[None, 0.5]])]
    with pytest.raises(FloatingPointError, match="no document was read to its end by every model.*1 of 2 documents"):
        write_adaptation_comparison(results, [], "python compare.py", tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_arm_without_runs_is_in_the_table():
    failed = make_results("b", [[0.5]])
    failed.runs = [failed.runs[0]._replace(status="failed", reason="no disk", summary=None)]
    rows = rows_of(make_results("a", [[0.5, 0.7]]), failed)
    assert "gain" in rows[0] and "gain" not in rows[1]
    assert verdict(rows[1], rows[0]) == "b: no comparable run finished."
    assert rows_of(failed, make_results("a", [[0.5, 0.7]]))[1]["gain"] == pytest.approx(0.6)


def test_best_arm_is_named_with_those_not_shown_to_be_worse():
    results = [make_results("a", [[0.5 + x + s for x in NOISE] for s in (0, 0.01, 0.02)]),
               make_results("b", [[0.9 + x + s for x in NOISE] for s in (0, 0.012, 0.02)]),
               make_results("c", [[0.9 + x + s for x in NOISE] for s in (0.02, 0.0, 0.011)])]
    gain, adapted = describe_best(results, common_documents(results))
    assert gain.startswith("Largest mean gain: b; not shown to be worse than it: c (p")
    assert adapted.startswith("Lowest mean bits/byte when adapted: b; not")
    assert describe_best(results[:2], common_documents(results[:2])) == []
    for run in results[2].runs:  # of whose seeds no other arm has finished a run
        object.__setattr__(run.cell, "seed", run.cell.seed + 10)
    gain, _ = describe_best(results, common_documents(results))
    assert gain.startswith("Largest mean gain: ") and "not shown to be worse than it: " in gain


def rate_result(arm: AdaptArm, multiple: float, gains: list[float | None], status: str = "finished") -> AdaptResult:
    run = make_results(arm.name, [gains]).runs[0]
    cell = AdaptCell(arm, "rates", multiple, 1, 2, run.cell.job, 1.0)
    return AdaptResult(cell, status, "", run.summary if status == "finished" else None)


@pytest.mark.parametrize("tried, best, beyond", [
    ({0.5: [0.1, 0.2], 1: [0.3, 0.4], 2: [0.2, 0.2]}, 1, None),
    ({0.5: [0.1, 0.2], 1: [0.3, 0.4], 2: [0.5, 0.5]}, 2, 4),
    ({0.5: [0.6, 0.7], 1: [0.3, 0.4], 2: [0.5, 0.5]}, 0.5, 0.25),
    ({0.5: [0.1, 0.2], 1: [0.3, 0.4], 2: [9.0, None]}, 1, None),
    ({0.5: [0.1, 0.2], 1: [0.3, 0.4], 2: [0.5, 0.5], 4: [0.6, 0.6], 8: [0.7, 0.7], 16: [0.8, 0.8]}, 16, None)])
def test_rates_beyond_the_edge_are_tried(tried, best, beyond):
    results = make_results("a", [[0.5]])
    results.rates = [rate_result(results.arm, multiple, gains) for multiple, gains in tried.items()]
    assert results.best_multiple() == best and results.next_multiple(3) == beyond
    results.rates.append(rate_result(results.arm, 3, [], "failed"))
    assert results.best_multiple() is None  # it has to run again first


def test_a_job_keeps_what_it_ended_with(tmp_path):
    job = AdaptJob(Path("adapt.py"), tmp_path / "cell", ("--limit=2",))
    assert job.previous_result() is None
    assert job.complete(JobResult("finished")).status == "failed"  # nothing was written
    assert job.complete(JobResult("bad input", "no file")) == JobResult("failed", "no file")
    assert job.previous_result() is None
    assert job.complete(JobResult("diverged", "at once")) == job.previous_result() == JobResult("diverged", "at once")
