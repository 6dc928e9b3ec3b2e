"""The end of a run: its final checkpoint."""

import pytest
from models import trainer_of

from minionerec.training.finish import save_final


def test_a_final_checkpoint_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    final = tmp_path / "final_checkpoint"
    trainer = trainer_of(tmp_path, 8)
    save_model = trainer.save_model

    def interrupted(folder):
        save_model(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "save_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_final(trainer, str(final))
    assert not final.exists()
    (tmp_path / "final_checkpoint.partial" / "leftover").touch()
    monkeypatch.setattr(trainer, "save_model", save_model)
    save_final(trainer, str(final))
    assert {"adapter_config.json", "adapter_model.safetensors", "minionerec.json"} <= {f.name for f in final.iterdir()}
    assert not (final / "leftover").exists()
    assert not (tmp_path / "final_checkpoint.partial").exists()
