import pytest
import torch
from accelerate.utils import operations
from as_on_gpu import answer
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data._utils import pin_memory
from trl import GRPOConfig

import lora_utils
from minionerec.data import sid_tokens
from minionerec.data.files import read_catalogue, read_info
from minionerec.decoding import beam_search
from minionerec.decoding.trie import Trie
from minionerec.flags import AdapterFlags
from minionerec.model import adapters, device, loading
from minionerec.training import rewards, rl_trainer
from minionerec.training.completions import choose
from minionerec.training.logprobs import completion_logps
from minionerec.training.prompts import look_up
from minionerec.training.rl_trainer import ReReTrainer

STARTS = ("full", "new LoRA", "own LoRA", "new QLoRA", "own QLoRA", "own DoRA")


@pytest.fixture(scope="module")
def sft(files, base, tmp_path_factory):
    """A whole checkpoint that knows the catalogue: (folder, tokenizer, SIDs, ids of the SID tokens)."""
    folder = str(tmp_path_factory.mktemp("sft"))
    torch.manual_seed(0)
    tokenizer, model = loading.load_tokenizer(base), loading.load_base(base)
    ids = loading.add_sid_tokens(model, tokenizer, read_catalogue(files["index"]).sid_tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)  # predictions that differ between items
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tokenizer, read_info(files["info"]), ids


def start_from(sft, start: str):
    """The model and whether its adapter is new."""
    folder, _, _, ids = sft
    kind = start.split()[-1]
    torch.manual_seed(1)
    model = loading.load_base(folder, lora_utils.quantization_config(AdapterFlags(use_qlora=kind == "QLoRA")))
    if kind == "full":
        return model, False
    config = lora_utils.lora_config(model, ids, AdapterFlags(lora_r=4, lora_dropout=0.5, use_dora=kind == "DoRA"))
    model = lora_utils.add_lora(model, config)
    if start.startswith("new"):
        return model, True
    with torch.no_grad():  # an adapter that has learned something
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model, False


