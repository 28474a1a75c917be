"""Choice of backend: reasons, errors, context manager, compilation."""

import contextlib
import subprocess
import sys
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from support import INTERPRETED, device_of

from convnext_kernels import backends, explain, use_backend
from convnext_kernels.backends import BACKENDS, BackendError, Explanation, requested_backend
from convnext_kernels.functional import OPERATORS, depthwise_conv2d, layer_norm
from convnext_kernels.ops.common import registration
from convnext_kernels.ops.layer_norm import reference

on_cpu_only = pytest.mark.skipif(not INTERPRETED, reason="with a GPU the interpreter is off")


@pytest.fixture
def image():
    return torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def interpreter_off(monkeypatch):
    """As where TRITON_INTERPRET is not set."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    backends.machine_reasons.cache_clear()
    yield
    backends.machine_reasons.cache_clear()


def test_the_setting_nests_and_comes_back():
    assert requested_backend(None) == "auto"
    with use_backend("triton"):
        assert requested_backend(None) == "triton"
        with use_backend("reference"):
            assert requested_backend(None) == "reference"
            assert requested_backend("cuda") == "cuda" and requested_backend("auto") == "auto"
        with use_backend("auto"):
            assert requested_backend(None) == "auto"
        assert requested_backend(None) == "triton"
    assert requested_backend(None) == "auto"


def test_the_setting_comes_back_after_an_error():
    with contextlib.suppress(KeyError), use_backend("triton"), use_backend("reference"):
        raise KeyError
    assert requested_backend(None) == "auto"


def test_an_unknown_backend_is_no_setting():
    accepted = "accepted: 'auto', 'cuda', 'triton', 'reference'"
    with pytest.raises(ValueError, match=rf"^backend: got 'trition'; {accepted}$"), use_backend("trition"):
        pass
    with pytest.raises(ValueError, match=rf"^backend: got ''; {accepted}$"):
        requested_backend("")
    assert requested_backend(None) == "auto"


def test_the_setting_is_the_process_s():
    """Backward runs in threads of autograd's own, and a model may be called from any."""
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(requested_backend(None)))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_auto_on_a_cpu_is_the_reference(image):
    explanation = explain("layer_norm", image)
    assert (explanation.operator, explanation.requested, explanation.backend) == ("layer_norm", "auto", "reference")
    assert tuple(explanation.reasons) == BACKENDS
    assert explanation.reasons["cuda"] and explanation.reasons["triton"] and not explanation.reasons["reference"]


@on_cpu_only
def test_why_not_automatically_the_interpreter(image):
    device_of("triton")
    (reason,) = explain(layer_norm, image).reasons["triton"]
    assert reason == "Triton's interpreter checks kernels and is slow; it is used only when asked for by name"
    asked = explain(layer_norm, image, backend="triton")
    assert (asked.backend, asked.requested, list(asked.reasons["triton"])) == ("triton", "triton", [])


@on_cpu_only
@pytest.mark.parametrize(("triton", "numpy", "fails"), [("3.6.0", "2.4.6", True), ("3.6.0", "2.3.5", False)])
@pytest.mark.parametrize("newer", [False, True])
def test_old_interpreter_with_new_numpy(image, monkeypatch, triton, numpy, fails, newer):
    pytest.importorskip("triton")
    versions = {"triton": "3.10.1" if newer else triton, "numpy": numpy}
    monkeypatch.setattr(backends, "release", lambda package: tuple(map(int, versions[package].split(".")[:2])))
    backends.machine_reasons.cache_clear()
    try:
        reasons = explain(layer_norm, image, backend="triton").reasons["triton"]
    finally:
        backends.machine_reasons.cache_clear()
    assert any("NumPy 2.4" in reason for reason in reasons) == (fails and not newer)


@on_cpu_only
def test_bfloat16_is_wrong_in_the_interpreter(image):
    pytest.importorskip("triton")
    with pytest.raises(BackendError, match=r"^layer_norm: backend 'triton' cannot run: .*bfloat16 toward zero"):
        layer_norm(image.bfloat16(), backend="triton")


