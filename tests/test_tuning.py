"""Launch configurations: each candidate gives the same results, and only tables that can be trusted are used."""

import json
import subprocess
import sys
import warnings
from dataclasses import asdict, astuple, replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from support import device_of

from convnext_kernels import parity
from convnext_kernels.backends import interpreting
from convnext_kernels.cli import tune, tune_plan
from convnext_kernels.cli.tune import write_table
from convnext_kernels.cli.workloads import PRECISIONS, workloads
from convnext_kernels.ops.common import matmul_configs, tuning
from convnext_kernels.ops.common.launch import architecture
from convnext_kernels.ops.common.tuning import Entry, read_table, trying, tunables
from convnext_kernels.ops.layer_norm import configs as layer_norm

GPU = "NVIDIA Test 1"
IMAGE = (1, 80, 6, 23)
"""Of which no dimension is a whole number of tiles, and whose tokens are enough for the scaled product."""
WIDE = (1, 272, 2, 3)
"""So wide that the pre-activation is saved."""
ARCHITECTURE = architecture(torch.device("cuda")) if interpreting() or torch.cuda.is_available() else 90


def small_workloads():
    """Every launch of a kernel once, plain matrix products in every precision."""
    found = {}
    for image, precision in product((IMAGE, WIDE), ("float16", "float32", "tf32")):
        for of in workloads(image, precision, ARCHITECTURE, grn=True, size=3):
            kind = dict(zip(of.tunable.parameters, of.key, strict=True)).get("kind")
            if precision == "float16" or kind == matmul_configs.Kind.PLAIN:
                found.setdefault((precision, of.tunable, of.call, tuple(of.shapes)), of)
    return list(found.values())


SMALL = small_workloads()


@pytest.fixture
def asked(monkeypatch):
    """The names under which configurations were looked up."""
    names, config_of = set(), tuning._config

    def recorded(tunable, device, dtype, key):
        names.add((tunable.name, str(dtype).removeprefix("torch."), key))
        return config_of(tunable, device, dtype, key)

    monkeypatch.setattr(tuning, "_config", recorded)
    return names


@pytest.mark.parametrize("workload", SMALL, ids=str)
def test_every_candidate_gives_the_same_results(workload, asked):
    pytest.importorskip("triton")
    device = torch.device(device_of("triton"))
    tensors = workload.draw(device, seed=0)
    with parity.poisoned_memory():
        expected = workload.run(tensors)
        assert workload.name in asked
        rule, *others = workload.tunable.candidates(workload.key)
        assert others and rule == workload.tunable.rule(*workload.key)
        for config in others:
            with trying(workload.tunable, config):
                assert tune.disagreement(workload.run(tensors), expected) is None, config


def test_kernels_are_known_before_their_operators_have_run():
    """A table names them all when it is first read."""
    script = "from convnext_kernels.ops.common.tuning import tunables; print(*tunables())"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(result.stdout.split()) == set(tunables())


def test_products_of_odd_sizes_are_measured_as_they_are_launched(asked):
    pytest.importorskip("triton")
    device = torch.device(device_of("triton"))
    products = [
        of for of in workloads((1, 40, 3, 5), "float16", ARCHITECTURE, grn=False) if "matmul" in of.tunable.name
    ]
    for workload in products:
        workload.run(workload.draw(device, seed=0))
    assert products and {workload.name for workload in products} <= asked


def test_every_kernel_is_measured_and_every_tile_is_a_power_of_two():
    networks = [tune_plan.stages_of(model) for model in tune.list_models()]
    found = tune_plan.planned(networks, list(PRECISIONS), torch.device("cpu"))
    assert {workload.tunable.name for workload in found} == set(tunables())
    for workload in found:
        for config in workload.tunable.candidates(workload.key):
            sizes = {name: size for name, size in asdict(config).items() if name not in ("stages", "high", "registers")}
            assert all(size > 0 and size & (size - 1) == 0 for size in sizes.values()), (workload, config)


