"""The commands on bases that are more than a dense text model: composite ones and mixtures of experts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from architectures import configuration
from helpers import refused, rl_flags, sft_flags
from peft import AutoPeftModelForCausalLM
from processes import two_processes
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

import lora_utils
import rl
import sft
from merge_lora import merge
from minionerec.checkpoint import Checkpoint, newest_checkpoint
from minionerec.errors import InputError
from minionerec.flags import AdapterFlags
from minionerec.model import architecture, loading

TOKENS = torch.arange(20).unsqueeze(0)


@pytest.fixture(scope="module")
def base_of(base, tmp_path_factory):
    """`base_of(name)`: the folder of a tiny base of this architecture with the tokenizer of `base`, made once."""
    folder = tmp_path_factory.mktemp("bases")

    def made(name: str, kind=AutoModelForCausalLM) -> str:
        path = folder / name
        if not path.exists():
            tokenizer, config = loading.load_tokenizer(base), configuration(name)
            text = config.get_text_config()
            text.vocab_size = len(tokenizer)
            text.bos_token_id = text.eos_token_id = text.pad_token_id = tokenizer.eos_token_id
            torch.manual_seed(0)
            kind.from_config(config).save_pretrained(path)
            tokenizer.save_pretrained(path)
        return str(path)

    return made


def train(files, base, output: Path, **flags) -> str:
    """Runs sft.py on few rows; returns its final_checkpoint."""
    sft.train(**sft_flags(files, base, str(output), sample=10, eval_step=0.5, learning_rate=1e-2, **flags))
    return str(output / "final_checkpoint")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits.float()


def assert_only_text_moved(checkpoint: str, base: str) -> None:
    (after, before) = (load_file(Path(folder) / "model.safetensors") for folder in (checkpoint, base))
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert any("language_model" in name for name in moved)
    assert not any("vision_tower" in name or "projector" in name for name in moved)
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert type(loaded).__name__ == "Gemma3ForConditionalGeneration"
    assert not torch.allclose(logits(loaded)[..., :400], logits(AutoModelForCausalLM.from_pretrained(base)))


def test_what_stands_next_to_the_text_is_named_and_frozen():
    model = architecture.meta_model(configuration("gemma3"))
    assert architecture.non_text_modules(model) == ["model.vision_tower", "model.multi_modal_projector"]
    frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"vision_tower", "multi_modal_projector"}
    assert lora_utils.trainable_report(model).endswith(
        "; frozen, not used for text: model.vision_tower, model.multi_modal_projector"
    )
    config = lora_utils.lora_config(model, [], AdapterFlags(lora_target_modules="q_proj"))
    assert config.target_modules == {"q_proj"}
    with torch.device("meta"):
        wrapped = lora_utils.add_lora(model, config)
    adapted = {name for name, module in wrapped.named_modules() if isinstance(module, lora_utils.lora.LoraLayer)}
    assert len(adapted) == 2 and all("language_model" in name for name in adapted)


@pytest.mark.slow
def test_two_processes_train_the_text_of_a_composite_model(files, base_of, tmp_path):
    base = base_of("gemma3")
    flags = sft_flags(files, base, tmp_path / "run", micro_batch_size=4, sample=10, eval_step=0.5, learning_rate=1e-2)
    two_processes("torchrun", tmp_path, "sft.py", flags)
    assert_only_text_moved(str(tmp_path / "run" / "final_checkpoint"), base)


def test_the_adapter_of_a_composite_model_merges_and_trains_on_in_full(files, base_of, tmp_path, capsys):
    base = base_of("gemma3")
    checkpoint = train(files, base, tmp_path / "lora", use_lora=True)
    assert "adapters on 14 of 14 linear layers\n" in capsys.readouterr().out
    plain = AutoPeftModelForCausalLM.from_pretrained(checkpoint)
    merge(adapter=checkpoint, output_dir=str(tmp_path / "merged"))
    assert_only_text_moved(str(tmp_path / "merged"), base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(plain), atol=1e-4, rtol=1e-4)
    rl.train(**rl_flags(files, checkpoint, str(tmp_path / "rl"), test_beam=4, sample_train=True, train_batch_size=8))
    assert_only_text_moved(str(tmp_path / "rl" / "final_checkpoint"), base)


def test_a_checkpoint_with_a_vision_tower_that_loads_without_it(files, base_of, tmp_path):
    base = base_of("qwen3_5", AutoModelForImageTextToText)
    assert any(name.startswith("model.visual") for name in load_file(Path(base) / "model.safetensors"))
    checkpoint = train(files, base, tmp_path / "run", use_lora=True)
    plain = AutoPeftModelForCausalLM.from_pretrained(checkpoint)
    assert type(plain.get_base_model()).__name__ == "Qwen3_5ForCausalLM"
    ours = lora_utils.load_adapted(Checkpoint.read(checkpoint), loading.load_tokenizer(checkpoint), base)
    torch.testing.assert_close(logits(ours), logits(plain), atol=1e-5, rtol=1e-5)
    with ours.disable_adapter():
        assert not torch.allclose(logits(ours), logits(plain), atol=1e-2)


def test_a_base_that_is_stored_in_4_bits_trains_as_qlora_only(files, base, sft_run, tmp_path):
    """Trained in full it ended in a traceback, and with --freeze_LLM after the training."""
    stored, adapter = tmp_path / "stored", tmp_path / "adapter"
    shutil.copytree(base, stored)
    quantization = lora_utils.quantization_config(AdapterFlags(use_qlora=True))
    AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization).save_pretrained(stored)
    remedy = "its weights are stored in 4 bits; train it with --use_qlora True"
    for flags in ({}, {"freeze_LLM": True}, {"use_lora": True}):
        refused("sft.py", f"--base_model: {remedy}", **sft_flags(files, str(stored), tmp_path / "a", **flags))
    shutil.copytree(sft_run("qlora") / "final_checkpoint", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(stored)}))
    refused("rl.py", f"--base_model: {remedy}", **rl_flags(files, adapter, tmp_path / "a"))
    merging = {"adapter": adapter, "output_dir": tmp_path / "a", "into": "original"}
    refused("merge_lora.py", f"--into original: the base {stored} is published in 4 bits", **merging)
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_experts_go_through_all_commands(files, base_of, tmp_path, capsys):
    base = base_of("deepseek_v3")
    every = (
        "adapters on 16 of 16 linear layers and 2 of 2 weights of experts, rank 8 for each expert; left out: 1 x mlp."
    )
    said = f"{every}gate (a router); not in 4 bits: what is left out, 0.00 GB, 0.3% of the matrices\n"
    sft.train(**sft_flags(files, base, str(tmp_path / "sft"), use_qlora=True, dry_run=True))
    assert said in capsys.readouterr().out
    checkpoint = train(files, base, tmp_path / "sft", use_qlora=True)
    assert said in capsys.readouterr().out
    small = {"test_beam": 4, "sample_train": True, "train_batch_size": 8}
    rl.train(**rl_flags(files, checkpoint, str(tmp_path / "rl"), use_qlora=True, **small))
    assert said in capsys.readouterr().out
    trained = newest_checkpoint(str(tmp_path / "rl"))  # the final one may be the start
    moved = [load_file(Path(folder) / "adapter_model.safetensors") for folder in (checkpoint, trained)]
    assert moved[0].keys() == moved[1].keys()
    assert all(not torch.equal(moved[0][name], moved[1][name]) for name in moved[0] if "experts.lora_A" in name)

    merge(adapter=trained, output_dir=str(tmp_path / "merged"))
    tokenizer, quantization = (
        loading.load_tokenizer(trained),
        lora_utils.quantization_config(AdapterFlags(use_qlora=True)),
    )
    adapted = lora_utils.load_adapted(Checkpoint.read(trained), tokenizer, base, quantization)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with adapted.disable_adapter():
        far = (logits(adapted) - logits(merged)).abs().mean()
    assert (logits(adapted) - logits(merged)).abs().mean() < 0.1 * far


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("mistral3", {"use_lora": True}, "transformers has no causal LM of the type mistral3"),
        ("falcon", {"use_qlora": True}, "--use_qlora True: bitsandbytes has no layer for any of Falcon"),
        ("mamba", {"use_lora": True, "lora_target_modules": "out_proj"}, "out_proj matches no linear layer of Mamba"),
        ("mamba", {"use_lora": True, "lora_target_modules": "qkv"}, "no attention layers"),
        ("mixtral", {"use_lora": True, "use_dora": True}, "--use_dora True: PEFT cannot do this for down_proj"),
        ("dbrx", {"use_lora": True, "dry_run": True}, "--dry_run True: the memory of dbrx cannot be predicted"),
    ],
)
def test_what_a_base_cannot_have_is_refused_before_training(files, base, tmp_path, name, flags, message):
    config = CONFIG_MAPPING[name]() if name == "mistral3" else configuration(name)
    config.save_pretrained(tmp_path / "base")
    loading.load_tokenizer(base).save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=message):
        sft.train(**sft_flags(files, str(tmp_path / "base"), str(tmp_path / "run"), **flags))
    assert not (tmp_path / "run").exists()
