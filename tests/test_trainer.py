"""The training step: what it does with a batch whose gradient is not finite, in each precision and optimizer."""

import pytest
import torch

from tests.upstream import mini_architecture
from visformer.config import TrainConfig
from visformer.data import Batch
from visformer.errors import RunError
from visformer.models import Visformer
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
