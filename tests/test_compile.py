"""torch.compile: when it is used, that it compiles once, and that it changes no results."""
import pytest
import torch
from test_model import random_model

import trainer
from conftest import assert_same, run_rows, saved_training
from runtime.checkpoint import load_checkpoint
from runtime.device import compile_in_place, keep_faster


def test_training_continues_where_compiling_fails(run_train, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no compiler here")
    expected = run_train(checkpoint="a/gpt.pt")
    monkeypatch.setattr(torch.nn.Module, "compile", fail)
    with pytest.warns(UserWarning, match="no compiler here") as caught:
        path = run_train("--compile_model", checkpoint="b/gpt.pt")
    assert len(caught) == 1
    assert_same(saved_training(path), saved_training(expected))


def test_the_model_is_compiled_once(run_train, monkeypatch):
    """All steps run what the dry run compiled; validation, the sample and the end do not compile again."""
    graphs, compile_model = [], torch.nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_model(self, backend=backend))
    torch._dynamo.reset()
    run_train("--compile_model", "--max_iter=4", "--sample_tokens=8")
    assert len(graphs) == 1


@pytest.mark.parametrize("switches", [{}, {"mixer": "gated_delta"}, {"linear": "grkan"}, {"ngram_rows": 50}],
                         ids=lambda s: str(s or "default"))
def test_compiled_gradients_equal_eager_ones(switches, monkeypatch):
    """Under autocast, bit for bit without the compiler's own kernels: a backward pass traced under autocast would round."""
    compile_model = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_model(self, backend="aot_eager"))
    model, idx = random_model(**switches, head_size=32, block_size=130), torch.arange(2 * 130).view(2, 130) % 96
    if model.ngrams is not None:
        model.ngrams.sparse = True

    def gradients():
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(idx, idx)
        loss.backward()
        return [parameter.grad.to_dense() for parameter in model.parameters()]
    eager = gradients()
    torch._dynamo.reset()
    assert compile_in_place(model, gradients)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), eager))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--linear=grkan", "--mixer=DA"], ["--linear=grkan", "--gradient_checkpointing"],
                                   ["--mlp=chebkan"], ["--mlp=bspline"]], ids=lambda flags: " ".join(flags) or "default")
def test_compiled_runs_equal_eager_ones(run_train, flags):
    eager = run_train(*flags, checkpoint="a/gpt.pt")
    compiled = run_train(*flags, "--compile_model", checkpoint="b/gpt.pt")
    for a, b in zip(run_rows(eager), run_rows(compiled)):
        assert a.get("train_loss") == pytest.approx(b.get("train_loss"), abs=1e-3)
    assert load_checkpoint(eager)["model"].keys() == load_checkpoint(compiled)["model"].keys()


@pytest.mark.parametrize("given, capability, compiles", [
    ("auto", None, False), ("auto", (6, 0), False), ("auto", (7, 0), True), ("1", None, True), ("0", (9, 0), False)])
def test_when_the_model_is_compiled(run_train, monkeypatch, given, capability, compiles):
    """auto: on GPUs that Triton supports; else as the flag says."""
    called = []
    monkeypatch.setattr(trainer, "compile_in_place", lambda model, dry_run: called.append(dry_run))
    if capability:
        monkeypatch.setattr("runtime.device.torch.cuda.get_device_capability", lambda device: capability)
        monkeypatch.setattr(trainer, "can_compile", lambda device, real=trainer.can_compile: real(torch.device("cuda")))
        monkeypatch.setattr(trainer, "compile_where_faster", called.append)  # as the run itself is on a CPU
    run_train(f"--compile_model={given}", "--max_iter=1")
    assert len(called) == compiles


@pytest.mark.parametrize("compiled_seconds, is_kept", [(0.9, True), (0.99, False), (1.5, False)])
def test_the_faster_way_is_kept(monkeypatch, compiled_seconds, is_kept):
    model, clock = torch.nn.Linear(1, 1), [0.0]
    model._compiled_call_impl = compiled = model._call_impl

    def step():
        clock[0] += compiled_seconds if model._compiled_call_impl else 1.0
    monkeypatch.setattr("runtime.device.time.perf_counter", lambda: clock[0])
    assert keep_faster(model, step) == pytest.approx(compiled_seconds)
    assert model._compiled_call_impl == (compiled if is_kept else None)


@pytest.mark.parametrize("is_faster", [False, True])
def test_a_long_run_on_a_cpu_chooses_and_resumes_as_it_chose(run_train, monkeypatch, is_faster, capsys):
    tried = []

    def compile_in_place(model, dry_run):
        tried.append(dry_run)
        model._compiled_call_impl = model._call_impl
        return True

    def keep_faster(model, dry_run):
        model._compiled_call_impl = model._compiled_call_impl if is_faster else None
        return 0.5 if is_faster else 1.0
    monkeypatch.setattr(trainer, "compile_in_place", compile_in_place)
    monkeypatch.setattr(trainer, "keep_faster", keep_faster)
    monkeypatch.setattr(trainer, "can_compile", lambda device: True)
    run_train("--max_iter=1", checkpoint="short/gpt.pt")
    assert not tried
    monkeypatch.setattr(trainer, "MIN_SECONDS_TO_COMPILE", 0.0)
    path = run_train("--max_iter=1", "--verbose=1")
    assert len(tried) == 1 and load_checkpoint(path)["training"]["settings"]["compile_model"] is is_faster
    assert f"training {'compiled' if is_faster else 'eager'}" in capsys.readouterr().err
    run_train("--max_iter=2", "--resume_checkpoint")
    assert len(tried) == 1 + is_faster and load_checkpoint(path)["training"]["settings"]["compile_model"] is is_faster
