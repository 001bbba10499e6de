"""Decoding with the cache against decoding without it, sampling against transformers, and streams of text."""
import codecs
import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from test_model import GPT2, LLAMA, random_model

import sampling
from model import GPT
from runtime.checkpoint import save_checkpoint
from runtime.config import BadInput
from sampling import (
    GREEDY,
    SamplingConfig,
    TextStream,
    draw,
    encode_prompt,
    generate,
    generate_text,
    generate_texts,
    generate_with_logprobs,
    load_pretrained,
    sample,
    token_logprobs,
)
from tokenizer import Tokenizer

BYTES = Tokenizer.from_ranks({bytes([byte]): byte for byte in range(256)}, "default")  # every byte is a token: é takes two
START, END = BYTES.separator_id, BYTES.chat_token_ids()[1]
UNFILTERED = SamplingConfig(temperature=1.0, top_k=0)
SHAPE = {"vocab_size": BYTES.vocab_size, "block_size": 40, "tied": False}  # a tied model of random weights repeats itself
ARCHITECTURES = [pytest.param(SHAPE | switches, id=name) for name, switches in {
    "attention": {}, "gated_delta": {"mixer": "gated_delta"}, "DA": {"mixer": "DA"}, "gpt2": GPT2, "llama": LLAMA,
    "loops": {"mixer": "DA", "loops": 3}}.items()]


@pytest.fixture(params=ARCHITECTURES)
def model(request) -> GPT:
    return random_model(**request.param)


@pytest.fixture
def attention_model() -> GPT:
    return random_model(**SHAPE)


def random_prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(256, (n,), generator=generator) for n in lengths]


def generate_ids(model: GPT, prompts: list[torch.Tensor], n: int, sampling=GREEDY, seed: int = 0) -> list[list[int]]:
    """The new tokens of each row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(list(generate(model, prompts, n, sampling, generator)), dim=1).tolist()


@torch.no_grad()
def generate_without_cache(model: GPT, prompts: list[torch.Tensor], n: int, penalize=lambda ids, logits: logits):
    """Greedy, row by row, from a forward pass over all that the cache is documented to hold at each token."""
    block_size, sequences = model.config.block_size, list(prompts)
    contexts = [prompt[-block_size:] for prompt in prompts]
    for _ in range(n):
        if max(map(len, contexts)) > block_size:
            contexts = [context[-max(1, block_size // 2):] for context in contexts]
        new = [penalize(sequence[None], model(context[None])[:, -1]).argmax(-1)
               for sequence, context in zip(sequences, contexts)]
        contexts, sequences = ([torch.cat(pair) for pair in zip(rows, new)] for rows in (contexts, sequences))
    return [sequence[len(prompt):].tolist() for sequence, prompt in zip(sequences, prompts)]


# -- decoding ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lengths", [(5, 5, 5), (1, 20, 7), (9, 3, 9)])
def test_batch_equals_single_rows_and_decoding_without_cache(model, lengths):
    prompts = random_prompts(*lengths)
    rows = generate_ids(model, prompts, 15)
    assert rows == generate_without_cache(model, prompts, 15)
    assert rows == [generate_ids(model, [prompt], 15)[0] for prompt in prompts]
    assert len({tuple(row) for row in rows}) == 3 and len({*rows[0], *rows[1], *rows[2]}) > 6  # not degenerate


@pytest.mark.parametrize("lengths", [(36,), (50,), (40, 3, 17), (90, 1), (2, 25, 38)])
def test_beyond_the_context_the_cache_is_rebuilt_from_half_a_block(model, lengths):
    prompts = random_prompts(*lengths)
    assert generate_ids(model, prompts, 55) == generate_without_cache(model, prompts, 55)  # rebuilt twice


def test_context_of_one_token():
    model, prompts = random_model(**SHAPE | {"block_size": 1}), random_prompts(3)
    assert generate_ids(model, prompts, 6) == generate_without_cache(model, prompts, 6)


def test_each_token_computes_one_position(attention_model, monkeypatch):
    widths, forward = [], attention_model.forward
    monkeypatch.setattr(attention_model, "forward",
                        lambda idx, **options: widths.append(idx.size(1)) or forward(idx, **options))
    generate_ids(attention_model, random_prompts(30), 25)
    assert widths == [30, *[1] * 10, 20, *[1] * 13]  # no pass for the last token


def test_seed_determines_samples(attention_model):
    runs = [generate_ids(attention_model, random_prompts(4) * 3, 12, UNFILTERED, seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] and len({tuple(row) for row in runs[0] + runs[2]}) == 6


# -- sampling ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_rows_are_sampled_from_their_own_distributions(attention_model):
    prompts = random_prompts(3, 8)
    config = SamplingConfig(temperature=0.7, top_k=3)
    rows = torch.tensor(generate_ids(attention_model, prompts * 10_000, 1, config)).view(-1, 2)
    for prompt, drawn in zip(prompts, rows.T):
        values, ids = attention_model(prompt[None])[0, -1].topk(3)
        expected = torch.zeros(BYTES.vocab_size).scatter_(0, ids, (values / 0.7).softmax(0))
        assert torch.allclose(drawn.bincount(minlength=BYTES.vocab_size) / 10_000, expected, atol=0.02)


@pytest.mark.parametrize("uniform, expected", [(0.0, [1, 0, 2]), (1 - 2**-53, [3, 0, 2]), (0.5, [3, 0, 2])])
def test_what_has_no_weight_is_never_drawn(uniform, expected, monkeypatch):
    """At both ends of the random number too. Weights need not sum to 1."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, uniform, dtype=torch.float64))
    weights = torch.tensor([[0, 0.3, 0, 0.7, 0], [0.2, 0, 0, 0, 0], [0, 0, 1e-9, 0, 0]])
    assert draw(weights, None)[:, 0].tolist() == expected


