"""meta.py: gradients of a task against slow ones, weights that stay, documents and what is held out, and the command."""
import json

import pytest
import torch
from test_conversations import write_jsonl
from test_model import V, random_model
from torch.func import functional_call

import finetune
from conftest import assert_same, run_rows, saved_training, train_tiny
from layers import MIXERS, MLPS
from learner import ADAPT_SCOPES, EMBED_RATIO, AdaptConfig, Learner
from meta import META_OBJECTIVES, DocumentBatches, MetaConfig, cut_pieces, meta_loss, read_documents, task_gradient
from runtime.checkpoint import load_checkpoint, run_folder, save_checkpoint
from runtime.device import DeviceConfig, open_machine

BLOCK, HOP = 24, 4  # of random_model
SGD = {"adapt_optimizer": "sgd", "adapt_rate": 0.05}


def make_learner(dtype: str = "fp32", model=None, **flags) -> Learner:
    machine = open_machine(DeviceConfig(device="cpu", dtype=dtype))
    return Learner(model or random_model(), AdaptConfig(**{"adapt_hop": HOP} | flags), machine)


def document(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(V, (n + 1,), generator=torch.Generator().manual_seed(seed))


def assert_close(a: list[torch.Tensor], b: list[torch.Tensor], rtol=1e-4):
    scale = max(x.abs().max() for x in b)
    assert len(a) == len(b) > 0 and scale > 1e-3
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * scale.item())


# -- the gradient of a task -------------------------------------------------------------------------------------------

def slow_gradient(learner: Learner, windows: list[tuple[int, int, int]], ids: torch.Tensor, rate: float) -> tuple:
    """Gradient descent on copies of the weights, without Learner, train_step or optimizer. windows: (context start, first
    read, stop)."""
    model = learner.model
    by_name = dict(model.named_parameters())
    weights = {name: p.detach().clone() for name, p in by_name.items()}
    sums, nats = {name: torch.zeros_like(p) for name, p in weights.items()}, 0.0
    for context_start, first, stop in windows:
        cache = model.init_cache(1, BLOCK)
        if first > context_start:
            with torch.no_grad():
                functional_call(model, weights, (ids[None, context_start:first],), {"cache": cache})
        for start in range(first, stop, HOP):
            n = min(HOP, stop - start)
            leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
            batch = ids[None, start:start + n], ids[None, start + 1:start + n + 1]
            loss = functional_call(model, leaves, batch, {"cache": cache})
            grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
            cache.detach()
            nats += loss.item() * n
            for name, grad in grads.items():
                sums[name] += grad * n
                weights[name] = weights[name] - rate * (EMBED_RATIO if name == "embed.weight" else 1.0) * grad
    name_of = {id(p): name for name, p in by_name.items()}
    n_tokens = len(ids) - 1
    return nats / n_tokens, [sums[name_of[id(p)]] / n_tokens for p, _ in learner.weights]


@pytest.mark.parametrize("objective, rate", [("fomaml", 0.05), ("joint", 0.0)])
def test_gradient_equals_a_slow_one(objective, rate):
    """Of 43 tokens: the second window starts anew from half a block, the last hop has 3 tokens."""
    learner, ids = make_learner(**SGD), document(43)
    windows = [(0, 0, 24), (12, 24, 36), (24, 36, 43)]
    expected_loss, expected = slow_gradient(learner, windows, ids, rate)
    loss, gradient = task_gradient(learner, ids, objective)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert_close(gradient, expected)
    other, _ = slow_gradient(learner, windows, ids, 0.05 - rate)
    assert abs(other - expected_loss) > 1e-3  # the steps matter


def test_without_a_rate_fomaml_is_joint():
    ids = document(40)
    fomaml, joint = (task_gradient(make_learner(**SGD | {"adapt_rate": 1e-30}), ids, objective)
                     for objective in ("fomaml", "joint"))
    assert fomaml[0] == joint[0]
    assert_close(fomaml[1], joint[1], rtol=1e-6)


def test_reptile_of_one_hop_is_the_gradient():
    learner, ids = make_learner(**SGD), document(HOP)
    loss = learner.model(ids[None, :-1], ids[None, 1:])
    expected = torch.autograd.grad(loss, [p for p, _ in learner.weights])
    value, gradient = task_gradient(learner, ids, "reptile")
    assert value.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_close(gradient, list(expected), rtol=1e-3)


