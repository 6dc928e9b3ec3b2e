"""Under FSDP every forward pass is a collective: all processes must try the same ways and run as many passes."""

import os
import subprocess
import sys

import torch
import torch.distributed as dist
from test_architectures import SIDS, build
from test_sid import EOS
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.models.bamba import modeling_bamba

from minionerec.decoding import probe
from minionerec.decoding.beams import CopiedBeams, RereadBeams, TreeBeams
from minionerec.decoding.probe import prove
from minionerec.decoding.ranking import rank_prompts
from minionerec.decoding.trie import Trie


def test_two_processes_try_and_rank_alike():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    path = os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), os.path.dirname(__file__)])
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-3000:]


def shard_and_rank() -> None:
    """Ranks five prompts of different lengths, in batches of two and with weights sharded over two processes."""
    modeling_bamba.apply_mask_to_padding_states = lambda states, _mask: states
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    prompts = [list(range(1, 1 + length)) for length in (9, 4, 17, 26, 5)]
    for architecture, beams in (("qwen2", TreeBeams), ("bamba", CopiedBeams), ("rwkv", RereadBeams)):
        found = {}
        for sharded in (False, True):
            model = build(architecture)
            if sharded:
                fully_shard(model, mesh=mesh)
                if dist.get_rank():  # what it finds out does not count
                    probe._distance = lambda *_: torch.tensor(torch.nan)
            found[sharded] = rank_prompts(model, Trie(SIDS, EOS), prompts, 0, 4, batch_size=2)
            assert prove(model).beams is beams and prove(model).padding == (architecture == "qwen2")
        assert found[True] == found[False]
    dist.destroy_process_group()


if __name__ == "__main__":
    shard_and_rank()
