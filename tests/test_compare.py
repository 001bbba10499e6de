"""compare.py: arms, matching, cells, and the command with a train.py that only pretends. Statistics: test_analysis.py."""
import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_report import parse_page

import compare
import download_data
import train
from compare import (
    MATCHED,
    CompareConfig,
    RunEnvironment,
    build_arms,
    build_meta_model,
    decoding_bytes,
    make_cell,
    match_arm,
    parse_arm,
)
from conftest import REPO, TINY_MODEL, run_rows
from experiments.analysis import ArmResults
from experiments.runner import JobResult
from experiments.stages import readable_name
from layers import MLPS
from model import GPT, GPTConfig
from runtime.checkpoint import load_checkpoint, save_checkpoint
from runtime.config import BadInput
from tokenizer import Tokenizer

SHAPE = {"n_layer": 2, "n_head": 4, "head_size": 32, "block_size": 64, "batch_size": 8, "num_batch_accum": 1}


@pytest.fixture(scope="module")
def data(data_path):
    return compare.load_shards({"data_path": data_path})


@pytest.fixture(scope="module")
def environment(data):
    return RunEnvironment(data, "cpu, fp32", "a machine", "0123")


def read_csv(folder) -> list[dict]:
    with open(folder / "comparison.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# -- arms -------------------------------------------------------------------------------------------------------------

def test_arm_is_flags_of_train_py():
    assert parse_arm("mlp=grkan, n_layer=4,bias", "--arms") == {"mlp": "grkan", "n_layer": 4, "bias": True}
    assert parse_arm(r"pattern=\d{1,3}|[a,;]+|.,tied=0", "--arms") == {"pattern": r"\d{1,3}|[a,;]+|.", "tied": False}


@pytest.mark.parametrize("text, words", [
    ("mlp=no", "choose one of"), ("mpl=gelu", "did you mean --mlp"), ("n_layer", "give it a value"),
    ("mixer=DDX", "a pattern"), ("n_layer=0", "at least 1"), ("", "no such"), ("help", "give flags of train.py"),
    ("gelu", "did you mean mlp=gelu"), ("n_layer=2,gated_delta", "did you mean mixer=gated_delta"),
    ("vocab_size=260", "at least 261"), ("pattern=gpt3", "neither one of default"),
    ("vocab_size=300,tokenizer_path=a.json", "leave out vocab_size")])
def test_bad_arm_is_refused(text, words):
    with pytest.raises(BadInput, match=words) as error:
        parse_arm(text, "--arms")
    assert str(error.value).startswith(f"--arms {text!r}")


@pytest.mark.parametrize("text, script", [
    ("seed=3", "train"), ("max_iter=3", "train"), ("checkpoint_path=a.pt", "train"), ("tokenizer_bytes=300", "train"),
    ("val_iter=3", "train"), ("device=cpu", "train"), ("epochs=2", "finetune"),
    ("dataset=builtin", "finetune"), ("out_path=a.pt", "finetune")])
def test_flags_of_the_comparison_are_not_an_arms(text, script):
    with pytest.raises(BadInput, match=f"{text.split('=')[0]} is not part of an architecture or recipe"):
        parse_arm(text, "--arms", script)


ARMS = (*(f"mlp={mlp}" for mlp in MLPS), "linear=grkan", "mixer=DA", "mixer=gated_delta", "bias=1", "norm=layer",
        "linear=grkan,mlp=swiglu", "loops=3", "loops=2,sampled_loops=1,mlp=swiglu")


@pytest.mark.parametrize("shape", [SHAPE, SHAPE | {"n_head": 8, "head_size": 64, "n_layer": 6}])
def test_arms_have_the_parameters_of_the_first(data, shape):
    arms = build_arms(CompareConfig(arms=ARMS), shape, data)
    for arm in arms:
        assert abs(arm.n_parameters - arms[0].n_parameters) <= 0.01 * arms[0].n_parameters, arm.name
        assert arm.n_parameters == build_meta_model(arm.flags, data.vocab_size).n_parameters()
    assert arms[0].flags == shape | {"mlp": "relu2"}  # the first stays as it is


def test_hidden_width_by_hand():
    """SwiGLU with three matrices has 3 * width * n_hidden parameters, ReLU² 2 * width * n_hidden."""
    target = build_meta_model(SHAPE | {"mlp": "relu2", "n_hidden": 480}, 512).n_parameters()
    assert match_arm(SHAPE | {"mlp": "swiglu"}, target, 512)["n_hidden"] == 320
    halved = build_meta_model(SHAPE | {"mlp": "relu2", "n_hidden": 256}, 512).n_parameters()
    assert match_arm(SHAPE | {"mlp": "relu2"}, halved, 512)["n_hidden"] == 256


@pytest.mark.parametrize("arm, words", [("linear=chebkan", "change its shape"), ("n_hidden=32", "--match=none"),
                                        ("n_layer=9", "parameters")])
def test_arm_that_cannot_be_matched_is_refused(data, arm, words):
    with pytest.raises(BadInput, match=words):
        build_arms(CompareConfig(arms=("mlp=gelu", arm)), SHAPE, data)
    assert len(build_arms(CompareConfig(arms=("mlp=gelu", arm), match="none"), SHAPE, data)) == 2


@pytest.mark.parametrize("arm", ["batch_size=4", "block_size=32", "preset=gpt2"])
def test_arm_that_would_see_other_data_is_refused(data, arm):
    shape = {name: value for name, value in SHAPE.items() if arm != "preset=gpt2" or name != "batch_size"}
    with pytest.raises(BadInput, match="other data"):
        build_arms(CompareConfig(arms=("mlp=gelu", arm), match="none"), shape, data)


def test_preset_is_an_arm_where_its_batches_are_the_same(data):
    assert len(build_arms(CompareConfig(arms=("mlp=gelu", "preset=gpt2"), match="none"), SHAPE, data)) == 2


def test_null_arm_has_other_seeds(data):
    first, again = build_arms(CompareConfig(arms=("mlp=gelu",), null=True, seeds=2), SHAPE, data)
    assert first.flags == again.flags and first.seeds == (1, 2) and again.seeds == (1001, 1002)
    assert [arm.name for arm in build_arms(CompareConfig(null=True), SHAPE, data)] == ["mlp=gelu", "mlp=gelu again"]


# -- vocabularies -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def vocabularies(data, tmp_path_factory):
    return compare.Vocabularies(data, tmp_path_factory.mktemp("out") / "data")


@pytest.fixture(scope="module")
def vocabulary_arms(data, vocabularies):
    """Of 512 (the data's own), 300 and 700 ids, and of 512 with another pattern and another width."""
    config = CompareConfig(arms=("mlp=gelu", "vocab_size=300", "vocab_size=700", "pattern=gpt2,mlp=swiglu"),
                           budget="bytes=1e5")
    return build_arms(config, SHAPE | {"data_path": data.shards.path}, data, vocabularies.prepared)


def texts(folder, split) -> list[str]:
    chunks = download_data.read_split(compare.open_data(folder), split)
    return [text for chunk in chunks for text in chunk.documents.strings()]


def test_each_vocabulary_has_the_same_documents(vocabulary_arms, data_path):
    assert [arm.vocab_size for arm in vocabulary_arms] == [512, 300, 700, 512]
    assert len({arm.vocabulary for arm in vocabulary_arms}) == 4
    folders = [arm.flags["data_path"] for arm in vocabulary_arms]
    for split in ("val", "train"):
        assert len(texts(folders[0], split)) > 1
        assert all(texts(folder, split) == texts(data_path, split) for folder in folders)
    for arm, folder in zip(vocabulary_arms, folders):
        manifest = compare.open_data(folder).manifest
        assert arm.bytes_per_token == manifest.total("train", "bytes") / manifest.total("train", "tokens")
        assert not {"vocab_size", "pattern", "tokenizer_path"} & arm.flags.keys()
    assert vocabulary_arms[1].bytes_per_token < vocabulary_arms[2].bytes_per_token


def test_shards_of_a_vocabulary_are_written_once(vocabularies, vocabulary_arms):
    """Unless they are damaged, or were not finished."""
    values = SHAPE | {"data_path": vocabularies.base.shards.path, "vocab_size": 300}
    folder = vocabulary_arms[1].flags["data_path"]
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = vocabularies.prepared(values)
    assert again.digests == vocabulary_arms[1].data_digests and again.shards.path == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    for name in ("train_000000.npy", "manifest.json", "tokenizer.json"):
        (again.shards.path / name).unlink()
        assert vocabularies.prepared(values).digests == again.digests
    assert not (again.shards.path / ".lock").exists()


def test_tokenizers_are_trained_on_the_same_training_text(vocabulary_arms, vocabularies, data):
    trained = [Tokenizer.load(arm.flags["data_path"] / "tokenizer.json") for arm in vocabulary_arms[1:3]]
    merges = [[*tokenizer.ranks][256:] for tokenizer in trained]
    assert merges[0] == merges[1][:39] and len(merges[1]) == 439
    sample = [*texts(data.shards.path, "train")][:1]
    few = vocabularies.make_tokenizer(compare.VocabularyConfig(vocab_size=300, tokenizer_bytes=1), 300)
    assert few.ranks == Tokenizer.train(sample, 300).ranks != trained[0].ranks


def test_a_tokenizer_of_ones_own(vocabularies, data, tmp_path):
    tokenizer = Tokenizer.train(["once upon a time"] * 9, 270)
    tokenizer.save(tmp_path / "a.json")
    values = {"data_path": data.shards.path} | parse_arm(f"tokenizer_path={tmp_path / 'a.json'}", "--arms")
    assert vocabularies.prepared(values).shards.tokenizer.fingerprint() == tokenizer.fingerprint()
    assert vocabularies.planned(values).vocab_size == 270


def test_text_is_not_encoded_again_where_the_path_of_the_data_is_spelled_in_another_way(data, vocabularies, vocabulary_arms,
                                                                                     monkeypatch):
    monkeypatch.setattr(compare, "retokenize", None)
    monkeypatch.chdir(data.shards.path.parent)
    shards = dataclasses.replace(data.shards, path=Path(data.shards.path.name))
    moved = dataclasses.replace(vocabularies, base=dataclasses.replace(data, shards=shards))
    assert moved.prepared({"vocab_size": 300}).shards.path == vocabulary_arms[1].flags["data_path"]


def test_budget_in_bytes(vocabulary_arms, environment):
    for arm in vocabulary_arms:
        _, flags = compare.stage_flags(arm, CompareConfig(budget="bytes=1e5"), "run")
        assert flags["max_tokens"] * arm.bytes_per_token == pytest.approx(1e5, rel=1e-3)


@pytest.mark.parametrize("budget, more, words", [
    ("tokens=1e5", {}, r"--budget=tokens=1e5: with different vocabularies .* give --budget bytes=\d"),
    ("bytes=1e5", {"val_iter": 3}, "--val_iter=3: with different vocabularies")])
def test_what_is_unfair_to_different_vocabularies_is_refused(data, budget, more, words):
    for arms in (("mlp=gelu", "vocab_size=300"), ("vocab_size=300", "pattern=gpt2")):
        with pytest.raises(BadInput, match=words):
            build_arms(CompareConfig(arms=arms, budget=budget, match="none"), SHAPE | more, data)
    build_arms(CompareConfig(arms=("vocab_size=300", "vocab_size=300,mlp=relu2"), budget=budget), SHAPE | more, data)


@pytest.mark.parametrize("match", MATCHED)
@pytest.mark.parametrize("arm", ["mlp=swiglu", "mixer=gated_delta", "mixer=AP", "ngram_rows=60"])
def test_arms_have_the_same_of_what_match_names(data, match, arm):
    """And of the others they need not."""
    first, second = (build_meta_model(built.flags, 512) for built in build_arms(
        CompareConfig(arms=("mlp=gelu", arm), match=match), SHAPE | {"n_layer": 2}, data))
    ratios = {name: matched.count(second) / matched.count(first) for name, matched in MATCHED.items()}
    assert ratios[match] == pytest.approx(1, abs=0.01)
    assert arm == "mlp=swiglu" or max(abs(ratio - 1) for ratio in ratios.values()) > 0.01


def test_bytes_of_decoding_by_hand():
    """4 bytes of every weight, and of keys and values of 16 positions in 2 layers; the last position of 4 token shifts."""
    model = build_meta_model({"n_layer": 2, "n_head": 2, "head_size": 4, "block_size": 16}, 30)
    assert decoding_bytes(model) == 4 * (model.n_parameters() + 2 * 2 * 16 * 8 + 4 * 8)


def test_parameters_of_different_vocabularies(data):
    """Hidden layers give up what a larger embedding takes, as far as they have it."""
    def arms(*names, match="parameters"):
        return build_arms(CompareConfig(arms=names, budget="bytes=1e5", match=match), SHAPE, data)
    small, large = arms("vocab_size=300", "vocab_size=600")
    assert abs(large.n_parameters - small.n_parameters) <= 0.01 * small.n_parameters
    assert large.embedding_parameters - small.embedding_parameters == 300 * 128 and large.flags["n_hidden"] < 512
    with pytest.raises(BadInput, match=r"--arms 'vocab_size=9000': has .* more even with hidden layers of width 1.*"
                                       "largest vocabulary first.*--match=non_embedding"):
        arms("vocab_size=300", "vocab_size=9000")
    large, small = arms("vocab_size=9000", "vocab_size=300")
    assert small.flags["n_hidden"] > 1024
    small, large, untied = arms("vocab_size=300", "vocab_size=9000", "vocab_size=9000,tied=0", match="non_embedding")
    assert small.flags == large.flags and untied.embedding_parameters == 2 * large.embedding_parameters
    assert untied.n_parameters == small.n_parameters + (2 * 9000 - 300) * 128
    plain, with_pairs = arms("vocab_size=300", "vocab_size=300,ngram_rows=1000", match="non_embedding")
    assert plain.flags == {name: value for name, value in with_pairs.flags.items() if name != "ngram_rows"}
    assert with_pairs.embedding_parameters == plain.embedding_parameters + 1000 * 128


def test_another_folder_is_an_arm_if_its_validation_text_is_the_same(data, vocabulary_arms, tmp_path, english):
    other = vocabulary_arms[1].flags["data_path"]
    config = CompareConfig(arms=("mlp=gelu", f"data_path={other}"), budget="bytes=1e5")
    common = SHAPE | {"data_path": data.shards.path}
    assert build_arms(config, common, data)[1].data_digests == vocabulary_arms[1].data_digests
    with pytest.raises(BadInput, match="has a vocabulary of its own: leave it out, or vocab_size=300"):
        build_arms(CompareConfig(arms=("mlp=gelu", f"data_path={other},vocab_size=300")), common, data)
    (tmp_path / "text.txt").write_text("\n\n".join(english[40:50]), encoding="utf-8")
    (tmp_path / "test.txt").write_text(english[50], encoding="utf-8")
    download_data.main([f"--dataset={tmp_path}", f"--data_path={tmp_path / 'data'}", "--vocab_size=300"])
    with pytest.raises(BadInput, match="its validation text is not that of"):
        build_arms(CompareConfig(arms=("mlp=gelu", f"data_path={tmp_path / 'data'}")), common, data)


# -- cells ------------------------------------------------------------------------------------------------------------

def cell_name(arm, environment, config=None, stage="run"):
    return make_cell(arm, config or CompareConfig(), environment, stage, 1.0, 1).job.checkpoint.name


@pytest.fixture
def gelu(data):
    return build_arms(CompareConfig(), SHAPE, data)[0]


def test_cells_of_a_seed_differ_in_nothing_but_the_arm(data, environment):
    arms = build_arms(CompareConfig(), SHAPE, data)
    cells = [make_cell(arm, CompareConfig(), environment, "run", 2.0, 3) for arm in arms]
    a, b = (set(cell.job.flags) for cell in cells)
    assert a ^ b == {"--mlp=gelu", "--mlp=relu2"} and {"--seed=3", "--max_tokens=10000000"} <= a
    assert cells[0].job.checkpoint != cells[1].job.checkpoint


def test_cell_name_ignores_what_changes_no_number(gelu, environment):
    """The number of seeds and jobs, how the data's folder is spelled, and, but for speeds, the hardware."""
    name = cell_name(gelu, environment)
    assert cell_name(gelu, environment, CompareConfig(seeds=5, jobs=2)) == name
    for path in ("data", "/home/data"):
        assert cell_name(dataclasses.replace(gelu, flags=gelu.flags | {"data_path": path}), environment) == name
    assert cell_name(gelu, dataclasses.replace(environment, hardware="another")) == name


@pytest.mark.parametrize("changed", [{"machine": "cpu, bf16"}, {"code": "4567"}])
def test_cell_name_changes_with_the_environment(gelu, environment, changed):
    assert cell_name(gelu, dataclasses.replace(environment, **changed)) != cell_name(gelu, environment)


def test_speed_cell_name_changes_with_the_hardware(gelu, environment):
    other = dataclasses.replace(environment, hardware="another")
    assert cell_name(gelu, other, stage="speed") != cell_name(gelu, environment, stage="speed")


def test_a_speed_cell_validates_as_little_as_it_can(data, environment):
    arm = build_arms(CompareConfig(), SHAPE | {"val_iter": 20}, data)[0]
    flags = make_cell(arm, CompareConfig(), environment, "speed", 1.0, 1).job.flags
    assert [flag for flag in flags if flag.startswith(("--val_iter", "--val_bytes"))] == ["--val_bytes=1"]


def test_cell_name_changes_with_the_text(gelu, environment, data):
    manifest = data.shards.manifest
    other = dataclasses.replace(manifest, shards={"train": manifest.shards["train"], "val": manifest.shards["val"][:0]})
    other = compare.TrainingData.from_shards(dataclasses.replace(data.shards, manifest=other))
    assert cell_name(dataclasses.replace(gelu, data_digests=other.digests), environment) != cell_name(gelu, environment)


def test_cell_name_changes_with_the_code_of_a_run(gelu, data, monkeypatch, tmp_path):
    """Of each file that its script imports, see test_code_hash.py."""
    (tmp_path / "runtime").mkdir()
    (tmp_path / "train.py").write_text("import runtime.metrics")
    names = []
    for code in ("bits = 1", "bits = 1  # a comment", "bits = 2"):
        (tmp_path / "runtime" / "metrics.py").write_text(code)
        monkeypatch.setattr(compare, "REPO", tmp_path)
        names.append(cell_name(gelu, compare.detect_environment(CompareConfig(), {"device": "cpu", "dtype": "fp32"}, data)))
    assert names[0] == names[1] != names[2]


def test_seconds_and_tokens_budgets(gelu, environment):
    flags = lambda budget: make_cell(gelu, CompareConfig(budget=budget), environment, "lr_grid", 1.0, 1).job.flags
    assert "--max_seconds=7.5" in flags("seconds=30")
    assert "--max_tokens=25000" in flags("tokens=1e5")


@pytest.mark.parametrize("deeper", ["n_layer=4", "loops=2", "loops=2,sampled_loops=1"])
def test_flops_budget_gives_a_deeper_arm_fewer_tokens(data, environment, deeper):
    arms = build_arms(CompareConfig(arms=("mlp=gelu", deeper), match="none"), SHAPE, data)
    tokens = []
    for arm in arms:
        cell = make_cell(arm, CompareConfig(budget="flops=1e12"), environment, "run", 1.0, 1)
        tokens += [int(flag.split("=")[1]) for flag in cell.job.flags if "max_tokens" in flag]
        assert tokens[-1] * (arm.flops_per_token + arm.elementwise_flops_per_token) == pytest.approx(1e12, rel=1e-4)
    assert tokens[0] > 1.3 * tokens[1]


def test_budget_below_one_step_is_refused(gelu, environment):
    with pytest.raises(BadInput, match="less than a step of 512"):
        make_cell(gelu, CompareConfig(budget="tokens=2000"), environment, "lr_grid", 1.0, 1)


def test_bar_counts_running_cells_in_part_and_ignores_the_time_of_earlier_runs(gelu, environment, tmp_path):
    cells = [make_cell(gelu, CompareConfig(out_path=tmp_path), environment, "run", 1.0, seed) for seed in (1, 2, 3, 4)]
    bar, cost = compare.ComparisonBar(lambda: sum(cell.cost for cell in cells)), cells[0].cost
    bar.add(cells[0], JobResult("finished", is_earlier=True))
    assert bar.bar.initial == bar.bar.n == cost and str(bar.bar).startswith("1 cell done  25%")
    bar.add(cells[1], JobResult("finished"))
    cells[2].job.folder.mkdir(parents=True)
    (cells[2].job.folder / "metrics.jsonl").write_text('{"step": 3, "tokens": 2500000}')
    bar.refresh(cells)
    assert (bar.bar.initial, bar.bar.n, bar.bar.total) == (cost, 2.25 * cost, 4 * cost)
    assert cells[3].progress() == 0 and cost > 0
    bar.bar.close()


def test_expected_cost_follows_the_search(gelu, environment):
    """Three rates on a quarter of the budget, one lower rate on the whole, three seeds; the speed is measured at the end."""
    config = CompareConfig(budget="tokens=1e6")
    results = ArmResults(gelu)
    flops = gelu.flops_per_token + gelu.elementwise_flops_per_token
    assert compare.expected_cost(results, config, environment) == flops * (
        (3 / 4 + 1 + 3) * 1e6 + compare.SPEED_ROUNDS * compare.SPEED_STEPS * 512)
    timed = CompareConfig(budget="seconds=40", rates=(1.0,))
    assert compare.expected_cost(results, timed, environment) == 40 * (1 / 4 + 3)


@pytest.mark.parametrize("budget", ["tokens", "steps=10", "tokens=-1", "tokens=nan", "flops=many"])
def test_bad_budget_is_refused(budget):
    with pytest.raises(BadInput, match=f"--budget={budget}: give tokens=N"):
        CompareConfig(budget=budget)


def test_plan_has_what_makes_it_another_comparison(data):
    """Paths of data are not in it, their fingerprint is."""
    plan = compare.make_plan(CompareConfig(seeds=7), {"data_path": "x", "norm": "layer"}, data)
    assert plan["flags of train.py"] == {"norm": "layer"} and plan["data"] == data.shards.manifest.fingerprint()
    assert {"arms", "budget", "sizes", "rates", "grid_share", "match", "null"} == plan.keys() - {"data", "flags of train.py"}


@pytest.mark.integration
def test_cell_trains_with_its_flags(gelu, environment, data_path, tmp_path):
    arm = dataclasses.replace(gelu, flags=gelu.flags | {"data_path": data_path})
    job = make_cell(arm, CompareConfig(budget="tokens=1024", out_path=tmp_path), environment, "run", 1.0, 7).job
    train.main([f"--checkpoint_path={job.checkpoint}", *job.flags, "--verbose=0", "--device=cpu", "--val_iter=1"])
    settings = load_checkpoint(job.checkpoint)["training"]["settings"]
    assert (settings["seed"], settings["mlp"], settings["max_tokens"]) == (7, "gelu", 1024)
    assert settings["learning_rate"] == pytest.approx(arm.base_lr)


# -- the command, with a train.py that pretends -----------------------------------------------------------------------

FAKE_TRAIN = """
import json, os, signal, sys, time
from pathlib import Path
flags = dict(flag.lstrip("-").split("=", 1) if "=" in flag else (flag.lstrip("-"), "1") for flag in sys.argv[1:])
path = Path(flags["checkpoint_path"]); folder = path.with_suffix(""); folder.mkdir(parents=True, exist_ok=True)
with open(Path(__file__).parent / "log", "a") as log:
    log.write(path.stem + (" resumed" if "resume_checkpoint" in flags else "") + chr(10))
mode = Path(__file__).with_name("mode").read_text()
def fail(code, message):
    print("train.py: " + message, file=sys.stderr)
    sys.exit(code)
if mode in ("damaged", "unreadable"):
    path.write_text("half")
    fail(*((1, "the disk is full") if mode == "damaged" else (2, "damaged, or not a checkpoint")))
if mode == "slow":
    path.write_text("checkpoint")
    signal.signal(signal.SIGTERM, lambda *args: sys.exit(143))
    time.sleep(60)
if "run" in path.stem and "relu2" in path.stem and path.stem.split("-")[-2] == "2":
    if mode == "dies":
        path.write_text("checkpoint")
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "diverges":
        fail(3, "it went wrong")
    if mode == "fails":
        fail(1, "loss is nan: words that a diverged run would end with")
bpb = 1.5 + (0.1 if "relu2" in path.stem else 0) + (0.4 if "grid" in path.stem else 0) + int(path.stem.split("-")[-2]) / 1e3
best = 0.01 if mode == "long" and "run" in path.stem else 0.02
bpb += abs(float(flags.get("learning_rate", 1)) - best) + (sum(map(ord, path.stem)) % 7) * 1e-5
rows = [{"step": n, "tokens": n * 512, "seconds": n / 10, "flops": n, "val_loss": 2 * bpb + 9 / n, "val_bpb": bpb,
         "tok_per_sec": 100.0, "peak_memory": 2**28, "val_bpb/0-15": bpb + 1, "val_bpb/16-31": bpb} for n in (10, 20, 30)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
path.write_text("checkpoint")
"""


@pytest.fixture
def fake_train(tmp_path, monkeypatch):
    """compare.py runs FAKE_TRAIN instead of train.py. fake_train(mode) sets what it does; .log() lists what ran since."""
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "train.py").write_text(FAKE_TRAIN)
    monkeypatch.setattr(compare, "REPO", folder)

    def set_mode(mode: str):
        (folder / "mode").write_text(mode)
        (folder / "log").write_text("")
    set_mode.log = lambda: (folder / "log").read_text().split("\n")[:-1]
    set_mode("succeeds")
    return set_mode


