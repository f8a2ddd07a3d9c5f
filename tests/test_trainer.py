"""The training step: what it does with a batch whose gradient is not finite, in each precision and optimizer."""

import copy
import ctypes
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.upstream import mini_architecture
from visformer.config import TrainConfig
from visformer.data import Batch
from visformer.errors import RunError
from visformer.fusion.training import GroupedConvolution, spatial_mlps
from visformer.models import Visformer
from visformer.verbs import precision as precisions
from visformer.verbs.memory import kept_memory
from visformer.verbs.precision import seconds_of_a_step, settle_precision
from visformer.verbs.trainer import Trainer


def make(**options):
    torch.manual_seed(0)
    config = TrainConfig(
        image_resize=64, lr=0.01, warmup_epochs=0, scheduler="constant", re_prob=0.0, color_jitter=None, **options
    )
    return Trainer(Visformer(mini_architecture("orig_mini_v1")), config, torch.device("cpu"), batches_per_epoch=100)


def batch(seed, trainer=None):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    return Batch(images, torch.randint(0, 10, (4,), generator=generator), [0, 1, 2, 3])


def spoil(trainer, monkeypatch):
    """The next batches reach the model as NaN, statistics of its norms included."""
    real = trainer.prepare
    monkeypatch.setattr(trainer, "prepare", lambda i, t, seed: (real(i, t, seed=seed)[0] * float("nan"), t))


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lamb", "nadam"])
@pytest.mark.parametrize("precision", [{"amp_level": "O0"}, {"amp_level": "O2", "amp_dtype": "bf16"}])
def test_a_bad_step_moves_nothing(monkeypatch, opt, precision):
    trainer = make(opt=opt, **precision)
    trainer.model.train()
    trainer.train_batch(batch(0), 0)
    assert trainer.check() == 0
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with monkeypatch.context() as patch:
        spoil(trainer, patch)
        trainer.train_batch(batch(1), 1)
    assert trainer.check() == 1 and trainer.step == 2
    for name, tensor in trainer.model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, before[name]), name
    trainer.train_batch(batch(2), 2)  # and it goes on
    assert trainer.check() == 1 and trainer.loss_sum.isfinite()
    assert not torch.equal(trainer.model.state_dict()["head.weight"], before["head.weight"])


def test_too_many_in_a_row_end_the_run(monkeypatch):
    trainer = make(opt="adamw", max_bad_steps=3)
    trainer.model.train()
    with monkeypatch.context() as patch:
        spoil(trainer, patch)
        for index in range(2):
            trainer.train_batch(batch(index), index)
    trainer.train_batch(batch(3), 2)
    assert trainer.check() == 2
    with monkeypatch.context() as patch:
        spoil(trainer, patch)
        for index in range(3, 6):
            trainer.train_batch(batch(index), index)
    with pytest.raises(RunError, match="3 steps in a row had no finite loss or gradient, up to step 6"):
        trainer.check()


def test_the_count_survives_a_resume(monkeypatch):
    trainer, again = make(opt="adamw"), make(opt="adamw")
    trainer.model.train()
    with monkeypatch.context() as patch:
        spoil(trainer, patch)
        trainer.train_batch(batch(0), 0)
    again.load_state_dict(trainer.state_dict())
    assert again.bad_steps.tolist() == [1, 1, 1]


def test_clipping_bounds_the_gradient():
    """With SGD and no momentum the weights move by lr times the clipped norm."""
    trainer = make(opt="sgd", momentum=0.0, clip_grad=True, clip_value=0.5, weight_decay=0.0)
    trainer.model.train()
    before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
    trainer.train_batch(batch(0), 0)
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.01 * 0.5, rel=1e-3)


# ---- speed


def weights_after(trainer, steps=3):
    trainer.begin_epoch(0)
    for index in range(steps):
        trainer.train_batch(batch(index), index)
    return trainer.model.state_dict()


def test_speed_changes_no_number_but_by_rounding():
    slow, fast = (weights_after(make(opt="momentum", speed=speed)) for speed in ("off", "auto"))
    assert list(slow) == list(fast)
    for name, expected in slow.items():
        assert torch.allclose(fast[name].double(), expected.double(), rtol=1e-3, atol=1e-4), name


