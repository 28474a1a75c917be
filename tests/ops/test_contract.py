"""What keeps a run on a GPU quick and its tests apart: collection that asks about few calls, memory taken in turn."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import Mock

import contract
import pytest
import support
import test_layer_norm
import torch
from contract import parity


@pytest.mark.parametrize(
    ("fixtures", "gpu", "asked"),
    [
        (["value", "layout", "parameter"], False, []),
        (["small_case"], False, ["cases"]),
        (["any_call", "kernels"], True, ["cases"]),
        (["kernel_call"], False, ["cases", "unsupported"]),
    ],
)
def test_collection_asks_for_what_a_test_is_given(fixtures, gpu, asked, monkeypatch):
    """Every test asking the kernels about every call took seconds."""
    questions = {name: Mock(wraps=getattr(parity, name)) for name in ("cases", "unsupported")}
    for name, question in questions.items():
        monkeypatch.setattr(parity, name, question)
    monkeypatch.setattr(contract, "BACKENDS", ("reference", "triton", "cuda"))
    definition = SimpleNamespace(get_closest_marker=lambda name: gpu)
    metafunc = Mock(fixturenames=fixtures, definition=definition)
    test_layer_norm.TestLayerNorm().pytest_generate_tests(metafunc)
    assert [call.args[0] for call in metafunc.parametrize.call_args_list] == fixtures
    assert [name for name, question in questions.items() if question.called] == asked


def test_those_that_take_all_gpu_memory_wait_for_each_other(tmp_path, monkeypatch):
    """Each asks how much is free after the one before has given back what it took."""
    events = []

    def mem_get_info():
        events.append("asks")
        time.sleep(0.1)
        return 0, 0

    def too_large(_):
        with pytest.raises(pytest.skip.Exception, match="GiB of free GPU memory, there are 0"):
            support.assert_far_images_are_right(torch.relu, (8, 64), {}, 1)

    monkeypatch.setattr(support, "gettempdir", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("gives back"))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(too_large, range(2)))
    assert events == ["asks", "gives back"] * 2