def make_trainer(sft, start: str, output_dir, rows=8, switches=None, reward=None, **settings):
    _, tokenizer, sids, _ = sft
    model, new_adapter = start_from(sft, start)
    sequences = sid_tokens.sid_sequences(tokenizer, sids)
    prompts = [tokenizer(f"Purchases: {sids[i]}, {sids[(i * 3) % len(sids)]}").input_ids for i in range(rows)]
    targets = [sids[(i * 5) % len(sids)] for i in range(rows)]
    values = {"output_dir": str(output_dir), "per_device_train_batch_size": 8, "num_generations": 4, "beta": 0.04}
    values |= {"learning_rate": 1e-2, "max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    values |= {**device.mixed_precision("QLoRA" in start), "use_cpu": True, "loss_type": "grpo", "seed": 3}
    values |= {"activation_checkpointing": False, "remove_unused_columns": False, "use_bias_correction_kl": False}
    values |= settings

    def varied(completion_ids, **_):
        return [float(ids[0] % 2 + ids[1] % 3) for ids in completion_ids]

    return ReReTrainer(
        model,
        reward if isinstance(reward, list) else [reward or varied],
        GRPOConfig(**values),
        Dataset.from_dict({"prompt": prompts, "target": targets}),
        processing_class=tokenizer,
        eval_dataset=Dataset.from_dict({"prompt": prompts, "target": targets}),
        new_adapter=new_adapter,
        trie=Trie(sequences, tokenizer.eos_token_id),
        sids=sids,
        **{"test_beam": 10, **(switches or {})},
    )


def generated(trainer):
    """The scored completions of one generation batch."""
    trainer.model.train()
    columns = look_up(trainer.train_dataset, next(iter(trainer.get_train_dataloader())))
    return columns, trainer.roll_out(columns)


def sids_of(trainer, outputs) -> list[str]:
    pairs = zip(outputs.completion_ids.tolist(), outputs.completion_mask.tolist(), strict=True)
    sid_of = trainer.trie.sid_of(trainer.sids)
    return [sid_of[tuple(t for t, m in zip(ids, mask, strict=True) if m)] for ids, mask in pairs]


# --- The reference ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", STARTS)
def test_kl_starts_at_zero_and_the_reference_stays(sft, tmp_path, start):
    trainer = make_trainer(sft, start, tmp_path, max_steps=3)
    inner = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.reference.adapter:
        frozen = adapters.adapter_parameters(inner, "ref")
        assert any("trainable_tokens_delta" in name for name in frozen)
    elif trainer.reference.whole is not None:
        frozen = dict(trainer.reference.whole.named_parameters())
    else:
        frozen = {name: p for name, p in inner.named_parameters() if not p.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in frozen.items()}
    moving = {name: p for name, p in inner.named_parameters() if p.requires_grad}
    assert not set(map(id, moving.values())) & set(map(id, frozen.values()))
    at_start = {name: parameter.detach().clone() for name, parameter in moving.items()}
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == 0.0 and all(value > 1e-6 for value in kl[1:])
    assert all(torch.equal(parameter, before[name]) for name, parameter in frozen.items())
    unmoved = [name for name, parameter in moving.items() if torch.equal(parameter, at_start[name])]
    assert unmoved == []
    assert all(p.dtype == torch.float32 for p in moving.values())
    assert {name for name, p in inner.named_parameters() if p.requires_grad} == set(moving)


def test_where_the_reference_is(sft, tmp_path):
    new, own = (make_trainer(sft, start, tmp_path) for start in ("new LoRA", "own LoRA"))
    assert new.reference.adapter is None and new.reference.whole is None
    assert list(new.model.peft_config) == ["default"]
    assert own.reference.adapter == "ref" and own.reference.whole is None
    without = make_trainer(sft, "own LoRA", tmp_path, beta=0.0)
    assert without.reference is None
    without.train()
    assert all("kl" not in entry for entry in without.state.log_history)


def test_an_adapter_that_trl_makes_is_a_new_one(sft, tmp_path):
    """The model without it is the reference, and TRL leaves the model's forward method and the arguments alone."""
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(sft, "full", tmp_path, switches={"peft_config": adapter})
    assert trainer.reference.whole is None and trainer.reference.adapter is None and trainer.args.beta == 0.04
    assert not any("forward" in vars(module) for module in trainer.model.modules())
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == 0.0 < kl[1]


@pytest.mark.parametrize("start", ["full", "new LoRA", "own LoRA"])
def test_the_reference_follows_when_it_should(sft, tmp_path, start):
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25}
    trainer = make_trainer(sft, start, tmp_path, max_steps=2, **settings)
    inner = trainer.model

    def both():
        if start == "full":
            return dict(trainer.reference.whole.named_parameters()), dict(inner.named_parameters())
        return adapters.adapter_parameters(inner, "ref"), adapters.adapter_parameters(inner, "default")

    old = {name: parameter.detach().clone() for name, parameter in both()[0].items()}
    trainer.train()
    reference, policy = both()
    assert reference.keys() == policy.keys()
    for name, parameter in reference.items():
        torch.testing.assert_close(parameter, 0.75 * old[name] + 0.25 * policy[name])
    assert any(not torch.equal(parameter, old[name]) for name, parameter in reference.items())


def test_a_saved_adapter_is_the_policy_alone(sft, tmp_path):
    trainer = make_trainer(sft, "own LoRA", tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "ref").exists()
    folder, _, _, _ = sft
    again = adapters.load_adapter(loading.load_base(folder), str(tmp_path / "saved"))
    policy = adapters.adapter_parameters(trainer.model, "default")
    saved = adapters.adapter_parameters(again, "default")
    assert saved.keys() == policy.keys()
    assert all(torch.equal(saved[name], parameter) for name, parameter in policy.items())


# --- Rows -------------------------------------------------------------------------------------------------------------


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


# --- The loss ---------------------------------------------------------------------------------------------------------


def plain_loss(mode, logps, old, ref, mask, advantages, beta, epsilon=0.2):
    """The loss of a batch, written down term by term."""
    rows = []
    for row in range(len(logps)):
        length = int(mask[row].sum())
        new, before, start = logps[row, :length], old[row, :length], ref[row, :length]
        ratio = (new - before).exp()
        if mode == "gspo":
            ratio = (new - before).mean().exp().expand(length)
        gain = torch.minimum(ratio * advantages[row], ratio.clamp(1 - epsilon, 1 + epsilon) * advantages[row])
        kl = (start - new).exp() - (start - new) - 1
        rows.append(-gain + beta * kl)
    if mode == "dapo":
        return torch.cat(rows).mean()
    return torch.stack([row.mean() for row in rows]).mean()


