"""What the dry run asks of the flags of sft.py and rl.py, which are defined there."""

from typing import Literal

from minionerec.flags import TrainingFlags


class SFTSettings(TrainingFlags):
    """Flags of sft.py: what an optimizer step is made of."""

    batch_size: int
    micro_batch_size: int | Literal["auto"]
    num_epochs: int

    @property
    def micro_rows(self) -> int:
        """`micro_batch_size` as a number."""
        raise NotImplementedError

    @property
    def rows_together(self) -> int:
        """How many rows that share much are put into the same step; 0 where every row is computed by itself."""
        raise NotImplementedError


class RLSettings(TrainingFlags):
    """Flags of rl.py: what is sampled, learnt and held."""

    train_batch_size: int
    gradient_accumulation_steps: int
    num_generations: int
    num_train_epochs: int
    beta: float
    sft_weight: float
    average_weights: bool
    dynamic_sampling: bool
    test_during_training: bool
    eval_batch_size: int
    test_beam: int
