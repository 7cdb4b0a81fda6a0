"""Users whose sem embedding is a linear picture of their taste, and whose text is another one."""

import torch

from prefgen.stages.align.data import AlignDataset, collate

TASTES, SEM, TEXT, DRAWS, ORDERS = 6, 20, 10, 3, 2


class PlantedUsers:
    """Stands in for SplitUsers: R noisy draws of one linear map of a hidden taste."""

    def __init__(self, count, *, seed):
        generator = torch.Generator().manual_seed(seed)
        world = torch.Generator().manual_seed(123)
        tastes = torch.randn(count, TASTES, generator=generator)
        self.user_ids = [f"u{seed}-{i}" for i in range(count)]
        sem = tastes @ torch.randn(TASTES, SEM, generator=world) + 5
        self._sem = sem[:, None] + 0.05 * torch.randn(count, DRAWS, SEM, generator=generator)
        text = tastes @ torch.randn(TASTES, TEXT, generator=world) * 2 - 3
        self.texts = text[:, None] + 0.05 * torch.randn(count, ORDERS, TEXT, generator=generator)

    def __len__(self):
        return len(self.user_ids)

    def sem(self, index):
        return self._sem[index]

    def first(self):
        return self._sem[:, 0], self.texts[:, 0]


def batches(users, *, pairing, batch_size, steps, seed=0):
    """Training batches as ResumableLoader would make them, in one process."""
    dataset = AlignDataset(users, texts=users.texts, pairing=pairing, seed=seed)
    order, epoch = [], 0
    for step in range(steps):
        if len(order) < batch_size:
            generator = torch.Generator().manual_seed(1000 * seed + step)
            order, epoch = torch.randperm(len(dataset), generator=generator).tolist(), epoch + 1
        rows, order = order[:batch_size], order[batch_size:]
        yield collate([dataset.example(row, epoch=epoch) for row in rows])
