"""What people do with a model works after `accelerate` as before it, or is refused with a message."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from small import BLOCK, BLOCKS, NORMS, TOLERANCE, assert_ours, build, difference, gradients, images, operators
from timm.layers import DropPath
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from convnext_kernels import accelerate, fold_, restore


def assert_close(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert difference(got[name], value) <= TOLERANCE, name


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class TestTree:
    def test_all_but_the_forward_is_the_hosts(self):
        model = build()
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        classes, names = {n: type(m) for n, m in modules.items()}, {n: type(m).__name__ for n, m in modules.items()}
        report = accelerate(model)
        assert list(report.converted) == [*BLOCKS, *NORMS] and not report.skipped
        assert all(module is modules[name] for name, module in model.named_modules())
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert all(isinstance(module, classes[name]) for name, module in modules.items())
        assert {name: type(module).__name__ for name, module in modules.items()} == names
        assert list(model.state_dict()) == list(build().state_dict())
        assert_ours(model)

    def test_restore(self, pair):
        host, ours = pair
        assert set(restore(ours)) == {*BLOCKS, *NORMS}
        for (name, theirs), module in zip(host.named_modules(), ours.modules(), strict=True):
            assert type(module) is type(theirs) and vars(module).keys() == vars(theirs).keys(), name
        assert torch.equal(ours(images()), host(images()))
        assert operators(ours, images()) == {}
        assert restore(ours) == ()

    def test_a_block_by_itself(self):
        block = build().stages[0].blocks[0]
        assert accelerate(block).converted == ("",)
        assert operators(block, torch.randn(1, 16, 3, 5)) == {BLOCK: 1}

    def test_the_input_may_be_named_as_the_host_names_it(self, pair):
        x = torch.randn(1, 16, 3, 5)
        for name in ("stages.0.blocks.0", "stem.1"):
            assert difference(pair[1].get_submodule(name)(x=x), pair[0].get_submodule(name)(x=x)) <= TOLERANCE

    def test_a_filter_is_asked_for_blocks_and_norms(self):
        model = build()
        report = accelerate(model, filter=lambda name, module: name.startswith("stages.1") and "blocks.1" not in name)
        assert report.converted == ("stages.1.blocks.0", "stages.1.downsample.0")
        assert report.skipped == {name: "the filter left it out" for name in BLOCKS if name != "stages.1.blocks.0"}
        rest = accelerate(model)
        assert {*rest.converted, *report.converted} == {*BLOCKS, *NORMS}
        assert rest.skipped == {"stages.1.blocks.0": "it is accelerated already"}
        assert_ours(model)

    def test_twice_changes_nothing_and_is_no_cause_for_a_warning(self, pair):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert accelerate(pair[1]).converted == ()
        assert_ours(pair[1])

    def test_no_block(self):
        with pytest.warns(UserWarning, match="changed nothing in this Linear: it has no ConvNeXt block"):
            report = accelerate(nn.Linear(2, 2))
        assert report.converted == () and report.skipped == {} and str(report) == "0 modules accelerated"

    def test_no_module(self):
        with pytest.raises(TypeError, match=r"model: got dict; accepted: a torch\.nn\.Module"):
            accelerate({})

    def test_a_failure_midway_leaves_the_model_as_it_was(self):
        model = build()
        host_class = type(model.stages[0].blocks[0])

        class Locked(host_class):
            def __setattr__(self, name, value):
                if name == "__class__" and self.locks:
                    raise RuntimeError("locked")
                super().__setattr__(name, value)

        for name in BLOCKS:
            block = model.get_submodule(name)
            block.__class__ = Locked
            block.__dict__["locks"] = [1] if name == BLOCKS[-1] else []
        with pytest.raises(RuntimeError, match="locked"):
            accelerate(model)
        assert {type(model.get_submodule(name)) for name in BLOCKS} == {Locked}
        assert not any("wiring" in vars(module) for module in model.modules())

    def test_report(self, pair):
        model = build()
        model.stages[0].blocks[0].mlp.act = nn.SiLU()
        text = str(accelerate(model))
        assert text.splitlines()[:2] == ["8 modules accelerated", "  4 timm ConvNeXtBlock"]
        assert "  stages.0.blocks.0: its `mlp.act` is a SiLU; accepted: GELU" in text


class TestCopies:
    def through_file(self, model):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
    def test_copy(self, pair, way):
        ours = pair[1]
        ways = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "save": self.through_file}
        copied = ways[way](ours)
        assert torch.equal(copied(images()), ours(images()))
        assert_ours(copied)
        copied.stages[0].blocks[0].gamma.data.mul_(2)
        assert not torch.equal(copied(images()), ours(images()))
        assert type(restore(copied) and copied.stages[0].blocks[0]) is type(pair[0].stages[0].blocks[0])

    def test_weights_of_the_host_load(self, pair):
        other, ours = build(), pair[1]
        for parameter in other.parameters():
            parameter.data.mul_(1.1)
        ours.load_state_dict(other.state_dict())
        assert difference(ours(images()), other(images())) <= TOLERANCE

    def test_parameters_are_read_at_every_call(self, pair):
        host, ours = pair
        for model in pair:
            model.stages[0].blocks[0].gamma.data.mul_(3)
            model.stages[1].blocks[0].mlp.fc1.weight = nn.Parameter(
                model.stages[1].blocks[0].mlp.fc2.weight.transpose(0, 1).clone()
            )
        assert difference(ours(images()), host(images())) <= TOLERANCE

    def test_to_another_dtype(self, pair):
        host, ours = (model.double() for model in pair)
        assert difference(ours(images().double()), host(images().double())) <= 1e-12
        assert_ours(ours, images().double())
        assert ours.bfloat16()(images().bfloat16()).dtype == torch.bfloat16


class TestTransforms:
    def test_fx(self, pair):
        traced = torch.fx.symbolic_trace(pair[1])
        assert difference(traced(images(3)), pair[0](images(3))) <= TOLERANCE
        assert_ours(traced)

    def test_fx_in_training_draws_as_the_host(self, pair):
        host, ours = (model.train() for model in pair)
        assert_close(gradients(torch.fx.symbolic_trace(ours), images()), gradients(host, images()))

    def test_jit_trace(self, pair):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(pair[1], images())
        assert difference(traced(images(3)), pair[0](images(3))) <= TOLERANCE
        assert_ours(traced)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
    def test_jit_script_gets_the_host_s_and_says_so(self, pair, tmp_path):
        host, ours = pair
        with pytest.warns(
            UserWarning, match=r"torch\.jit\.script .* ConvNeXtBlock: it compiles the host's.*the model has"
        ):
            scripted = torch.jit.script(ours)
        assert isinstance(scripted, torch.jit.ScriptModule) and restore(ours) == ()
        torch.jit.save(scripted, tmp_path / "model.pt")
        for model in (ours, torch.jit.load(tmp_path / "model.pt")):
            assert torch.equal(model(images()), host(images()))

    def test_jit_script_where_the_host_s_is_out_of_reach(self, pair):
        block = pair[1].stages[0].blocks[0]
        block.__class__ = type("Wrapped", (type(block),), {})
        with pytest.raises(
            RuntimeError, match=r"torch\.jit\.script cannot .* it has been made a Wrapped since; .*accepted"
        ):
            torch.jit.script(block)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
    @pytest.mark.filterwarnings("ignore:torch.jit.script cannot read")
    def test_what_jit_script_restored_before_a_refusal_is_converted_again(self, pair):
        host, ours = pair
        fold_(ours)
        with pytest.raises(RuntimeError, match=r"it has been folded by fold_.*; modules before it .* `accelerate`"):
            torch.jit.script(ours)
        accelerate(ours)
        assert difference(ours(images()), host(images())) <= TOLERANCE
        assert_ours(ours)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
    def test_jit_script_of_an_fx_graph_runs_ours(self, pair):
        host, ours = (model.train() for model in pair)
        scripted = torch.jit.script(torch.fx.symbolic_trace(ours))
        assert_close(gradients(scripted, images()), gradients(host, images()))
        with pytest.raises(RuntimeError, match="Could not export Python function call 'normalise'"):
            scripted.save_to_buffer()

    def test_compile(self, pair):
        host, ours = (model.train() for model in pair)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        assert_close(
            {n.removeprefix("_orig_mod."): g for n, g in gradients(compiled, images()).items()},
            gradients(host, images()),
        )

    def test_export(self, pair):
        exported = torch.export.export(pair[1], (images(),)).module()
        assert difference(exported(images()), pair[0](images())) <= TOLERANCE
        assert_ours(exported)


class TestTraining:
    def test_checkpointing(self, pair):
        host, ours = (model.train() for model in pair)
        expected = gradients(host, images())
        ours.set_grad_checkpointing(True)
        assert_close(gradients(ours, images()), expected)

    def test_ddp(self, pair, process_group):
        host, ours = (model.train() for model in pair)
        wrapped = nn.parallel.DistributedDataParallel(ours)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as that gradients' strides are not the parameters'
            got = {name.removeprefix("module."): value for name, value in gradients(wrapped, images()).items()}
        assert_close(got, gradients(host, images()))

    def test_fsdp(self, pair, process_group):
        host, ours = (model.train() for model in pair)
        mesh = init_device_mesh("cpu", (1,))
        for name in BLOCKS:
            fully_shard(ours.get_submodule(name), mesh=mesh)
        fully_shard(ours, mesh=mesh)
        got = {name: getattr(v, "full_tensor", lambda v=v: v)() for name, v in gradients(ours, images()).items()}
        assert_close(got, gradients(host, images()))
        assert_ours(ours)
        with pytest.raises(RuntimeError, match=r"`stages\.0\.blocks\.0` has been made a FSDPConvNeXtBlock since"):
            restore(ours)
        assert_ours(ours)

    def test_sharded_before(self, pair, process_group):
        host = pair[0]
        fully_shard(host.stages[0].blocks[0], mesh=init_device_mesh("cpu", (1,)))
        reason = accelerate(host).skipped["stages.0.blocks.0"]
        assert "is a DTensor; accelerate a model before it is sharded" in reason

    def test_frozen_layers(self, pair):
        host, ours = (model.train() for model in pair)
        for model in pair:
            model.stages[1].requires_grad_(False)
        for model in pair:
            torch.manual_seed(0)
            model(images()).square().sum().backward()
        for (name, theirs), parameter in zip(host.named_parameters(), ours.parameters(), strict=True):
            assert (parameter.grad is None) == (theirs.grad is None), name
            assert theirs.grad is None or difference(parameter.grad, theirs.grad) <= TOLERANCE, name

    def test_another_checkpoint_flag_of_the_host(self):
        """As mmpretrain's blocks have it; nothing but the input is kept then."""
        block = nn.Module()
        block.with_cp = True
        for name, module in zip(
            ("depthwise_conv", "norm", "pointwise_conv1", "act", "pointwise_conv2"),
            (nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)),
            strict=True,
        ):
            block.add_module(name, module)
        block.__class__ = type("MMBlock", (nn.Module,), {"forward": mm_forward})
        assert accelerate(block).converted == ("",)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            block(torch.randn(1, 8, 9, 9, requires_grad=True)).sum().backward()
        assert max(saved) <= 8 * 81


