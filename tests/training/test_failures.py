"""What ends a run names the last good checkpoint."""

import pytest
from models import trainer_of

from minionerec.errors import RunError


def test_the_last_good_checkpoint_is_named(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(tmp_path, 8, **settings)
    compute = trainer.compute_loss

    def bad_at_step_3(*args, **kwargs):
        loss = compute(*args, **kwargs)
        return loss * float("nan") if trainer.state.global_step == 2 else loss

    trainer.compute_loss = bad_at_step_3
    with pytest.raises(RunError, match=r"the loss is nan at step 3; the last good checkpoint is \S+checkpoint-2\b"):
        trainer.train()

    # A NaN gradient after a finite loss spoils the weights; they are not saved.
    trainer = trainer_of(tmp_path / "again", 8, **settings)

    def spoil(gradient):
        return gradient * float("nan") if trainer.state.global_step == 1 else gradient

    next(p for p in trainer.model.parameters() if p.requires_grad).register_hook(spoil)
    with pytest.raises(RunError, match=r"weights are NaN or infinite at step 2; .*checkpoint-1\b"):
        trainer.train()
    assert [path.name for path in (tmp_path / "again").glob("*/checkpoint-*")] == ["checkpoint-1"]
