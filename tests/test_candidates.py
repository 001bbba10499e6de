"""candidates.py: several answers and the choice among them, thoughts of a given length, votes that stop early."""
import itertools
from collections import Counter

import pytest
import torch

from candidates import (
    CHOICES,
    ROUND,
    Answer,
    CandidateConfig,
    choose_logprob,
    choose_mbr,
    choose_verifier,
    choose_vote,
    given,
    is_decided,
    pass_at_k,
    sample_candidates,
    sample_texts,
    subsets_of,
)
from model import GPT, GPTConfig
from runtime.config import BadInput
from sampling import GREEDY, SamplingConfig, generate_texts
from tasks.checkable import THOUGHT_END
from think import byte_tokenizer

BYTES = byte_tokenizer()
T1 = SamplingConfig(temperature=1.0, top_k=0)


def make_model(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{"n_layer": 2, "n_head": 2, "head_size": 8, "block_size": 48, "vocab_size": BYTES.vocab_size}
                          | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def said(text: str, logprob: float = -1.0, has_ended: bool = True) -> Answer:
    return Answer([0] * len(text), [logprob] * len(text), text, has_ended)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- choices ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("texts, winner", [
    ("a b b", 1), ("a b", 0), ("b a a b", 0), ("a b c b c", 1), ("c", 0)])
def test_a_vote_is_won_by_the_most_frequent_and_of_equal_ones_by_the_first(texts, winner):
    assert choose_vote([said(text) for text in texts.split()]) == winner


def test_answers_that_have_not_ended_have_no_vote():
    assert choose_vote([said("a", has_ended=False), said("a", has_ended=False), said("b")]) == 2
    assert all(CHOICES[way]([said("a", has_ended=False)] * 2, lambda text: 1.0) == 0 for way in CHOICES)


def test_thoughts_and_white_space_do_not_divide_a_vote():
    answers = [said("b"), said(f"1 2{THOUGHT_END}a  c"), said(f"3{THOUGHT_END} a c ")]
    assert given(answers) == ["b", "a c", "a c"] and choose_vote(answers) == 1


def test_the_verifier_takes_the_first_that_is_right_and_else_votes():
    answers = [said("x"), said("y"), said("z"), said("y")]
    assert choose_verifier(answers, lambda text: float(text in "zy")) == 1
    assert choose_verifier(answers, lambda text: 0.0) == choose_vote(answers) == 1


def test_logprob_does_not_favour_short_answers():
    assert choose_logprob([said("a", -0.5), said("abc", -0.4), said("abcdef", -0.6)]) == 1
    assert choose_logprob([said("a", -0.1, has_ended=False), said("b", -3.0)]) == 1


def test_minimum_bayes_risk_by_hand():
    """F1 with the others: "the cat sat" 2*2/5 + 0, "the cat" 2*2/5 + 0, "dogs" 0; a repeated answer counts for itself."""
    assert choose_mbr([said("dogs"), said("the cat sat"), said("the cat")]) == 1
    assert choose_mbr([said("dogs"), said("the cat sat"), said("dogs"), said("the cat ran")]) == 0
    assert choose_mbr([said("dogs run"), said("the cat sat"), said("the cat ran"), said("the cat")]) == 3


# -- votes that stop early --------------------------------------------------------------------------------------------

def winner(answers) -> str:
    counts = Counter(answers)
    return max(counts, key=lambda answer: (counts[answer], -list(counts).index(answer)))


@pytest.mark.parametrize("n", [3, 5, 6])
def test_stopping_early_never_changes_the_winner_and_stops_as_soon_as_that_is_so(n):
    """Every vote of n answers over three, and each way to go on, with a fourth that nobody has given."""
    for length in range(1, n + 1):
        for start in itertools.product("abc", repeat=length):
            endings = itertools.product("abcd", repeat=n - length)
            is_fixed = len({winner([*start, *rest]) for rest in endings}) == 1
            assert is_decided(start, n - length) == is_fixed, (start, n - length)


@pytest.mark.parametrize("first, second", [(4, 0), (3, 1), (6, 1), (5, 5), (1, 0)])
def test_certainty_is_the_posterior_probability_of_the_lead(first, second):
    from scipy.stats import beta
    probability = beta(first + 1, second + 1).sf(0.5)
    votes = ["a"] * first + ["b"] * second
    assert is_decided(votes, 100, probability - 1e-9) and not is_decided(votes, 100, probability + 1e-9)


def test_a_vote_without_answers_is_not_decided():
    assert not is_decided([], 0, 0.5)


def test_a_unanimous_vote_stops_and_a_divided_one_goes_on(monkeypatch):
    """The prompts are read once, however many rounds there are."""
    texts, read = {1: itertools.repeat("a"), 2: (str(i) for i in itertools.count())}, []

    def fake(decoder, rows, *args):
        for row in rows:
            row.text, row.stream.is_done = next(texts[row.prompt[0]]), True
    monkeypatch.setattr("candidates.decode_answers", fake)
    model, prefill = make_model(), GPT.prefill_distinct
    monkeypatch.setattr(GPT, "prefill_distinct", lambda *args: read.append(len(args[1])) or prefill(*args))
    for certainty, n in ((1.0, 8), (0.95, ROUND)):
        config = CandidateConfig(16, "vote", certainty)
        same, different = sample_candidates(model, BYTES, [[1], [2]], config, 8, T1, None)
        assert (len(same), len(different)) == (n, 16)
    assert read == [2, 2]


@pytest.mark.parametrize("choose", ["vote", "mbr"])
def test_each_answer_is_what_its_prompt_alone_leads_to(choose, monkeypatch):
    """Greedy, in batches of several prompts of different lengths. Answers that end are decided after a round; those that do
    not end have no vote."""
    monkeypatch.setattr("candidates.ROWS_PER_BATCH", 12)
    model, prompts = make_model(), [[1], [2, 3, 4], [5, 6], [2, 3, 4], [7] * 5, [8]]
    found = sample_candidates(model, BYTES, prompts, CandidateConfig(6, choose), 9, GREEDY, None)
    for prompt, answers in zip(prompts, found):
        (alone,) = sample_texts(model, BYTES, [prompt], 9, GREEDY, None)
        assert {tuple(answer.ids) for answer in answers} == {tuple(alone.ids)}
        assert len(answers) == (ROUND if choose == "vote" and alone.has_ended else 6)


# -- what several answers are worth -----------------------------------------------------------------------------------

@pytest.mark.parametrize("n, right, k", [(6, 2, 1), (6, 2, 3), (5, 0, 2), (4, 4, 1), (7, 1, 7), (6, 3, 4), (8, 6, 3)])
def test_pass_at_k_is_the_mean_over_all_subsets(n, right, k):
    subsets = list(itertools.combinations([1] * right + [0] * (n - right), k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_subsets_are_of_the_asked_size_without_repetition_and_cover_all():
    found = subsets_of(8, 3, 500)
    assert found.shape == (500, 3) and all(len(set(row)) == 3 and list(row) == sorted(row) for row in found.tolist())
    counts = Counter(found.ravel().tolist())
    assert len(counts) == 8 and max(counts.values()) < 1.5 * min(counts.values())
    assert subsets_of(8, 8, 500).tolist() == [list(range(8))]


# -- sampling ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, {"mixer": "DA"}, {"positions": "learned"}], ids=str)
def test_answers_are_those_of_generate_whatever_shares_their_batch(changes):
    model, prompts = make_model(**changes), [[1, 2, 3], [1, 2, 3], [7], [5, 9, 200, 4, 8]]
    texts = [""] * len(prompts)
    for row, text in generate_texts(model, BYTES, prompts, 24, GREEDY):
        texts[row] += text
    together = sample_texts(model, BYTES, prompts, 24, GREEDY, None)
    alone = [sample_texts(model, BYTES, [prompt], 24, GREEDY, None)[0] for prompt in prompts]
    assert [answer.text for answer in together] == texts == [answer.text for answer in alone]
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]


def test_an_answer_longer_than_the_context_goes_on_as_generate_does():
    model = make_model(block_size=16)
    prompts = [[1, 2, 3], [7, 8]]
    texts = [""] * 2
    for row, text in generate_texts(model, BYTES, prompts, 40, GREEDY):
        texts[row] += text
    assert [answer.text for answer in sample_texts(model, BYTES, prompts, 40, GREEDY, None)] == texts


@pytest.mark.parametrize("think", [0, 1, 5])
def test_a_thought_is_cut_off_and_held_on_at_the_number_of_tokens_that_is_asked_for(think):
    model, end, = make_model(), BYTES.encode(THOUGHT_END)[0]
    prompts = [[i, 2, 3] for i in range(40)]
    limited = sample_texts(model, BYTES, prompts, 20, T1, generator(), CandidateConfig(think=think))
    held = sample_texts(model, BYTES, prompts, 20, T1, generator(), CandidateConfig(think=think, think_fully=True))
    for answer in limited:
        assert end in answer.ids[:think + 1] or answer.has_ended and len(answer.ids) <= think
        assert len(answer.ids) <= 20
    assert all(answer.ids[think] == end and end not in answer.ids[:think] for answer in held)
    assert all(not BYTES.end_ids & {*answer.ids[:think]} for answer in held)


def test_log_probabilities_are_of_what_was_drawn_and_forced_tokens_have_none():
    model, (answer,) = make_model(), sample_texts(make_model(), BYTES, [[1, 2]], 12, T1, generator(3),
                                                  CandidateConfig(think=2))
    forced = len(answer.ids) > 2 and answer.ids[2] == BYTES.encode(THOUGHT_END)[0]
    logits = model(torch.tensor([[1, 2, *answer.ids]]))[0].log_softmax(-1)
    for i, (token_id, logprob) in enumerate(zip(answer.ids, answer.logprobs)):
        if not (forced and i == 2):
            assert logprob == pytest.approx(logits[1 + i, token_id].item(), abs=1e-4)
    assert not forced or answer.logprobs[2] == 0.0


def test_more_rows_than_a_batch(monkeypatch):
    monkeypatch.setattr("candidates.ROWS_PER_BATCH", 4)
    found, = sample_candidates(make_model(), BYTES, [[1, 2, 3]], CandidateConfig(10), 6, T1, generator())
    assert len(found) == 10 and len({tuple(answer.ids) for answer in found}) > 5


@pytest.mark.parametrize("flags, words", [
    ({"choose": "vote"}, "--choose=vote: has nothing to choose from"),
    ({"think_fully": True}, "--think_fully: give --think"),
    ({"samples": 4, "choose": "mbr", "certainty": 0.9}, "--certainty=0.9: is of a vote"),
    ({"samples": 4, "choose": "best"}, "--choose=best: choose one of vote, verifier"), ({"samples": 0}, "at least 1")])
def test_flags_without_effect_are_refused(flags, words):
    with pytest.raises(BadInput) as error:
        CandidateConfig(**flags)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_certainty_of_one_half_stops_at_any_lead():
    assert is_decided(["a", "a", "b"], 100, 0.5) and not is_decided(["a", "a", "b"], 100, 1.0)