def test_nothing_is_keyed_on_the_batch_but_whether_there_are_few_programs(monkeypatch):
    """Both are measured, also where a batch has many."""
    monkeypatch.setattr(matmul_configs, "interpreting", lambda: False)
    one, many, more = (
        {workload.name for workload in workloads((n, *IMAGE[1:]), "float16", ARCHITECTURE, grn=True)}
        for n in (1, 300, 301)
    )
    assert one < many == more
    few = matmul_configs.MATMUL.parameters.index("few")
    keys = [key for kernel, _, key in many if kernel == "common.matmul"]
    assert {key[few] for kernel, _, key in one if kernel == "common.matmul"} == {1}
    of_many, of_few = (sorted(key[:few] + key[few + 1 :] for key in keys if key[few] == value) for value in (0, 1))
    assert of_many == of_few


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the user's tables are read, with an empty one for the package's; `GPU` is the one there is."""
    (tmp_path / "package").mkdir()
    monkeypatch.setattr(tuning, "PACKAGE_FOLDER", tmp_path / "package")
    monkeypatch.setenv("CONVNEXT_KERNELS_TABLES", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    tuning.forget_tables()
    yield tmp_path
    tuning.forget_tables()


RULE = layer_norm.norm_config(96)
FASTER = replace(RULE, tokens=8)
ENTRY = Entry(layer_norm.FORWARD.name, "float16", (96,), FASTER, 1.25)


def on_gpu(dtype=torch.float16, device="cuda:0"):
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


def test_launches_read_a_table_from_when_it_is_written(folder):
    assert layer_norm.FORWARD(on_gpu(), 96) == RULE
    write_table(folder / tuning.file_name(GPU), GPU, [ENTRY])
    assert layer_norm.FORWARD(on_gpu(), 96) == FASTER


def test_a_measured_configuration_is_used_where_it_was_measured(folder):
    assert FASTER != RULE and FASTER in layer_norm.FORWARD.candidates((96,))
    write_table(folder / "nvidia-test-1.json", GPU, [ENTRY])
    assert layer_norm.FORWARD(on_gpu(), 96) == FASTER
    assert layer_norm.FORWARD(on_gpu(torch.float32), 96) == RULE
    assert layer_norm.FORWARD(on_gpu(), 80) == layer_norm.norm_config(80)
    assert layer_norm.FORWARD(on_gpu(device="cpu"), 96) == RULE
    assert layer_norm.BACKWARD(on_gpu(), 96) == RULE


def test_the_user_s_table_wins_over_the_package_s(folder):
    packaged = [replace(ENTRY, config=RULE), replace(ENTRY, dtype="bfloat16")]
    write_table(folder / "package" / "nvidia-test-1.json", GPU, packaged)
    assert layer_norm.FORWARD(on_gpu(), 96) == RULE
    write_table(folder / "nvidia-test-1.json", GPU, [ENTRY])
    assert layer_norm.FORWARD(on_gpu(), 96) == FASTER
    assert layer_norm.FORWARD(on_gpu(torch.bfloat16), 96) == FASTER


def test_tables_are_read_once_at_the_first_launch(folder, monkeypatch):
    read = []
    monkeypatch.setattr(tuning, "read_table", lambda path, gpu: read.append(path) or read_table(path, gpu))
    for channels in (96, 192, 96):
        layer_norm.FORWARD(on_gpu(), channels)
    assert read == [folder / "package" / "nvidia-test-1.json", folder / "nvidia-test-1.json"]


def test_where_tables_are_read(monkeypatch, tmp_path):
    monkeypatch.delenv("CONVNEXT_KERNELS_TABLES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.user_folder() == tmp_path / "convnext_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.user_folder() == tmp_path / ".cache" / "convnext_kernels"
    assert tuning.file_name("NVIDIA H100 80GB HBM3 (x)") == "nvidia-h100-80gb-hbm3-x.json"


def content(**changes):
    record = {"kernel": ENTRY.kernel, "dtype": "float16", "key": {"channels": 96}, "config": asdict(FASTER)}
    table = {"format": tuning.FORMAT, "gpu": GPU, "versions": {}, "entries": [{**record, **changes.pop("entry", {})}]}
    return json.dumps({**table, **changes})


BROKEN = {
    "{": "cannot be read",
    "[" * 100_000: "cannot be read",
    "[]": "is not a table",
    '{"format": 1}': "is not a table",
    content(format=tuning.FORMAT - 1): f"format: got 1; accepted: {tuning.FORMAT}",
    content(gpu="NVIDIA Test 2"): "gpu: got 'NVIDIA Test 2'; accepted: 'NVIDIA Test 1'",
    content(entries=[3]): "entry 0: accepted: kernel, dtype, key and config",
    content(entry={"kernel": "pooling"}): "entry 0: kernel: got 'pooling'",
    content(entry={"kernel": ["pooling"]}): "kernel: got ['pooling']",
    content(entry={"dtype": "int8"}): "dtype: got 'int8'",
    content(entry={"dtype": {}}): "dtype: got {}",
    content(entry={"key": {"width": 96}}): "key: got {'width': 96}; accepted: channels",
    content(entry={"key": [96]}): "key: got [96]",
    content(entry={"key": {"channels": -1}}): "accepted: integers from 0 to 1048576",
    content(entry={"key": {"channels": 2**40}}): "accepted: integers from 0 to 1048576",
    content(entry={"key": {"channels": "96"}}): "accepted: integers from 0 to 1048576",
    content(entry={"config": asdict(replace(FASTER, warps=3))}): "'warps': 3}; accepted: the candidates of layer_norm",
    content(entry={"config": asdict(replace(FASTER, channels=64))}): "config: got {'tokens': 8, 'channels': 64",
    content(entry={"config": list(astuple(FASTER))}): "config: got [8, 128, 4]",
}


@pytest.mark.parametrize(("text", "problem"), BROKEN.items(), ids=range(len(BROKEN)))
def test_a_table_that_cannot_be_trusted_is_named_and_ignored(folder, text, problem):
    path = folder / "nvidia-test-1.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match="launch configurations ignored") as caught:
        assert [layer_norm.FORWARD(on_gpu(), channels) for channels in (96, 192)] == [RULE, layer_norm.norm_config(192)]
    (message,) = [str(warning.message) for warning in caught]
    assert str(path) in message and problem in message


def test_a_folder_or_text_that_is_no_text_is_a_problem(tmp_path):
    (tmp_path / "table.json").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "table.json"):
        table = read_table(path, GPU)
        assert not table.entries and not table.files and f"{path} cannot be read" in table.problems[0]


def test_a_good_entry_beside_a_bad_one_is_used(folder):
    good, bad = (json.loads(content(entry=entry))["entries"][0] for entry in ({}, {"kernel": "pooling"}))
    (folder / "nvidia-test-1.json").write_text(content(entries=[bad, good]))
    with pytest.warns(UserWarning, match="entry 0: kernel: got 'pooling'"):
        assert layer_norm.FORWARD(on_gpu(), 96) == FASTER


def test_no_entry_makes_a_kernel_run_that_the_rule_leaves_out():
    fused = tunables()["mlp.fused_kernel"]
    assert fused.candidates((48, 90)) and fused.candidates((40, 90)) == []


def test_a_table_is_written_and_read(tmp_path):
    path = tmp_path / "table.json"
    every = [
        Entry(*workload.name, config, 1.5)
        for workload in SMALL
        for config in workload.tunable.candidates(workload.key)[-1:]
    ]
    write_table(path, GPU, every)
    table = read_table(path, GPU)
    assert table.entries == {entry.name: entry for entry in every} and not table.problems
    assert json.loads(path.read_text())["versions"]["torch"] == torch.__version__
    assert [found.name for found in path.parent.iterdir()] == ["table.json"]


@pytest.mark.parametrize("interrupted", ["replace", "write"])
def test_an_interrupted_write_leaves_the_old_table(tmp_path, monkeypatch, interrupted):
    path = tmp_path / "table.json"
    write_table(path, GPU, [ENTRY])
    before = path.read_bytes()

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    def half(self, text, encoding):
        self.write_bytes(text.encode()[: len(text) // 2])
        raise KeyboardInterrupt

    if interrupted == "replace":
        monkeypatch.setattr(type(path), "replace", interrupt)
    else:
        monkeypatch.setattr(type(path), "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        write_table(path, GPU, [])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_missing_table_is_no_problem(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layer_norm.FORWARD(on_gpu(), 96) == RULE
