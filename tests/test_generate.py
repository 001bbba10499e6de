import pytest
import torch

import generate as generate_script
from generate import generate, generate_text, sample
from model import GPT, GPTConfig
from tokenizer import Tokenizer

V = 50


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, head_size=8, block_size=16, vocab_size=V))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def test_greedy_equals_the_uncached_loop(model):
    idx = torch.randint(V, (3, 5))
    made = torch.stack(list(generate(model, idx, 11, temperature=0)), dim=1)
    for _ in range(11):
        idx = torch.cat((idx, model(idx)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(made, idx[:, 5:])


def test_goes_on_beyond_the_context(model):
    """When the cache is full it starts again from the last half of the context, as an uncached loop would see it."""
    idx = torch.randint(V, (1, 20))
    made = list(generate(model, idx, 30, temperature=0))
    assert len(made) == 30
    context, whole = idx[:, -16:], idx
    for token in made:
        assert torch.equal(token, model(context)[:, -1].argmax(-1))
        whole = torch.cat((whole, token[:, None]), dim=1)
        context = torch.cat((context, token[:, None]), dim=1)
        if context.size(1) > 16:
            context = whole[:, -8:]


def test_same_seed_same_text(model):
    idx = torch.zeros(1, 1, dtype=torch.int64)
    runs = [[int(token) for token in generate(model, idx, 12, 1.0, 0, torch.Generator().manual_seed(seed))]
            for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_sample_follows_the_probabilities():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(20_000, 1)
    generator = torch.Generator().manual_seed(0)

    def frequencies(temperature, top_k):
        return torch.bincount(sample(logits, temperature, top_k, generator).flatten(), minlength=4) / 20_000

    assert torch.allclose(frequencies(1.0, 0), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.02)
    assert torch.allclose(frequencies(1.0, 2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.02)
    squared = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert torch.allclose(frequencies(0.5, 0), squared / squared.sum(), atol=0.02)
    assert frequencies(0, 0)[0] == 1


def test_text_comes_in_whole_characters_and_ends_with_the_document(monkeypatch):
    tokenizer = Tokenizer.train(["abc"], 261)  # every byte a token of its own: é needs two
    script = [*tokenizer.encode("né"), *tokenizer.encode("!"), 0xC3, tokenizer.separator_id, ord("x")]
    monkeypatch.setattr(generate_script, "generate", lambda *args: (torch.tensor([i]) for i in script))
    model = GPT(GPTConfig(n_layer=1, n_head=1, head_size=2, block_size=4, vocab_size=261))
    assert list(generate_text(model, tokenizer, "", 9, 1.0, 0, 0)) == ["n", "", "é", "!", "", "\ufffd"]


def test_command(run_train, capsys, refused, tmp_path):
    path = run_train("--max_iter=1")
    capsys.readouterr()
    flags = [f"--checkpoint_path={path}", "--device=cpu"]
    generate_script.main([*flags, "--prompt=The numpy array", "--max_new_tokens=20", "--seed=3"])
    first = capsys.readouterr().out
    assert first.startswith("The numpy array") and len(first) > len("The numpy array")
    generate_script.main([*flags, "--prompt=The numpy array", "--max_new_tokens=20", "--seed=3"])
    assert capsys.readouterr().out == first
    refused(generate_script.main, [*flags, "--temperature=-1"], "--temperature=-1.0")
    refused(generate_script.main, [f"--checkpoint_path={tmp_path / 'none.pt'}"], "none.pt: no checkpoint")
