"""Few-shot rules: from a few pairs of grids, what does the rule make of another grid?

    rule = draw_rules("shift", "test", 1)[0]
    task = make_task(rule, n_demonstrations=3, n_questions=32)      # pairs that show the rule, and pairs to answer
    ids, targets = encode_episode([*task.demonstrations, task.questions[0]])

A grid is an int array (height, width) of colours 0 to 9, of which 0 is the background. The parameters of a family are split
by the rank of their hash, so that no rule of a test is one that a base is trained on; a test's composition has two steps of
which neither is. Every grid that a rule draws tells it from the other rules of its family. Tasks of the same kind, but not
these: ARC, Chollet 2019, arXiv:1911.01547, whose JSON files `read_arc` reads.
"""
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime.config import BadInput
from runtime.files import require_regular_file

N_COLORS = 10
ROW_END, ANSWER, PAIR_END = N_COLORS, N_COLORS + 1, N_COLORS + 2  # tokens besides the colours
RULE_VOCAB_SIZE = N_COLORS + 3
IGNORE_INDEX = -100  # targets without a loss, as in dataloader.py
MAX_ARC_SIDE = 30

Grid = np.ndarray
COLORS = tuple(range(1, N_COLORS))  # without the background


class Pair(NamedTuple):
    input: Grid
    output: Grid


@dataclass(frozen=True)
class Task:
    """Pairs of one rule: those that show it, and those whose outputs are asked for."""
    name: str
    family: str
    demonstrations: list[Pair]
    questions: list[Pair]


# -- families ---------------------------------------------------------------------------------------------------------

def permute_cells(grid: Grid, order: tuple[int, ...]) -> Grid:
    """Cell i of the result is cell order[i]."""
    return grid.reshape(-1)[list(order)].reshape(grid.shape)


def shift_cells(grid: Grid, offset: tuple[int, int]) -> Grid:
    """Down and to the right; what leaves on one side enters on the other."""
    return np.roll(grid, offset, axis=(0, 1))


def reflect(grid: Grid, symmetry: tuple[int, int]) -> Grid:
    """(quarter turns counterclockwise, 1 to mirror left and right before them)."""
    turns, is_mirrored = symmetry
    return np.rot90(grid[:, ::-1] if is_mirrored else grid, turns)


def recolor(grid: Grid, colors: tuple[tuple[int, ...], tuple[int, ...]]) -> Grid:
    """The first colours become the second ones, all others stay."""
    table = np.arange(N_COLORS)
    table[list(colors[0])] = colors[1]
    return table[grid]


def fill_between(grid: Grid, colors: tuple[int, int]) -> Grid:
    """Between two cells of the first colour in a row, the background becomes the second colour."""
    result = grid.copy()
    for row in result:
        if len(ends := np.flatnonzero(row == colors[0])) == 2:
            inside = row[ends[0] + 1:ends[1]]
            inside[inside == 0] = colors[1]
    return result


def count_cells(grid: Grid, colors: tuple[int, int]) -> Grid:
    """As many cells of the second colour, from the left, as the grid has of the first."""
    result = np.zeros(grid.size, int)
    result[:(grid == colors[0]).sum()] = colors[1]
    return result.reshape(grid.shape)


def draw_colors(rng: np.random.Generator, parameter: tuple, shape: tuple[int, int], palette: tuple[int, ...]) -> Grid:
    """Cells of the palette: all its colours where the grid has room, else different ones."""
    n = shape[0] * shape[1]
    cells = rng.permutation(palette)[:n]
    return rng.permutation(np.concatenate((cells, rng.choice(palette, n - len(cells))))).reshape(shape)


def draw_ends(rng: np.random.Generator, colors: tuple[int, int], shape: tuple[int, int], palette: tuple[int, ...]) -> Grid:
    """Two cells of the first colour with background between them, in one row or more; elsewhere background, and other
    colours of which each occurs once."""
    others = rng.permutation([color for color in palette if color not in colors])
    grid = np.zeros(shape, int)
    grid.reshape(-1)[rng.permutation(grid.size)[:min(4, len(others))]] = others[:4]
    for y in rng.permutation(shape[0])[:rng.integers(1, shape[0] + 1)]:
        first = rng.integers(shape[1] - 2)
        last = rng.integers(first + 2, shape[1])
        grid[y, first + 1:last] = 0
        grid[y, [first, last]] = colors[0]
    return grid


