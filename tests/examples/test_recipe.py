"""Layer-wise learning rates, their schedule, frozen stages, the moving average and weights to start from."""

import copy
from functools import partial

import pytest
import torch
from support import randomise
from training import recipe

from convnext_kernels.model import ConvNeXt

SMALL = {"dims": (4, 8, 12, 16), "num_classes": 3, "layer_scale_init_value": 1.0}


def make_model(**options):
    torch.manual_seed(0)
    return ConvNeXt(**{"depths": (1, 1, 4, 1), **SMALL, **options})


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("downsample_layers.0.0.weight", 0),
        ("stages.0.2.gamma", 1),
        ("downsample_layers.1.1.weight", 2),
        ("stages.1.0.dwconv.weight", 2),
        ("downsample_layers.2.1.weight", 3),
        ("stages.2.2.norm.bias", 3),
        ("stages.2.3.norm.bias", 4),
        ("stages.2.26.norm.bias", 11),
        ("downsample_layers.3.0.weight", 12),
        ("stages.3.1.pwconv1.weight", 12),
        ("norm.weight", 13),
        ("head.bias", 13),
    ],
)
def test_layers_are_the_official_ones(name, layer):
    assert recipe.layer_of(name, (3, 3, 27, 3)) == layer


@pytest.mark.parametrize(("name", "layer"), [("stem.weight", 0), ("blocks.4.gamma", 2), ("head.weight", 7)])
def test_layers_of_an_isotropic_model(name, layer):
    assert recipe.layer_of(name, (18,)) == layer


@pytest.mark.parametrize("use_grn", [False, True])
def test_each_parameter_is_in_one_group_with_its_learning_rate(use_grn):
    model = make_model(use_grn=use_grn)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = recipe.parameter_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(names)
    assert found["head.weight"] == (1.0, 0.1)
    assert found["head.bias"] == (1.0, 0.0)
    assert found["stages.3.0.pwconv1.weight"] == (0.5, 0.1)
    assert found["stages.2.3.gamma"] == (0.25, 0.0)
    assert found["downsample_layers.0.0.weight"] == (0.5**6, 0.1)
    if use_grn:
        assert found["stages.0.0.grn.gamma"] == (0.5**5, 0.0)


def test_the_learning_rate_rises_and_falls():
    factors = [recipe.schedule_factor(step, warmup=4, total=12, final=0.01) for step in range(13)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.505) and factors[12] == pytest.approx(0.01)
    assert sorted(factors[4:], reverse=True) == factors[4:]


def test_the_schedule_keeps_the_layers_apart():
    groups = recipe.parameter_groups(make_model(), 1.0, 0.0, 0.5)
    optimizer = torch.optim.AdamW(groups)
    first = [group["lr"] for group in optimizer.param_groups]
    scheduler = recipe.schedule(optimizer, warmup=2, total=4, final=0.0)
    assert [group["lr"] for group in optimizer.param_groups] == [lr / 2 for lr in first]
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == first


def test_frozen_stages_get_no_gradient_and_are_in_no_group():
    model = make_model(depths=(1, 1, 1, 1))
    recipe.freeze(model, 2)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    trained = {tuple(name.split(".")[:2]) for name, p in model.named_parameters() if p.grad is not None}
    expected = {(kind, index) for kind in ("stages", "downsample_layers") for index in "23"}
    assert trained == expected | {(kind, part) for kind in ("norm", "head") for part in ("weight", "bias")}
    grouped = {id(p) for group in recipe.parameter_groups(model, 1.0, 0.0, 0.5) for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.grad is not None}
    with pytest.raises(ValueError, match="--freeze: got 4; accepted: less than 4"):
        recipe.freeze(model, 4)


def test_the_average_follows_the_weights():
    model = make_model()
    average = copy.deepcopy(model)
    start = copy.deepcopy(model.state_dict())
    randomise(model)
    recipe.follow(average, model, 0.9)
    for name, value in average.state_dict().items():
        torch.testing.assert_close(value, 0.9 * start[name] + 0.1 * model.state_dict()[name])


@pytest.mark.parametrize(("classes", "head"), [(3, True), (5, False), (0, False)], ids=["same", "other", "none"])
def test_weights_to_start_from(tmp_path, classes, head):
    source = make_model(num_classes=classes)
    randomise(source)
    torch.save({"model": source.state_dict()}, tmp_path / "official.pth")
    model = make_model()
    before = model.head.weight.detach().clone()
    assert "official checkpoint" in recipe.initialise(model, str(tmp_path / "official.pth"), 0.5)
    assert torch.equal(model.stages[2][1].gamma, source.stages[2][1].gamma)
    assert torch.equal(model.head.weight, source.head.weight if head else 0.5 * before)


def test_weights_of_another_model_are_refused(tmp_path):
    torch.save({"model": make_model(depths=(1, 1, 1, 1)).state_dict()}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"do not fit the model; missing: stages\.2\.1"):
        recipe.initialise(make_model(), str(tmp_path / "other.pth"), 1.0)


def test_blocks_that_run_again_save_less_and_give_the_same_gradients():
    images = torch.randn(2, 3, 32, 32)
    gradients, saved = [], []
    for again in (False, True):
        model = make_model(drop_path_rate=0.5).train()
        if again:
            recipe.recompute_blocks(model)
        sizes: list[int] = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(partial(note_size, sizes), lambda tensor: tensor):
            loss = model(images).square().sum()
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        saved.append(sum(sizes))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert saved[1] < 0.5 * saved[0]


def note_size(sizes, tensor):
    sizes.append(tensor.numel())
    return tensor
