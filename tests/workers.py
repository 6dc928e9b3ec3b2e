"""What test_devices.py starts under torchrun.

torchrun --nproc_per_node 2 tests/workers.py digests FOLDER sft.py --base_model ...
torchrun --nproc_per_node 2 tests/workers.py fsdp
"""

import hashlib
import os
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def digests(folder: str, script: str, *flags: str) -> None:
    """Runs a command; every process leaves a digest of the weights it trained in `folder`."""
    from minionerec import trainer

    finish = trainer.finish

    def recorded(run, *args, **kwargs):
        digest = hashlib.sha256()
        for _, parameter in sorted(run.accelerator.unwrap_model(run.model).named_parameters()):
            if parameter.requires_grad:
                digest.update(parameter.detach().numpy().tobytes())
        Path(folder, f"rank{os.environ['RANK']}").write_text(digest.hexdigest())
        return finish(run, *args, **kwargs)

    trainer.finish = recorded
    sys.argv = [script, *flags]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def fsdp() -> None:
    """A LoRA model whose weights FSDP2 shares out, against the same model whole: loss, gradients, beams."""
    from test_trainer import adapted, examples
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from minionerec.dataset import Collator
    from minionerec.sid import Trie, constrained_beam_search
    from minionerec.trainer import response_logits

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    batch = Collator(0)(examples(6))
    trie = Trie([[90, 91], [90, 92], [91, 90], [92, 5, 6]], 0)
    found = {}
    for shared_out in (False, True):
        model = adapted("qwen2", False, "lora")
        if shared_out:
            for layer in model.get_base_model().model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            assert all(hasattr(p, "to_local") for p in model.parameters())
        logits, targets = response_logits(model, batch)
        loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        if shared_out:
            gradients = {name: gradient.full_tensor() for name, gradient in gradients.items()}
        prompts = batch["input_ids"][:2, :3]
        rows, scores = constrained_beam_search(model.eval(), prompts, torch.ones_like(prompts), trie, 4)
        found[shared_out] = (loss.detach(), gradients, rows, scores)
    assert found[True][1].keys() == found[False][1].keys()
    torch.testing.assert_close(found[True], found[False], atol=1e-6, rtol=1e-5)
    dist.destroy_process_group()


if __name__ == "__main__":
    {"digests": digests, "fsdp": fsdp}[sys.argv[1]](*sys.argv[2:])
