"""runtime/device.py: devices, dtypes, peak FLOP/s, compiling, random generators; GPUs are simulated."""
import platform
import random
import re
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from runtime import device as device_module
from runtime.config import BadInput
from runtime.device import (
    DTYPES,
    DeviceConfig,
    Machine,
    compile_in_place,
    describe_hardware,
    measure_flops,
    open_machine,
    rng_state,
    seed_everything,
    set_rng_state,
    with_faster_dtype,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def simulate_gpu(monkeypatch, capability, archs="sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90", name="NVIDIA Example"):
    """torch reports one GPU, and was built for `archs`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)  # as on a P100
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: archs.split())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)


def simulate_flops(monkeypatch, **flops):
    """dtype -> FLOP/s that a matrix product is measured to have. Measuring another dtype raises KeyError."""
    monkeypatch.setattr(device_module, "measure_flops", lambda device, dtype, n: flops[dtype])


# -- devices ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["cuda:77", "tpu", "cpu:1", "mps:3", "", "gpu"])
def test_a_device_that_does_not_exist_is_refused(name):
    with pytest.raises(BadInput, match=f"--device={name}: not on this machine, which has cpu"):
        open_machine(DeviceConfig(device=name))


@pytest.mark.parametrize("capability, archs, is_supported", [
    ((6, 0), "sm_70 sm_75 sm_80 sm_86 sm_90 compute_90", False),  # torch's cu128 wheels on a P100
    ((6, 0), "sm_70 compute_50", True),                           # PTX is compiled for any later GPU
    ((6, 0), "sm_61", False), ((6, 1), "sm_60", True), ((8, 6), "sm_80", True), ((8, 0), "sm_86", False),
    ((12, 0), "sm_80 sm_90", False), ((12, 0), "sm_80 compute_90", True), ((9, 0), "sm_90a", True),
    ((10, 0), "sm_100", True), ((10, 3), "sm_100a", False), ((10, 3), "sm_100f", True), ((7, 5), "", False),
    ((9, 0), "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120", True)])
def test_a_gpu_without_kernels_in_the_installed_torch_is_refused(monkeypatch, capability, archs, is_supported):
    simulate_gpu(monkeypatch, capability, archs, "Tesla Old")
    if is_supported:
        assert open_machine(DeviceConfig(dtype="fp32")).device.type == "cuda"
        return
    words = "^--device=auto: Tesla Old has compute capability .*has no kernels.*pip install.*--device=cpu"
    with pytest.raises(BadInput, match=words) as caught:
        open_machine(DeviceConfig(dtype="fp32"))
    wheel = "whl/cu126" if capability < (7, 5) else "whl/cu128"
    assert "\n" not in str(caught.value) and wheel in str(caught.value)


def test_amd_gpus_are_not_checked_by_nvidias_names(monkeypatch):
    simulate_gpu(monkeypatch, (9, 0), "gfx90a gfx942")
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert open_machine(DeviceConfig(dtype="fp32")).device.type == "cuda"


def test_hardware_is_described(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A Fast One\n")
    monkeypatch.setattr(device_module, "CPUINFO", tmp_path / "cpuinfo")
    assert re.fullmatch(r"A Fast One, \d+ cores, Python 3[.\d]+, torch 2\S+", describe_hardware(CPU))
    monkeypatch.setattr(device_module, "CPUINFO", tmp_path / "none")  # not Linux
    assert describe_hardware(CPU).startswith(platform.machine())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")
    assert describe_hardware(CUDA).startswith("A Card, ")


# -- dtype ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("capability, dtype", [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((7, 0), "fp16")])
def test_the_compute_capability_of_a_gpu_decides_its_dtype(monkeypatch, capability, dtype):
    simulate_gpu(monkeypatch, capability)
    simulate_flops(monkeypatch)  # nothing needs to be measured
    machine = open_machine(DeviceConfig())
    assert (machine.device.type, machine.dtype) == ("cuda", dtype)
    assert open_machine(DeviceConfig(dtype="fp32")).dtype == "fp32"


@pytest.mark.parametrize("device, half, half_flops, expected", [
    ("cuda", "fp16", 1.9e13, "fp16"), ("cuda", "fp16", 1.1e13, "fp32"), ("cuda", "fp16", 1.6e11, "fp32"),
    ("cpu", "bf16", 3e13, "bf16"), ("cpu", "bf16", 1.1e13, "fp32"), ("cpu", "bf16", 1.4e12, "fp32")])
def test_timed_products_decide_the_dtype_where_no_table_does(monkeypatch, device, half, half_flops, expected):
    """A P100 has fast fp16, a GTX 1080 a 64th of it; some CPUs have bf16 instructions, others emulate them."""
    monkeypatch.setattr(device_module, "x86_dtype", lambda: None)
    if device == "cuda":
        simulate_gpu(monkeypatch, (6, 1))
    simulate_flops(monkeypatch, **{"fp32": 1e13, half: half_flops})
    assert open_machine(DeviceConfig(device=device)).dtype == expected
    assert open_machine(DeviceConfig(device=device, dtype=half)).dtype == half


@pytest.mark.parametrize("cpuinfo, expected", [
    ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16\n", "bf16"), ("flags : fpu amx_bf16 amx_tile", "bf16"),
    ("flags : fpu avx2 avx512f", "fp32"), ("processor : 0\nFeatures : fp asimd bf16\n", None), (None, None)])
def test_x86_instructions_decide_the_dtype_without_timing(monkeypatch, tmp_path, cpuinfo, expected):
    """A busy machine would be mistimed. Muon's products take bf16 where it is fast, whatever --dtype is."""
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    detected = device_module.x86_dtype(path)
    assert detected == expected
    monkeypatch.setattr(device_module, "x86_dtype", lambda: detected)
    simulate_flops(monkeypatch, fp32=1e13, bf16=9e13)
    assert open_machine(DeviceConfig(device="cpu")).dtype == (expected or "bf16")
    for dtype in ("fp32", "bf16"):
        muon_dtype = open_machine(DeviceConfig(device="cpu", dtype=dtype)).newton_schulz_dtype()
        assert muon_dtype == (torch.bfloat16 if "bf16" in (expected, dtype) else torch.float32)


@pytest.mark.parametrize("capability, resume_dtype, expected", [
    ((6, 0), "bf16", "fp16"), ((6, 0), "fp32", "fp32"), ((6, 0), "", "fp16"), ((8, 0), "fp16", "bf16"),
    ((7, 5), "fp32", "fp16")])
def test_a_resumed_run_keeps_its_dtype_where_timing_chose_it(monkeypatch, capability, resume_dtype, expected):
    """Moved from a laptop's RTX to a P100, which would emulate bf16, a run takes fp16."""
    simulate_gpu(monkeypatch, capability)
    simulate_flops(monkeypatch, fp32=1e13, fp16=2e13)
    assert open_machine(DeviceConfig(), resume_dtype).dtype == expected


@pytest.mark.parametrize("slow, fast", [("fp32", "fp16"), ("fp16", "fp32")])
def test_timed_steps_choose_the_dtype_of_an_old_gpu(monkeypatch, slow, fast):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    machine = with_faster_dtype(Machine(CPU, "fp32"),
                                lambda machine, batch_size: time.sleep(0.02 if machine.dtype == slow else 0.0))
    assert machine == Machine(CPU, fast)


def test_only_fp16_scales_the_loss_and_autocast_has_the_dtype():
    assert [Machine(CPU, dtype).grad_scaler().is_enabled() for dtype in DTYPES] == [False, False, True]
    a = torch.ones(2, 2)
    for dtype in DTYPES:
        with Machine(CPU, dtype).autocast():
            assert (a @ a).dtype == DTYPES[dtype]


# -- peak FLOP/s ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, dtype, peak", [
    ("NVIDIA H100 PCIe", "bf16", 756e12), ("NVIDIA H100 80GB HBM3", "bf16", 989e12), ("NVIDIA H200", "bf16", 989e12),
    ("Tesla P100-PCIE-16GB", "fp32", 9.3e12), ("Tesla V100-SXM2-16GB", "fp16", 125e12),
    ("NVIDIA GeForce GTX 480", "fp16", None), ("NVIDIA L40S", "fp16", None),  # not an L4
    ("NVIDIA GeForce RTX 4090 Laptop GPU", "fp16", None), ("NVIDIA L4", "fp32", None)])