@pytest.mark.parametrize("weights", [[0.5, torch.nan], [torch.inf, 1.0], [0.0, 0.0]])
def test_weights_that_are_not_finite_are_refused(weights):
    with pytest.raises(FloatingPointError, match="not finite"):
        draw(torch.tensor([[0.5, 0.5], weights]), None)


def logits_processors():
    return pytest.importorskip("transformers.generation.logits_process")


def test_repetition_penalty_covers_prompt_and_generated_tokens(model):
    oracle = logits_processors().RepetitionPenaltyLogitsProcessor(1.5)
    prompts, config = random_prompts(4, 11), SamplingConfig(temperature=0, repetition_penalty=1.5)
    assert generate_ids(model, prompts, 20, config) == generate_without_cache(model, prompts, 20, oracle)


def sample_frequencies(logits: torch.Tensor, config: SamplingConfig, seen=None, n: int = 20_000) -> torch.Tensor:
    """(B, V) -> (B, V): how often each token is drawn."""
    logits, seen = (None if part is None else part.repeat_interleave(n, dim=0) for part in (logits, seen))
    ids = sample(logits, config, torch.Generator().manual_seed(0), seen).view(-1, n)
    return torch.stack([row.bincount(minlength=logits.size(-1)) for row in ids]) / n


@pytest.mark.parametrize("flags", [
    {}, {"temperature": 1.7}, {"top_k": 3}, {"top_k": 1}, {"top_k": 99}, {"top_p": 0.7}, {"top_p": 1e-6},
    {"min_p": 0.3}, {"min_p": 1.0}, {"repetition_penalty": 1.8}, {"repetition_penalty": 0.5}, {"top_k": 5, "top_p": 0.8},
    {"temperature": 0.6, "top_k": 6, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3}], ids=str)
def test_sampling_equals_transformers(flags):
    """The same tokens are possible, with the same frequencies."""
    oracle, config = logits_processors(), SamplingConfig(**{"temperature": 1.0, "top_k": 0} | flags)
    logits = torch.rand(10, 12, generator=torch.Generator().manual_seed(3)) * 3 - 1
    context = torch.arange(20).view(10, 2) % 12
    processors = oracle.LogitsProcessorList([
        oracle.RepetitionPenaltyLogitsProcessor(config.repetition_penalty),
        oracle.TemperatureLogitsWarper(config.temperature), oracle.TopKLogitsWarper(config.top_k or 12),
        oracle.TopPLogitsWarper(config.top_p), oracle.MinPLogitsWarper(config.min_p)])
    expected = processors(context, logits.clone()).softmax(-1)
    frequencies = sample_frequencies(logits, config, torch.zeros(10, 12, dtype=torch.bool).scatter_(1, context, True))
    assert torch.equal(frequencies > 0, expected > 0)
    assert torch.allclose(frequencies, expected, atol=0.015)


