"""Speculative decoding: the tokens of plain decoding whatever the drafts, their distribution where drafts are drawn."""
import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from test_model import GPT2, LLAMA, random_model
from test_sampling import BYTES, SHAPE, UNFILTERED, generate_ids, random_prompts

import generate
from model import GPT
from runtime.checkpoint import load_checkpoint, save_checkpoint
from sampling import GREEDY, SamplingConfig
from speculative import NGRAMS, Draft, DraftModel, PromptLookup, accept_or_redraw, speculate, token_probs
from tokenizer import Tokenizer

ARCHITECTURES = [pytest.param(SHAPE | switches, id=name) for name, switches in {
    "attention": {}, "gated_delta": {"mixer": "gated_delta"}, "DA": {"mixer": "DA"}, "gpt2": GPT2, "llama": LLAMA,
    "learned": {"positions": "learned"}, "n_kv_head": {"n_kv_head": 1}, "no_shift": {"token_shift": False},
    "loops": {"n_layer": 3, "loops": 2, "mixer": "DA"}}.items()]
SAMPLINGS = [GREEDY, UNFILTERED, SamplingConfig(temperature=0, repetition_penalty=1.5),
             SamplingConfig(temperature=1.3, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2)]


class Oracle:
    """Knows the tokens that plain decoding gives after a prompt, and drafts each of them with probability `p_right`, else a
    wrong one."""

    def __init__(self, n_prompt: int, tokens: list[int], p_right: float):
        self.n_prompt, self.tokens, self.p_right, self.rng = n_prompt, tokens, p_right, random.Random(0)

    def propose(self, text, n, sampling, generator) -> Draft:
        right = self.tokens[len(text) - self.n_prompt:][:n]
        assert text[self.n_prompt:] == self.tokens[:len(text) - self.n_prompt] and len(right) == n
        return Draft([token if self.rng.random() < self.p_right else (token + 1) % 256 for token in right])


def speculate_ids(model, prompt: torch.Tensor, n: int, sampling, drafter, seed=0, max_draft=8) -> list[list[int]]:
    """The new tokens of each forward pass."""
    return list(speculate(model, prompt, n, sampling, torch.Generator().manual_seed(seed), drafter, max_draft))


def record_widths(model: GPT, monkeypatch) -> list[int]:
    """Positions of each forward pass from now on."""
    widths, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda idx, **options: widths.append(idx.size(1)) or forward(idx, **options))
    return widths


# -- the tokens of plain decoding -------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", ARCHITECTURES)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "greedy,penalty", "all filters"])
def test_tokens_equal_those_of_plain_decoding(shape, sampling):
    """Right, wrong and mixed drafts; also beyond the context of 40 tokens, where the cache is rebuilt."""
    model = random_model(**shape)
    for seed, n_prompt in enumerate((1, 17, 40, 55)):
        prompt, = random_prompts(n_prompt)
        want, = generate_ids(model, [prompt], 30, sampling, seed)
        for drafter in (*(Oracle(n_prompt, want, p_right) for p_right in (0.0, 0.6, 1.0)), PromptLookup()):
            assert sum(speculate_ids(model, prompt, 30, sampling, drafter, seed), []) == want


@pytest.mark.parametrize("shape", ARCHITECTURES[:3])
@pytest.mark.parametrize("sampling", SAMPLINGS[::2], ids=["greedy", "greedy,penalty"])
def test_a_draft_model_does_not_change_greedy_tokens(shape, sampling):
    """Whose context is as long as the model's, longer or shorter."""
    model, prompt = random_model(**shape), random_prompts(20)[0]
    want, = generate_ids(model, [prompt], 60, sampling)
    for block_size in (40, 100, 9, 1):
        draft_model = random_model(**shape | {"block_size": block_size, "tied": True})
        assert sum(speculate_ids(model, prompt, 60, sampling, DraftModel(draft_model)), []) == want
    assert sum(speculate_ids(model, prompt, 60, sampling, DraftModel(model)), []) == want


@pytest.mark.parametrize("max_new_tokens", [1, 2, 5])
def test_context_of_one_token_and_few_tokens(max_new_tokens):
    for block_size in (1, 2, 40):
        model, prompt = random_model(**SHAPE | {"block_size": block_size}), random_prompts(3)[0]
        want, = generate_ids(model, [prompt], max_new_tokens)
        for drafter in (Oracle(3, want, 1.0), Oracle(3, want, 0.0), DraftModel(model)):
            assert sum(speculate_ids(model, prompt, max_new_tokens, GREEDY, drafter), []) == want