@pytest.fixture
def flags(data_path, tmp_path):
    return [f"--data_path={data_path}", f"--out_path={tmp_path / 'out'}", "--budget=tokens=15360", "--arms", "mlp=gelu",
            "mlp=relu2", "--device=cpu", "--dtype=fp32", *(f"--{name}={value}" for name, value in SHAPE.items())]


@pytest.mark.integration
def test_command_tunes_trains_and_times_every_arm(fake_train, flags, tmp_path, capsys):
    compare.main(flags)
    out, folder = capsys.readouterr().out, tmp_path / "out"
    ran = fake_train.log()
    cells = {stage: sum(f"-{stage}-" in name for name in ran) for stage in ("lr_grid", "run", "speed")}
    assert cells == {"lr_grid": 2 * 3, "run": 2 * (3 + 1), "speed": 2 * 3}
    runs = [name for name in ran if "-run-" in name]
    assert [name.split("-")[0] for name in runs[:4]] == ["mlp=gelu", "mlp=relu2"] * 2  # in turns
    assert [name.split("-")[2:4] for name in runs] == [[rate, seed] for rate, seed in zip("22112222", "11112233")]
    first, second = read_csv(folder)
    assert float(second["difference"]) == pytest.approx(0.1, abs=1e-3) and second["significance"] == "corrected"
    assert second["parameters"] == first["parameters"] and second["runs"] == "3"
    assert float(first["tok_per_sec"]) == 100 and float(first["seconds"]) == pytest.approx(30 * 512 / 100)
    text = (folder / "comparison.md").read_text(encoding="utf-8")
    assert "mlp=relu2: worse than mlp=gelu by 0.10" in text and "2 layers x 128" in text
    n_parameters = f"{int(first['parameters']):,}"  # the same for all, so not in the table
    assert f"parameters {n_parameters}; " in text and f"| {n_parameters} |" not in text
    table = [line.split("  ") for line in out.splitlines()[-6:-3]]
    assert [line[0] for line in table] == ["arm", "mlp=gelu", "mlp=relu2"] and table[2][-1] == "worse"
    assert all(len(line) <= 80 for line in out.splitlines() if "html" not in line)
    assert not list(folder.glob("runs/*.pt"))  # finished runs need no checkpoint
    assert (folder / "curves.svg").stat().st_size > 5000 and (folder / "front.svg").stat().st_size > 5000


