"""The prediction of memory against what the same training really holds."""

import pytest
import torch
import torch.nn.functional as F
from architectures import configuration
from models import IDS, config_of, predicted
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import lora_utils
from minionerec.dryrun.memory import GB
from minionerec.dryrun.passes import Alive, Step
from minionerec.flags import OPTIMIZERS, AdapterFlags, memory_gb
from minionerec.model import adapters, loading
from minionerec.training.logprobs import completion_logps
from minionerec.training.sft_trainer import response_logits

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
    return alive.pieces[0].peak, sum(p.numel() * p.element_size() for p in model.parameters())


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
    assert bytes_predicted == pytest.approx(alive.pieces[0].peak, rel=0.1)


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
    assert bytes_predicted == pytest.approx(alive.pieces[0].peak, rel=0.1)


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


def test_sizes_of_cards():
    assert memory_gb("12GB") == memory_gb("12") == 12 and memory_gb("12GiB") == 12 * 2**30 / GB