def test_off_leaves_the_model_as_it_is_written():
    assert any(type(module) is nn.GELU for module in make(opt="sgd", speed="off").model.modules())
    assert not any(type(module) is nn.GELU for module in make(opt="sgd").model.modules())


@pytest.mark.parametrize(("speed", "measures"), [("auto", False), ("measure", True)])
def test_the_cpu_measures_only_when_it_is_asked_to(monkeypatch, tmp_path, speed, measures):
    """Bits on the CPU are a function of the options alone, unless measuring is one of them."""
    monkeypatch.setenv("VISFORMER_CACHE", str(tmp_path))
    trainer = make(opt="sgd", speed=speed, batch_size=4)
    assert bool(trainer.ways) == measures == (tmp_path / "tuning").exists()
    assert trainer.state_dict()["ways"] == trainer.ways


def test_recorded_ways_are_taken_without_measuring(monkeypatch):
    monkeypatch.setattr("visformer.verbs.trainer.ways_to_train", lambda *_, **__: pytest.fail("measured"))
    torch.manual_seed(0)
    model = Visformer(mini_architecture("orig_mini_v1"))
    ways = dict.fromkeys(spatial_mlps(model), "merged 2")
    config = TrainConfig(image_resize=64, opt="sgd", speed="measure")
    trainer = Trainer(model, config, torch.device("cpu"), 100, ways=ways)
    assert ways and trainer.ways == ways
    assert all(isinstance(mlp.conv2, GroupedConvolution) for mlp in spatial_mlps(trainer.model).values())


# ---- amp_level auto


def model_of_four():
    torch.manual_seed(0)
    return Visformer(mini_architecture("orig_mini_v1"))


@pytest.mark.parametrize(("half", "level"), [(0.5, "O2"), (0.97, "O0"), (2.0, "O0")])
def test_the_faster_precision_is_taken(monkeypatch, capsys, half, level):
    monkeypatch.setattr(precisions, "seconds_of_a_step", lambda *_: {"O0": 1.0, "O2": half})
    config = TrainConfig(image_resize=64, amp_level="auto")
    assert settle_precision(config, model_of_four(), torch.device("cpu"), None).amp_level == level
    said = capsys.readouterr().err
    assert f"bf16 is {1 / half:.2f} times as fast as fp32 here; taking {level}" in said


def test_a_resumed_run_keeps_its_precision(monkeypatch):
    monkeypatch.setattr(precisions, "seconds_of_a_step", lambda *_: pytest.fail("measured"))
    config = TrainConfig(image_resize=64, amp_level="auto")
    state = {"config": "# mixed precision\namp_level: O2\n"}
    assert settle_precision(config, model_of_four(), torch.device("cpu"), state).amp_level == "O2"
    given = TrainConfig(image_resize=64, amp_level="O1")
    assert settle_precision(given, model_of_four(), torch.device("cpu"), None) is given


def test_measuring_the_precision_leaves_model_and_random_numbers_alone():
    model = model_of_four()
    before, random_numbers = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    config = TrainConfig(image_resize=64, amp_level="auto", batch_size=4)
    seconds = seconds_of_a_step(config, model, torch.device("cpu"))
    assert set(seconds) == {"O0", "O2"} and min(seconds.values()) > 0
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any(type(module) is nn.GELU for module in model.modules())


# ---- memory


def test_memory_is_kept_and_given_back():
    """Freed memory stays with the process while it is open, so the next tensor of that size comes without page faults;
    at the end it goes back to the system. In a process of its own: the allocator learns from what was freed before."""
    if not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        pytest.skip("another C library than GNU's")
    script = """
import resource, torch
from visformer.verbs.memory import kept_memory

def faults(count=4, size=8 << 20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(size, dtype=torch.uint8) for _ in range(count)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with kept_memory(torch.device("cpu")) as kept:
    assert kept
    during = [faults() for _ in range(8)][-1]
print(during, min(faults() for _ in range(5)), 4 * (8 << 20) // resource.getpagesize())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    during, after, pages = map(int, done.stdout.split())
    assert during < pages / 10
    assert after > pages / 5


@pytest.mark.parametrize(("device", "use"), [("cpu", False), ("meta", True)])
def test_memory_is_left_alone(device, use):
    with kept_memory(torch.device(device), use) as kept:
        assert not kept