@pytest.mark.integration
def test_a_screen_chooses_what_is_confirmed_with_new_seeds(fake_train, flags, tmp_path, capsys):
    """Of three arms besides the first, all with two seeds: the best one, with as many new seeds as their spread asks for."""
    flags = [*flags, "--arms", "mlp=gelu", "mlp=relu2", "mlp=swiglu", "mlp=gelu_tanh", "--screen", "--confirm=1",
             "--rates", "1", "--smallest_difference=0.00002", "--most_seeds=4", "--match=none"]
    compare.main(flags)
    captured, ran = capsys.readouterr(), fake_train.log()
    runs = {arm: sorted(name.split("-")[-2] for name in ran if name.startswith(f"{arm}-") and "-run-" in name)
            for arm in (name.split("-")[0] for name in ran)}
    assert sum(seeds == ["1", "2"] for seeds in runs.values()) == 2 and len(runs) == 4
    assert sum(seeds == ["1", "2", "3", "4", "5", "6"] for seeds in runs.values()) == 2  # of the first and the best arm
    assert runs["mlp=gelu"] == ["1", "2", "3", "4", "5", "6"] and runs["mlp=relu2"] == ["1", "2"]
    assert "confirming mlp=" in captured.err and "with 4 new seeds: paired differences have" in captured.err
    assert "3 degrees of freedom" in captured.err and "would take" in captured.err and "--most_seeds" in captured.err
    assert sum("-speed-" in name for name in ran) == 2 * 3
    with open(tmp_path / "out" / "comparison.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["stage"], row["runs"]) for row in rows] == [("confirm", "4")] * 2 + [("screen", "2")] * 4
    assert [bool(row["p_holm"]) for row in rows] == [False, True] + [False] * 4 and rows[1]["comparisons"] == "1"
    assert "### Screen" in (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert captured.out.count(" screened") == 3
    compare.main(flags)
    assert fake_train.log() == ran  # nothing is run twice


@pytest.mark.integration
def test_command_compares_lengths_of_context(fake_train, flags, tmp_path, capsys, monkeypatch):
    """Each arm at each; what decoding costs is measured once."""
    flags = [*flags, "--lengths", "32", "128", "--rates", "1", "--seeds=2"]
    compare.main(flags)
    out, folder, ran = capsys.readouterr().out, tmp_path / "out", fake_train.log()
    for length in (32, 128):
        names = [name for name in ran if f"block_size={length}-" in name]
        assert len(names) == len(ran) / 2 and {name.split("-")[0] for name in names} == {"mlp=gelu", "mlp=relu2"}
    rows = read_csv(folder)
    assert [(row["size"], row["arm"], row["comparisons"]) for row in rows] == [
        (f"block_size={length}", arm, "2" if arm == "mlp=relu2" else "") for length in (32, 128)
        for arm in ("mlp=gelu", "mlp=relu2")]
    contexts, positions = (list(csv.DictReader((folder / f"{name}.csv").read_text(encoding="utf-8").splitlines()))
                           for name in ("context", "positions"))
    assert [float(row["bpb"]) for row in contexts] == [float(row["bpb"]) for row in rows]
    assert [float(row["step_ms"]) for row in contexts] == [1e3 * 512 / 100] * 4  # as many tokens at each length
    assert [int(row["cache_bytes"]) for row in contexts] == [4 * 2 * (2 * length + 2) * 128 for length in (32, 32, 128, 128)]
    assert all(float(row["decode_tok_per_sec"]) > 0 for row in contexts)
    assert [(row["context"], row["first_position"], row["last_position"]) for row in positions] == [
        (str(length), *bounds) for length in (32, 128) for _ in range(2) for bounds in (("0", "15"), ("16", "31"))]
    assert float(positions[2]["difference"]) == pytest.approx(0.1, abs=1e-3)
    text, page = (folder / "comparison.md").read_text(encoding="utf-8"), parse_page(folder / "comparison.html").text
    for words in ("By length of context", "By position in the context", "cache, KiB", "128"):
        assert words in text and words in page, words
    assert all((folder / f"{name}.svg").stat().st_size > 5000 for name in ("contexts", "positions_32", "positions_128"))
    assert out.count("block_size=128") > 4 and "decoding tok/s" in out and "Loss against FLOPs" not in text
    monkeypatch.setattr(compare, "time_decoding", None)
    before = (folder / "context.csv").read_text(encoding="utf-8")
    compare.main(flags)
    assert fake_train.log() == ran and (folder / "context.csv").read_text(encoding="utf-8") == before


@pytest.mark.integration
def test_command_compares_vocabularies(fake_train, flags, tmp_path, capsys):
    """With as much text for each; what was encoded stays, and is used again by the same command."""
    arms = ["vocab_size=300", "vocab_size=400", "vocab_size=600,mlp=relu2", "vocab_size=600"]
    flags = [*flags, "--budget=bytes=40000", "--match=non_embedding", "--arms", *arms]
    compare.main(flags)
    out, folder = capsys.readouterr().out, tmp_path / "out"
    rows = read_csv(folder)
    assert [row["vocab_size"] for row in rows] == ["300", "400", "600", "600"] and rows[2]["arm"] == arms[2]
    for row in rows:
        assert float(row["tokens_per_byte"]) == pytest.approx(1 / float(row["bytes_per_token"]))
        assert float(row["bytes_per_context"]) == pytest.approx(64 * float(row["bytes_per_token"]))
        assert float(row["bytes_per_sec"]) == pytest.approx(100 * float(row["bytes_per_token"]))
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("data/*/*.npy")}
    assert len({path.parent for path in kept}) == 3
    text, page = (folder / "comparison.md").read_text(encoding="utf-8"), parse_page(folder / "comparison.html").text
    for words in ("bytes per context", "embedding's share of parameters", "as many parameters besides embeddings",
                  "Lowest mean: vocab_size=", "Bits per byte against the size of the vocabulary"):
        assert words in text and words in page, words
    assert "\nvocab_size: " in out and (folder / "vocabulary.svg").stat().st_size > 5000
    fake_train("succeeds")
    compare.main(flags)
    assert not fake_train.log() and kept == {path: path.stat().st_mtime_ns for path in folder.glob("data/*/*.npy")}


def test_dry_run_prints_a_forecast_and_writes_nothing(fake_train, flags, tmp_path, capsys):
    compare.main([*flags, "--dry_run", "--arms", "mlp=gelu", "vocab_size=300", "--budget=bytes=40000"])
    head, *rows, time, memory, disk = capsys.readouterr().out.splitlines()
    assert head.split() == ["arm", "parameters", "memory", "tokens/s", "runs", "time"]
    for row, name in zip(rows, ["mlp=gelu", "vocab_size=300"], strict=True):
        arm, _, peak, unit, speed, runs, *_ = row.split()
        assert arm == name and runs == "7" and float(speed.replace(",", "")) > 0 and float(peak) > 1 and unit.endswith("iB")
    assert time.startswith("time    about") and "14 processes" in time
    assert memory.endswith(" available") and disk.startswith("disk    about") and "1 other vocabulary," in disk
    assert not fake_train.log() and not (tmp_path / "out").exists()
    compare.main([*flags, "--dry_run", "--screen", "--lengths", "32"])
    out = capsys.readouterr().out
    assert "12 processes included; that is the screen alone" in out and out.splitlines()[1].split()[-3] == "6"
    assert [line.split()[1] for line in out.splitlines()[1:3]] == ["block_size=32"] * 2


@pytest.mark.integration
def test_rate_too_high_for_the_whole_budget_is_lowered(fake_train, flags, tmp_path):
    """0.025 is best on a part, 0.0125 on the whole, 0.00625 on neither."""
    fake_train("long")
    compare.main(flags)
    runs = [name.split("-")[2:4] for name in fake_train.log() if "-run-" in name]
    assert runs == [[rate, seed] for rate, seed in zip(["2", "2", "1", "1", "0.5", "0.5", "1", "1", "1", "1"], "1111112233")]
    assert {(float(row["learning_rate"]), row["at_grid_edge"]) for row in read_csv(tmp_path / "out")} == {(0.0125, "False")}


@pytest.mark.integration
def test_finished_cells_are_not_run_again(fake_train, flags, capsys):
    compare.main(flags)
    before = capsys.readouterr().out
    fake_train("succeeds")
    compare.main(flags)
    again = capsys.readouterr().out
    assert not fake_train.log() and again.splitlines()[-5:-1] == before.splitlines()[-5:-1]
    compare.main([*flags, "--seeds=4"])
    assert len(fake_train.log()) == 2 and all("-run-" in name for name in fake_train.log())


@pytest.mark.integration
def test_page_is_self_contained(fake_train, flags, tmp_path):
    compare.main([*flags, "--sizes", "n_layer=1", "n_layer=2"])
    page = parse_page(tmp_path / "out" / "comparison.html")
    assert not page.open and page.tags.count("svg") == 11 and page.tags.count("table") == 2
    assert all(address.startswith("#") for address in page.addresses)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    for words in ("mlp=relu2: worse than mlp=gelu", "Loss against FLOPs", "Pareto front", "n_layer=1", "95 %"):
        assert words in page.text, words


@pytest.mark.integration
@pytest.mark.parametrize("mode, words", [
    ("diverges", "diverged: it went wrong"), ("dies", "killed: by signal 9"), ("fails", "failed: loss is nan")])
def test_unfinished_runs_are_reported(fake_train, flags, tmp_path, capsys, mode, words):
    fake_train(mode)
    if mode == "diverges":
        compare.main(flags)
    else:
        with pytest.raises(SystemExit) as stop:
            compare.main(flags)
        assert stop.value.code == 1
    printed = capsys.readouterr()
    assert ("some runs failed" in printed.err) == (mode != "diverges")
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert f"mlp=relu2, learning rate x 2, seed 2: {words}" in text and "| 2 of 3 |" in text and "2 seeds)" in text
    assert f"left out: mlp=relu2, learning rate x 2, seed 2: {words}" in printed.out
    fake_train("succeeds")
    compare.main(flags)
    assert len(fake_train.log()) == (0 if mode == "diverges" else 1)
    if mode == "dies":
        assert fake_train.log()[0].endswith(" resumed")


@pytest.mark.integration
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_saves_running_cells(flags, tmp_path, fake_train):
    """Sent as a terminal does it, to the whole process group."""
    fake_train("slow")
    program = f"""
import sys; sys.path.insert(0, {str(REPO)!r})
import compare; from pathlib import Path
compare.REPO = Path({str(compare.REPO)!r})
compare.main({[*flags, "--jobs=2"]!r})
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    end = time.monotonic() + 60
    while len(fake_train.log()) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "the same command continues" in error and "Traceback" not in error, error
    assert len(fake_train.log()) == 2 and len(list((tmp_path / "out" / "runs").glob("*.pt"))) == 2
    fake_train("succeeds")
    compare.main(flags)
    assert sum(name.endswith(" resumed") for name in fake_train.log()) == 2


@pytest.mark.integration
def test_unreadable_checkpoint_is_reported_once(fake_train, flags):
    """It would fail forever."""
    for mode in ("damaged", "unreadable"):
        fake_train(mode)
        with pytest.raises(SystemExit):
            compare.main(flags)
    assert all(name.endswith(" resumed") for name in fake_train.log())
    fake_train("succeeds")
    compare.main(flags)
    assert not any(name.endswith(" resumed") for name in fake_train.log())


@pytest.mark.parametrize("more, words", [
    (["--arms", "mlp=gelu"], "two or more"), (["--arms", "mlp=gelu", "mlp=gelu"], "has a duplicate"),
    (["--rates", "1", "1.0"], "--rates 1.0 1.0: has a duplicate"),
    (["--sizes", "n_layer=2", "n_layer=2"], "has a duplicate"), (["--arms", "mlp=gelu", "help"], "'help': give flags"),
    (["--arms", "mlp=gelu", "mlp=what"], "'mlp=what': --mlp=what: choose one of"),
    (["--budget=tokens=600"], "less than a step"),
    (["--arms", "mlp=gelu", "vocab_size=300"], "--budget=tokens=15360: with different vocabularies"),
    (["--arms", "vocab_size=300", "vocab_size=400", "--budget=bytes=2e4", "--val_iter=3"], "--val_iter=3: with different"),
    (["--arms", "mlp=gelu", "tokenizer_path=none.json", "--budget=bytes=2e4"], "none.json: no tokenizer to read"),
    (["--arms", "mlp=gelu", "pattern=([", "--budget=bytes=2e4"], "nor a regular expression"),
    (["--arms", "vocab_size=300", "vocab_size=90000", "--budget=bytes=2e4"], "--match=non_embedding"),
    (["--lengths", "48"], "no whole number of blocks of 48: give a --batch_size that is a multiple of 3"),
    (["--lengths", "32", "--arms", "mlp=gelu", "block_size=32"], "'block_size=32': block_size follows from --lengths"),
    (["--confirm=2"], "--confirm=2: has a meaning with --screen alone"),
    (["--most_seeds=2"], "--most_seeds=2: has a meaning with --screen alone"),
    (["--arms", "mlp=gelu", "--null", "--screen"], "--screen: chooses among arms that are trained, not with --null"),
    (["--budget=bytes=900"], "less than a step"), (["--arms", "gelu", "swiglu"], "'gelu': did you mean mlp=gelu?"),
    (["--budget=cups=2"], "give tokens=N"), (["--budget=seconds=9", "--jobs=2"], "only one run at a time"),
    (["--data_path=/nowhere"], "no shards to read"), (["--batch_size=auto"], "give a number"), (["--rates", "0"], "above 0"),
    (["--budget=tokens=١٢٠٠"], "give tokens=N"), (["--budget=tokens=1e999"], "give tokens=N"),
    (["--sizes", "n_layer=9999"], "--n_layer=9999: must be at most 1000"),
    (["--max_iter=5"], "no such flag"), (["--block_size=100000"], "--block_size=100000"),
    (["--device=cuda:77"], "not on this")])
def test_bad_input_is_refused_in_a_line(fake_train, refused, flags, tmp_path, more, words):
    refused(compare.main, [*flags, *more], words)
    assert not fake_train.log() and not (tmp_path / "out").exists()


@pytest.mark.integration
@pytest.mark.parametrize("plan", ["", "[]", "3", "null", '{"arms": ', "[" * 100_000])
def test_a_plan_that_cannot_be_read_is_written_again(fake_train, flags, tmp_path, plan):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.json").write_text(plan)
    compare.main(flags)
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["budget"] == "tokens=15360"


@pytest.mark.integration
def test_results_of_another_comparison_are_not_replaced(fake_train, refused, flags, tmp_path):
    compare.main(flags)
    before = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    refused(compare.main, [*flags, "--budget=tokens=20480"], "holds a comparison that differs in budget", "--overwrite")
    refused(compare.main, [*flags, "--norm=layer"], "differs in flags of train.py")
    assert (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8") == before
    compare.main([*flags, "--budget=tokens=20480", "--overwrite"])


# -- the command with the real scripts --------------------------------------------------------------------------------

@pytest.mark.integration
def test_command_with_the_real_train_py(data_path, tmp_path, monkeypatch, forked):
    """Two arms end to end, at a length of context; the tables hold what their runs logged."""
    monkeypatch.setattr(compare, "SPEED_ROUNDS", 1)
    compare.main([f"--data_path={data_path}", f"--out_path={tmp_path / 'out'}", "--arms", "mlp=gelu",
                  "linear=grkan,mixer=DA", "--budget=tokens=1024", "--seeds=2", "--rates", "1", "--jobs=2", *TINY_MODEL,
                  "--lengths", "32", "--batch_size=4", "--num_batch_accum=1", "--val_iter=2"])
    positions = list(csv.DictReader((tmp_path / "out" / "positions.csv").read_text(encoding="utf-8").splitlines()))
    for row, name in zip(read_csv(tmp_path / "out"), ("mlp=gelu", "linear=grkan_mixer=DA")):
        ends = [run_rows(folder.with_suffix(".pt"))[-1] for folder in sorted(tmp_path.glob(f"out/runs/{name}-*-run-*"))]
        assert len(ends) == 2 and all(end["tokens"] == 1024 and end["step"] == 16 for end in ends)
        assert float(row["bpb"]) == pytest.approx(sum(end["val_bpb"] for end in ends) / 2)
        for bins in ("0-15", "16-31"):
            found, = (float(row["bpb"]) for row in positions
                      if readable_name(row["arm"]) == name and f"{row['first_position']}-{row['last_position']}" == bins)
            assert found == pytest.approx(sum(end[f"val_bpb/{bins}"] for end in ends) / 2)
    results = [json.loads(path.read_text()) for path in tmp_path.glob("out/runs/*/result.json")]
    assert len(results) == 2 * (1 + 2 + 1) and {result["status"] for result in results} == {"finished"}


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}?", "answer": "yes"}) + "\n" for i in range(60)))
    return path


def test_models_with_different_tokenizers_have_different_vocabularies(questions, tmp_path):
    """Their tokens are not compared, though as many vectors are in their embeddings."""
    shape = GPTConfig(n_layer=1, n_head=1, head_size=8, block_size=64, vocab_size=270)
    for name, text in (("a", "once upon a time"), ("b", "twice below a time"), ("c", "once upon a time")):
        tokenizer = Tokenizer.train([text] * 9, 270)
        save_checkpoint(tmp_path / f"{name}.pt", GPT(shape).to_checkpoint() | {"tokenizer": tokenizer.to_json()})
    config = CompareConfig(script="finetune", arms=tuple(f"checkpoint_path={tmp_path / name}.pt" for name in "abc"))
    common = {"dataset": str(questions)}
    a, b, c = (arm.vocabulary for arm in build_arms(config, common, compare.load_conversations(common)))
    assert a == c != b


@pytest.mark.integration
def test_finetuning_runs_are_compared(run_train, questions, tmp_path, monkeypatch, forked):
    """Two models to start from, end to end."""
    monkeypatch.setattr(compare, "SPEED_ROUNDS", 1)
    monkeypatch.setattr(compare, "VALIDATIONS", 2)
    a, b = (run_train("--max_iter=1", f"--mlp={mlp}", checkpoint=f"{mlp}/gpt.pt") for mlp in ("gelu", "swiglu"))
    flags = ["--script=finetune", f"--dataset={questions}", "--arms", f"checkpoint_path={a}", f"checkpoint_path={b}",
             "--budget=tokens=400", "--seeds=2", "--rates=1", "--grid_share=1", "--batch_size=4", "--device=cpu",
             "--val_conversations=4", f"--out_path={tmp_path / 'out'}"]
    compare.main(flags)
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert "conversations of" in page and "swiglu/gpt.pt" in page and "<svg" in page
    assert len(read_csv(tmp_path / "out")) == 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").rglob("metrics.jsonl")}
    assert len(before) == 2 * (1 + 2 + 1)  # the learning rate, each seed, the speed
    compare.main([*flags, "--overwrite"])
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").rglob("metrics.jsonl")}


@pytest.mark.parametrize("arms, words", [
    (["mlp=gelu", "mlp=relu2"], ["--arms 'mlp=gelu'", "--mlp", "no such flag"]),
    (["checkpoint_path=none.pt", "checkpoint_path=other.pt"], ["none.pt", "no checkpoint"]),
    (["dataset=builtin", "learning_rate=1"], ["dataset is not part"])])
def test_bad_finetuning_arm_is_refused(arms, words, questions, tmp_path, refused):
    flags = ["--script=finetune", f"--dataset={questions}", f"--out_path={tmp_path / 'out'}"]
    refused(compare.main, [*flags, "--arms", *arms], *words)


def test_unknown_role_is_refused_before_any_run(tmp_path, refused):
    rows = [{"messages": [{"role": "user", "content": f"{i}"}, {"role": "robot", "content": "x"}]} for i in range(4)]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(compare.main, ["--script=finetune", f"--dataset={path}", f"--out_path={tmp_path / 'out'}", "--arms",
                           "checkpoint_path=a.pt", "checkpoint_path=b.pt"], "chat.jsonl", "unknown role 'robot'")
    assert not (tmp_path / "out").exists()