def test_reptile_with_gradient_descent_is_fomaml():
    """And not with AdamW."""
    ids = document(48)
    for flags, is_same in (SGD, True), ({"adapt_rate": 1e-3}, False):
        reptile, fomaml = (torch.cat([g.flatten() for g in task_gradient(make_learner(**flags), ids, objective)[1]])
                           for objective in ("reptile", "fomaml"))
        assert (torch.dist(reptile, fomaml) / fomaml.norm() < 1e-3) == is_same


@pytest.mark.parametrize("objective", META_OBJECTIVES)
@pytest.mark.parametrize("switches", [*({"mixer": mixer} for mixer in MIXERS), *({"mlp": mlp} for mlp in MLPS),
                                      {"loops": 2}, {"loops": 2, "sampled_loops": True, "mixer": "DA"}], ids=str)
def test_loss_has_the_gradient_and_leaves_the_weights(objective, switches):
    """Two tasks of a step, one of them of an odd length: the gradients add up, and weights stay bit for bit."""
    learner = make_learner(model=random_model(**switches))
    before = [p.detach().clone() for p, _ in learner.weights]
    tasks = [task_gradient(learner, document(n, seed=n), objective) for n in (30, 41)]
    for n, (loss, _) in zip((30, 41), tasks):
        ids = document(n, seed=n)
        value = meta_loss(learner, objective, learner.model, [ids[None, :-1], ids[None, 1:]])
        value.backward()
        assert value.item() == loss.item()
    for (p, _), old, *grads in zip(learner.weights, before, *(gradient for _, gradient in tasks)):
        assert torch.equal(p, old) and torch.equal(p.grad, grads[0] + grads[1])


@pytest.mark.parametrize("scope", sorted(set(ADAPT_SCOPES) - {"lora"}))
def test_what_is_out_of_scope_stays(scope):
    learner, ids = make_learner(model=random_model(norm="scaled_rms"), adapt_scope=scope), document(30)
    meta_loss(learner, "fomaml", learner.model, [ids[None, :-1], ids[None, 1:]]).backward()
    with_gradient = {name for name, p in learner.model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in learner.model.named_parameters()
                             if ADAPT_SCOPES[scope].trains(name, learner.model.config)}


def test_half_precision_sees_every_step():
    """Autocast keeps weights that it has cast until it ends, and `fit` computes the loss within it."""
    learner, ids = make_learner("bf16", adapt_rate=1e-2), document(40)
    loss, gradient = task_gradient(learner, ids, "fomaml")
    with learner.machine.autocast():
        learner.model(ids[None, :BLOCK])  # casts the weights
        within, other = task_gradient(learner, ids, "fomaml")
    assert within == loss and all(torch.equal(a, b) for a, b in zip(gradient, other))


def test_a_task_that_diverges_has_no_finite_loss():
    learner, ids = make_learner(), document(40)
    with torch.no_grad():
        learner.weights[0][0][0, 0] = float("inf")
    before = [p.detach().clone() for p, _ in learner.weights]
    assert torch.isnan(meta_loss(learner, "fomaml", learner.model, [ids[None, :-1], ids[None, 1:]]))
    assert all(torch.equal(p, old) for (p, _), old in zip(learner.weights, before))


# -- documents --------------------------------------------------------------------------------------------------------

def test_pieces_by_hand():
    pieces = cut_pieces([torch.arange(9), torch.arange(3)], n=3, shortest=3)  # of 8 and of 2 predicted tokens
    assert [piece.tolist() for piece in pieces] == [[0, 1, 2, 3], [3, 4, 5, 6]]
    assert [len(piece) for piece in cut_pieces([torch.arange(9)], 3, 2)] == [4, 4, 3]


def test_an_epoch_contains_every_piece_once():
    batches = DocumentBatches([torch.arange(i, i + 5) for i in range(7)], seed=3)
    epochs = [[int(batches[i][0][0, 0]) for i in range(first, first + 7)] for first in (0, 7)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(7)) and epochs[0] != epochs[1]
    idx, targets = batches[0]
    assert idx.shape == (1, 4) and torch.equal(targets, idx + 1)
    fingerprints = {DocumentBatches([torch.tensor([0, last])], 0).fingerprint() for last in (1, 2)}
    assert len(fingerprints) == 2


