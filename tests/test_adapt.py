"""adapt.py: rows of documents, their controls, and an evaluation that goes on where it was stopped."""
import json
import math
import signal

import pytest
import torch

import adapt
from download_data import held_out_texts, read_split
from evaluate import document_losses
from experiments.adaptation import by_position, gains, gains_by_quarter, pooled_bits_per_byte, seconds_ratio, verdict
from learner import AdaptConfig, Learner
from runtime.checkpoint import save_checkpoint
from runtime.device import Machine
from sampling import load_pretrained
from shards import open_data
from text.sources import SourceConfig

CPU = Machine(torch.device("cpu"), "fp32")
TIMINGS = {"static_seconds", "adapted_seconds"}


@pytest.fixture(scope="module")
def documents(tmp_path_factory, english):
    path = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    texts = [english[i][:size] for i, size in enumerate((70, 150, 45, 3, 100))]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path, texts


def run(*flags: str):
    adapt.main(["--device=cpu", "--dtype=fp32", "--adapt_hop=4", *flags])


def rows_in(folder) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "documents.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


# -- one evaluation ---------------------------------------------------------------------------------------------------

def test_rows_hold_what_each_reading_costs(trained, documents, tmp_path, capsys):
    path, texts = documents
    run(f"--checkpoint_path={trained}", f"--dataset={path}", f"--out_path={tmp_path / 'out'}")
    rows, printed = rows_in(tmp_path / "out"), capsys.readouterr().out
    texts = [text for i, text in enumerate(texts) if i != 3]  # a document shorter than a hop
    assert len(rows) == 4 and "Left out: 1 document of at most 4 tokens." in printed
    model, tokenizer, _ = load_pretrained(trained)
    for text, row in zip(texts, rows):
        expected, = document_losses(model, tokenizer, CPU, [text], 4)
        assert sum(row["static"]) == pytest.approx(expected.nats, rel=1e-5)
        assert row["bytes"] == sum(row["hop_bytes"]) == expected.text_bytes
        assert row["tokens"] == sum(row["hop_tokens"]) == expected.tokens
        assert row["adapted"][0] == pytest.approx(row["static"][0], rel=1e-5)
    learner = Learner(model, AdaptConfig(adapt_hop=4), CPU)
    learner.read(torch.tensor([tokenizer.separator_id, *tokenizer.encode(texts[3])]))
    other = learner.read(torch.tensor([tokenizer.separator_id, *tokenizer.encode(texts[0])]), learn=False)
    assert rows[3]["next"] == pytest.approx(other.sum().item(), rel=1e-6)  # the last is followed by the first
    for line in ("static ", "adapted ", "adapted to another document", "static, stride", "first", "fourth", "times the"):
        assert line in printed
    tables = [line for line in printed.splitlines() if "  " in line]
    assert len(tables) > 8 and max(map(len, tables)) <= 80
    page = (tmp_path / "out" / "adaptation.html").read_text()
    assert page.count("<svg") == 2 and "adapted to another document" in page


def test_the_overlap_costs_as_much_as_adapting(trained, documents, tmp_path):
    model, tokenizer, _ = load_pretrained(trained)
    learner = Learner(model, AdaptConfig(adapt_hop=4), CPU)
    config = adapt.AdaptRunConfig(checkpoint_path=trained, dataset=str(documents[0]))
    found, _ = adapt.read_documents(config, tokenizer, 4)
    flops, stride, extra_bytes = adapt.measure_cost(learner, found)
    forward, n = model.flops_per_token() / 3, 16  # tokens in a window of the model
    assert flops["overlap"] == pytest.approx(forward * n / stride, rel=0.01)
    assert flops["overlap"] == pytest.approx(flops["adapted"], rel=0.2)
    assert flops["static"] < 2 * forward and 1.5 * forward < flops["adapted"] - flops["static"] < 2.1 * forward
    assert extra_bytes > 16 * learner.n_trained() * 0.99
    assert all(torch.equal(parameter, initial) for parameter, initial in learner.weights)


