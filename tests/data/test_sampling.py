"""lit_sparse.data.sampling: every row is seen, rows of like length meet, and Lightning leaves the order alone."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader, TensorDataset

from lit_sparse.data.sampling import LengthGroupedSampler, ResumableLoader, RowSampler

lengths_lists = st.lists(st.integers(1, 60), min_size=1, max_size=400)


def random_lengths(count):
    return torch.randint(5, 100, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def padding_share(order, lengths, batch_size):
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths) / padded


@given(lengths_lists, st.integers(1, 8), st.integers(0, 3), st.integers(0, 3))
@settings(deadline=None)
def test_one_process_sees_every_row_once_and_the_longest_first(lengths, batch_size, seed, epoch):
    sampler = LengthGroupedSampler(lengths, batch_size, seed=seed)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths)))
    assert len(sampler) == len(order)
    assert lengths[order[0]] == max(lengths)


@given(lengths_lists, st.integers(1, 8), st.integers(2, 4))
@settings(deadline=None)
def test_ranks_share_all_rows_in_equal_counts(lengths, batch_size, replicas):
    shares = [list(LengthGroupedSampler(lengths, batch_size, replicas, rank)) for rank in range(replicas)]
    assert {len(share) for share in shares} == {-(-len(lengths) // replicas)}
    seen = sorted(itertools.chain(*shares))
    assert set(seen) == set(range(len(lengths)))
    assert len(seen) - len(set(seen)) < replicas  # only what fills up the last step is repeated


def test_ranks_hold_rows_of_like_length_in_every_step():
    lengths = random_lengths(4000)
    shares = [list(LengthGroupedSampler(lengths, 8, 2, rank)) for rank in range(2)]
    longest = [[max(lengths[i] for i in share[s : s + 8]) for s in range(8, 2000, 8)] for share in shares]
    assert max(abs(a - b) for a, b in zip(*longest, strict=True)) <= 3


def test_grouping_leaves_little_padding():
    lengths = random_lengths(4000)
    shuffled = torch.randperm(4000, generator=torch.Generator().manual_seed(0)).tolist()
    assert padding_share(shuffled, lengths, 32) > 0.4
    assert padding_share(list(LengthGroupedSampler(lengths, 32)), lengths, 32) < 0.03


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = random_lengths(500)

    def order(seed, epoch):
        sampler = LengthGroupedSampler(lengths, 4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    first = order(0, 0)
    torch.manual_seed(1)
    assert order(0, 0) == first
    assert order(0, 1) != first
    assert order(7, 0) != first


def test_no_rows_give_no_order():
    assert list(LengthGroupedSampler([], 4)) == []


def test_lightning_neither_wraps_nor_replaces_the_sampler():
    trainer = Trainer(
        accelerator="cpu", strategy="ddp", devices=2, logger=False, enable_checkpointing=False, barebones=False
    )
    rows = TensorDataset(torch.zeros(8, 1))
    grouped = DataLoader(rows, sampler=LengthGroupedSampler([1] * 8, 2, 2, 0))
    assert trainer._data_connector._requires_distributed_sampler(DataLoader(rows))
    assert not trainer._data_connector._requires_distributed_sampler(grouped)


def test_lightning_tells_the_sampler_the_epoch(tmp_path):
    sampler = LengthGroupedSampler([1] * 16, 2)
    epochs = []

    class Recorder(BoringModel):
        def on_train_epoch_start(self):
            epochs.append(self.trainer.train_dataloader.sampler.epoch)

    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=3,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Recorder(), DataLoader(torch.zeros(16, 32), batch_size=2, sampler=sampler))
    assert trainer.train_dataloader.sampler is sampler
    assert epochs == [0, 1, 2]


def resumable(count, batch_size, grouped=False, **options):
    rows = TensorDataset(torch.arange(count))
    sampler = LengthGroupedSampler(random_lengths(count), batch_size) if grouped else RowSampler(rows, 1, 0, seed=3)
    return ResumableLoader(rows, batch_size=batch_size, sampler=sampler, **options)


def served(loader, epoch, limit=None):
    loader.sampler.set_epoch(epoch)
    return [batch[0].tolist() for batch in itertools.islice(iter(loader), limit)]


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 45), st.integers(0, 3), st.booleans())
@settings(deadline=None)
def test_a_loader_goes_on_where_another_was(count, batch_size, taken, epoch, grouped):
    loader = resumable(count, batch_size, grouped)
    whole = served(loader, epoch)
    interrupted = resumable(count, batch_size, grouped)
    served(interrupted, max(0, epoch - 1))
    first = served(interrupted, epoch, limit=taken)
    other = resumable(count, batch_size, grouped)
    other.load_state_dict(interrupted.state_dict())
    assert first + served(other, epoch) == whole
    assert other.state_dict()["batches"] == len(whole) == len(other)
    assert served(other, epoch + 1) == served(loader, epoch + 1)  # the place was one of that epoch alone


def test_a_place_before_the_first_batch_is_the_end_of_the_epoch_before():
    loader = resumable(10, 3)
    served(loader, 0)
    loader.sampler.set_epoch(1)
    iter(loader)
    other = resumable(10, 3)
    other.load_state_dict(loader.state_dict())
    assert served(other, 1) == served(resumable(10, 3), 1)


def test_an_epoch_that_was_over_is_not_gone_on_with():
    loader = resumable(10, 3)
    served(loader, 0, limit=2)  # as many as limit_train_batches allows
    other = resumable(10, 3)
    other.load_state_dict(loader.state_dict())
    assert served(other, 1) == served(resumable(10, 3), 1)


def test_worker_processes_begin_at_the_place_too():
    loader = resumable(12, 2)
    whole = served(loader, 2)
    served(loader, 2, limit=2)
    other = resumable(12, 2, num_workers=2)
    other.load_state_dict(loader.state_dict())
    assert served(other, 2) == whole[2:]


def test_other_batches_than_before_are_pointed_out():
    loader = resumable(12, 2)
    served(loader, 0, limit=2)
    with pytest.warns(UserWarning, match="run with {'batch_size': 2, 'processes': 1}, and this one has .*3"):
        resumable(12, 3).load_state_dict(loader.state_dict())
