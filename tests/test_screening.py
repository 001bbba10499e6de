"""experiments/screening.py: how many seeds a confirmation takes. The command with --screen: test_compare.py."""
import math
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.analysis import ArmResults
from experiments.screening import POWER, SCREEN_SEEDS, choose_seeds, plan_confirmation
from experiments.stats import holm, p_value


def test_seeds_by_hand():
    """Differences of two arms, +-0.01 and +-0.03 about their means: variances of 0.0002 and 0.0018, pooled 0.001. A power of
    80 % at an effect of 0.5 standard deviations takes 34 pairs (printed tables), and more where two arms are tested."""
    pairs, spread = [[0.5, 0.52], [-0.1, -0.04], [0.3]], math.sqrt(0.001)
    n, why = choose_seeds(pairs, spread / 2, 1, 100, ".4f", "bits/byte")
    assert n == 34 and "standard deviation of 0.0316 bits/byte (2 degrees of freedom)" in why and "81%" in why
    assert choose_seeds(pairs, spread / 2, 2, 100, ".4f", "bits/byte")[0] > 34
    n, why = choose_seeds(pairs, spread / 2, 1, 20, ".4f", "bits/byte")
    assert n == 20 and "80% would take 34 seeds: see --most_seeds" in why and "a probability of 56%" in why
    assert choose_seeds([[0.1], []], 0.01, 1, 20, ".4f", "bits/byte") == (20, "")
    assert choose_seeds([[0.1, 0.1]], 0.01, 1, 20, ".4f", "bits/byte")[0] == SCREEN_SEEDS


def test_nothing_is_confirmed_where_no_arm_can_be_compared():
    """Of the first arm, or of all others, no run has finished."""
    run = lambda status: SimpleNamespace(status=status, outcome=1.0)
    arm = SimpleNamespace(size="n_layer=2", name="mlp=gelu")
    for statuses in (("diverged", "finished"), ("finished", "diverged")):
        screened = [ArmResults(arm, runs=[run(status)] * 2) for status in statuses]
        chosen, sentence = plan_confirmation(screened, 2, 0.01, 20)
        assert chosen == [] and sentence == "n_layer=2: no arm can be compared with the first: nothing is confirmed"


@pytest.mark.parametrize("n_arms", [1, 2])
def test_the_chosen_seeds_find_the_difference(n_arms):
    """As often as they should, in a simulation of confirmations, where one arm differs and the others do not."""
    rng, deviation, difference = np.random.default_rng(0), 0.02, 0.015
    half = deviation / math.sqrt(2)  # of two values this far from their mean the standard deviation is `deviation`
    n, _ = choose_seeds([[half, -half]], difference, n_arms, 1000, ".4f", "bits/byte")
    found = 0
    for _ in range(1500):
        ps = [p_value(rng.normal(mean, deviation, n).tolist()) for mean in (difference, *[0.0] * (n_arms - 1))]
        found += holm(ps)[0] < 0.05
    assert POWER - 0.03 < found / 1500 < POWER + 0.06