def test_peak_flops_come_from_the_data_sheet_or_are_measured(monkeypatch, name, dtype, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    simulate_flops(monkeypatch, **{} if peak else {dtype: 7e12})
    machine = Machine(CUDA, dtype)
    assert machine.datasheet_flops() == peak and machine.peak_flops() == (peak or 7e12)


@pytest.mark.parametrize("seconds, best", [
    ([(20 - i) / 1024 for i in range(20)], 1 / 1024), ([(20 - i) / 64 for i in range(20)], 17 / 64), ([2.0, 1.0], 2.0),
    ([0.5, 0.25, 1.0, 0.125], 0.25)])
def test_the_fastest_of_the_timed_products_counts(monkeypatch, seconds, best):
    """By hand: of 20 products, or of those that begin within a second. It is measured once."""
    times = iter([moment for i, one in enumerate(seconds) for moment in (128.0 * i, 128.0 * i + one)])
    monkeypatch.setattr(device_module, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    measure_flops.cache_clear()
    assert measure_flops(CPU, "fp32", 8) == 2 * 8**3 / best
    assert measure_flops(CPU, "fp32", 8) == 2 * 8**3 / best  # not measured again
    measure_flops.cache_clear()


# -- compiling --------------------------------------------------------------------------------------------------------

def test_a_model_that_does_not_compile_stays_eager_with_one_warning(monkeypatch):
    model = torch.nn.Linear(2, 2)
    expected = model(torch.ones(2))

    def fail(*args):
        raise RuntimeError("no compiler\nand more lines")

    monkeypatch.setattr(model, "compile", lambda: setattr(model, "_compiled_call_impl", fail))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not compile_in_place(model, lambda: model(torch.ones(2)))
    (warning,) = caught
    assert "no compiler" in str(warning.message) and "\n" not in str(warning.message)
    assert torch.equal(model(torch.ones(2)), expected)


def test_too_little_memory_is_not_a_failure_of_the_compiler(monkeypatch):
    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(model, "compile", lambda: None)

    def try_step():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        compile_in_place(model, try_step)


# -- random generators ------------------------------------------------------------------------------------------------

def test_random_generators_are_restored():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_everything(3)
    draw()
    state = rng_state()
    expected = draw()
    seed_everything(4)
    assert draw() != expected
    set_rng_state(state)
    assert draw() == expected
    seed_everything(3)
    draw()
    assert draw() == expected