def test_a_recurrent_model_may_keep_its_state(run_train, documents, tmp_path, capsys):
    model = run_train("--mixer=gated_delta", "--max_iter=2")
    run(f"--checkpoint_path={model}", f"--dataset={documents[0]}", f"--out_path={tmp_path / 'out'}", "--limit=2")
    assert "static, state kept" in (printed := capsys.readouterr().out) and "adapted, state kept" in printed
    long = rows_in(tmp_path / "out")[1]
    assert long["static_kept"] != pytest.approx(sum(long["static"]), rel=1e-6)


def test_a_data_folder_gives_its_validation_documents(data_path, english):
    texts = list(held_out_texts(SourceConfig(str(data_path))))
    expected = [text for chunk in read_split(open_data(data_path), "val") for text in chunk.documents.strings()]
    assert texts == expected and 1 <= len(texts) < 40


def test_held_out_files_are_read_where_a_folder_has_some(tmp_path):
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"of {name}"}) + "\n")
    assert list(held_out_texts(SourceConfig(str(tmp_path)))) == ["of validation"]
    (tmp_path / "validation.jsonl").unlink()
    assert list(held_out_texts(SourceConfig(str(tmp_path)))) == ["of train"]


# -- stopped and resumed ----------------------------------------------------------------------------------------------

def test_stopped_and_resumed_gives_the_same_rows(trained, documents, tmp_path, monkeypatch, capsys):
    flags = [f"--checkpoint_path={trained}", f"--dataset={documents[0]}"]
    run(*flags, f"--out_path={tmp_path / 'whole'}")
    read, n_read = adapt.read_document, []

    def watched(*args):
        row = read(*args)
        n_read.append(row)
        if len(n_read) == 2:
            signal.raise_signal(signal.SIGTERM)
        return row
    monkeypatch.setattr(adapt, "read_document", watched)
    with pytest.raises(SystemExit) as stop:
        run(*flags, f"--out_path={tmp_path / 'stopped'}")
    assert stop.value.code == 128 + signal.SIGTERM
    assert "stopped after 2 of 4 documents, which are kept: the same command continues" in capsys.readouterr().err
    with open(tmp_path / "stopped" / "documents.jsonl", "a") as file:
        file.write('{"digest": "cut off by a cra')
    run(*flags, f"--out_path={tmp_path / 'stopped'}")
    assert len(n_read) == 4
    resumed = adapt.read_rows(tmp_path / "stopped" / "documents.jsonl").values()
    assert [{name: value for name, value in row.items() if name not in TIMINGS} for row in resumed] == rows_in(
        tmp_path / "whole")


def test_a_document_that_comes_again_is_left_out(trained, tmp_path, capsys, english):
    """Else the weights that it has led to would be those "of another document"."""
    texts = [english[0][:200], english[1][:200], english[0][:200]]
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    run(f"--checkpoint_path={trained}", f"--dataset={tmp_path / 'twice.jsonl'}", f"--out_path={tmp_path / 'out'}")
    assert len(rows_in(tmp_path / "out")) == 2
    assert "Left out: 1 document that had come before." in capsys.readouterr().out


def test_more_documents_are_added(trained, documents, tmp_path):
    flags = [f"--checkpoint_path={trained}", f"--dataset={documents[0]}"]
    run(*flags, f"--out_path={tmp_path / 'grown'}", "--limit=2")
    run(*flags, f"--out_path={tmp_path / 'grown'}", "--limit=4")
    run(*flags, f"--out_path={tmp_path / 'whole'}")
    grown = adapt.read_rows(tmp_path / "grown" / "documents.jsonl")  # of two rows of a document the last one counts
    for row in rows_in(tmp_path / "whole"):
        assert {name: value for name, value in grown[row["digest"]].items() if name not in TIMINGS} == row


