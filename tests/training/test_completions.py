"""Which completions a step learns from: beams, samples and targets."""

import torch
from rl_trainers import generated, make_trainer, sids_of

from minionerec.decoding import beam_search
from minionerec.training.completions import choose
from minionerec.training.logprobs import completion_logps
from minionerec.training.prompts import look_up


def test_beams_are_the_best_items_in_order(sft, tmp_path):
    trainer = make_trainer(sft, "new LoRA", tmp_path)
    batch, outputs = generated(trainer)
    assert batch["prompt"][:4] == [batch["prompt"][0]] * 4
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    logps, _ = completion_logps(trainer.model, *(getattr(outputs, name) for name in names), shared=False)
    scores = logps.sum(dim=1).view(-1, 4)
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    groups = [sids_of(trainer, outputs)[start : start + 4] for start in (0, 4)]
    assert all(len(set(group)) == 4 for group in groups)


def test_sampling_follows_the_temperature(sft, tmp_path):
    switches = {"beam_search": False}
    counts = []
    for temperature in (1e-3, 100.0):
        trainer = make_trainer(
            sft, "new LoRA", tmp_path, switches=switches, num_generations=32, per_device_train_batch_size=32,
            temperature=temperature,
        )  # fmt: skip
        counts.append(len(set(sids_of(trainer, generated(trainer)[1]))))
    assert counts[0] == 1 and counts[1] > 8


def test_add_gt_puts_the_target_last(sft, tmp_path):
    trainer = make_trainer(sft, "new LoRA", tmp_path, switches={"add_gt": True})
    batch, outputs = generated(trainer)
    predicted = sids_of(trainer, outputs)
    assert [predicted[3], predicted[7]] == [batch["target"][3], batch["target"][7]]


def test_choose_keeps_the_target_and_the_most_frequent():
    a, b, c, d = (1,), (2,), (3,), (4,)
    assert choose([a, b, b, c, d, d], c, 3) == [b, c, d]
    assert choose([a, b, b, c, d, d], (9,), 2) == [b, d]
    assert choose([a, b, c], (9,), 2) == [a, b]
    assert choose([a, a, b], a, 4) == [a, b, a, b]


def test_dynamic_sampling_draws_more_and_keeps_the_hit(sft, tmp_path):
    trainer = make_trainer(sft, "new LoRA", tmp_path, switches={"dynamic_sampling": True})
    columns = look_up(trainer.train_dataset, next(iter(trainer.get_train_dataloader())))
    ids = torch.tensor([columns["prompt"][0]])
    rows, _ = beam_search.constrained_beam_search(trainer.model.eval(), ids, torch.ones_like(ids), trainer.trie, 6)
    six = [trainer.sids[i] for i in trainer.trie.source[rows[0]]]
    trainer.model.train()
    kept = trainer.roll_out({**columns, "target": [six[5]] * 8})
    assert sids_of(trainer, kept)[:4] == [*six[:3], six[5]]
