"""The order of the rows of steps without token trees, and how processes share it."""

import itertools

import torch
from accelerate import skip_first_batches
from torch.utils.data import DataLoader

from minionerec.training.row_batches import RowBatches, StepSampler


def test_the_examples_of_a_step_stand_from_the_longest_to_the_shortest():
    lengths = torch.randint(5, 50, (103,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = StepSampler(lengths, 16, seed=3)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(103)) and order == list(sampler)
        steps = [order[start : start + 16] for start in range(0, 103, 16)]
        for step in steps:
            assert [lengths[i] for i in step] == sorted((lengths[i] for i in step), reverse=True)
        epochs.append([set(step) for step in steps])
    assert epochs[0] != epochs[1]
    # Which examples make a step does not depend on their lengths: that would make its gradient another one.
    alike = StepSampler([1] * 103, 16, seed=3)
    order = list(alike)
    assert [set(order[start : start + 16]) for start in range(0, 103, 16)] == epochs[0]
    assert list(StepSampler(lengths, 16, seed=4)) != list(StepSampler(lengths, 16, seed=3))


def test_processes_take_every_row_once_and_as_many_micro_batches():
    for rows, micro_rows, processes in itertools.product((1, 2, 5, 16, 23), (1, 3, 4), (1, 2, 3, 8)):
        sampler = StepSampler([1] * rows, micro_rows * processes, seed=3)
        shares = [RowBatches(sampler, micro_rows, processes, process) for process in range(processes)]
        for epoch in range(2):
            for batches in shares:
                batches.set_epoch(epoch)
            taken = [list(batches) for batches in shares]
            assert {len(batches) for batches in taken} == {len(batches) for batches in shares} == {len(taken[0])}
            in_turn = [row for turn in zip(*taken, strict=True) for batch in turn for row in batch]
            assert in_turn == list(sampler) and sorted(in_turn) == list(range(rows))


def test_a_resumed_process_goes_on_where_it_stopped():
    loader = DataLoader(
        range(23), batch_sampler=RowBatches(StepSampler([1] * 23, 12, seed=3), 2, 3, 1), collate_fn=list
    )
    assert list(skip_first_batches(loader, 2)) == list(loader)[2:]


def test_grouped_by_length_steps_are_of_similar_length():
    lengths = torch.randint(5, 500, (4003,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = StepSampler(lengths, 16, seed=3, group_by_length=True)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(4003)) and order == list(sampler)
        assert lengths[order[0]] == max(lengths)
        steps = [[lengths[i] for i in order[start : start + 16]] for start in range(0, 4000, 16)]
        assert all(step == sorted(step, reverse=True) for step in steps)
        assert sum(step[0] - step[-1] for step in steps) / len(steps) < 15  # of 495 tokens; at random it is 440
        epochs.append(order)
    assert epochs[0] != epochs[1]
