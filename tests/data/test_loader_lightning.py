"""Exact resume under the real Trainer: six steps straight equal three, stop, three more in fresh objects."""

import lightning.pytorch as lp
import pytest
import torch

from prefgen.data.loader import ResumableLoader
from prefgen.testing.data import NumberDataset, collate_numbers


class Net(lp.LightningModule):
    def __init__(self):
        super().__init__()
        # Dropout: the loader must not draw from the global random state, or a resume would shift it.
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        self.keys = []
        self.checked = []

    def training_step(self, batch, batch_idx):
        keys, x = batch
        self.keys.append(keys)
        return (self.net(x) - x.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class CheckedNet(Net):
    def validation_step(self, batch, batch_idx):
        self.checked.append(batch[0])


class SaveAtThree(lp.Callback):
    """Saves after step 3 from inside the loop, random state included, as a run's checkpoints are."""

    def __init__(self, path):
        self.path = path
        self.state = None

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 3 and not self.path.exists():
            trainer.save_checkpoint(self.path)

    def on_save_checkpoint(self, trainer, module, checkpoint):
        checkpoint["random"] = torch.get_rng_state()

    def on_load_checkpoint(self, trainer, module, checkpoint):
        self.state = checkpoint["random"]

    def on_train_start(self, trainer, module):
        if self.state is not None:
            torch.set_rng_state(self.state)


def make_loader(size, *, num_workers, shuffle=True, limit_batches=None):
    return ResumableLoader(
        NumberDataset(size, shard_sizes=(2,) * (size // 2)),
        batch_size=2,
        seed=7,
        shuffle=shuffle,
        drop_last=shuffle,
        num_workers=num_workers,
        collate_fn=collate_numbers,
        window_shards=2,
        limit_batches=limit_batches,
    )


def fit(path, *, size, num_workers, max_steps=6, resume=None, validate=False, limit_batches=None, **options):
    """Fresh module, loader and trainer, as a new process would make them."""
    torch.manual_seed(0 if resume is None else 123)
    net = CheckedNet() if validate else Net()
    trainer = lp.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[SaveAtThree(path)],
        num_sanity_val_steps=2,
        **options,
    )
    loader = make_loader(size, num_workers=num_workers, limit_batches=limit_batches)
    checks = make_loader(4, num_workers=num_workers, shuffle=False) if validate else None
    trainer.fit(net, loader, checks, ckpt_path=resume, weights_only=True if resume else None)
    return net, trainer


CASES = {
    "middle": (8, {}),  # 4 batches an epoch: the stop is in its middle
    "boundary": (6, {}),  # 3 batches an epoch: the stop is at its end
    "boundary-val": (6, {"validate": True}),
    "middle-val": (8, {"validate": True, "val_check_interval": 3}),
    "limited": (12, {"limit_batches": 3}),  # epochs cut short by the loader
    "limited-by-trainer": (10, {"limit_train_batches": 3}),  # Lightning's epochs are not ours
    "single": (2, {}),  # one batch an epoch
    "accumulate": (12, {"accumulate_grad_batches": 2}),
}


RUNS = [(case, 0) for case in CASES] + [("middle", 2), ("boundary-val", 2), ("accumulate", 2)]


@pytest.mark.parametrize(("case", "num_workers"), RUNS)
def test_six_steps_equal_three_and_three(tmp_path, case, num_workers):
    size, options = CASES[case]
    straight, _ = fit(tmp_path / "killed.ckpt", size=size, num_workers=num_workers, **options)
    first, trainer = fit(
        tmp_path / "stopped.ckpt", size=size, num_workers=num_workers, max_steps=3, **options
    )
    trainer.save_checkpoint(tmp_path / "afterwards.ckpt")
    for name in ("killed", "stopped", "afterwards"):
        if (case, name) == ("accumulate", "afterwards"):
            continue  # Lightning goes on with an epoch of one batch: half an accumulation. Save in the loop
        resumed, _ = fit(
            tmp_path / "unused.ckpt",
            size=size,
            num_workers=num_workers,
            resume=tmp_path / f"{name}.ckpt",
            **options,
        )
        assert first.keys + resumed.keys == straight.keys, name
        for left, right in zip(straight.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(left, right), name


def test_workers_change_nothing(tmp_path):
    alone, _ = fit(tmp_path / "a.ckpt", size=8, num_workers=0)
    helped, _ = fit(tmp_path / "b.ckpt", size=8, num_workers=2, resume=None)
    assert alone.keys == helped.keys
    resumed, _ = fit(tmp_path / "c.ckpt", size=8, num_workers=2, resume=tmp_path / "a.ckpt")
    assert alone.keys[3:] == resumed.keys


def test_epochs_advance_and_validation_repeats(tmp_path):
    net, _ = fit(tmp_path / "a.ckpt", size=4, num_workers=0, validate=True)
    assert [{key.split("@")[1] for key in keys} for keys in net.keys] == [{e} for e in "001122"]
    assert sorted(key for keys in net.keys[:2] for key in keys) == ["0@0", "1@0", "2@0", "3@0"]
    assert net.checked == [["0@0", "1@0"], ["2@0", "3@0"]] * 4  # sanity check, then three epochs
