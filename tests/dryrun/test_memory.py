"""The prediction of memory against what the same training really holds, and the dry runs that print it."""

import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from architectures import configuration
from helpers import refused, rl_flags, run_command, sft_flags
from models import IDS, config_of, predicted
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import lora_utils
from minionerec.dryrun import report
from minionerec.dryrun.memory import GB, predict
from minionerec.dryrun.passes import Alive, Step
from minionerec.flags import OPTIMIZERS, AdapterFlags, memory_gb
from minionerec.model import adapters, loading
from minionerec.process_memory import rss_gb
from minionerec.training.logprobs import completion_logps
from minionerec.training.sft_trainer import response_logits
from rl import RLFlags
from sft import SFTFlags

ROWS, TOKENS, RESPONSE = 4, 120, 3


def really_held(config, method: str, checkpointing: bool, half: bool = False) -> tuple[int, int]:
    """(peak bytes of forward and backward passes, bytes of all weights): the training itself, counted as it runs, with
    `half` under the autocast of a GPU."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if method == "lora":
        model = lora_utils.add_lora(model, lora_utils.lora_config(model, IDS), checkpointing)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    input_ids = torch.randint(1, 90, (ROWS, TOKENS))
    labels = input_ids.clone()
    labels[:, :-RESPONSE] = -100
    inputs = {"input_ids": input_ids, "labels": labels}
    alive = Alive([*model.parameters(), *model.buffers(), *inputs.values()])
    with alive:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, half, cache_enabled=not checkpointing):
                logits, targets = response_logits(model, inputs)
            loss = F.cross_entropy(logits.float(), targets)
            loss.backward()
            del logits, loss
    return alive.peak, sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_prediction_is_what_training_holds(architecture, method, checkpointing):
    config = config_of(architecture)
    step = Step(ROWS, TOKENS, ROWS * RESPONSE)
    found = predicted(config, IDS, step, method, gradient_checkpointing=checkpointing)
    parts = found.parts
    peak, weights = really_held(config, method, checkpointing)
    bytes_predicted = (parts["gradients"] + parts["activations"] + parts["logits"]) * GB
    assert bytes_predicted == pytest.approx(peak, rel=0.1)
    assert (parts["weights"] + parts["adapter"]) * GB == pytest.approx(weights)
    assert found.total == pytest.approx(sum(parts.values()))


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_full_fine_tuning_on_a_gpu_takes_16_bytes_a_parameter(architecture, checkpointing):
    """4 each for weights and gradients, 8 for two moments; and what autocast adds: its copies of the weights are kept
    for the backward pass, but not where activations are recomputed."""
    config = config_of(architecture, hidden_size=128) if architecture != "gpt2" else config_of(architecture, n_embd=128)
    step = Step(ROWS, TOKENS, ROWS * RESPONSE)
    found = predicted(config, IDS, step, on_gpu=True, gradient_checkpointing=checkpointing)
    parts = found.parts
    model = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert model * GB == pytest.approx(16 * found.trainable)
    peak, weights = really_held(config, "full", checkpointing, half=True)
    bytes_predicted = (parts["gradients"] + parts["activations"] + parts["logits"]) * GB
    assert bytes_predicted == pytest.approx(peak, rel=0.1) and parts["weights"] * GB == pytest.approx(weights)


def test_the_reference_of_a_full_run_on_a_gpu_is_rounded():
    config, step = config_of("qwen2"), Step(1, 20, 4)
    one, two = (predicted(config, IDS, step, on_gpu=True, reference_copy=copy).parts for copy in (False, True))
    model = AutoModelForCausalLM.from_config(config)
    adapters.round_weights(model, torch.bfloat16)
    reference = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (two["weights"] - one["weights"]) * GB == pytest.approx(reference, rel=0.01)


@pytest.mark.parametrize("shape", [(4, 30, 8), (2, 100, 4)])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_prediction_of_rl_is_what_its_loss_holds(method, shape):
    groups, width, size = shape
    config = config_of("qwen2")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if method == "lora":
        model = lora_utils.add_lora(model, lora_utils.lora_config(model, IDS))
    prompts = torch.randint(1, 90, (groups, width)).repeat_interleave(size, 0)
    completions = torch.randint(1, 90, (groups * size, 4))
    inputs = (prompts, torch.ones_like(prompts), completions, torch.ones_like(completions))
    alive = Alive([*model.parameters(), *model.buffers(), *inputs])
    with alive:
        for _ in range(2):
            completion_logps(model.train(), *inputs)[0].sum().backward()
    step = Step(groups, width + 3 * size, groups + 3 * groups * size, shared=True, rewarded=True)
    parts = predicted(config, IDS, step, method).parts
    bytes_predicted = (parts["gradients"] + parts["activations"] + parts["logits"]) * GB
    assert bytes_predicted == pytest.approx(alive.peak, rel=0.1)


def test_a_step_of_rl_on_plain_rows_is_predicted():
    """Bloom adds its ALiBi to a mask it makes itself, so every completion has a row of its own."""
    torch.manual_seed(0)
    config = configuration("bloom")
    model = AutoModelForCausalLM.from_config(config)
    prompts = torch.randint(1, 90, (4, 30))
    completions = torch.randint(1, 90, (4, 4))
    inputs = (prompts, torch.ones_like(prompts), completions, torch.ones_like(completions))
    alive = Alive([*model.parameters(), *model.buffers(), *inputs])
    with alive:
        for _ in range(2):
            completion_logps(model.train(), *inputs, shared=False)[0].sum().backward()
    parts = predicted(config, [], Step(4, 34, 16, rewarded=True)).parts
    bytes_predicted = (parts["gradients"] + parts["activations"] + parts["logits"]) * GB
    assert bytes_predicted == pytest.approx(alive.peak, rel=0.1)


@pytest.mark.parametrize("architecture", ["bloom", "mamba", "gpt_neo", "mpt", "lfm2", "qwen3_5_text"])
def test_a_dry_run_of_rl_takes_plain_rows_where_rl_does(architecture, monkeypatch, capsys):
    steps = []
    monkeypatch.setattr(report, "say_flags", lambda flags: None)
    monkeypatch.setattr(report, "say_tasks", lambda *_: None)
    monkeypatch.setattr(report, "predict", lambda *a, **k: steps.append(a[3]) or predict(*a, **k))
    flags = RLFlags(beta=0.0, gpu_memory="12GB", train_batch_size=4, num_generations=2, test_during_training=False)
    inputs = report.Inputs(configuration(architecture), range(96), [], None, None, lora_utils.adapt)
    found = report.rl(flags, inputs, [[1] * 20], 1, 4, continues=False)
    assert steps[0] == Step(4, 24, 16, False, False, rewarded=True) and found.total > 0
    assert "each repeat their prompt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("architecture", "step"),
    [
        ("qwen2", Step(2, 20 + 3 * 3, 2 + 6 * 3, True, False, rewarded=True)),
        ("bloom", Step(6, 24, 24, False, False, True)),
    ],
)
def test_a_target_to_learn_is_one_more_completion(architecture, step, monkeypatch):
    """4 completions of 2 prompts of 20 tokens, and SIDs of 4."""
    steps = []
    monkeypatch.setattr(report, "say_flags", lambda flags: None)
    monkeypatch.setattr(report, "say_tasks", lambda *_: None)
    monkeypatch.setattr(report, "predict", lambda *a, **k: steps.append(a[3]) or predict(*a, **k))
    flags = RLFlags(gpu_memory="12GB", train_batch_size=4, num_generations=2, sft_weight=1.0)
    inputs = report.Inputs(configuration(architecture), range(96), [], None, None, lora_utils.adapt)
    report.rl(flags, inputs, [[1] * 20], 1, 4, continues=False)
    assert steps[0] == step


def test_a_pass_of_rl_is_as_large_as_the_memory():
    flags = RLFlags(train_batch_size=4, gradient_accumulation_steps=6, num_generations=4, use_lora=True)
    inputs = report.Inputs(config_of("qwen2"), range(96), IDS, None, None, lora_utils.adapt)
    sizes = []
    for completions in (24, 12, 8, 4):  # the next smaller size does not fit in what the one before it needs
        exact = replace(flags, train_batch_size=completions, gradient_accumulation_steps=1)
        needed = report.predict_rl(exact, inputs, 200, 4, False, on_gpu=True).total / (1 - report.SPARE)
        sizes.append(report.largest_pass(flags, inputs, 200, 4, False, needed * 1.00001))
    assert sizes == [24, 12, 8, 4]
    assert report.largest_pass(flags, inputs, 200, 4, False, 0.0) == 4


def test_a_micro_batch_of_sft_is_as_large_as_the_memory():
    """Of the divisors of the rows of a process."""
    flags, tried = SFTFlags(batch_size=24, micro_batch_size="auto"), []

    def rows_in(memory: float) -> int:
        return report.largest_micro_batch(
            flags, None, None, memory, lambda changed: tried.append(changed.micro_rows) or float(changed.micro_rows)
        )

    found = [rows_in(rows / (1 - report.SPARE) + 1e-9) for rows in (100, 23, 7, 3, 0.5)]
    assert found == [24, 12, 6, 3, 1] and not set(tried) - {1, 2, 3, 4, 6, 8, 12, 24}
    assert [SFTFlags(batch_size=rows, micro_batch_size="auto").micro_rows for rows in (128, 12, 5)] == [8, 6, 5]


def test_a_dry_run_sizes_the_micro_batch(files, base, tmp_path):
    flags = sft_flags(files, base, tmp_path / "run", batch_size=32, micro_batch_size="auto", use_lora=True)
    done = run_command("sft.py", **flags, dry_run=True, gpu_memory="12GB")
    assert done.returncode == 0, done.stderr
    assert "--micro_batch_size auto: 32 rows" in done.stdout and "fits a GPU with 12GB" in done.stdout
    refused(
        "sft.py", "--micro_batch_size 'most' is not valid; expected a whole number or auto", micro_batch_size="most"
    )
    refused("sft.py", "--micro_batch_size 0: must be above 0", **{**flags, "micro_batch_size": 0})


@pytest.mark.parametrize("bits", [4, 8])
def test_what_a_quantized_base_weighs(base, bits):
    quantization = lora_utils.quantization_config(AdapterFlags(use_qlora=bits == 4, load_in_8bit=bits == 8))
    model = loading.load_base(base, quantization)
    weights = 0
    for parameter in model.parameters():
        weights += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            weights += sum(t.numel() * t.element_size() for t in (state.absmax, state.state2.absmax))
    if bits == 8:  # and the scale of every row
        layers = [layer for layer in model.modules() if type(layer).__name__ == "Linear8bitLt"]
        weights += 4 * sum(layer.out_features for layer in layers)
    method = "qlora" if bits == 4 else "lora"
    flags = {"vocabulary": 0, "load_in_8bit": bits == 8}
    parts = predicted(model.config, [5], Step(2, 20, 2), method, True, **flags).parts
    assert parts["weights"] * GB == pytest.approx(weights, rel=0.02)


def test_a_gpu_computes_in_bfloat16():
    config, step = config_of("qwen2"), Step(ROWS, TOKENS, ROWS * RESPONSE)
    on_cpu, on_gpu = (predicted(config, IDS, step, "lora", on_gpu).parts for on_gpu in (False, True))
    assert on_gpu["weights"] == on_cpu["weights"] / 2 and on_gpu["adapter"] == on_cpu["adapter"]
    assert on_gpu["activations"] < 0.7 * on_cpu["activations"]


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "lion_32bit", "sgd"])
def test_what_an_optimizer_keeps(optim):
    """Of a large and of a small tensor, which bitsandbytes keeps in 32 bits."""
    weights = [torch.nn.Parameter(torch.randn(64, 128)), torch.nn.Parameter(torch.randn(16, 8))]
    module = torch.nn.ParameterList(weights)
    arguments = TrainingArguments("none", optim=optim, use_cpu=True, report_to="none")
    made, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, module)
    optimizer = made(weights, **settings)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    states = [v for state in optimizer.state.values() for k, v in state.items() if torch.is_tensor(v) and v.dim()]
    held = sum(v.numel() * v.element_size() for v in states if v.numel() != 256)  # of a map of 8-bit values, shared
    flags = AdapterFlags(optim=optim)
    assert sum(flags.optimizer_bytes(w.numel()) for w in weights) == held


def test_optimizers_are_those_of_the_trainer():
    assert set(OPTIMIZERS) <= {name.value for name in OptimizerNames}


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_work_of_a_step_is_that_of_its_matmuls(method, checkpointing):
    """Of all 12 layers, though few are measured: 2 FLOPs a weight and position forward, 2 for the gradient of the
    input, 2 for that of the weight if it trains, and the forward pass again with checkpointing. Attention is little."""
    config = config_of("qwen2", num_hidden_layers=12, hidden_size=256, intermediate_size=1024)
    model = AutoModelForCausalLM.from_config(config)
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    head = model.lm_head.weight.numel()
    flags = AdapterFlags(
        use_lora=method == "lora", use_qlora=method == "qlora", lora_r=1, gradient_checkpointing=checkpointing
    )
    step = Step(2, 32, 8, accumulate=True)
    found = predict(config, config.vocab_size, IDS, step, flags, lora_utils.adapt, False)
    passes = 3 if method == "full" else 2
    assert found.layers.flops == pytest.approx(2 * 64 * layers * (passes + checkpointing), rel=0.1)
    assert found.head.flops == pytest.approx(2 * 8 * head * passes, rel=0.1)


def test_sizes_of_cards():
    assert memory_gb("12GB") == memory_gb("12") == 12 and memory_gb("12GiB") == 12 * 2**30 / GB


def test_a_dry_run_of_sft(files, base, tmp_path):
    flags = sft_flags(files, base, tmp_path / "run", use_lora=True, dry_run=True)
    done = run_command("sft.py", **flags, gpu_memory="24GB")
    assert done.returncode == 0, done.stderr
    assert "title_history_to_sid" in done.stdout and "240 examples; 15 steps an epoch" in done.stdout
    assert "fits a GPU with 24GB" in done.stdout and '"lora_r": 16' in done.stdout
    trained = run_command("sft.py", **sft_flags(files, base, tmp_path / "run", use_lora=True, sample=8))
    assert trained.returncode == 0, trained.stderr
    printed = next(line for line in done.stdout.splitlines() if line.startswith("trainable parameters: "))
    assert trained.stdout.startswith(printed)

    total = float(next(line for line in done.stdout.splitlines() if line.startswith("  total")).split()[1])
    done = run_command("sft.py", **{**flags, "output_dir": tmp_path / "other"}, gpu_memory=f"{total - 0.003}GB")
    assert done.returncode == 0 and not (tmp_path / "other").exists()
    assert "does not fit a GPU" in done.stdout and " s a step" not in done.stdout
    assert "this does: --micro_batch_size " in done.stdout or "nor does anything else" in done.stdout
    refused("sft.py", "--gpu_memory 'big'", **{**flags, "output_dir": tmp_path / "other"}, gpu_memory="big")


def test_a_dry_run_of_rl(files, base, tmp_path):
    sft = run_command("sft.py", **sft_flags(files, base, tmp_path / "sft", use_lora=True, sample=8, lora_r=8))
    assert sft.returncode == 0, sft.stderr
    flags = rl_flags(
        files, tmp_path / "sft" / "final_checkpoint", tmp_path / "rl", use_lora=True, dry_run=True, lora_r=4
    )
    done = run_command("rl.py", **flags)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\nsid_history_to_sid +40 +1 ", done.stdout)
    assert "40 prompts of" in done.stdout and "10 steps" in done.stdout and "cache" in done.stdout
    assert "--lora_r 4 is ignored: " in done.stdout and "was trained with 8\n" in done.stdout
    trainable = json.loads((tmp_path / "sft" / "metrics.json").read_text())["trainable_parameters"]
    assert f"trainable parameters: {trainable:,}\n" in done.stdout
    assert not (tmp_path / "rl").exists() and rss_gb() > 0.1