@pytest.mark.parametrize("flags, expected", [
    ({}, [0.15, 0.5, 0.05, 0.3]), ({"top_k": 2}, [0, 5 / 8, 0, 3 / 8]), ({"top_p": 0.79}, [0, 5 / 8, 0, 3 / 8]),
    ({"top_p": 0.81}, [3 / 19, 10 / 19, 0, 6 / 19]), ({"min_p": 0.31}, [0, 5 / 8, 0, 3 / 8]),
    ({"top_k": 3, "top_p": 0.83}, [0, 5 / 8, 0, 3 / 8]),  # of three tokens, the first two have 16/19 = 0.84
    ({"temperature": 0.5}, [9 / 146, 100 / 146, 1 / 146, 36 / 146]),
    ({"temperature": 0.0}, [0, 1, 0, 0]), ({"temperature": 1e-9}, [0, 1, 0, 0])], ids=str)
def test_sampling_by_hand(flags, expected):
    config = SamplingConfig(**{"temperature": 1.0, "top_k": 0} | flags)
    frequencies = sample_frequencies(torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log(), config)[0].tolist()
    assert frequencies == pytest.approx(expected, abs=0.015) and [f > 0 for f in frequencies] == [e > 0 for e in expected]


# -- log-probabilities ------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_token_logprobs_equal_the_log_softmax_of_all_logits(model):
    ids = torch.stack(random_prompts(20, 20))
    expected = model(ids).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    assert torch.allclose(token_logprobs(model, ids), expected, atol=1e-5)


def test_token_logprobs_train_the_model_and_fit_into_its_context(attention_model):
    ids = torch.stack(random_prompts(41, 41))
    token_logprobs(attention_model, ids).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in attention_model.parameters())
    for n in (1, 42):
        with pytest.raises(ValueError, match=f"{n} tokens: give 2 to 41"):
            token_logprobs(attention_model, torch.zeros(1, n, dtype=torch.int64))


@torch.no_grad()
@pytest.mark.parametrize("flags", [
    {}, {"temperature": 0.0}, {"temperature": 0.7}, {"top_k": 1}, {"top_k": 3, "temperature": 1.3}, {"top_p": 0.8},
    {"min_p": 0.2}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.4}], ids=str)
def test_logprobs_of_samples_equal_transformers(attention_model, flags):
    """Of the distribution that a token was drawn from, and of the model alone, also where the cache was rebuilt (40 + 1
    tokens); and the tokens are those of `generate`."""
    oracle, config = logits_processors(), SamplingConfig(**{"temperature": 1.0, "top_k": 0} | flags)
    prompts, n, V = random_prompts(6, 6, 6), 37, BYTES.vocab_size
    rows = [torch.stack(part, dim=1) for part in zip(*generate_with_logprobs(
        attention_model, prompts, n, config, torch.Generator().manual_seed(4)))]
    ids, logprobs, model_logprobs = rows
    assert ids.tolist() == generate_ids(attention_model, prompts, n, config, seed=4)
    assert ids.shape == logprobs.shape == model_logprobs.shape == (3, n) and logprobs.dtype == torch.float32
    processors = oracle.LogitsProcessorList([
        oracle.RepetitionPenaltyLogitsProcessor(config.repetition_penalty),
        oracle.TemperatureLogitsWarper(config.temperature or 1e-4), oracle.TopKLogitsWarper(config.top_k or V),
        oracle.TopPLogitsWarper(config.top_p), oracle.MinPLogitsWarper(config.min_p)])
    texts = torch.cat([torch.stack(prompts), ids], dim=1)
    for i in (0, 20, 34, 35, 36):
        context = texts[:, :6 + i]
        logits = attention_model(context[:, -(40 if i < 35 else 20 + i - 35):])[:, -1]
        for found, distribution in ((model_logprobs, logits), (logprobs, processors(context, logits.clone()))):
            expected = distribution.log_softmax(-1).gather(1, ids[:, i:i + 1])[:, 0]
            assert torch.allclose(found[:, i], expected, atol=1e-4)


# -- streams of text --------------------------------------------------------------------------------------------------

