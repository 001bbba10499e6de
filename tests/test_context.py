"""Comparisons at several lengths of context: rows by hand, arms, timed decoding. The command: test_compare.py."""
import dataclasses
import math

import pytest
import torch
from test_analysis import make_results

import compare
from compare import CompareConfig, build_arms, time_decoding
from experiments.analysis import ArmResults, table_rows
from experiments.context import Contexts, Decoding, context_rows, context_section, position_rows, short_contexts
from experiments.report import Figure, markdown_page
from runtime.config import BadInput
from runtime.device import Machine
from runtime.metrics import PositionSums, position_bins

SHAPE = {"n_layer": 2, "n_head": 2, "head_size": 8, "block_size": 64, "batch_size": 6, "num_batch_accum": 3}
CPU = Machine(torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def data(data_path):
    return compare.load_shards({"data_path": data_path})


# -- positions --------------------------------------------------------------------------------------------------------

def test_position_bins_by_hand():
    assert position_bins(40) == [(0, 16), (16, 32), (32, 40)] and position_bins(32) == [(0, 16), (16, 32)]
    assert position_bins(1) == [(0, 1)] and position_bins(16) == [(0, 16)]


def test_bits_by_position_by_hand():
    """18 positions of two rows in two batches: position 1 predicts a special token once, 17 nothing in the second batch."""
    sums, token_bytes = PositionSums(), torch.tensor([0, 2, 4])
    for batch in range(2):
        bits, targets = torch.ones(1, 18), torch.ones(1, 18, dtype=torch.int64)
        bits[0, 3], targets[0, 3] = 9.0, 2
        if batch:
            targets[0, 1], targets[0, 17] = 0, -100
            bits[0, 1] = bits[0, 17] = 1e9
        sums.add(bits * math.log(2), targets, token_bytes)
    # 31 texts at positions 0 to 15: 29 of one bit and two bytes, two of nine bits and four bytes; three behind them
    assert sums.bits_per_byte() == {"0-15": pytest.approx((29 + 18) / (58 + 8)), "16-17": pytest.approx(3 / 6)}
    assert PositionSums().bits_per_byte() == {}


def at_length(results: ArmResults, length: int, by_bin: list[dict]) -> ArmResults:
    """As made by make_results, at a length of context, whose runs end with these fields."""
    results.arm = dataclasses.replace(results.arm, size=f"block_size={length}", batch_shape=(100 // length, length))
    for run, fields in zip(results.runs, by_bin):
        if run.rows:
            run.rows[-1] |= {f"val_bpb/{name}": value for name, value in fields.items()}
    return results


def test_rows_by_position_are_paired_by_seed():
    first = at_length(make_results("a", [2.0, 2.0, 2.0]), 20, [{"0-15": 3.0, "16-19": 1.0 + i} for i in range(3)])
    other = at_length(make_results("b", [2.0, None, 2.0]), 20, [{"0-15": 2.5, "16-19": 1.5 + i} for i in range(3)])
    rows = position_rows([first, other])
    assert [(row["arm"], row["first_position"], row["last_position"], row["context"], row["runs"]) for row in rows] == [
        ("a", 0, 15, 20, 3), ("a", 16, 19, 20, 3), ("b", 0, 15, 20, 2), ("b", 16, 19, 20, 2)]
    assert [row["bpb"] for row in rows] == [3.0, 2.0, 2.5, 2.5]
    assert [row.get("difference") for row in rows] == [None, None, -0.5, 0.5]  # of seeds 1 and 3 alone
    assert rows[3]["difference_margin"] == 0 and rows[3]["bpb_margin"] > 1
    assert position_rows([make_results("a", [2.0])]) == []


@pytest.fixture
def by_size():
    """Two arms, of which the second is twice as slow and remembers a quarter, at two lengths; one has not finished."""
    groups = []
    for length, name in ((10, "0-9"), (20, "0-15")):
        groups.append([at_length(make_results("a", [2.0, 2.1]), length, [{name: 2.0}, {name: 2.1}]),
                       at_length(make_results("b", [1.9, 2.02], speed=500.0), length, [{name: 1.9}, {name: 2.02}])])
    groups[1].append(at_length(make_results("c", [None, None]), 20, []))
    return groups


CONTEXTS = Contexts({("block_size=10", "a"): Decoding(4096, 0.001), ("block_size=10", "b"): Decoding(1024, 0.0005),
                     ("block_size=20", "a"): Decoding(8192, 0.002), ("block_size=20", "b"): Decoding(1024, 0.0005),
                     ("block_size=20", "c"): Decoding(8192, 0.002)}, "cpu, fp32", 9)


def test_rows_of_contexts_by_hand(by_size):
    rows = context_rows([table_rows(group) for group in by_size], by_size, CONTEXTS)
    assert [(row["context"], row["arm"]) for row in rows] == [(10, "a"), (10, "b"), (20, "a"), (20, "b"), (20, "c")]
    assert [row.get("step_ms") for row in rows] == [100, 200, 100, 200, None]  # of 100 tokens
    assert [row["cache_bytes_ratio"] for row in rows] == [1, 0.25, 1, 0.125, 1]
    assert [row["decode_tok_per_sec"] for row in rows] == pytest.approx([1000, 2000, 500, 2000, 500])
    assert rows[3]["decode_tok_per_sec_ratio"] == pytest.approx(4) and rows[3]["difference"] == pytest.approx(-0.09)
    assert "bpb" not in rows[4]


def test_section_of_contexts(by_size):
    rows = context_rows([table_rows(group) for group in by_size], by_size, CONTEXTS)
    parts = context_section(rows, [row for group in by_size for row in position_rows(group)], CONTEXTS)
    page = markdown_page("Title", parts)
    assert "| 20 | b | 1.9600 ± 0.7624 | -0.0900 ± 0.1271 | 200.0 (2.00 x) | 1.0 (0.12 x) | 2,000 (4.00 x) |" in page
    assert "| 20 | c |  |  |  | 8.0 (1.00 x) | 500 (1.00 x) |" in page and "(cpu, fp32); the median of 9 rounds" in page
    figures = {part.name: len(part.panels) for part in parts if isinstance(part, Figure)}
    assert figures == {"contexts": 4, "positions_10": 2, "positions_20": 2}
    head, *lines, _ = short_contexts(rows)
    assert head.split() == ["arm", "context", "ms/step", "cache,", "KiB", "decoding", "tok/s"]
    assert lines[1].split() == ["b", "10", "200.0", "1.0", "2,000"]


# -- arms -------------------------------------------------------------------------------------------------------------

def test_arms_at_each_length_see_as_many_tokens_in_a_step(data):
    arms = build_arms(CompareConfig(arms=("mlp=gelu", "mixer=SA"), lengths=(16, 128), sizes=("n_layer=2", "n_layer=4"),
                                    match="none"), SHAPE, data)
    assert [(arm.size, arm.batch_shape) for arm in arms[::2]] == [
        (f"n_layer={n},block_size={length}", shape) for n in (2, 4) for length, shape in ((16, (24, 16)), (128, (3, 128)))]
    assert {arm.step_tokens for arm in arms} == {6 * 64 * 3} and len({arm.base_lr for arm in arms}) == 1
    default, = build_arms(CompareConfig(arms=("mlp=gelu",), null=True, lengths=(512,)), {}, data)[:1]
    assert default.batch_shape == (8, 512)  # of 4 x 1024 tokens


@pytest.mark.parametrize("config, shape, words", [
    ({"lengths": (16, 100)}, SHAPE, "hold no whole number of blocks of 100: give a --batch_size that is a multiple of 25"),
    ({"lengths": (16, 1024)}, SHAPE, "multiple of 16"),
    ({"lengths": (32,), "arms": ("mlp=gelu", "mlp=relu2,batch_size=3")}, SHAPE, "batch_size follows from --lengths"),
    ({"lengths": (32,)}, SHAPE | {"batch_size": "auto"}, "--batch_size=auto: give a number")])
def test_lengths_that_cannot_be_compared_are_refused(data, config, shape, words):
    with pytest.raises(BadInput, match=words):
        build_arms(CompareConfig(**config), shape, data)


def test_lengths_are_of_train_py():
    with pytest.raises(BadInput, match="--lengths 16 32: needs arms that learn from text, not --script=think"):
        CompareConfig(script="think", budget="problems=9", lengths=(16, 32))
    with pytest.raises(BadInput, match="--lengths 16 16: has a duplicate"):
        CompareConfig(lengths=(16, 16))


# -- decoding ---------------------------------------------------------------------------------------------------------

def test_decoding_is_timed_in_turns_at_the_end_of_the_context(data, monkeypatch):
    arms = build_arms(CompareConfig(arms=("mixer=attention", "mixer=sliding"), lengths=(128,), match="none"), SHAPE, data)
    timed, decode = [], compare.decode

    def watched(reading, n_tokens):
        timed.append((type(reading.model.blocks[0].mixer).letter, reading.cache.length, n_tokens))
        return decode(reading, n_tokens)
    monkeypatch.setattr(compare, "decode", watched)
    attention, sliding = time_decoding(arms, CPU, n_rounds=2)
    assert timed == [("A", 112, 16), ("S", 112, 16)] * 3  # 128 positions in all
    # keys and values of each position and layer, and the last position of 4 token shifts, 16 channels in fp32
    assert attention.cache_bytes == 4 * 16 * (2 * 2 * 128 + 4)
    assert sliding.cache_bytes == 4 * 16 * (2 * 2 * (32 + 8) + 4)
    assert 0 < attention.seconds < 1 and 0 < sliding.seconds < 1