def loss_settings(mode: str) -> dict[str, str]:
    level = "sequence" if mode == "gspo" else "token"
    return {"loss_type": "dapo" if mode == "dapo" else "grpo", "importance_sampling_level": level}


@pytest.mark.parametrize("mode", ["grpo", "dapo", "gspo"])
def test_the_loss_is_the_formula(sft, tmp_path, mode):
    trainer = make_trainer(sft, "own LoRA", tmp_path, **loss_settings(mode))
    trainer.train()  # so that policy and reference differ
    _, inputs = generated(trainer)
    inputs.completion_mask[::3, 2:] = 0  # sequences of different lengths
    inputs.tokens = inputs.completion_mask.sum()
    torch.manual_seed(0)
    inputs.advantages = torch.randn(len(inputs.advantages))
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    parts = [getattr(inputs, name) for name in names]
    logps, _ = completion_logps(trainer.model, *parts, shared=False)
    inputs.old_logps = logps.detach() + 0.3 * torch.randn_like(logps)
    with torch.no_grad(), trainer.reference.in_place() as reference:
        ref, _ = completion_logps(reference, *parts, shared=False)
    mask = inputs.completion_mask
    expected = plain_loss(mode, logps, inputs.old_logps, ref, mask, inputs.advantages, 0.04)
    expected.backward()
    moving = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    grads = {name: p.grad.clone() for name, p in moving.items()}
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, inputs)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    loss.backward()
    for name, parameter in moving.items():
        torch.testing.assert_close(parameter.grad, grads[name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_accumulation_splits_groups_without_changing_the_step(sft, tmp_path, sft_weight):
    trained = []
    for size, steps in ((16, 1), (8, 2), (2, 8)):
        trainer = make_trainer(
            sft, "own LoRA", tmp_path, max_steps=2, per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, switches={"beam_search": True, "sft_weight": sft_weight},
        )  # fmt: skip
        trainer.train()
        trained.append(adapters.adapter_parameters(trainer.model, "default"))
    for other in trained[1:]:
        for name, parameter in trained[0].items():
            torch.testing.assert_close(other[name], parameter, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"loss_type": "dapo"}, {"importance_sampling_level": "sequence"}])