def test_damaged_rows_are_read_again(trained, documents, tmp_path):
    flags = [f"--checkpoint_path={trained}", f"--dataset={documents[0]}", f"--out_path={tmp_path / 'out'}", "--limit=3"]
    run(*flags)
    whole, path = rows_in(tmp_path / "out"), tmp_path / "out" / "documents.jsonl"
    damaged = [{"digest": whole[0]["digest"]}, {"digest": [1]}, [], {**whole[1], "stride": 1}]
    path.write_text("".join(json.dumps(row) + "\n" for row in damaged))
    run(*flags)
    found = {row["digest"]: row for row in rows_in(tmp_path / "out")}
    assert [found[row["digest"]] for row in whole] == whole


# -- what cannot be read ----------------------------------------------------------------------------------------------

def test_a_document_that_diverges_is_left_out(trained, documents, tmp_path, monkeypatch, capsys):
    read = Learner.read

    def diverge(self, ids, *args, **kwargs):
        if len(ids) > 50 and kwargs.get("learn", True):
            raise FloatingPointError("loss or gradient not finite at step 7: lower --adapt_rate, now 0.0006")
        return read(self, ids, *args, **kwargs)
    monkeypatch.setattr(Learner, "read", diverge)
    flags = [f"--checkpoint_path={trained}", f"--dataset={documents[0]}", f"--out_path={tmp_path / 'out'}"]
    run(*flags)
    printed = capsys.readouterr().out
    assert "document 2: left out" in printed and "documents that diverged were left out: loss or gradient not" in printed
    assert "of 3" in printed or "of 2" in printed
    monkeypatch.setattr(Learner, "read", lambda self, ids, *args, **kwargs: diverge(self, ids.repeat(9), *args, **kwargs))
    with pytest.raises(SystemExit) as stop:
        run(*flags[:2], f"--out_path={tmp_path / 'none'}")
    assert stop.value.code == 3


def test_bad_input(trained, documents, tmp_path, refused):
    def flags(*more, checkpoint=trained, dataset=documents[0]):
        return ["--device=cpu", f"--checkpoint_path={checkpoint}", f"--dataset={dataset}", f"--out_path={tmp_path / 'out'}",
                *more]
    refused(adapt.main, flags(checkpoint=tmp_path / "none.pt"), "none.pt")
    refused(adapt.main, flags(checkpoint=documents[0]), "documents.jsonl")
    save_checkpoint(tmp_path / "rules.pt", load_pretrained(trained)[0].to_checkpoint())
    refused(adapt.main, flags(checkpoint=tmp_path / "rules.pt"), "rules.pt: holds no tokenizer: give a model of text")
    refused(adapt.main, flags(dataset=tmp_path / "nothing.txt"), "nothing.txt")
    refused(adapt.main, flags("--adapt_hop=500", "--max_tokens=3"), "holds no document of more than --adapt_hop=8 tokens",
            "and 5 shorter or repeated ones")
    refused(adapt.main, flags("--adapt_scope=norms"), "--adapt_scope=norms", "no parameters there")
    refused(adapt.main, flags("--adapt_rate=0"), "--adapt_rate")
    for unused, needed in (("adapt_rank=4", "adapt_scope=lora"), ("adapt_pull=0.1", "adapt_optimizer=rms"),
                           ("adapt_statistics=notes.txt", "adapt_optimizer=rms")):
        refused(adapt.main, flags(f"--{unused}"), f"--{unused}: is only used with --{needed}")
    refused(adapt.main, ["--task=rules", "--dataset="], "--dataset=: ")
    refused(adapt.main, ["--task=rules", "--adapt_statistics=notes.txt"], "--adapt_statistics=notes.txt: is only used with")
    refused(adapt.main, flags("--adapt_optimizer=rms", "--adapt_statistics=/none/there"), "--adapt_statistics=/none/there: ")
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty.txt").write_text("")
    refused(adapt.main, flags(dataset=tmp_path / "empty.txt"), "empty.txt")


