"""Simulates torch's "cuda" device on a machine without a GPU, to test code that only a GPU runs.

Under FakeTensorMode tensors have a shape, a dtype and the device "cuda", but no numbers. Code that mixes devices by mistake,
or makes the host wait for a number, fails. torch.compile generates its Triton kernels, and Triton compiles them for any GPU.

    python tests/no_card.py train_step decode       runs these checks and prints a line of JSON: {"train_step": null, …}

A CPU build of torch has neither a device guard nor hooks for CUDA. The library below registers some that do nothing, and
has to be loaded before torch. So this is a separate program, which tests/test_cuda_path.py runs. (A CUDA build of torch has
its own guard and hooks, which need a GPU.)
"""
import ctypes
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import traceback
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

REPO = Path(__file__).parent.parent
LIBRARY = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
constexpr auto CUDA = c10::DeviceType::CUDA;
struct NoCard : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Device getDevice() const { return c10::Device(CUDA, 0); }
  c10::Stream getStream(c10::Device) const noexcept { return c10::Stream(c10::Stream::DEFAULT, getDevice()); }
  c10::Stream exchangeStream(c10::Stream) const noexcept { return getStream(getDevice()); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const {}
  void block(void*, const c10::Stream&) const {}
  bool queryEvent(void*) const { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, NoCard)
struct Hooks : at::CUDAHooksInterface {
  Hooks(at::CUDAHooksArgs) {}
  bool isBuilt() const { return true; }
  bool hasCUDA() const { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const { return true; }
  c10::DeviceIndex deviceCount() const { return 1; }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}
"""


def load_library():
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "no_card.cpp", Path(folder) / "no_card.so"
        source.write_text(LIBRARY)
        subprocess.run(["g++", "-w", "-O0", "-shared", "-fPIC", "-std=c++20", f"-I{torch_folder / 'include'}", source, "-o",
                        library, f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}", "-lc10",
                        "-ltorch_cpu"], check=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


if __name__ == "__main__":
    load_library()
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import torch  # noqa: E402
import torch._dynamo  # noqa: E402 (reads how torch was built, before the patches below)
import torch._inductor.compile_fx  # noqa: E402
from test_model import GPT2, T, tiny_config  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._dynamo.device_interface import CudaInterface  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.cuda.amp import common as cuda_amp  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import trainer  # noqa: E402
from layers import LINEARS, MIXERS, MLPS  # noqa: E402
from learner import AdaptConfig, Learner  # noqa: E402
from model import GPT  # noqa: E402
from optimizer import OptimizerConfig, set_rates  # noqa: E402
from runtime.device import DeviceConfig, Machine, copy_stream, open_machine  # noqa: E402
from sampling import GREEDY, SamplingConfig, sample  # noqa: E402

GPU = torch.device("cuda:0")


# -- the simulated GPU ------------------------------------------------------------------------------------------------

class FakeStream:
    """Records the calls on all streams, in order."""
    calls: list = []

    def __init__(self, name):
        self.name = name

    def wait_stream(self, other):
        self.calls.append((self.name, "waits for", other.name))


COMPUTE_STREAM = FakeStream("compute")


def constant(value):
    """A function that returns `value`; a new one at each call, as dynamo would confuse two uses of the same one."""
    return lambda *args, **kwargs: value


@contextmanager
def simulated_gpu(capability: tuple[int, int] = (8, 0)):
    """torch reports one GPU of this compute capability."""
    major, minor = capability
    properties = SimpleNamespace(
        name="NVIDIA Example", major=major, minor=minor, multi_processor_count=108, total_memory=80 << 30, warp_size=32,
        max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536, gcnArchName="",
        L2_cache_size=40 << 20, shared_memory_per_block=49152, shared_memory_per_block_optin=101376,
        shared_memory_per_multiprocessor=102400)
    return_values = {
        torch.cuda: {"is_available": True, "is_initialized": True, "current_device": 0, "device_count": 1,
                     "get_device_capability": capability, "get_device_properties": properties,
                     "_get_device_properties": properties, "get_device_name": properties.name, "_lazy_init": None,
                     "_exchange_device": 0, "_maybe_exchange_device": 0, "is_bf16_supported": True,
                     "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
                     "get_arch_list": [f"sm_{major}{minor}"],
                     "current_stream": COMPUTE_STREAM, "default_stream": COMPUTE_STREAM},
        torch._C: {"_cuda_getDevice": 0, "_cuda_getDeviceCount": 1, "_cuda_exchangeDevice": 0,
                   "_cuda_maybeExchangeDevice": 0},
        torch._subclasses.fake_tensor: {"init_gpu_context": None},
        cuda_amp: {"amp_definitely_not_available": False},
        CudaInterface: {"get_device_properties": properties, "get_compute_capability": 10 * major + minor,
                        "is_triton_capable": True, "raise_if_triton_unavailable": None},
        CudaInterface.Worker: {"get_device_properties": properties}}
    with ExitStack() as patches:
        for owner, values in return_values.items():
            for name, value in values.items():
                function = constant(value)
                patches.enter_context(mock.patch.object(
                    owner, name, staticmethod(function) if isinstance(owner, type) else function, create=True))
        patches.enter_context(mock.patch.object(torch.cuda, "Stream", lambda device: FakeStream("copy")))
        patches.enter_context(mock.patch.object(torch.cuda, "stream", lambda stream: ExitStack()))
        patches.enter_context(mock.patch.object(
            torch.Tensor, "record_stream", lambda self, stream: FakeStream.calls.append(("recorded on", stream.name))))
        copy_stream.cache_clear()
        yield


def to_gpu(model: nn.Module) -> nn.Module:
    """`model.to(GPU)`, which fake parameters do not allow."""
    moved = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in moved:  # tied parameters stay tied
                    moved[parameter] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=GPU))
                module._parameters[name] = moved[parameter]
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=GPU)
    return model


class NoHostSync(TorchDispatchMode):
    """Raises where the host would wait for the GPU: where a number is read (FakeTensorMode raises there too), at blocking
    copies, and at scalars that where() copies to the GPU (aten's TensorCompare.cpp)."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        kinds = {tensor.device.type for tensor in tensors}
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"), f"{name} waits for the GPU"
        out = func(*args, **kwargs)
        copies = name == "_to_copy" and isinstance(out, Tensor) and {out.device.type} != kinds
        if copies or name == "copy_" and len(kinds) == 2:
            assert kwargs.get("non_blocking") or name == "copy_" and args[2:3] == (True,), f"{name} blocks: {args}"
        elif len(kinds) == 2 and name not in ("copy_", "_to_copy"):
            scalars = [t for t in tensors if t.device.type == "cpu" and t.dim() == 0]
            assert name != "where", f"where() copies a scalar to the GPU: {args}"
            assert scalars and all(t.dim() == 0 for t in tensors if t.device.type == "cpu"), f"{name} mixes devices: {args}"
        return out


# -- checks -----------------------------------------------------------------------------------------------------------

class FakeLoader:
    """Batches of 3 x T tokens on the CPU."""

    def next_batch(self, model):
        return torch.empty(3, T, dtype=torch.int64), torch.empty(3, T, dtype=torch.int64)


def fake_run(dtype: str, optimizer: str, **switches) -> tuple[trainer.TrainState, trainer.TrainSetup]:
    """A run as `train.open_run` makes one."""
    setup = trainer.TrainSetup(Machine(GPU, dtype), OptimizerConfig(optimizer=optimizer), step_tokens=3 * T)
    state = trainer.init_state(to_gpu(GPT(tiny_config(**switches))), FakeLoader(), setup)
    assert state.scaler.is_enabled() == (dtype == "fp16")
    return state, setup


def train_step():
    """Two training steps of every architecture and optimizer, the first of which allocates states, have no host sync."""
    layers = [*({"mlp": name} for name in MLPS), *({"mixer": name} for name in MIXERS),
              *({"linear": name} for name in LINEARS)]
    cases = [*(("bf16", "muon", switches) for switches in layers), ("fp16", "muon", {"mixer": "DA", "linear": "grkan"}),
             ("fp32", "muon", {"n_kv_head": 1}), ("bf16", "muon", {"loops": 2, "sampled_loops": True}),
             ("bf16", "gpt2", GPT2), ("bf16", "adamw", {"tied": False}), ("fp16", "muon", {"ngram_rows": 50})]
    for dtype, optimizer, switches in cases:
        with FakeTensorMode():
            state, setup = fake_run(dtype, optimizer, **switches)
            loop = trainer.LoopConfig(num_batch_accum=2, grad_clip=1.0)
            with NoHostSync():
                for step in range(2):
                    set_rates(state.optimizer, step, step / 2, setup.schedule)
                    loss, n_tokens = trainer.train_step(state, loop, trainer.next_token_loss, setup.machine)
                    state.step += 1
            assert (loss.device, loss.dtype, n_tokens) == (GPU, torch.float32, 2 * 3 * T)
            for part in state.optimizer.parts.values():
                assert all(value.device == GPU for averages in part.state.values() for value in averages.values())


def host_sync_is_detected():
    """NoHostSync raises at every kind of host sync."""
    with FakeTensorMode(), NoHostSync():
        x = torch.empty((), device=GPU)
        for name, sync in {"item": lambda: x.item(), "bool": lambda: bool(x > 0), "cpu": lambda: x.cpu(),
                           "where": lambda: torch.where(x > 0, torch.empty(()), x), "mixed": lambda: x + torch.empty(2),
                           "to": lambda: torch.empty(2).to(GPU)}.items():
            try:
                sync()
            except Exception:
                continue
            raise AssertionError(f"{name}: not detected")


def copy_stream_order():
    """Batches are copied on a stream of their own; computing waits for it, and their memory is freed after computing."""
    with FakeTensorMode():
        FakeStream.calls.clear()
        with NoHostSync():
            batch = Machine(GPU, "bf16").to_device(FakeLoader().next_batch(None))
        assert all(tensor.device == GPU for tensor in batch)
    assert FakeStream.calls == [("compute", "waits for", "copy"), ("recorded on", "compute"), ("recorded on", "compute")]


def decode():
    """Decoding a token has no host sync, from the cache to the sampled token, with any mixer."""
    for switches in ({}, {"mixer": "gated_delta"}, {"mixer": "DA", "linear": "grkan"}, {"positions": "learned"},
                     {"loops": 3}):
        for sampling in (GREEDY, SamplingConfig(top_p=0.9, min_p=0.01, repetition_penalty=1.1)):
            with FakeTensorMode(), torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
                model = to_gpu(GPT(tiny_config(**switches)))
                model.cast_matrices(torch.bfloat16)
                cache = model.init_cache(3, T, torch.bfloat16)
                model.eager_forward(torch.empty(3, 5, dtype=torch.int64, device=GPU), cache=cache, logits_to_keep=1)
                with NoHostSync():
                    new = torch.empty(3, 1, dtype=torch.int64, device=GPU)
                    seen = torch.empty(3, model.config.vocab_size, dtype=torch.bool, device=GPU)
                    logits = model.eager_forward(new, cache=cache, logits_to_keep=1)[:, 0]
                    assert sample(logits, sampling, None, seen).device == GPU


def adapt_step():
    """Reading two hops at inference time, with a step on each, has no host sync, with any mixer. (sgd's fused kernel has no
    fake one.)"""
    for switches, dtype, optimizer in (({}, "bf16", "adamw"), ({"mixer": "gated_delta"}, "bf16", "adamw"),
                                       ({"mixer": "DA", "linear": "grkan"}, "fp16", "adamw"), ({}, "fp32", "rms")):
        with FakeTensorMode():
            config = AdaptConfig(adapt_optimizer=optimizer)
            learner = Learner(to_gpu(GPT(tiny_config(**switches))), config, Machine(GPU, dtype))
            ids = torch.empty(1, 12, dtype=torch.int64, device=GPU)
            with NoHostSync():
                cache = learner.fill_cache(ids[0, :4])
                losses = [learner.read_hop((ids[:, i:i + 4], ids[:, i + 1:i + 5]), cache, learn=True) for i in (4, 7)]
                learner.forget()
            assert all(loss.device == GPU and loss.dim() == 0 for loss in losses)


def machine_setup():
    """open_machine enables TF32, and with --deterministic only deterministic kernels."""
    with mock.patch.dict("os.environ"):
        assert open_machine(DeviceConfig()).dtype == "bf16"
        assert torch.get_float32_matmul_precision() == "high" and not torch.are_deterministic_algorithms_enabled()
        try:
            open_machine(DeviceConfig(deterministic=True))
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        finally:
            torch.use_deterministic_algorithms(False)


def compiled(capability: str, **switches):
    """torch.compile generates one graph each for the forward and backward pass; their Triton kernels compile for the GPU."""
    import triton
    from torch._inductor import config, graph
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.fx_passes import joint_graph
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget

    class Generated(Exception):
        pass

    class Driver:
        get_current_target = lambda self: GPUTarget("cuda", int(capability), 32)
        get_current_device = get_current_stream = lambda self, *args: 0
        get_active_torch_device = lambda self: GPU
        get_device_interface = lambda self: torch.cuda
        get_benchmarker = lambda self: None

    sources = []

    def keep(self, *args, **kwargs):
        code, _ = self.codegen()
        sources.append(code.value if hasattr(code, "value") else str(code))

        def call(args):
            raise Generated  # nothing can run it
        return SimpleNamespace(call=call, __file__=__file__, runner=None)
    triton.runtime.driver.set_active(Driver())
    model_dtype = torch.bfloat16 if int(capability) >= 80 else torch.float16
    patches = [  # off: what would run on the GPU while compiling, such as pattern tracing and constant folding
        mock.patch.object(joint_graph, "lazy_init", lambda *args: None),
        mock.patch.object(graph.GraphLowering, "compile_to_module", keep),
        mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None),
        config.patch(compile_threads=1, pattern_matcher=False, shape_padding=False, joint_graph_constant_folding=False,
                     fx_graph_cache=False),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False)]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        with FakeTensorMode():
            model = to_gpu(GPT(tiny_config(block_size=128, head_size=32, **switches)))
            idx = torch.empty(4, 128, dtype=torch.int64, device=GPU)
            model.compile()
            try:
                with torch.autocast("cuda", dtype=model_dtype):
                    model(idx, idx)
            except Generated:
                pass
        assert len(sources) == 2, f"{len(sources)} graphs: the model is not one forward and one backward pass"
        kernels = {name: source for code in sources for name, source in re.findall(
            r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.DOTALL)}
        assert len(kernels) > 10
        for name, source in kernels.items():
            getattr(PyCodeCache.load(source), name).precompile(warm_cache_only=True)


CHECKS = {check.__name__: check for check in (train_step, host_sync_is_detected, copy_stream_order, decode, adapt_step,
                                              machine_setup)}


def main(names: list[str]):
    """names: checks, or architectures to compile, such as compiled:80:mixer=DA. Prints name -> null or a traceback."""
    errors = {}
    for name in names:
        check, *options = name.split(":")
        try:
            with simulated_gpu((int(options[0][0]), int(options[0][1])) if options else (8, 0)):
                if check == "compiled":
                    compiled(options[0], **dict(switch.split("=") for switch in options[1:]))
                else:
                    CHECKS[check]()
            errors[name] = None
        except Exception:
            errors[name] = traceback.format_exc()
    print(json.dumps(errors))


if __name__ == "__main__":
    main(sys.argv[1:] or list(CHECKS))