def mm_forward(self, x):
    branch = self.norm(self.depthwise_conv(x).permute(0, 2, 3, 1))
    return x + self.pointwise_conv2(self.act(self.pointwise_conv1(branch))).permute(0, 3, 1, 2)


class TestAutocast:
    def test_dtypes(self, pair):
        """Blocks in a row hand on bfloat16, the last returns float32; norms before a convolution bfloat16."""
        dtypes = {}
        for name in (*BLOCKS, *NORMS):
            module = pair[1].get_submodule(name)
            module.register_forward_hook(lambda module, args, output, name=name: dtypes.update({name: output.dtype}))
        with torch.autocast("cpu", torch.bfloat16):
            pair[1](images())
        inner = {"stages.1.blocks.0", *NORMS[1:]}
        assert dtypes == {n: torch.bfloat16 if n in inner else torch.float32 for n in (*BLOCKS, *NORMS)}

    def test_drop_path_is_asked_in_the_dtype_of_the_hosts_branch(self, pair, monkeypatch):
        """Random numbers depend on it. With a layer scale it is float32, under autocast too."""
        asked, forward = [], DropPath.forward

        def spy(self, x):
            asked.append((x.dtype, len(x)))
            return forward(self, x)

        monkeypatch.setattr(DropPath, "forward", spy)
        for model in pair:
            with torch.autocast("cpu", torch.bfloat16):
                model.train()(images())
        assert asked == [(torch.float32, 2)] * 2 * (len(BLOCKS) - 1)


class TestLayout:
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("library", ["timm", "official"])
    def test_result_lies_as_the_hosts(self, library, memory_format):
        if library == "timm":
            block = build().stages[0].blocks[0]
        else:
            block = nn.Module()
            for name, module in zip(
                ("dwconv", "norm", "pwconv1", "act", "pwconv2"),
                (
                    nn.Conv2d(16, 16, 7, padding=3, groups=16),
                    nn.LayerNorm(16),
                    nn.Linear(16, 64),
                    nn.GELU(),
                    nn.Linear(64, 16),
                ),
                strict=True,
            ):
                block.add_module(name, module)
            block.__class__ = type("Block", (nn.Module,), {"forward": official_forward})
        input = torch.randn(2, 16, 5, 6).to(memory_format=memory_format)
        expected = block(input)
        accelerate(block)
        assert block(input).stride() == expected.stride()


def official_forward(self, x):
    branch = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
    return x + self.pwconv2(self.act(self.pwconv1(branch))).permute(0, 3, 1, 2)