def test_right_drafts_save_passes_and_wrong_ones_cost_none(monkeypatch):
    model, prompt = random_model(**SHAPE | {"block_size": 100}), random_prompts(20)[0]
    want, = generate_ids(model, [prompt], 60)
    widths = record_widths(model, monkeypatch)
    groups = speculate_ids(model, prompt, 60, GREEDY, Oracle(20, want, 1.0), max_draft=16)
    assert [len(group) for group in groups] == [1, 5, 9, 17, 17, 11] and widths == [20, 5, 9, 17, 17, 11]
    widths.clear()
    assert [len(group) for group in speculate_ids(model, prompt, 60, GREEDY, Oracle(20, want, 0.0))] == [1] * 60
    assert widths == [20, 5, *[3] * 56, 2, 1]  # the last tokens need no longer draft


def test_a_text_without_repetitions_is_decoded_plainly(monkeypatch):
    model, prompt = random_model(**SHAPE), torch.arange(20)
    widths = record_widths(model, monkeypatch)
    fresh = SimpleNamespace(tokens=iter(range(20, 40)))
    monkeypatch.setattr("speculative.sample", lambda *args: torch.tensor([next(fresh.tokens)]))
    assert speculate_ids(model, prompt, 15, GREEDY, PromptLookup()) == [[token] for token in range(20, 35)]
    assert widths == [20, *[1] * 14]


# -- the distribution -------------------------------------------------------------------------------------------------

class TableModel:
    """Stands in for a GPT of 5 tokens: its logits depend on the last two. table: (5, 5, 5)."""
    config = SimpleNamespace(block_size=10**6, vocab_size=5)
    embed = torch.nn.Embedding(1, 1)

    def __init__(self, seed: int, scale: float = 1.0):
        self.table = scale * torch.randn(5, 5, 5, generator=torch.Generator().manual_seed(seed))

    def prefill(self, prompts, max_len, dtype):
        cache = TableCache()
        return self.eager_forward(prompts[0][None], cache)[:, -1], cache

    def eager_forward(self, idx, cache, logits_to_keep=None):
        old, new = cache.ids[-1:] or [0], idx[0].tolist()
        cache.ids += new
        return self.table[[*old, *new][:-1], new][None, -(logits_to_keep or 0):]


class TableCache:
    def __init__(self):
        self.ids = []

    @property
    def length(self) -> int:
        return len(self.ids)

    def rewind(self, n: int):
        del self.ids[len(self.ids) - n:]


class Liar:
    """Says that it draws uniformly, and does not."""

    def propose(self, text, n, sampling, generator) -> Draft:
        return Draft([0] * n, torch.full((n, 5), 0.2))


def chi2_pvalue(tokens: list[int], model: TableModel, sampling: SamplingConfig) -> float:
    """Of the next token after each pair, and so of triples, against the probabilities that plain sampling gives them."""
    counts = torch.zeros(5, 5, 5)
    for triple in zip(tokens, tokens[1:], tokens[2:]):
        counts[triple] += 1
    expected = counts.sum(2, keepdim=True) * token_probs(model.table.view(25, 5), sampling, None).view(5, 5, 5)
    assert not counts[expected == 0].any()
    used = expected > 0
    statistic = ((counts - expected)[used] ** 2 / expected[used]).sum().item()
    free = used.sum().item() - (counts.sum(2) > 0).sum().item()
    return stats.chi2.sf(statistic, free)


DRAWN = [UNFILTERED, SamplingConfig(temperature=0.7, top_k=4), SamplingConfig(temperature=1.2, top_k=0, top_p=0.85),
         SamplingConfig(temperature=0.9, top_k=0, min_p=0.15)]


@pytest.mark.parametrize("sampling", DRAWN, ids=["plain", "top_k", "top_p", "min_p"])
@pytest.mark.parametrize("drafter", ["lookup", "model"])
def test_the_distribution_is_that_of_plain_sampling(sampling, drafter):
    model = TableModel(seed=1)
    made = PromptLookup() if drafter == "lookup" else DraftModel(TableModel(seed=2))
    groups = speculate_ids(model, torch.tensor([0, 1]), 10_000, sampling, made, max_draft=3)
    assert 1.2 < 10_000 / len(groups) < 4  # drafts are accepted and refused
    assert chi2_pvalue(sum(groups, []), model, sampling) > 0.01


