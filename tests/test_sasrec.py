import json

import pytest
import torch
from helpers import run_command, succeed
from recorded import problems_of

from minionerec import sasrec
from minionerec.errors import InputError

SIDS = [f"<a_{i}>" for i in range(12)]


def cycle(length: int, start: int) -> list[str]:
    return [SIDS[(start + i) % len(SIDS)] for i in range(length)]


def test_it_learns_what_follows_and_loads_what_it_saved(tmp_path):
    torch.manual_seed(0)
    model = sasrec.SASRec(SIDS, hidden_size=16, dropout=0.0, length=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    histories = [cycle(length, start) for start in range(12) for length in (2, 4, 9)]
    targets = [cycle(length + 1, start)[-1] for start in range(12) for length in (2, 4, 9)]
    for _ in range(60):
        optimizer.zero_grad()
        sasrec.loss_of(model, histories, targets).backward()
        optimizer.step()
    asked = [cycle(4, 2), cycle(11, 7)]  # the second is longer than the model looks back
    assert [ranking[0] for ranking in model.rankings(asked, 3)] == [SIDS[6], SIDS[6]]
    sasrec.save(model, str(tmp_path / "m"))
    again = sasrec.load(str(tmp_path / "m"))
    assert again.rankings(asked, 12) == model.rankings(asked, 12)
    assert again.scores(asked * 2, [SIDS[6], SIDS[0]] * 2) == pytest.approx(model.scores(asked, [SIDS[6], SIDS[0]]) * 2)


def test_a_large_catalogue_is_ranked_for_few_histories_at_once(monkeypatch):
    torch.manual_seed(0)
    model = sasrec.SASRec(SIDS, hidden_size=16, length=8)
    asked, sizes = [cycle(1 + start % 7, start) for start in range(20)], []
    whole = model.rankings(asked, 5)
    model.register_forward_hook(lambda _module, _args, scores: sizes.append(scores.numel()))
    for most in (36, 1):
        monkeypatch.setattr(sasrec, "MOST_SCORES", most)
        assert model.rankings(asked, 5) == whole
        assert max(sizes) == max(most, len(SIDS))
        sizes.clear()


def test_an_ensemble_averages_log_probabilities(tmp_path):
    torch.manual_seed(0)
    models = [sasrec.SASRec(SIDS, hidden_size=16, length=8).eval() for _ in range(3)]
    both = sasrec.Ensemble(models)
    asked = [cycle(4, 2), ["<new>"], ["<new>", SIDS[3]]]
    mean = torch.stack([model.logps(asked) for model in models]).mean(0)
    torch.testing.assert_close(both.logps(asked), mean.log_softmax(dim=1))
    assert both.logps(asked)[1].unique().numel() == 1
    sasrec.save(both, str(tmp_path / "m"))
    again = sasrec.load(str(tmp_path / "m"))
    assert isinstance(again, sasrec.Ensemble) and torch.equal(again.logps(asked), both.logps(asked))
    assert again.rankings(asked, 3) == both.rankings(asked, 3)
    assert again.scores(asked, SIDS[:3]) == both.scores(asked, SIDS[:3])


def test_padding_and_unknown_items_change_nothing():
    torch.manual_seed(0)
    model = sasrec.SASRec(SIDS, hidden_size=16, length=8).eval()
    alone = model(model.encode([cycle(2, 0)]))
    together = model(model.encode([["<unknown>", *cycle(2, 0)], cycle(7, 3)]))
    torch.testing.assert_close(together[:1], alone)


def test_a_history_of_unknown_items_says_nothing():
    """It is no item that was never trained: SASRec then adds nothing to a ranking, and rewards all items alike."""
    torch.manual_seed(0)
    model = sasrec.SASRec(SIDS, hidden_size=16, length=8)
    logps = model.logps([["<new>"], ["<new>", SIDS[2]], [SIDS[2]]])
    assert logps[0].unique().numel() == 1 and logps[1].unique().numel() > 1
    torch.testing.assert_close(logps[1], logps[2])
    assert model.scores([["<new>"]] * 2, SIDS[:2]) == [0, 0]


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="no SASRec model"):
        sasrec.load(str(tmp_path))
    model = sasrec.SASRec(SIDS, hidden_size=16, length=8)
    model.items.weight.data[3, 2] = torch.nan  # its scores would be no rewards
    sasrec.save(model, str(tmp_path / "m"))
    with pytest.raises(InputError, match="weights are NaN or infinite; train it again"):
        sasrec.load(str(tmp_path / "m"))