def make_stream(pieces: list[bytes], stop: list[str]) -> TextStream:
    """Token i is the i-th piece; -1 ends the text, -2 is another special token."""
    return TextStream(SimpleNamespace(special_tokens={"<|end|>": -1, "<pad>": -2}, end_ids={-1}, vocab_size=len(pieces),
                                      decode_bytes=lambda ids: pieces[ids[0]]), stop)


def stream_texts(*pieces: bytes, stop=()) -> list[str]:
    """What the stream returns for each token, and at the end."""
    stream, out = make_stream(pieces, stop), []
    for i in range(len(pieces)):
        if not stream.is_done:
            out.append(stream.push(i))
    return out if stream.is_done else [*out, stream.finish()]


def test_stream_holds_back_incomplete_characters():
    pieces = b"n\xc3", b"\xa9", b"\xf0\x9f", b"\x99", b"\x82!", b"\xc3"
    assert stream_texts(*pieces) == ["n", "é", "", "", "🙂!", "", "\ufffd"]
    assert stream_texts(b"a\xff", b"\xc3", b"b") == ["a\ufffd", "", "\ufffdb", ""]


def test_other_special_tokens_and_unknown_ids_are_no_text():
    stream = make_stream([b"\xc3", b"\xa9"], [])
    assert [stream.push(i) for i in (0, -2, 700, 1, -1)] == ["", "", "", "é", ""] and stream.is_done


@pytest.mark.parametrize("pieces, stop, expected", [
    ([b"one ST", b"O", b"P two", b"three"], ["STOP"], ["one ", "", ""]),
    ([b"one ST", b"O", b"RE"], ["STOP"], ["one ", "", "STORE", ""]),  # it only looked like a stop string
    ([b"one ST", b"O"], ["STOP"], ["one ", "", "STO"]),               # the text ended before it could become one
    ([b"a", b"a", b"a", b"c"], ["aac"], ["", "", "a", ""]),           # only the last two letters are still held back
    ([b"caf\xc3", b"\xa9 x"], ["fé"], ["ca", ""]),
    ([b"x STOP \n\n"], ["\n\n", "STOP"], ["x "])])
def test_stream_ends_at_stop_strings(pieces, stop, expected):
    assert stream_texts(*pieces, stop=stop) == expected


def test_special_token_ends_the_stream_and_releases_pending_text():
    stream = make_stream([b"ab\xc3"], ["bc", "b\ufffd!"])
    assert (stream.push(0), stream.is_done, stream.push(-1), stream.is_done) == ("a", False, "b\ufffd", True)


@given(st.text("ab🙂é", max_size=12), st.sets(st.integers(1, 40), max_size=6),
       st.lists(st.text("ab🙂é", min_size=1, max_size=4), max_size=3))
def test_stream_ends_at_the_first_stop_string_and_holds_back_no_more_than_needed(text, cuts, stop):
    assume(not any(a in b[1:] for a in stop for b in stop))  # for those, see the next test
    utf8 = text.encode()
    pieces = [utf8[i:j] for i, j in itertools.pairwise([0, *sorted(cut for cut in cuts if cut < len(utf8)), len(utf8)])]
    stream, decoder, received, out = make_stream(pieces, stop), codecs.getincrementaldecoder("utf-8")(), "", ""
    for i, piece in enumerate(pieces):
        received, out = received + decoder.decode(piece), out + stream.push(i)
        if stream.is_done:
            break
        held_back = received[len(out):]
        assert received.startswith(out) and any(candidate.startswith(held_back) for candidate in [*stop, ""])
    out += "" if stream.is_done else stream.finish()
    assert out == text[:min((start for one in stop if (start := text.find(one)) >= 0), default=len(text))]


def test_stop_does_not_depend_on_how_text_is_cut_into_tokens():
    assert "".join(stream_texts(b"xabcd", stop=["abc", "b"])) == \
        "".join(stream_texts(b"x", b"a", b"b", b"c", stop=["abc", "b"]))


# -- texts ------------------------------------------------------------------------------------------------------------

def script_tokens(monkeypatch, *rows: list[int]) -> list[list[int]]:
    """Makes generate() yield these tokens, a list for each row. Returns the list of columns consumed so far."""
    consumed = []
    monkeypatch.setattr(sampling, "generate", lambda *args: (
        consumed.append(list(column)) or torch.tensor(column) for column in zip(*rows)))
    return consumed