TEXTS = [f"{'number ' * (i % 3 + 1)}{i} and then {i + 1}; " * 3 for i in range(40)]


def test_held_out_documents_are_not_trained_on(tmp_path):
    """Whatever their order, and however often they occur."""
    splits = []
    for name, texts in ("a", TEXTS), ("b", [*TEXTS[::-1], *TEXTS[:9]]):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in texts])
        splits.append(read_documents(str(path), None, False, MetaConfig()))
    assert len(splits[0][1]) == 4 and set(splits[0][1]) == set(splits[1][1])
    for train, held_out in splits:
        assert set(train) == set(TEXTS) - set(held_out)


def test_a_prepared_folder_keeps_its_split(data_path):
    train, held_out = read_documents(str(data_path), None, False, MetaConfig())
    manifest = json.loads((data_path / "manifest.json").read_text())
    for part, split in (train, "train"), (held_out, "val"):
        assert sum(len(text.encode()) for text in part) == sum(shard["bytes"] for shard in manifest["shards"][split])


# -- the command ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def base(data_path, tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("base") / "gpt.pt", data_path, "--max_iter=4")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture
def run(base, texts, tmp_path):
    """run("--meta=fomaml", …) -> path of the checkpoint that finetune.py has written in this process."""
    def run(*flags: str, out: str = "out/gpt.pt"):
        flags = [f"--out_path={tmp_path / out}", "--verbose=0", "--device=cpu", *flags]
        if "--resume_checkpoint" not in flags:
            flags = [f"--checkpoint_path={base}", f"--dataset={texts}", "--dtype=fp32", "--meta_contexts=2", "--adapt_hop=8",
                     "--num_batch_accum=2", "--val_intervals=3", "--log_intervals=1", "--warmup_iter=2", *flags]
        finetune.main(flags)
        return tmp_path / out
    return run


@pytest.mark.integration
@pytest.mark.parametrize("objective", META_OBJECTIVES)
def test_it_learns_and_reports(run, capsys, objective):
    path = run(f"--meta={objective}", "--max_iter=16", "--val_intervals=8", "--verbose=1", "--learning_rate=0.01")
    first, *_, last = run_rows(path)
    assert first["static_bpb"] > first["val_bpb"] > 0  # so high a rate of a hardly trained model gains at once
    assert last["static_bpb"] < first["static_bpb"] - 0.1 and last["val_bpb"] < first["val_bpb"] - 0.1
    assert last["gain_bpb"] > 0 and last["gain_margin"] > 0
    out = capsys.readouterr().out
    assert f"learner  {objective}: adamw at 0.0006 on all, hops of 8 tokens" in out and "| adapting | lower |" in out
    page = (run_folder(path) / "finetuning.html").read_text(encoding="utf-8")
    assert "<svg" in page and "held-out documents" in page and "answers" not in page


@pytest.mark.integration
@pytest.mark.parametrize("scope", ["all", "last_half_mlps"])
def test_resumed_run_equals_an_uninterrupted_one(run, scope):
    flags = "--meta=fomaml", f"--adapt_scope={scope}", "--cooldown_frac=0"
    whole, parts = run(*flags, "--max_iter=6", out="whole/gpt.pt"), run(*flags, "--max_iter=4", out="parts/gpt.pt")
    run("--resume_checkpoint", "--max_iter=6", out="parts/gpt.pt")
    assert_same(saved_training(parts), saved_training(whole))
    keep = {0, 1, 2, 3, 5, 6}  # at step 4 the run that ended there was validated
    assert [row for row in run_rows(parts) if row["step"] in keep] == [row for row in run_rows(whole) if row["step"] in keep]


