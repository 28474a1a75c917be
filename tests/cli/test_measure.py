"""How time and memory are measured."""

import time
from types import SimpleNamespace

import pytest
import torch

from convnext_kernels.cli import measure as measuring
from convnext_kernels.cli.measure import Timing, measure, peak_memory, rotating_inputs


def test_the_ratio_pairs_the_samples_of_a_round():
    """A machine that slows down tenfold in between changes both times of a round, not their ratio."""
    baseline, ours = Timing([2.0, 20.0, 3.0]), Timing([1.0, 10.0, 3.0])
    assert ours.speedup_over(baseline) == 2.0
    assert ours.median == 3.0 and ours.quartiles == (2.0, 6.5)
    assert Timing([4.0]).quartiles == (4.0, 4.0)


def test_contenders_alternate():
    order = []

    def work(name, seconds):
        def run(batch):
            order.append(name)
            time.sleep(seconds)

        return run

    advances = []
    works = {"a": work("a", 0.06), "b": work("b", 0.12)}
    timings = measure(works, torch.zeros(1, 1, 1, 1), 3, lambda: advances.append(None))
    assert "".join(order).endswith("ababab") and len(advances) == 6
    assert 60 <= timings["a"].median < 110 and 120 <= timings["b"].median < 170
    assert len(timings["a"].samples) == 3


def test_short_work_is_repeated():
    calls = []
    measure({"short": lambda batch: (calls.append(None), time.sleep(0.005))}, torch.zeros(1), 2, lambda: None)
    assert 3 + 2 * 5 <= len(calls) <= 3 + 2 * 11


def test_long_work_is_warmed_up_once_more_and_no_more(monkeypatch):
    """A training step on a GPU takes longer than the samples of a kernel."""
    monkeypatch.setattr(measuring, "WARM_UP_CALLS", {"cpu": 10})
    calls = []
    measure({"long": lambda batch: (calls.append(None), time.sleep(0.1))}, torch.zeros(1), 2, lambda: None)
    assert len(calls) == 1 + 1 + 2


def test_peak_memory_counts_what_lives_at_once():
    batch = torch.rand(1, 1, 512, 512)
    one = peak_memory(lambda x: (x * 2).sum(), batch)
    assert batch.nbytes <= one < 1.1 * batch.nbytes
    assert peak_memory(lambda x: [(x * 2).sum() for _ in range(3)], batch) < 1.1 * batch.nbytes
    assert peak_memory(lambda x: [x * 2 for _ in range(3)], batch) == pytest.approx(3 * batch.nbytes, rel=0.1)


def test_a_cpu_needs_no_copies():
    batch = torch.rand(2, 3, 4, 4)
    assert [copy.data_ptr() for copy in rotating_inputs(batch)] == [batch.data_ptr()]


@pytest.mark.parametrize(("nbytes", "copies"), [(100, 21), (300, 8), (2000, 2), (10**6, 2)])
def test_how_many_inputs_exceed_a_cache_of_1000_bytes(monkeypatch, nbytes, copies):
    """Twice, without the one that is read."""
    properties = SimpleNamespace(L2_cache_size=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert measuring.rotation(nbytes, torch.device("cuda", 0)) == copies


@pytest.mark.gpu
def test_a_gpu_s_inputs_exceed_its_cache():
    batch = torch.rand(2, 3, 64, 64, device="cuda")
    copies = rotating_inputs(batch)
    cache = torch.cuda.get_device_properties(batch.device).L2_cache_size
    assert sum(copy.nbytes for copy in copies) > 2 * cache
    assert len({copy.data_ptr() for copy in copies}) == len(copies)