def draw_to_count(rng: np.random.Generator, colors: tuple[int, int], shape: tuple[int, int],
                  palette: tuple[int, ...]) -> Grid:
    """One to all but one cells of the first colour, and no other colour as often."""
    n, others = shape[0] * shape[1], [color for color in palette if color != colors[0]]
    while True:
        counted = int(rng.integers(1, n))
        cells = np.concatenate((np.full(counted, colors[0]), rng.choice(others, n - counted)))
        if (np.bincount(cells) == counted).sum() == 1:
            return rng.permutation(cells).reshape(shape)


@dataclass(frozen=True)
class Family:
    """Rules of one kind. shape: of its grids. parameters: of all its rules. apply(grid, parameter) -> grid. draw(rng,
    parameter, shape, palette) -> a grid that shows the rule."""
    shape: tuple[int, int]
    parameters: tuple
    apply: Callable[[Grid, tuple], Grid]
    draw: Callable[[np.random.Generator, tuple, tuple[int, int], tuple[int, ...]], Grid] = draw_colors


COLOR_PAIRS = tuple(itertools.permutations(COLORS, 2))
RECOLORED = 5  # colours of a grid of the family recolor
# recolourings that leave no colour as it is
RECOLORINGS = tuple((colors, new) for colors in itertools.combinations(COLORS, RECOLORED)
                    for new in itertools.permutations(colors) if all(a != b for a, b in zip(colors, new)))
FAMILIES = {
    "permutation": Family((1, 5), tuple(itertools.permutations(range(5)))[1:], permute_cells),
    "shift": Family((3, 3), tuple(itertools.product(range(3), range(3)))[1:], shift_cells),
    "reflection": Family((3, 3), tuple((turns, mirror) for mirror in (0, 1) for turns in range(4))[1:], reflect),
    "recolor": Family((2, 3), RECOLORINGS, recolor),
    "fill": Family((3, 3), COLOR_PAIRS, fill_between, draw_ends),
    "count": Family((1, 5), COLOR_PAIRS, count_cells, draw_to_count),
}
# Steps in this order, on grids of the first one's shape. None is a rule of a single family.
COMPOSITIONS = (("permutation", "recolor"), ("shift", "recolor"), ("reflection", "recolor"), ("reflection", "shift"),
                ("fill", "shift"), ("fill", "reflection"))
COMPOSITION_NAMES = tuple("+".join(pair) for pair in COMPOSITIONS)
FAMILY_NAMES = (*FAMILIES, *COMPOSITION_NAMES)
MIN_TEST_PARAMETERS, TEST_SHARE = 3, 0.2


# -- rules ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Rule:
    """One or two steps (family, parameter), applied in order."""
    steps: tuple[tuple[str, tuple], ...]

    @property
    def family(self) -> str:
        return "+".join(family for family, _ in self.steps)

    @property
    def name(self) -> str:
        return " then ".join(f"{family} {parameter}" for family, parameter in self.steps)

    def apply(self, grid: Grid) -> Grid:
        for family, parameter in self.steps:
            grid = FAMILIES[family].apply(grid, parameter)
        return grid

    def draw(self, rng: np.random.Generator) -> Pair:
        """A pair that shows the rule, and tells it from the others of its family."""
        family, parameter = self.steps[0]
        palette = next((parameter[0] for name, parameter in self.steps if name == "recolor"), COLORS)
        grid = FAMILIES[family].draw(rng, parameter, FAMILIES[family].shape, palette)
        return Pair(grid, self.apply(grid))


def digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@functools.cache
def split_parameters(family: str, split: str) -> list[tuple]:
    """The parameters of a family that "train" or "test" has, in the order of their hashes."""
    ranked = sorted(FAMILIES[family].parameters, key=lambda parameter: digest(f"{family} {parameter}"))
    n_test = max(MIN_TEST_PARAMETERS, round(TEST_SHARE * len(ranked)))
    return ranked[:n_test] if split == "test" else ranked[n_test:]


def draw_rules(family: str, split: str, n: int) -> list[Rule]:
    """The first n rules of a family, or all if it has fewer; of a composition, the first n pairs of steps by their hash."""
    steps = [[(name, parameter) for parameter in split_parameters(name, split)[:n]] for name in family.split("+")]
    rules = [Rule(pair) for pair in itertools.product(*steps)]
    return sorted(rules, key=lambda rule: digest(rule.name))[:n] if len(steps) > 1 else rules


