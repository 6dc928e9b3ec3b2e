"""What the steps of an RL run add to its log."""

import json
import math
from collections import defaultdict
from types import SimpleNamespace

import torch

from minionerec.training.rl_log import RLLog


def test_means_of_passes_add_up_and_go_on_after_a_checkpoint():
    def new_log() -> RLLog:
        one_process = SimpleNamespace(num_processes=1, reduce=lambda pairs, reduction: pairs)
        return RLLog(defaultdict(list), {}, ["rule"], one_process)

    log = new_log()
    for total, count, first in ((3.0, 2, True), (1.0, 6, False), (5.0, 5, True)):
        log.add_mean("kl", torch.tensor(total), torch.tensor(count), first)
    log.add_mean("sft_loss", torch.tensor(0.0), torch.tensor(0), True)  # of no completions
    log.metrics["reward"].append(math.nan)
    kept = json.loads(json.dumps(log.state(), allow_nan=False))
    assert kept == {"kl": [0.5, 1.0], "sft_loss": [None], "reward": [None]}
    sizes = log.sizes()
    log.add_mean("kl", torch.tensor(1.0), torch.tensor(1), True)
    log.add_mean("entropy", torch.tensor(1.0), torch.tensor(1), True)
    log.cut(sizes)
    assert log.state() == kept  # nothing of an attempt that ran out of memory
    resumed = new_log()
    resumed.resume(kept)
    assert resumed.metrics["kl"] == [0.5, 1.0] and math.isnan(resumed.metrics["reward"][0])