def test_rows_of_other_settings_are_kept_unless_told(trained, documents, tmp_path, refused):
    flags = [f"--checkpoint_path={trained}", f"--dataset={documents[0]}", f"--out_path={tmp_path / 'out'}", "--limit=2"]
    run(*flags)
    before = rows_in(tmp_path / "out")
    refused(adapt.main, ["--device=cpu", "--dtype=fp32", "--adapt_hop=4", "--adapt_rate=0.1", *flags], "holds an evaluation "
            "that differs in adapt_rate", "--overwrite")
    assert rows_in(tmp_path / "out") == before
    run("--adapt_rate=0.1", "--overwrite", *flags)
    after = rows_in(tmp_path / "out")
    assert len(after) == 2 and after[0]["static"] == before[0]["static"] and after[0]["adapted"] != before[0]["adapted"]


@pytest.mark.parametrize("plan", [None, "", "[]", '{"adapt_rate": '])
def test_rows_without_a_plan_are_kept_unless_told(trained, documents, tmp_path, refused, plan):
    flags = [f"--checkpoint_path={trained}", f"--dataset={documents[0]}", f"--out_path={tmp_path / 'out'}", "--limit=2"]
    run(*flags)
    before = rows_in(tmp_path / "out")
    (tmp_path / "out" / "plan.json").unlink() if plan is None else (tmp_path / "out" / "plan.json").write_text(plan)
    flags += ["--device=cpu", "--dtype=fp32", "--adapt_hop=4", "--adapt_rate=0.1"]
    refused(adapt.main, flags, "documents.jsonl", "plan.json", "--overwrite")
    assert rows_in(tmp_path / "out") == before
    run(*flags, "--overwrite")
    assert [row["adapted"] != other["adapted"] for row, other in zip(rows_in(tmp_path / "out"), before)] == [True, True]


# -- the numbers by hand ----------------------------------------------------------------------------------------------

LN2 = math.log(2)
ROWS = [{"bytes": 10, "static": [4 * LN2, 6 * LN2, 6 * LN2, 4 * LN2], "adapted": [4 * LN2, 5 * LN2, 4 * LN2, 2 * LN2],
         "hop_tokens": [10, 6, 10, 2], "hop_bytes": [2, 3, 3, 2], "other": 25 * LN2,
         "static_seconds": 1.0, "adapted_seconds": 3.0},
        {"bytes": 2, "static": [4 * LN2], "adapted": [4 * LN2], "hop_tokens": [4], "hop_bytes": [2], "other": None,
         "static_seconds": 1.0, "adapted_seconds": 2.0}]


def test_gains_by_hand():
    assert gains(ROWS, "adapted") == pytest.approx([-0.5, 0.0]) and gains(ROWS, "other") == pytest.approx([0.5])
    assert pooled_bits_per_byte(ROWS, "static") == pytest.approx(24 / 12)
    assert gains_by_quarter(ROWS) == [[0], [pytest.approx(-1 / 3)], [pytest.approx(-2 / 3)], [pytest.approx(-1), 0]]
    assert seconds_ratio(ROWS) == 2.5
    assert "No significant difference" in verdict(ROWS)
    curves = by_position(ROWS, width=2)
    assert curves["static"] == [(8, pytest.approx(14 / 7)), (22, pytest.approx(10 / 5))]
    assert curves["adapted"] == [(8, pytest.approx(13 / 7)), (22, pytest.approx(6 / 5))]


@pytest.mark.parametrize("static, adapted, other, words", [
    (2.0, 1.5, 2.1, "Adapted is better than static;"), (2.0, 2.5, 2.1, "Adapted is worse than static: lower --adapt_rate"),
    (2.0, 1.5, 1.7, "but so is what another document has led to")])
def test_the_verdict_claims_what_intervals_support(static, adapted, other, words):
    rows = [{"bytes": 10, "static": [(10 * static + i) * LN2], "adapted": [(10 * adapted + i * 1.01) * LN2],
             "other": (10 * other + i) * LN2} for i in range(5)]
    assert words in verdict(rows)