def make_task(rule: Rule, n_demonstrations: int, n_questions: int, seed: int = 0) -> Task:
    """No question's input is that of another pair."""
    rng, pairs = np.random.default_rng([seed, digest(rule.name)]), {}
    while len(pairs) < n_demonstrations + n_questions:
        pair = rule.draw(rng)
        pairs[pair.input.tobytes()] = pair
    pairs = list(pairs.values())
    return Task(rule.name, rule.family, pairs[:n_demonstrations], pairs[n_demonstrations:])


# -- tokens -----------------------------------------------------------------------------------------------------------

def encode_grid(grid: Grid) -> list[int]:
    """Row by row: [[1, 2], [3, 4]] -> 1 2 ROW_END 3 4."""
    rows = grid.tolist()
    return [*rows[0], *itertools.chain.from_iterable((ROW_END, *row) for row in rows[1:])]


def decode_grid(ids: Sequence[int]) -> Grid | None:
    """The inverse of `encode_grid`, given the tokens before PAIR_END; None where they are not a grid."""
    rows = [[]]
    for token in ids:
        if token == ROW_END:
            rows.append([])
        else:
            rows[-1].append(token)
    if any(not 0 <= token < N_COLORS for row in rows for token in row) or len({len(row) for row in rows}) > 1 or not rows[0]:
        return None
    return np.array(rows)


def encode_question(grid: Grid) -> list[int]:
    return [*encode_grid(grid), ANSWER]


def encode_pair(pair: Pair) -> list[int]:
    return [*encode_question(pair.input), *encode_grid(pair.output), PAIR_END]


def encode_episode(pairs: Sequence[Pair]) -> tuple[list[int], list[int]]:
    """Inputs and targets, of one length; targets are the outputs, each up to its PAIR_END."""
    ids, targets = [], []
    for pair in pairs:
        tokens = encode_pair(pair)
        n_input = tokens.index(ANSWER) + 1
        ids += tokens
        targets += [IGNORE_INDEX] * n_input + tokens[n_input:]
    return ids[:-1], targets[1:]


def permute_colors(pair: Pair, colors: np.ndarray) -> Pair:
    """Color c becomes colors[c]."""
    return Pair(colors[pair.input], colors[pair.output])


# -- ARC --------------------------------------------------------------------------------------------------------------

def read_arc(path: Path, flag_text: str) -> list[Task]:
    """The tasks of a JSON file of ARC's form, {"train": [{"input", "output"}, …], "test": […]}, or of all *.json in a
    folder. Raises BadInput, which names the file and what is wrong with it. flag_text: the flag as typed."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise BadInput(f"{flag_text}: no *.json in this folder: give a folder of ARC tasks, or one such file")
    return [read_arc_file(file) for file in files]


def read_arc_file(path: Path) -> Task:
    require_regular_file(path, str(path))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise BadInput(f"{path}: not JSON: use a file of ARC's form") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}): check the path") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: not an ARC task: must be an object with \"train\" and \"test\"")
    return Task(path.stem, "arc", *(read_arc_pairs(path, content.get(part), part) for part in ("train", "test")))


def read_arc_pairs(path: Path, pairs, part: str) -> list[Pair]:
    least = 2 if part == "train" else 1  # one is left out when the others are trained on
    if not isinstance(pairs, list) or len(pairs) < least:
        raise BadInput(f"{path}: not an ARC task: \"{part}\" must be a list of at least {least} pairs")
    for i, pair in enumerate(pairs):
        for side in Pair._fields:
            if not is_arc_grid(pair.get(side) if isinstance(pair, dict) else None):
                raise BadInput(f"{path}: not an ARC task: the {side} of pair {i} in \"{part}\" must be 1 to {MAX_ARC_SIDE} "
                               f"rows of 1 to {MAX_ARC_SIDE} colours 0 to 9, all of one length")
    return [Pair(np.array(pair["input"]), np.array(pair["output"])) for pair in pairs]


def is_arc_grid(rows) -> bool:
    return (isinstance(rows, list) and 1 <= len(rows) <= MAX_ARC_SIDE
            and all(isinstance(row, list) and 1 <= len(row) <= MAX_ARC_SIDE and len(row) == len(rows[0]) for row in rows)
            and all(type(cell) is int and 0 <= cell < N_COLORS for row in rows for cell in row))