def test_without_the_interpreter_triton_needs_a_gpu(image, interpreter_off):
    pytest.importorskip("triton")
    (reason,) = explain("layer_norm", image, backend="triton").reasons["triton"]
    assert "the tensors are on the CPU" in reason and "TRITON_INTERPRET=1" in reason
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1 turns it on"):
        layer_norm(image, backend="triton")


def test_without_triton(image, monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    backends.machine_reasons.cache_clear()
    try:
        assert "triton is not installed" in explain("layer_norm", image, backend="triton").reasons["triton"]
    finally:
        backends.machine_reasons.cache_clear()


def test_only_the_kernels_import_triton():
    """Triton's, and the block's in CUDA C++, whose products are Triton's."""
    script = """
import sys
sys.modules["triton"] = None
import importlib, pkgutil
import convnext_kernels
modules = [module.name for module in pkgutil.walk_packages(convnext_kernels.__path__, "convnext_kernels.")]
kernels = (".triton_", "._", ".convnext_block.cuda_kernel")
imported = [importlib.import_module(name) for name in modules if not any(kernel in name for kernel in kernels)]
assert "convnext_kernels.ops.mlp.configs" in modules and len(imported) > 30
import torch
convnext_kernels.functional.layer_norm(torch.ones(1, 2, 3, 3))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_float64_is_for_the_reference(image):
    assert "float64 has no Triton kernels" in explain("layer_norm", image.double()).reasons["triton"]
    with pytest.raises(BackendError, match="float64 has no Triton kernels"):
        layer_norm(image.double(), backend="triton")
    assert layer_norm(image.double()).dtype == torch.float64
    assert "float64 has no CUDA kernels" in explain("layer_norm", image.double()).reasons["cuda"]


@pytest.mark.parametrize("call", ["argument", "setting"])
def test_cuda_on_a_cpu_is_an_error_with_its_reasons(image, call):
    setting = use_backend("cuda") if call == "setting" else contextlib.nullcontext()
    with setting, pytest.raises(BackendError, match=r"^layer_norm: backend 'cuda' cannot run: .+") as raised:
        layer_norm(image, backend="cuda" if call == "argument" else None)
    explanation = explain("layer_norm", image, backend="cuda")
    assert explanation.backend is None
    assert explanation.reasons["cuda"] and all(reason in str(raised.value) for reason in explanation.reasons["cuda"])
    assert isinstance(raised.value, RuntimeError)


def test_a_filter_too_large_for_triton(image):
    weight = torch.randn(5, 1, 13, 13)
    reasons = explain(depthwise_conv2d, image, weight, backend="triton").reasons["triton"]
    assert any("the filter is 13x13; the Triton kernel takes up to 11x11" in reason for reason in reasons)
    with pytest.raises(BackendError, match="the filter is 13x13"):
        depthwise_conv2d(image, weight, backend="triton")
    assert depthwise_conv2d(image, weight).shape == image.shape


@pytest.mark.parametrize(
    ("size", "dilation", "reasons"),
    [
        (3, 1, []),
        (7, 1, []),
        (9, 1, ["the filter is 9x9; the CUDA kernels take 3x3, 5x5 and 7x7"]),
        (1, 1, ["the filter is 1x1; the CUDA kernels take 3x3, 5x5 and 7x7"]),
        (5, 2, ["the dilation is 2; the CUDA kernels take 1"]),
    ],
)
def test_filters_that_the_cuda_kernels_do_not_take(image, size, dilation, reasons):
    weight = torch.randn(5, 1, size, size)
    affine = {"bias": None, "norm_weight": None, "norm_bias": None}
    for name, parameters in (("depthwise_conv2d", {}), ("depthwise_conv2d_layer_norm", affine)):
        found = explain(name, image, weight, **parameters, dilation=dilation).reasons["cuda"]
        assert [reason for reason in found if "the CUDA kernels take" in reason] == reasons


def slow_path(input):
    """Why the CUDA kernels leave the tensor cores."""
    weight = torch.randn(input.shape[1], 1, 7, 7)
    return explain(depthwise_conv2d, input, weight).notes["cuda"]


def test_slow_paths_are_named():
    image = torch.randn(2, 8, 4, 3).half().to(memory_format=torch.channels_last)
    cores = "on CUDA cores, not tensor cores"
    assert slow_path(image) == slow_path(image.bfloat16()) == slow_path(image.contiguous()) == []
    assert slow_path(image.float()) == [f"{cores}: float32"]
    assert slow_path(image[:, :5]) == [f"{cores}: an odd number of channels, 5"]
    assert slow_path(image[:, 1:7]) == [f"{cores}: memory that is not aligned to 4 bytes"]
    odd = torch.empty_strided(image.shape, (111, 1, 27, 9), dtype=torch.float16)
    assert slow_path(odd) == [f"{cores}: odd strides of image, row or pixel, (111, 27, 9)"]


def test_a_slow_path_is_shown_where_the_backend_can_run():
    reasons, notes = {"cuda": [], "triton": ["no"], "reference": []}, {"cuda": ["slowly"], "triton": ["slowly"]}
    shown = str(Explanation("layer_norm", "auto", "cuda", reasons, notes)).splitlines()
    assert shown[1:] == ["  cuda: can run; slowly", "  triton: no", "  reference: can run"]


@pytest.mark.parametrize(
    ("code", "runs"),
    [("machine code", True), ("PTX", True), ("none: no kernel image", False), ("unavailable: x", False)],
)
def test_the_library_must_have_code_for_the_gpu(monkeypatch, code, runs):
    monkeypatch.setattr(backends.build, "missing_reasons", lambda: [])
    monkeypatch.setattr(backends.build, "device_code", lambda device: code if device == 3 else "none")
    reasons = backends._cuda_reasons(torch.device("cuda", 3), torch.float16)
    assert reasons == ([] if runs else [f"what the compiled library has for the GPU is {code}"])


@pytest.mark.parametrize(
    ("capability", "reasons"),
    [((7, 5), ["the GPU has compute capability 7.5; 8.0 or newer is needed"]), ((8, 0), []), ((12, 0), [])],
)
def test_gpus_that_triton_s_kernels_run_on(monkeypatch, capability, reasons):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert backends._triton_reasons(torch.device("cuda", 3), torch.float16, by_name=False) == reasons


def test_tensors_on_another_device():
    pytest.importorskip("triton")
    device = torch.device("xpu")
    assert backends._triton_reasons(device, torch.half, True) == [
        "the tensors are on xpu; Triton's kernels are for CUDA"
    ]
    assert "the tensors are on xpu" in backends._cuda_reasons(device, torch.half)


def test_tensors_without_values_need_no_backend(image):
    with pytest.raises(ValueError, match=r"^layer_norm: got tensors without values; accepted: tensors on a device"):
        explain("layer_norm", image.to("meta"))


def test_the_reference_in_place_of_kernels_on_a_gpu_warns_once_with_its_reasons(monkeypatch):
    """Where nobody asked for it, and on a GPU alone."""
    reasons = {"cuda": ("not built",), "triton": ("too old", "too many"), "reference": ()}
    monkeypatch.setattr(backends, "machine_reasons", lambda backend, *_: reasons[backend])
    backends._warn_slow_path.cache_clear()

    def choose(requested, device):
        input = SimpleNamespace(device=torch.device(device), dtype=torch.float32)
        return backends.choose("test", requested, input, {backend: [] for backend in BACKENDS}, dict)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert choose("auto", "cpu") == choose("reference", "cuda") == "reference" and not seen
        assert choose("auto", "cuda") == choose("auto", "cuda") == "reference"
    told = "test runs the plain PyTorch reference on a GPU: cuda: not built; triton: too old, too many"
    assert [str(warning.message) for warning in seen] == [told]


def test_more_channels_than_triton_holds():
    tokens = torch.randn(1, 2, 8200)
    assert any("8200 channels" in reason for reason in explain("layer_norm", tokens).reasons["triton"])


def test_an_explanation_is_readable(image):
    lines = str(explain("layer_norm", image)).splitlines()
    assert lines[0] == "layer_norm: reference (asked for: auto)"
    assert [line.split(":")[0].strip() for line in lines[1:]] == list(BACKENDS)
    assert lines[-1] == "  reference: can run"
    assert str(explain("layer_norm", image, backend="cuda")).startswith("layer_norm: cannot run (asked for: cuda)\n")


def test_explaining_uses_the_setting_and_runs_nothing(image, monkeypatch):
    monkeypatch.setattr(reference, "forward", lambda *_: pytest.fail("the operator ran"))
    with use_backend("reference"):
        assert explain("layer_norm", image.requires_grad_()).requested == "reference"


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_code_follows_the_setting(image, compiler, monkeypatch):
    torch._dynamo.reset()
    image, chosen = image.to(device_of("triton")), []

    def noted(*arguments):
        chosen.append(backends.choose(*arguments))
        return chosen[-1]

    monkeypatch.setattr(registration, "choose", noted)
    compiled = torch.compile(layer_norm, fullgraph=True, backend=compiler)
    compiled(image)
    for backend in ("triton", "reference", "triton"):
        with use_backend(backend):
            compiled(image)
    compiled(image)
    automatic = explain("layer_norm", image).backend
    assert chosen[:5] == [automatic, "triton", "reference", "triton", automatic]


def test_every_operator_has_a_reference_and_triton_kernels(image):
    limits = {name: explain(name, *arguments) for name, arguments in minimal_calls(image).items()}
    assert limits.keys() == OPERATORS.keys()
    for explanation in limits.values():
        assert not explanation.reasons["reference"]
        assert not any("no triton kernels" in reason for reason in explanation.reasons["triton"])


def minimal_calls(image):
    width, vector = image.shape[1], torch.ones(image.shape[1])
    filters, matrix = torch.ones(width, 1, 3, 3), torch.eye(width)
    return {
        "convnext_block": (image, filters, None, None, None, matrix, None, matrix, None),
        "depthwise_conv2d": (image, filters),
        "depthwise_conv2d_layer_norm": (image, filters, None, None, None),
        "global_response_norm": (image, vector, vector),
        "layer_norm": (image,),
        "mlp": (image, matrix, None, matrix, None),
        "patch_linear": (image, torch.ones(4, width, 2, 2)),
    }


@pytest.mark.gpu
def test_auto_on_a_gpu_is_no_reference(image):
    explanation = explain("layer_norm", image.cuda())
    assert explanation.backend in ("cuda", "triton")


@pytest.mark.gpu
def test_the_slow_path_on_a_gpu_warns_once_with_its_reason():
    backends._warn_slow_path.cache_clear()
    tokens = torch.randn(1, 2, 8, device="cuda", dtype=torch.float64)
    with pytest.warns(
        UserWarning, match=r"layer_norm runs the plain PyTorch reference on a GPU: .*float64 has no CUDA kernels"
    ) as seen:
        layer_norm(tokens)
        layer_norm(tokens)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("channels", "dtype", "expected"),
    [
        (96, torch.float16, []),
        (6144, torch.bfloat16, []),
        (6152, torch.bfloat16, ["each token is read again: of 6152 channels registers hold 6144"]),
        (100, torch.float16, ["one channel at a time: 100 channels are no multiple of 8"]),
        (100, torch.float32, []),
        (
            3073,
            torch.float32,
            [
                "one channel at a time: 3073 channels are no multiple of 4",
                "each token is read again: of 3073 channels registers hold 768",
            ],
        ),
    ],
)
def test_slow_norms_are_named(channels, dtype, expected):
    assert explain("layer_norm", torch.zeros(1, 2, channels, dtype=dtype)).notes["cuda"] == expected
