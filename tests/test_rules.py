"""tasks/rules.py: families by hand examples, the split into training and test, tokens, and ARC's files."""
import functools
import itertools
import json

import numpy as np
import pytest

from runtime.config import BadInput
from tasks.rules import (
    ANSWER,
    COMPOSITION_NAMES,
    FAMILIES,
    FAMILY_NAMES,
    IGNORE_INDEX,
    N_COLORS,
    PAIR_END,
    ROW_END,
    Pair,
    Rule,
    decode_grid,
    draw_rules,
    encode_episode,
    encode_grid,
    make_task,
    permute_colors,
    read_arc,
    split_parameters,
)

EXAMPLES = {  # family -> parameter, grid, result
    "permutation": ((4, 0, 1, 2, 3), [[1, 2, 3, 4, 5]], [[5, 1, 2, 3, 4]]),
    "shift": ((1, 2), [[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[8, 9, 7], [2, 3, 1], [5, 6, 4]]),
    "reflection": ((1, 1), [[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[1, 4, 7], [2, 5, 8], [3, 6, 9]]),
    "recolor": (((1, 2, 3, 4, 5), (2, 3, 4, 5, 1)), [[1, 1, 2], [3, 4, 5]], [[2, 2, 3], [4, 5, 1]]),
    "fill": ((7, 3), [[7, 0, 7], [0, 0, 7], [7, 5, 7]], [[7, 3, 7], [0, 0, 7], [7, 5, 7]]),
    "count": ((2, 9), [[2, 5, 2, 5, 5]], [[9, 9, 0, 0, 0]]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_by_hand(family):
    parameter, grid, result = EXAMPLES[family]
    assert parameter in FAMILIES[family].parameters
    assert FAMILIES[family].apply(np.array(grid), parameter).tolist() == result


def test_steps_of_a_composition_are_applied_in_order():
    mirror_then_shift = Rule((("reflection", (0, 1)), ("shift", (0, 1))))
    assert mirror_then_shift.apply(np.array([[1, 2, 3]] * 3)).tolist() == [[1, 3, 2]] * 3
    assert mirror_then_shift.family == "reflection+shift"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_drawn_pair_tells_its_rule_from_all_others_of_the_family(family):
    rng = np.random.default_rng(0)
    for rule in draw_rules(family, "train", 2) + draw_rules(family, "test", 2):
        for _ in range(3 if family == "recolor" else 10):
            pair = rule.draw(rng)
            fitting = [other for other in FAMILIES[family].parameters
                       if np.array_equal(FAMILIES[family].apply(pair.input, other), pair.output)]
            assert fitting == [rule.steps[0][1]] and pair.input.shape == FAMILIES[family].shape


# -- training and test ------------------------------------------------------------------------------------------------

@functools.cache
def behaviours(family: str, split: str, n: int) -> set[bytes]:
    return {behaviour(rule) for rule in draw_rules(family, split, n)}


def behaviour(rule: Rule) -> bytes:
    """What the rule makes of many grids: equal for two rules only if they are one function."""
    rng, shape = np.random.default_rng(7), FAMILIES[rule.steps[0][0]].shape
    filled = [color * rng.integers(0, 2, shape) for color in range(1, N_COLORS) for _ in range(8)]
    return b"".join(rule.apply(grid).tobytes() for grid in [*filled, *rng.integers(0, N_COLORS, (8, *shape))])


@pytest.mark.parametrize("family", FAMILIES)
def test_training_and_test_share_no_parameter(family):
    train, test = (split_parameters(family, split) for split in ("train", "test"))
    assert len(test) >= 3 and set(train).isdisjoint(test)
    assert sorted(train + test) == sorted(FAMILIES[family].parameters)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_no_rule_of_a_test_does_what_a_rule_of_training_does(family):
    """Of the same shape, single or composed: a shift after a reflection must not be another reflection."""
    shape = FAMILIES[family.split("+")[0]].shape
    same_shape = [name for name in FAMILY_NAMES if FAMILIES[name.split("+")[0]].shape == shape]
    trained = set.union(*(behaviours(name, "train", 200) for name in same_shape))
    assert trained.isdisjoint(behaviours(family, "test", 50))


@pytest.mark.parametrize("family", COMPOSITION_NAMES)
def test_neither_step_of_a_tests_composition_is_trained_on(family):
    trained = {step for rule in draw_rules(family, "train", 1000) for step in rule.steps}
    tested = draw_rules(family, "test", 1000)
    assert tested and trained.isdisjoint(step for rule in tested for step in rule.steps)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_task_shows_and_asks_different_pairs_and_depends_on_its_rule_alone(family):
    rule = draw_rules(family, "test", 1)[0]
    task, again = make_task(rule, 3, 32), make_task(rule, 3, 32)
    pairs = [*task.demonstrations, *task.questions]
    assert len(task.demonstrations) == 3 and len({pair.input.tobytes() for pair in pairs}) == 35
    assert all(np.array_equal(rule.apply(pair.input), pair.output) for pair in pairs)
    assert all(np.array_equal(a.input, b.input) for a, b in zip(task.questions, again.questions))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recoloured_rule_is_a_rule_of_the_same_family(family):
    """What a view assumes: some parameter of the family explains all pairs of a recoloured task."""
    rng = np.random.default_rng(1)
    colors = np.concatenate(([0], 1 + rng.permutation(N_COLORS - 1)))
    task = make_task(draw_rules(family, "test", 1)[0], 3, 5)
    pairs = [permute_colors(pair, colors) for pair in [*task.demonstrations, *task.questions]]
    apply = FAMILIES[family].apply
    assert any(all(np.array_equal(apply(pair.input, parameter), pair.output) for pair in pairs)
               for parameter in FAMILIES[family].parameters)


# -- tokens -----------------------------------------------------------------------------------------------------------

def test_encode_by_hand():
    a, b = ([[1, 2], [3, 4]], [[5]]), ([[6]], [[7]])
    ids, targets = encode_episode([Pair(*map(np.array, pair)) for pair in (a, b)])
    assert ids == [1, 2, ROW_END, 3, 4, ANSWER, 5, PAIR_END, 6, ANSWER, 7]
    assert targets == [*[IGNORE_INDEX] * 5, 5, PAIR_END, *[IGNORE_INDEX] * 2, 7, PAIR_END]


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 1), (30, 30)])
def test_decode_undoes_encode(shape):
    grid = np.random.default_rng(0).integers(0, N_COLORS, shape)
    assert np.array_equal(decode_grid(encode_grid(grid)), grid)


@pytest.mark.parametrize("ids", [[], [ROW_END], [1, ROW_END], [1, 2, ROW_END, 3], [1, ANSWER], [PAIR_END]])
def test_what_is_no_grid_decodes_to_none(ids):
    assert decode_grid(ids) is None


# -- ARC --------------------------------------------------------------------------------------------------------------

GOOD = {"train": [{"input": [[1, 0]], "output": [[0], [1]]}, {"input": [[2]], "output": [[2]]}],
        "test": [{"input": [[3, 3]], "output": [[3]]}]}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_arc_folder_is_read_in_order_of_names(tmp_path):
    for name in ("b", "a"):
        write(tmp_path / f"{name}.json", GOOD)
    write(tmp_path / "notes.txt", "no task")
    tasks = read_arc(tmp_path, "--dataset=x")
    assert [task.name for task in tasks] == ["a", "b"]
    assert tasks[0].demonstrations[0].output.tolist() == [[0], [1]] and tasks[0].questions[0].input.tolist() == [[3, 3]]


def changed(*path_and_value) -> dict:
    *path, last, value = path_and_value
    content = json.loads(json.dumps(GOOD))
    place = content
    for key in path:
        place = place[key]
    place[last] = value
    return content


BAD = {"not JSON": ("{", "not JSON"), "a list": ([1], "must be an object"), "no train": ({"test": GOOD["test"]}, '"train"'),
       "one demonstration": (changed("train", GOOD["train"][:1]), "at least 2 pairs"),
       "no test": (changed("test", []), '"test" must be a list of at least 1'),
       "no output": (changed("test", 0, {"input": [[1]]}), 'output of pair 0 in "test"'),
       "ragged": (changed("train", 1, "input", [[1, 2], [3]]), 'input of pair 1 in "train"'),
       "colour 10": (changed("train", 0, "input", [[10]]), "colours 0 to 9"),
       "colour true": (changed("train", 0, "input", [[True]]), "colours 0 to 9"),
       "empty": (changed("train", 0, "input", []), "1 to 30 rows"),
       "too wide": (changed("train", 0, "output", [[1] * 31]), "1 to 30 colours"),
       "pair is text": (changed("train", 0, "x"), 'input of pair 0 in "train"'),
       "deep": ("[" * 100_000, "not JSON")}


@pytest.mark.parametrize("name", BAD)
def test_file_that_is_no_arc_task_is_named_with_what_is_wrong(tmp_path, name):
    content, message = BAD[name]
    path = write(tmp_path / "task.json", content)
    with pytest.raises(BadInput) as error:
        read_arc(path, f"--dataset={path}")
    assert str(path) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_missing_and_empty_datasets(tmp_path):
    with pytest.raises(BadInput, match="no such|No such"):
        read_arc(tmp_path / "none", "--dataset=none")
    with pytest.raises(BadInput, match=r"no \*.json"):
        read_arc(tmp_path, "--dataset=here")


def test_all_families_are_drawn_apart():
    names = list(itertools.chain(*([rule.name for rule in draw_rules(family, "test", 20)] for family in FAMILY_NAMES)))
    assert len(set(names)) == len(names) > 100