@torch.no_grad()
def test_the_distribution_of_a_transformer_with_a_draft_model():
    """How often each token comes, against the sum of its probabilities in one forward pass over the text."""
    shape = {"vocab_size": 5, "block_size": 250, "tied": False, "mixer": "DA"}
    model, draft_model = random_model(**shape), random_model(**shape | {"mixer": "AD"})
    counts, mean, variance, n_passes = torch.zeros(5), torch.zeros(5), torch.zeros(5), 0
    for seed in range(4):
        groups = speculate_ids(model, torch.tensor([0]), 250, UNFILTERED, DraftModel(draft_model), seed)
        ids = torch.tensor([0, *sum(groups, [])])
        probs = model(ids[None, :-1])[0].softmax(-1)
        counts, mean, variance = counts + ids[1:].bincount(minlength=5), mean + probs.sum(0), variance + (
            probs * (1 - probs)).sum(0)
        n_passes += len(groups)
    assert 1.2 < 4 * 250 / n_passes < 4
    assert ((counts - mean).abs() < 3 * variance.sqrt()).all()


def test_the_test_of_the_distribution_can_fail():
    model = TableModel(seed=1)
    groups = speculate_ids(model, torch.tensor([0, 1]), 4_000, UNFILTERED, Liar(), max_draft=3)
    assert chi2_pvalue(sum(groups, []), model, UNFILTERED) < 1e-6


def test_accepting_by_hand():
    """p = q is always accepted, what p lacks never; else with probability p/q, and the rest goes to what q has too little
    of."""
    p, q, generator = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.9, 0.0]), torch.Generator().manual_seed(0)
    assert {accept_or_redraw(p, q, 0, generator) for _ in range(50)} == {0}
    drawn = torch.tensor([accept_or_redraw(p, q, 1, generator) for _ in range(6000)]).bincount() / 6000
    assert torch.allclose(drawn, torch.tensor([2 / 3 * 2 / 3, 1 / 3, 2 / 3 * 1 / 3]), atol=0.02)
    assert {accept_or_redraw(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), 0, generator) for _ in range(50)} == {1}
    less = torch.tensor([0.4999999, 0.5])  # of rounding alone
    assert {accept_or_redraw(less, torch.tensor([0.5, 0.5]), 0, generator) for _ in range(50)} <= {0, 1}


@torch.no_grad()
@pytest.mark.parametrize("sampling", SAMPLINGS[1::2], ids=["sampled", "all filters"])
@pytest.mark.parametrize("block_size", [100, 30, 1])
def test_a_draft_model_says_what_it_drew_from(sampling, block_size):
    """The distributions are those of a forward pass over the text and the draft so far, after rejections of any length."""
    model = random_model(**SHAPE | {"block_size": block_size, "mixer": "DA"})
    drafter, text, rng = DraftModel(model), random_prompts(12)[0].tolist(), random.Random(0)
    generator, context_start = torch.Generator().manual_seed(0), 0
    for n in (3, 5, 1, 4, 4, 2, 5, 5, 3, 4):
        ids, probs = drafter.propose(text, n, sampling, generator)
        context_start = len(text) + len(ids) - 1 - drafter.cache.length
        for i, token in enumerate(ids):
            whole = torch.tensor([text + ids[:i]])
            seen = torch.zeros(1, BYTES.vocab_size, dtype=torch.bool).scatter_(1, whole, True)
            expected = token_probs(model(whole[:, context_start:])[:, -1], sampling,
                                   seen if sampling.repetition_penalty != 1 else None)[0]
            assert torch.allclose(probs[i], expected, atol=1e-4) and probs[i, token] > 0
        text = text + ids[:rng.randint(0, len(ids))] + [rng.randrange(256)]
    assert drafter.cache.length <= block_size


# -- looking up -------------------------------------------------------------------------------------------------------

def look_up(text: str, n: int, drafter: PromptLookup | None = None) -> str:
    return bytes((drafter or PromptLookup()).propose(list(text.encode()), n, GREEDY, None).ids).decode()


