import json

from minionerec.model_card import write_card


def test_a_checkpoint_has_a_card(sft_run):
    """Its data, its method and, for the last one, its metrics, with a head that the hub can read."""
    output = sft_run("lora")
    metrics = json.loads((output / "metrics.json").read_text())
    card = (output / "final_checkpoint" / "README.md").read_text(encoding="utf-8")
    _, head, text = card.split("---\n", 2)
    assert head.splitlines() == [
        "library_name: peft",
        "pipeline_tag: text-generation",
        'tags: ["generative-recommendation", "semantic-ids", "lora"]',
    ]
    for line in ("# Next-item recommendations: bolts", "| train_file | train.csv |", "| learning_rate | 0.01 |"):
        assert line in text
    assert f"| best_eval_loss | {metrics['best_eval_loss']:.5g} |" in text and "More Information" not in card
    assert f"| train_examples | {metrics['train_examples']:,} |" in text and "| history" not in text
    for folder in output.glob("checkpoint-*"):
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "| learning_rate | 0.01 |" in card and "## Metrics" not in card


def test_a_card_lists_no_adapter_where_there_is_none(tmp_path):
    for method, listed in (("lora", True), ("freeze_LLM", False), ("full", False)):
        write_card(str(tmp_path), {"command": "sft", "method": method, "flags": {"lora_r": 16, "learning_rate": 0.1}})
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert ("lora_r" in card) == listed and "learning_rate" in card