def test_passes_change_no_gradient(sft, tmp_path, settings):
    """However many completions fit into memory, whole groups or not."""
    switches = {"beam_search": True, "sft_weight": 0.5, "mask_all_zero": True}
    trainer = make_trainer(sft, "own LoRA", tmp_path, per_device_train_batch_size=16, switches=switches, **settings)
    _, inputs = generated(trainer)
    inputs.completion_mask[::3, 2:] = 0
    trainer.current_gradient_accumulation_steps = 1
    found = []
    for size in (16, 8, 6):
        trainer.pass_size = size
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        trainer.step_log.read()
        logged = {name: trainer._metrics["train"][name].pop() for name in ("kl", "entropy", "sft_loss")}
        gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        found.append((loss.detach(), gradients, torch.tensor(list(logged.values()))))
    for loss, gradients, logged in found[1:]:
        torch.testing.assert_close(loss, found[0][0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(logged, found[0][2], atol=1e-6, rtol=1e-4)
        for name, gradient in found[0][1].items():
            torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-3)


def test_a_step_that_does_not_fit_is_made_in_smaller_passes(sft, tmp_path, monkeypatch, capsys):
    """Also where the memory runs out in its second pass: nothing of the first one is left in the gradients."""
    real, sizes = rl_trainer.completion_logps, []

    def small(model, ids, *args, **kwargs):
        sizes.append(len(ids))
        if len(ids) > 4 and len(sizes) > 2:  # the reference and the policy of the first pass fit
            raise torch.OutOfMemoryError
        return real(model, ids, *args, **kwargs)

    trained = []
    for limited in (False, True):
        trainer = make_trainer(sft, "own LoRA", tmp_path, per_device_train_batch_size=16, switches={"pass_size": 8})
        if limited:
            monkeypatch.setattr(rl_trainer, "completion_logps", small)
        trainer.train()
        trained.append(adapters.adapter_parameters(trainer.model, "default"))
    assert sizes[:3] == [8, 8, 8] and set(sizes[3:]) == {4} and trainer.pass_size == 4
    assert capsys.readouterr().out.count("out of memory: passes have 4 completions from here on") == 1
    for name, parameter in trained[0].items():
        torch.testing.assert_close(trained[1][name], parameter, atol=2e-4, rtol=1e-3)
    monkeypatch.setattr(rl_trainer, "completion_logps", lambda *args, **kwargs: small(args[0], [0] * 5))
    with pytest.raises(torch.OutOfMemoryError):  # a group by itself does not fit
        make_trainer(sft, "own LoRA", tmp_path, switches={"pass_size": 4}).train()


@pytest.mark.parametrize("start", STARTS)
def test_the_supervised_loss_is_that_of_the_targets(sft, tmp_path, monkeypatch, start):
    """In one pass with the completions, values and gradients are those of a pass of its own without shared prompts: in
    float32, on a base in 4 bits too."""
    monkeypatch.setattr(device, "compute_dtype", answer("float32"))
    trainer = make_trainer(sft, start, tmp_path, switches={"sft_weight": 0.7, "mask_all_zero": True})
    trainer.train()
    batch, inputs = generated(trainer)
    sid_of = trainer.trie.sid_of(trainer.sids)
    assert [sid_of[tuple(ids)] for ids in inputs.target_ids.tolist()] == batch["target"]
    inputs.completion_mask[:4] = 0  # a group without a signal still learns its target
    inputs.target_mask[4:, -1] = 0  # targets of different lengths
    model, parts = trainer.model, [inputs.prompt_ids, inputs.prompt_mask, inputs.target_ids, inputs.target_mask]
    trainer.current_gradient_accumulation_steps = 2
    moving = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in moving.items()}

    logps, _ = completion_logps(model, *parts, shared=False)
    plain = -(logps.sum(dim=1) / inputs.target_mask.sum(dim=1)).mean()
    trainer.loss.sft_weight = 0.0
    expected = trainer.compute_loss(model, inputs) + 0.7 * plain / 2
    of_plain = gradients(expected)
    trainer.loss.sft_weight = 0.7
    loss = trainer.compute_loss(model, inputs)
    tolerance = {"atol": 1e-5, "rtol": 1e-3}
    torch.testing.assert_close(loss, expected, **tolerance)
    trainer.step_log.read()
    assert trainer._metrics["train"]["sft_loss"][-1] == pytest.approx(plain.item(), rel=1e-2)
    for name, gradient in gradients(loss).items():
        torch.testing.assert_close(gradient, of_plain[name], **tolerance)