@pytest.mark.parametrize("text, draft", [
    ("the cat and the", " cat and"), ("xabc1 yabc2 zabc", "2 zabc2 "),  # the last one, as if the text went on like that
    ("zbc1 abc2 dabc", "2 dabc2 "), ("1bc2 3abc4 5bc", "4 5bc4 5"), ("aaa", "aaaaaaaa"), ("xyxyxy", "xyxyxyxy"),
    ("abcdefga", ""), ("", ""), ("a", ""), ("aa", "")])
def test_look_up_by_hand(text, draft):
    assert look_up(text, 8) == draft and look_up(text, 2) == draft[:2] and look_up(text, 0) == ""


def test_the_longest_match_counts():
    assert look_up("abcd1 cd2 abcd", 1) == "1" and look_up("abcd1 cd2 xcd", 1) == "2"


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=8), st.integers(1, 9))
def test_the_index_equals_a_search(pieces, n):
    drafter, text = PromptLookup(), []
    for piece in pieces:
        text = text + piece
        want = []
        for size in NGRAMS:
            for end in range(size, len(text)):
                if len(text) > size and text[end - size:end] == text[-size:]:
                    best = end
                    want = [*text[end:], *itertools.islice(itertools.cycle(text[best:]), n)][:n]
        assert drafter.propose(text, n, GREEDY, None).ids == want


# -- the command ------------------------------------------------------------------------------------------------------

@pytest.fixture
def flags(tmp_path) -> list[str]:
    """Of a tiny model whose tokens are bytes."""
    path = tmp_path / "tiny.pt"
    save_checkpoint(path, {**random_model(**SHAPE).to_checkpoint(), "tokenizer": BYTES.to_json()})
    return [f"--checkpoint_path={path}", "--device=cpu", "--dtype=fp32", "--prompt=so and so and"]


def test_text_is_that_without_speculation(flags, capsys, monkeypatch):
    def output(*more):
        generate.main([*flags, "--max_new_tokens=70", *more])
        return capsys.readouterr()
    draft = ["--speculate=draft", "--draft_path=" + flags[0].partition("=")[2]]
    for more in (["--temperature=0"], ["--temperature=1.5", "--seed=3"], ["--temperature=0", "--stop", "\u00e9", "a"]):
        plain = output(*more)
        assert output("--speculate=lookup", *more) == output("--speculate=lookup", "--draft_tokens=2", *more) == plain
        if "--temperature=0" in more:
            assert output(*draft, *more) == plain
    sampled = output(*draft, "--seed=3").out
    assert output(*draft, "--seed=3").out == sampled != output(*draft, "--seed=4").out
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    line = output(*draft, "--temperature=0", "--draft_tokens=5").err.strip()
    assert line.endswith("tokens per forward pass)") and float(line[1:5]) > 4  # it accepts its own drafts


@pytest.mark.parametrize("given, words", [
    (["--speculate=fast"], ["--speculate=fast: choose one of none, lookup, draft"]),
    (["--speculate=draft"], ["--speculate=draft: needs --draft_path"]),
    (["--draft_path=x.pt"], ["--draft_path=x.pt: is only used with --speculate=draft"]),
    (["--speculate=lookup", "--draft_path=x.pt"], ["--draft_path=x.pt: is only used with --speculate=draft"]),
    (["--draft_tokens=3"], ["--draft_tokens=3: is only used to speculate: add --speculate=lookup"]),
    (["--speculate=lookup", "--draft_tokens=0"], ["--draft_tokens=0: must be at least 1"]),
    (["--speculate=draft", "--draft_path=none.pt"], ["none.pt: no checkpoint"]),
    (["--speculate=lookup", "--samples=2"], ["--samples=2: --speculate=lookup makes one sample"]),
    (["--speculate=lookup", "--chat"], ["--chat: --speculate=lookup makes one sample"])], ids=str)
def test_bad_flags_are_refused(flags, refused, given, words):
    refused(generate.main, [*flags, *given], *words)


def test_a_draft_model_with_another_tokenizer_is_refused(flags, trained, tmp_path, refused):
    path = tmp_path / "wider.pt"
    for other in (trained, path):
        save_checkpoint(path, {**random_model(**SHAPE | {"vocab_size": 300}).to_checkpoint(), "tokenizer": BYTES.to_json()})
        refused(generate.main, [*flags, "--speculate=draft", f"--draft_path={other}"], f"--draft_path={other}: has another",
                "train it on the same data folder")
    assert Tokenizer.from_json(load_checkpoint(path)["tokenizer"]).fingerprint() == BYTES.fingerprint()