def test_a_training_that_diverges_ends_in_one_line(files, tmp_path):
    flags = {"train_file": files["train"], "eval_file": files["valid"], "info_file": files["info"]}
    result = run_command("scripts/train_sasrec.py", **flags, output_dir=tmp_path / "m", learning_rate=1e30)
    assert result.returncode == 1 and not (tmp_path / "m").exists()
    (line,) = result.stderr.strip().splitlines()
    assert "weights are NaN or infinite after epoch" in line and line.endswith("; take a smaller --learning_rate")


def test_the_command_trains_saves_and_evaluates(files, tmp_path):
    flags = {"train_file": files["train"], "eval_file": files["valid"], "info_file": files["info"]}
    result = succeed(
        "scripts/train_sasrec.py", **flags, test_data_path=files["test"], output_dir=tmp_path / "m", num_epochs=2
    )
    assert sasrec.load(str(tmp_path / "m")).scores([["<a_0><b_0><c_0>"]], ["<a_2><b_0><c_2>"])
    metrics = json.loads((tmp_path / "m" / "result.metrics.json").read_text())
    assert 0 <= metrics["NDCG@10"] <= metrics["HR@10"] <= 1
    costs = json.loads((tmp_path / "m" / "metrics.json").read_text())
    by_epoch = [float(line.rsplit(" ", 1)[1]) for line in result.stdout.splitlines() if line.startswith("epoch ")]
    (best,) = costs["best_epochs"]
    assert by_epoch[best - 1] == max(by_epoch) == round(costs["best_eval_NDCG@10"], 4)
    again = run_command("scripts/train_sasrec.py", **flags, output_dir=tmp_path / "m")
    assert again.returncode == 2 and "exists already" in again.stderr


def test_several_models_are_those_of_their_seeds(files, tmp_path):
    flags = {"train_file": files["train"], "eval_file": files["valid"], "info_file": files["info"], "num_epochs": 3}

    def trained(name: str, **more: object) -> tuple[sasrec.Recommender, dict]:
        succeed("scripts/train_sasrec.py", **flags, output_dir=tmp_path / name, **more)
        return sasrec.load(str(tmp_path / name)), json.loads((tmp_path / name / "metrics.json").read_text())

    ones, costs = zip(*(trained(f"seed{seed}", seed=seed) for seed in (7, 8)), strict=True)
    both, cost = trained("both", seed=7, num_models=2)
    assert cost["best_epochs"] == [one["best_epochs"][0] for one in costs]
    assert cost["trainable_parameters"] == 2 * costs[0]["trainable_parameters"]
    for one, model in zip(ones, both.models, strict=True):
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [
        {"models": 10**9},
        {"models": 2},
        {"models": 0},
        {"models": "x"},
        {"hidden_size": 10**9},
        {"length": 10**9},
        {"layers": 10**9},
        {"layers": 1},
        {"heads": 0},
        {"heads": 3},
        {"heads": "x"},
        {"dropout": 7},
        {"colour": "red"},
        {"hidden_size": None},
    ],
)
def test_a_sasrec_model_whose_files_disagree(tmp_path, changes):
    sasrec.save(sasrec.SASRec(["<a>", "<b>"], hidden_size=8), str(tmp_path))
    data = json.loads((tmp_path / "sasrec.json").read_text())
    data["settings"].update(changes)
    (tmp_path / "sasrec.json").write_text(json.dumps(data))
    (problem,) = problems_of(sasrec.load, folder=tmp_path)
    assert problem.startswith(f"--cf_path {tmp_path}: no SASRec model can be loaded: ")