def test_rows_end_independently(attention_model, monkeypatch):
    consumed = script_tokens(monkeypatch, [*b"ab", START, *b"xxx"], [*b"cSTOP!"], [0xC3, 0xA9, *b"d", END, *b"ef"])
    pieces = list(generate_texts(attention_model, BYTES, [[START]] * 3, 6, GREEDY, ["STOP"]))
    assert pieces == [(0, "a"), (1, "c"), (0, "b"), (2, "é"), (2, "d")]
    assert len(consumed) == 5  # by then every row has ended


def test_text_held_back_is_released_after_the_last_token(attention_model, monkeypatch):
    script_tokens(monkeypatch, [*b"aST"], [*b"b\xc3\xa9"])
    pieces = list(generate_texts(attention_model, BYTES, [[START]] * 2, 3, GREEDY, ["STOP"]))
    assert pieces == [(0, "a"), (1, "b"), (1, "é"), (0, "ST")]


def test_prompt_starts_a_document(attention_model):
    ids = generate_ids(attention_model, [torch.tensor([START, *"é!".encode()])], 9, UNFILTERED, seed=5)[0]
    assert max(ids) < 256  # no special token among them
    assert "".join(generate_text(attention_model, BYTES, "é!", 9, UNFILTERED, seed=5)) == BYTES.decode(ids)


def test_text_is_yielded_token_by_token(attention_model, monkeypatch):
    consumed = script_tokens(monkeypatch, b"one")
    text = generate_text(attention_model, BYTES, "", 3, GREEDY)
    assert consumed == [] and next(text) == "o" and consumed == [[ord("o")]] and "".join(text) == "ne"


def test_prompt_must_fit_into_the_context(attention_model):
    assert encode_prompt(attention_model, BYTES, "a" * 39) == [START, *b"a" * 39]
    with pytest.raises(BadInput, match="--prompt=aaaaaaaaaaaaaaaaaaaa…: has 40 tokens, .* holds 39: shorten it"):
        next(generate_text(attention_model, BYTES, "a" * 40, 5, GREEDY))


# -- loading ----------------------------------------------------------------------------------------------------------

def test_a_pretrained_model_comes_with_its_tokenizer_and_flags(attention_model, tmp_path):
    path, checkpoint = tmp_path / "gpt.pt", attention_model.to_checkpoint() | {"tokenizer": BYTES.to_json()}
    save_checkpoint(path, checkpoint)
    model, tokenizer, flags = load_pretrained(path, chat=True)
    assert model.config == attention_model.config and flags == {}  # an imported model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), attention_model.parameters(), strict=True))
    assert tokenizer.to_json() == BYTES.to_json()
    trained = checkpoint | {"training": {"settings": {"optimizer": "muon"}}}
    assert load_pretrained(path, trained)[2] == {"optimizer": "muon"}


def test_a_tokenizer_that_lacks_tokens_is_refused_with_the_file(attention_model, tmp_path):
    path = tmp_path / "gpt.pt"
    bare = Tokenizer.from_ranks(BYTES.ranks, "default", ["<|endoftext|>", "<|a|>", "<|b|>", "<|c|>", "<|d|>"])
    checkpoint = attention_model.to_checkpoint() | {"tokenizer": bare.to_json()}
    load_pretrained(path, checkpoint)
    with pytest.raises(BadInput, match="gpt.pt: the tokenizer has no <.system.> token"):
        load_pretrained(path, checkpoint, chat=True)
    none = Tokenizer.from_ranks(BYTES.ranks, "default", ["<|a|>"])
    with pytest.raises(BadInput, match="gpt.pt: the tokenizer has no <.endoftext.> token"):
        load_pretrained(path, checkpoint | {"tokenizer": none.to_json()})


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(attention_model, tmp_path):
    larger = Tokenizer(BYTES.ranks, "default", BYTES.special_tokens | {"<|more|>": BYTES.vocab_size})
    checkpoint = attention_model.to_checkpoint() | {"tokenizer": larger.to_json()}
    with pytest.raises(BadInput, match="gpt.pt: its tokenizer has 262 ids, its model 261: they do not belong together"):
        load_pretrained(tmp_path / "gpt.pt", checkpoint)
