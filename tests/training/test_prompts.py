"""The rows of a step of reinforcement, and what rewards and logs learn of them."""

from accelerate.utils import operations
from datasets import Dataset
from rl_trainers import make_trainer
from torch.utils.data._utils import pin_memory


def visits(monkeypatch, module, name: str, batch) -> int:
    """How many values a function visits that walks through a batch by calling itself."""
    walk, count = getattr(module, name), []

    def counted(*args, **kwargs):
        count.append(1)
        return walk(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, counted)
        counted(batch, "cpu")
    return len(count)


def test_moving_a_batch_does_not_walk_through_its_prompts(sft, tmp_path, monkeypatch):
    trainer = make_trainer(sft, "new LoRA", tmp_path)
    longer = [prompt * 20 for prompt in trainer.train_dataset["prompt"]]
    history = [["<a_0><b_0><c_0>"] * 20] * len(longer)
    rows = {**trainer.train_dataset[:], "prompt": longer, "history": history}
    for dataset in (trainer.train_dataset, Dataset.from_dict(rows)):
        trainer.train_dataset = dataset
        batch = next(iter(trainer.get_train_dataloader()))
        assert len(batch) == 8
        for module, name in ((operations, "send_to_device"), (pin_memory, "pin_memory")):
            assert visits(monkeypatch, module, name, batch) <= 1 + len(batch)  # a number for each row


def test_rewards_and_logs_get_the_columns_of_the_rows(sft, tmp_path):
    seen = []

    def reward(prompts, completions, completion_ids, target, history, trainer_state, **_):
        seen.extend(zip(prompts, target, history, strict=True))
        assert len(completions) == len(completion_ids) == len(prompts) == 8 and trainer_state.global_step == 0
        return [float(ids[0] % 2) for ids in completion_ids]

    trainer = make_trainer(sft, "new LoRA", tmp_path, reward=reward, max_steps=1)
    dataset = trainer.train_dataset
    dataset = dataset.add_column("history", [[target] * i for i, target in enumerate(dataset["target"])])
    trainer.train_dataset = dataset
    trainer.train()
    rows = [tuple(row) for row in zip(dataset["prompt"], dataset["target"], dataset["history"], strict=True)]
    assert seen[:4] == [seen[0]] * 4 and seen[4:] == [seen[4]] * 4 and seen[0] != seen[4]
    assert seen[0] in rows and seen[4] in rows
    assert list(trainer._logs["prompt"]) == [prompt for prompt, _, _ in seen]
