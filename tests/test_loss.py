"""The chunked loss against torch's cross-entropy of all logits at once."""
import pytest
import torch
import torch.nn.functional as F
from test_rational import NEEDS_TRITON, run_python
from torch import library

from dataloader import IGNORE_INDEX
from layers import loss
from layers.loss import cross_entropy, losses_and_logit_grad, softcap_logits

B, T, C, V = 3, 10, 12, 37


@pytest.fixture(params=[1, 7, 1000])
def rows(request, monkeypatch) -> int:
    """Rows of logits in a chunk. Plain torch works on two at a time."""
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(loss.LOGIT_CHUNK_BYTES, device, 4 * V * request.param)
        monkeypatch.setitem(loss.SLICE_BYTES, device, 4 * V * 2)
    return request.param


def example(dtype=torch.float32, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    x = (scale * torch.randn(B, T, C, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator).requires_grad_()
    targets = torch.randint(V, (B, T), generator=generator)
    targets[0, 2:6] = targets[2, -1] = IGNORE_INDEX
    return x, weight, targets


def full_logits_loss(x, weight, targets, softcap, reduction="mean"):
    """The oracle: from all logits at once, in fp64."""
    logits = x.double() @ weight.double().T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction, ignore_index=IGNORE_INDEX)
    return losses if reduction == "mean" else losses.view(targets.shape)


@pytest.mark.parametrize("softcap", [0.0, 5.0, 2 * loss.MAX_SMALL_SOFTCAP])
@pytest.mark.parametrize("factor", [1.0, 65_536.0])
@pytest.mark.parametrize("is_on_gpu", [False, True], ids=["cpu", "as_on_gpu"])
def test_loss_and_gradients_equal_the_oracle(rows, softcap, factor, is_on_gpu, monkeypatch):
    """factor: the loss is multiplied by it afterwards, as by 1/num_batch_accum or a loss scale. As on a GPU: with a padded
    matrix and by an operation."""
    monkeypatch.setattr(loss, "is_on_gpu", lambda x: is_on_gpu)
    x, weight, targets = example()
    expected = full_logits_loss(x, weight, targets, softcap)
    expected_grads = torch.autograd.grad(factor * expected, (x, weight))
    value = cross_entropy(x, weight, targets, softcap, "mean")
    grads = torch.autograd.grad(factor * value, (x, weight))
    assert value.dtype == torch.float32 and value.item() == pytest.approx(expected.item(), rel=1e-6)
    for grad, expected_grad in zip(grads, expected_grads):
        assert grad.dtype == torch.float32
        assert torch.allclose(grad, expected_grad.float(), atol=1e-6 * factor, rtol=1e-4)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_unreduced_losses_and_gradients_equal_the_oracle(rows, softcap):
    x, weight, targets = example()
    factors = torch.randn(B, T, generator=torch.Generator().manual_seed(1))
    expected = full_logits_loss(x, weight, targets, softcap, "none")
    losses = cross_entropy(x, weight, targets, softcap, "none")
    assert losses.shape == (B, T) and torch.allclose(losses, expected.float(), atol=1e-5)
    assert (losses[targets < 0] == 0).all()
    for a, b in zip(torch.autograd.grad((factors * losses).sum(), (x, weight)),
                    torch.autograd.grad((factors * expected).sum(), (x, weight))):
        assert torch.allclose(a, b.float(), atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
@pytest.mark.parametrize("x_dtype", ["same", "fp32"])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_autocast_affects_products_and_not_sums(rows, dtype, tolerance, x_dtype, softcap):
    x, weight, targets = example(dtype if x_dtype == "same" else torch.float32)
    expected = full_logits_loss(x, weight, targets, softcap)
    expected_grads = torch.autograd.grad(expected, (x, weight))
    with torch.autocast("cpu", dtype=dtype):
        value = cross_entropy(x, weight, targets, softcap, "mean")
        each = cross_entropy(x, weight, targets, softcap, "none")
    assert value.dtype == each.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=tolerance) and value.item() != expected.item()
    assert each.sum().item() / (targets >= 0).sum().item() == pytest.approx(expected.item(), rel=tolerance)
    for grad, expected_grad, of in zip(torch.autograd.grad(value, (x, weight)), expected_grads, (x, weight)):
        assert grad.dtype == of.dtype
        error = (grad.float() - expected_grad.float()).norm() / expected_grad.float().norm()
        assert error < tolerance


def test_small_gradients_survive_fp16():
    """Without a loss scale: fp16 would round these gradients to 0 after the division by 4,096 targets."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 1024, C, requires_grad=True), (0.01 * torch.randn(V, C)).requires_grad_()
    targets = torch.randint(V, (4, 1024))
    expected = torch.autograd.grad(full_logits_loss(x, weight, targets, 0.0), weight)[0]
    with torch.autocast("cpu", dtype=torch.float16):
        value = cross_entropy(x, weight, targets, 0.0, "mean")
    grad, = torch.autograd.grad(value, weight)
    assert (grad - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_targets_loss_and_gradients_are_zero(rows, reduction):
    x, weight, targets = example()
    value = cross_entropy(x, weight, torch.full_like(targets, IGNORE_INDEX), 5.0, reduction)
    grads = torch.autograd.grad(value.sum(), (x, weight))
    assert (value == 0).all() and all((grad == 0).all() for grad in grads)


def test_frozen_inputs_get_no_gradient(rows):
    x, weight, targets = example()
    for frozen in (x, weight):
        frozen.requires_grad_(False)
        free = weight if frozen is x else x
        grad, = torch.autograd.grad(cross_entropy(x, weight, targets, 5.0, "mean"), free)
        expected, = torch.autograd.grad(full_logits_loss(x, weight, targets, 5.0), free)
        assert torch.allclose(grad, expected.float(), atol=1e-5)
        frozen.requires_grad_(True)
    with torch.no_grad():
        assert not cross_entropy(x, weight, targets, 5.0, "mean").requires_grad


def test_a_second_backward_pass_is_right_or_refused(rows):
    """Gradients are computed in the forward pass and may be scaled in place: a second pass must not return wrong ones."""
    x, weight, targets = example()
    value = cross_entropy(x, weight, targets, 5.0, "mean")
    first = [grad.clone() for grad in torch.autograd.grad(2 * value, (x, weight), retain_graph=True)]
    try:
        second = torch.autograd.grad(2 * value, (x, weight))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error) or "second time" in str(error)
    else:
        assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("softcap", [0.0, 15.0])
def test_huge_logits_give_no_nan(softcap):
    x, weight, targets = example(scale=1e18)
    value = cross_entropy(x, weight, targets, softcap, "mean")
    assert torch.isfinite(value) and all(torch.isfinite(grad).all() for grad in torch.autograd.grad(value, (x, weight)))


def test_softcap_logits_by_hand():
    x, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [15.0, 0.0], [1e6, 0.0], [-1e6, 0.0]])
    expected = torch.tensor([[0.0, 15 * 0.7615942, 15.0, -15.0]])  # tanh(1) = 0.7615942
    assert torch.allclose(softcap_logits(x, weight, 15.0), expected)
    assert torch.equal(softcap_logits(x, weight, 0.0), torch.tensor([[0.0, 15.0, 1e6, -1e6]]))
    assert softcap_logits(x.bfloat16(), weight.bfloat16(), 15.0).dtype == torch.float32


# -- the GPU's kernel -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("needs_grad", [False, True])
def test_the_operation_passes_torchs_checks(needs_grad):
    """Fake tensors get the shapes of real ones, and no input is modified."""
    for dtype in (torch.float32, torch.bfloat16):
        library.opcheck(losses_and_logit_grad, (torch.randn(3, 64).to(dtype), torch.tensor([0, 5, 36]), V, 5.0, needs_grad))


@pytest.mark.integration
@NEEDS_TRITON
def test_the_kernel_in_tritons_interpreter():
    """Classes fewer than the columns that are read at once, more, and as many; the last columns only pad."""
    pytest.importorskip("triton", minversion="3.7")  # before, the interpreter does not understand newer versions of numpy
    run_python("""
import torch
from kernels import cross_entropy_triton as kernels
from layers.loss import losses_and_logit_grad_torch
torch.manual_seed(0)
for classes, columns in ((37, 64), (5000, 5000), (kernels.COLUMNS, kernels.COLUMNS + 64)):
    for softcap in (0.0, 5.0):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            logits = (3 * torch.randn(6, columns)).to(dtype)
            targets = torch.tensor([0, classes - 1, 5, 5, 7, 30])
            fp32 = logits[:, :classes].to(torch.float32, copy=True)  # the gradient will overwrite it
            want_losses, want_grad = losses_and_logit_grad_torch(fp32, targets, softcap, True)
            losses, grad = kernels.losses_and_logit_grad(logits, targets, classes, softcap, True)
            assert torch.allclose(losses, want_losses, rtol=1e-5)
            assert grad.dtype == dtype and grad.shape == logits.shape and (grad[:, classes:] == 0).all()
            assert (grad[:, :classes].float() - want_grad).norm() <= tolerance * want_grad.norm()
            alone, none = kernels.losses_and_logit_grad(logits, targets, classes, softcap, False)
            assert torch.equal(alone, losses) and none.shape == (0, columns)
""", TRITON_INTERPRET="1")


@pytest.mark.integration
@NEEDS_TRITON
def test_the_kernel_compiles_for_several_generations_of_cards():
    pytest.importorskip("triton", minversion="3.3")  # ASTSource has other arguments before
    run_python("""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import cross_entropy_triton as kernels
for dtype in ("*fp32", "*bf16", "*fp16"):
    types = {"logits_ptr": dtype, "targets_ptr": "*i64", "losses_ptr": "*fp32", "grad_ptr": dtype, "stride": "i32",
             "classes": "i32", "softcap": "fp32", "CAPPED": "constexpr", "NEEDS_GRAD": "constexpr", "COLUMNS": "constexpr"}
    for flags in ({"CAPPED": True, "NEEDS_GRAD": True}, {"CAPPED": False, "NEEDS_GRAD": True},
                  {"CAPPED": True, "NEEDS_GRAD": False}):
        source = ASTSource(fn=kernels.cross_entropy_kernel, signature=types, constexprs=flags | {"COLUMNS": kernels.COLUMNS})
        for capability in (75, 90) if dtype == "*fp16" else (80,):
            assert "sm_" in triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
""")
