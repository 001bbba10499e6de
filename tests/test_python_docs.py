"""docs/python.md: its blocks, run beside a trained checkpoint, compute what the page says they do. (That they run one by one
in a folder of the user's is also in test_house.py, for all pages.)"""
import re
import shutil

import pytest
import torch

from conftest import REPO
from layers.loss import softcap_logits

PAGE = (REPO / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^## ([^\n]+)$(?:(?!^## ).)*?```python\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """run("title") -> the variables that the block under that heading leaves."""
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(trained, tmp_path / "checkpoints" / "gpt.pt")
    monkeypatch.chdir(tmp_path)

    def run_block(title: str) -> dict:
        variables = {}
        exec(BLOCKS[title], variables)
        return variables
    return run_block


def logprobs_by_hand(model, ids: torch.Tensor) -> torch.Tensor:
    """(T,) -> (T - 1,), from all logits."""
    with torch.no_grad():
        return model(ids[None])[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def test_every_block_is_under_a_heading_of_its_own():
    assert len(BLOCKS) == PAGE.count("```python") == 5
    assert all(len(block.splitlines()) <= 26 for block in BLOCKS.values())


def test_token_logprobs(run, capsys):
    found = run("How likely a text is, token by token")
    with found["machine"].autocast():
        expected = logprobs_by_hand(found["model"], torch.tensor(found["ids"]))
    assert torch.allclose(found["logprobs"], expected, atol=0.05)
    pieces = re.findall(r"'(.*)'$", capsys.readouterr().out, re.MULTILINE)
    assert "".join(pieces) == "The history of" and len(pieces) == len(expected)


def test_samples_with_logprobs(run):
    """The model's own log-probabilities are those that a pass over prompt and sample gives; the others are of 50 tokens."""
    found = run("Samples with their log-probabilities")
    assert found["ids"].shape == found["logprobs"].shape == found["mask"].shape == (8, 8)
    for row in range(8):
        text = torch.cat((found["prompts"][row], found["ids"][row]))
        with found["machine"].autocast():
            expected = logprobs_by_hand(found["model"], text)[-8:]
        assert torch.allclose(found["model_logprobs"][row], expected, atol=0.05)
    assert (found["logprobs"] > found["model_logprobs"]).all() and (found["logprobs"] <= 0).all()


def test_a_weighted_loss(run):
    found = run("A weight for each token")
    expected = -(logprobs_by_hand(found["model"], found["ids"][0]) * found["weights"][0]).sum() / found["weights"].sum()
    assert torch.allclose(found["loss"], expected, atol=1e-5)
    assert all(parameter.grad is not None for parameter in found["model"].parameters())


def test_fit_with_a_loader_and_a_loss_of_ones_own(run, tmp_path):
    found = run("Training with your own loader and loss")
    assert found["state"].step == 20 and found["state"].best < 3.5  # about 6.3 before
    assert [path.name for path in tmp_path.rglob("*.*")] == ["gpt.pt"]  # nothing was written


def test_hooks(run):
    found = run("Looking at activations")
    stream, model = found["stream"], found["model"]
    assert [x.shape for x in stream.values()] == [(1, found["ids"].size(1), model.config.n_embd)] * model.config.n_layer
    last = model.norm(stream[model.config.n_layer - 1])
    assert torch.allclose(softcap_logits(last, model.head.weight, model.config.softcap), found["logits"], atol=1e-5)
    with torch.no_grad():
        logits = model(found["ids"])
    assert not torch.equal(found["logits"], found["without_mlp"]) and torch.equal(logits, found["logits"])