@pytest.fixture(scope="module")
def default_val_loss(base, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("default") / "gpt.pt"
    finetune.main([f"--checkpoint_path={base}", f"--dataset={texts}", f"--out_path={out}", "--meta=fomaml", "--max_iter=3",
                   "--dtype=fp32", "--meta_contexts=2", "--adapt_hop=8", "--num_batch_accum=2", "--verbose=0",
                   "--device=cpu", "--warmup_iter=2"])
    return run_rows(out)[-1]["val_loss"]


@pytest.mark.integration
@pytest.mark.parametrize("flag", ["--meta=joint", "--meta=reptile", "--meta_contexts=1", "--val_documents=2", "--seed=1",
                                  "--adapt_rate=0.01", "--adapt_hop=2", "--adapt_scope=last_half_mlps", "--dtype=bf16",
                                  "--adapt_optimizer=sgd", "--num_batch_accum=1", "--meta_bytes=2500"])
def test_flag_changes_the_run(run, default_val_loss, flag):
    assert run_rows(run("--meta=fomaml", "--max_iter=3", flag))[-1]["val_loss"] != default_val_loss


@pytest.mark.integration
def test_a_dry_run_and_the_name_of_the_output(base, texts, capsys):
    finetune.main([f"--checkpoint_path={base}", f"--dataset={texts}", "--meta=reptile", "--dry_run", "--device=cpu"])
    assert "tokens per second" in capsys.readouterr().out.replace("tokens/s", "tokens per second")
    assert not base.with_name("gpt_reptile.pt").exists()
    assert finetune.default_out_path(base, "reptile") == base.with_name("gpt_reptile.pt")


@pytest.mark.parametrize("flags, words", [
    (["--adapt_hop=8"], ["--adapt_hop=8: has no effect without --meta"]),
    (["--meta=fomaml", "--batch_size=4"], ["--batch_size=4: has no effect with --meta"]),
    (["--meta=maml"], ["--meta", "fomaml, reptile, joint"]),
    (["--meta=fomaml", "--adapt_scope=lora"], ["--adapt_scope=lora"]),
    (["--meta=fomaml", "--adapt_optimizer=rms"], ["--adapt_optimizer=rms"]),
    (["--meta=fomaml", "--dataset=none.txt"], ["none.txt"]),
    (["--meta=fomaml", "--dataset=a/b,c/d"], ["give one at a time"]),
    (["--meta=fomaml", "--meta_bytes=400"], ["too few to hold out"])], ids=str)
def test_bad_flags_are_refused(base, texts, tmp_path, refused, flags, words):
    refused(finetune.main, [f"--checkpoint_path={base}", f"--dataset={texts}", f"--out_path={tmp_path / 'gpt.pt'}",
                            "--max_iter=1", "--device=cpu", *flags], *words)
    assert not (tmp_path / "gpt.pt").exists()


def test_documents_shorter_than_a_hop_are_refused(base, tmp_path, refused):
    path = write_jsonl(tmp_path / "short.jsonl", [{"text": f"{i}"} for i in range(20)])
    refused(finetune.main, [f"--checkpoint_path={base}", f"--dataset={path}", f"--out_path={tmp_path / 'gpt.pt'}",
                            "--meta=fomaml", "--device=cpu"], "short.jsonl", "longer than a hop", "--adapt_hop")


@pytest.mark.integration
def test_resumed_run_keeps_its_flags_and_data(run, refused, tmp_path):
    path = run("--meta=fomaml", "--max_iter=1")
    for flag in "--meta=joint", "--adapt_hop=2", "--meta_contexts=1":
        refused(finetune.main, [f"--out_path={path}", "--resume_checkpoint", "--max_iter=2", flag], flag, "keeps")


@pytest.mark.integration
def test_a_checkpoint_from_before_the_flags_resumes(base, tmp_path):
    questions = write_jsonl(tmp_path / "q.jsonl", [{"question": f"{i}?", "answer": "yes"} for i in range(30)])
    path = tmp_path / "gpt.pt"
    finetune.main([f"--checkpoint_path={base}", f"--dataset={questions}", f"--out_path={path}", "--max_iter=1",
                   "--batch_size=4", "--device=cpu", "--verbose=0"])
    checkpoint = load_checkpoint(path)
    for name in (*MetaConfig.__dataclass_fields__, *AdaptConfig.__dataclass_fields__):
        del checkpoint["training"]["settings"][name]
    save_checkpoint(path, checkpoint)
    finetune.main([f"--out_path={path}", "--resume_checkpoint", "--max_iter=2", "--verbose=0", "--device=cpu"])
    assert run_rows(path)[-1]["step"] == 2