# --- The switches -----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("mode", ["grpo", "dapo", "gspo"])
def test_silent_groups_cost_nothing(sft, tmp_path, mode):
    """The other groups weigh as much as without the flag, because masked ones still count in the average."""

    def first_prompt_only(completion_ids, prompts, **_):
        pairs = zip(completion_ids, prompts, strict=True)
        return [float(ids[0] % 2 + ids[1] % 3) if prompt == prompts[0] else 1.0 for ids, prompt in pairs]

    seen = []
    losses, grads = {}, {}
    for masked in (False, True):
        trainer = make_trainer(
            sft, "own LoRA", tmp_path, switches={"mask_all_zero": masked}, reward=first_prompt_only, beta=0.0,
            **loss_settings(mode),
        )  # fmt: skip
        _, inputs = generated(trainer)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.get_base_model().model.register_forward_pre_hook(
            lambda _m, _a, kw: seen.append(len(kw["input_ids"])), with_kwargs=True
        )
        losses[masked] = trainer.compute_loss(trainer.model, inputs)
        losses[masked].backward()
        grads[masked] = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert seen == [2, 1]
    torch.testing.assert_close(losses[True], losses[False])
    for name, grad in grads[False].items():
        torch.testing.assert_close(grads[True][name], grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("size", [3, 7, 8, 16, 24])
def test_groups_of_equal_fractions_are_silent(sft, tmp_path, size):
    """Exactly: in the advantages, in what is masked and in the log. A group with the smallest difference is not."""
    third = torch.tensor(1 / 3)
    slightly = [third.item()] * (size - 1) + [torch.nextafter(third, third + 1).item()]

    def thirds(prompts, **_):
        rest = [0.1] * (len(prompts) - 3 * size)
        return [*[1 / 3] * size, *slightly, *[None] * (size - 1), 0.9, *rest]

    def tenths(prompts, **_):
        return [0.1] * len(prompts)

    trainer = make_trainer(
        sft, "new LoRA", tmp_path, switches={"mask_all_zero": True}, reward=[thirds, tenths],
        reward_weights=[0.7, 0.3], num_generations=size, per_device_train_batch_size=4 * size,
    )  # fmt: skip
    _, outputs = generated(trainer)
    advantages = outputs.advantages.view(4, size)
    assert not advantages[[0, 3]].any() and advantages[1].any() and advantages[2].any()
    counted = outputs.completion_mask.view(4, size, -1).any(dim=2)
    assert counted.tolist() == [[False] * size, [True] * size, [True] * size, [False] * size]
    assert trainer._metrics["train"]["frac_reward_zero_std"] == [0.5]


def test_a_batch_of_silent_groups_runs_no_model(sft, tmp_path):
    trainer = make_trainer(
        sft, "own LoRA", tmp_path, switches={"mask_all_zero": True}, reward=lambda prompts, **_: [1.0] * len(prompts)
    )
    _, inputs = generated(trainer)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.get_base_model().model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("collective", [True, False])
def test_a_step_of_silent_groups_has_a_zero_gradient(sft, tmp_path, monkeypatch, collective):
    """With a pass, where other processes wait for it, and without: the optimizer continues with its momentum. The group
    is larger than a micro-batch."""
    trainer = make_trainer(
        sft, "own LoRA", tmp_path, switches={"mask_all_zero": True}, reward=lambda prompts, **_: [1.0] * len(prompts),
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    monkeypatch.setattr(trainer, "_passes_are_collective", lambda: collective)
    ran = []
    trainer.model.get_base_model().model.register_forward_pre_hook(lambda *_: ran.append(torch.is_grad_enabled()))
    _, batch = generated(trainer)
    trainer._buffered_inputs = [batch.rows(slice(i, i + 2)) for i in (0, 2)]
    trainer._step, trainer.current_gradient_accumulation_steps = 1, 2
    ran.clear()
    loss = trainer.training_step(trainer.model, [], None)
    assert loss.item() == 0.0 and ran == ([False, True] if collective else [])
    assert all(not p.grad.any() for p in trainer.model.parameters() if p.requires_grad)


def test_evaluation_ranks_the_validation_prompts(sft, tmp_path):
    trainer = make_trainer(sft, "new LoRA", tmp_path, rows=5)
    metrics = trainer.evaluate()
    names = {f"eval_{metric}@{k}" for metric in ("HR", "NDCG") for k in (1, 3, 5, 10)} | {"eval_MRR", "eval_mean@10"}
    assert set(metrics) == names
    # Against targets that are each prompt's own best item.
    best = []
    for prompt in trainer.eval_dataset["prompt"]:
        ids = torch.tensor([prompt])
        rows, _ = beam_search.constrained_beam_search(trainer.model, ids, torch.ones_like(ids), trainer.trie, 10)
        best.append(trainer.sids[trainer.trie.source[rows[0, 0]]])
    dataset = Dataset.from_dict({"prompt": list(trainer.eval_dataset["prompt"]), "target": best})
    assert set(trainer.evaluate(dataset).values()) == {1.0}


def test_rewards_see_each_row_its_own_target(sft, tmp_path):
    """Two rows with the same prompt and different targets."""
    trainer = make_trainer(sft, "new LoRA", tmp_path)
    batch, outputs = generated(trainer)
    sid_of, first = trainer.trie.sid_of(trainer.sids), sids_of(trainer, outputs)[:4]
    rows = {"prompt": [batch["prompt"][0]] * 8, "target": [first[0]] * 4 + [first[2]] * 4, "row": batch["row"]}

    def rule(completion_ids, target, **_):
        return rewards.rule([sid_of[tuple(ids)] for ids in completion_ids], target)

    trainer.reward_funcs = [rule]
    advantages = trainer.roll_out(rows).advantages.view(2, 4)
    assert advantages.argmax(dim=1).tolist() == [0, 2]
