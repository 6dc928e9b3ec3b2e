"""Rankings under all that can change them together against brute force over the catalogue: SASRec, a penalty,
constraints, items that share a SID, few beams, tiny catalogues, and histories of what the catalogue lacks.

`FUZZ_SEEDS=500 pytest tests/test_ranking_fuzz.py` tries more of them.
"""

import math
import random
from functools import cache
from itertools import product

import pytest
import torch
from plain import fuzz_seeds

from minionerec import Ranker, ranking, sasrec
from minionerec.blending import Blend
from minionerec.data.files import InfoItem, Interaction
from minionerec.data.items import Items, left_out
from minionerec.metrics import watched_cutoff
from minionerec.serving.requests import RequestReader

MOST = 40  # tokens of a prompt
COLD = ["<a_4><b_7><c_2>", "<a_4><b_6><c_1>"]  # SIDs that no catalogue here has


@pytest.fixture(scope="module")
def loaded(files, checkpoint) -> Ranker:
    """Has the model that ranks all catalogues."""
    return Ranker.load(checkpoint, info_file=files["info"])


def random_catalogue(chance: random.Random) -> Items:
    """1 to 12 items. Some share a SID, some SIDs are the start of another, and some titles are those of two items."""
    parts = [[f"<{name}_{i}>" for i in range(count)] for name, count in (("a", 3), ("b", 4), ("c", 3))]
    count = chance.choice([1, 2, 3, 7, 12])
    sids = ["".join(map(chance.choice, parts[: chance.choice([1, 2, 3, 3, 3])])) for _ in range(count)]
    listed = [InfoItem(str(i), f"Bolt {chance.randrange(2 * count)}", sid) for i, sid in enumerate(sids)]
    return Items(listed, "info", purchases=chance.choices([item.id for item in listed], k=5))


class Setting:
    """What a seed stands for. `best` SIDs of SASRec are ranked with the beams."""

    def __init__(self, seed: int, loaded: Ranker, folder, monkeypatch):
        chance = self.chance = random.Random(seed)
        self.items = random_catalogue(chance)
        self.num_beams, self.batch_size = chance.choice([1, 2, 4, 40]), chance.choice([1, 2, 8])
        self.weight, self.penalty = chance.choice([None, 0.0, 0.7, 2.0]), chance.choice([0.0, 0.75, 3.0])
        blend, self.best = None, chance.choice([1, 3, 15])
        monkeypatch.setattr(ranking, "BEST", self.best)
        if self.weight is not None:
            torch.manual_seed(seed)
            self.sasrec = sasrec.SASRec(chance.sample(self.items.sids, len(self.items.sids)), hidden_size=4, length=3)
            self.sasrec.items.weight.data.mul_(4)
            sasrec.save(self.sasrec, str(folder))
            blend = Blend(str(folder), self.weight, "")
        self.ranker = Ranker(
            *(loaded.checkpoint, loaded.encoder.prompts, self.items.sids, "", ""),
            items=self.items,
            also=COLD,
            num_beams=self.num_beams,
            batch_size=self.batch_size,
            blend=blend,
            seen_penalty=self.penalty,
        ).use(loaded.model)
        self.ranker.encoder.cutoff_len = MOST
        self.tokens = {
            sid: (*self.ranker.tokenizer(sid, add_special_tokens=False).input_ids, self.ranker.tokenizer.eos_token_id)
            for sid in self.items.sids
        }

    def random_request(self) -> dict:
        """A history of ids, SIDs and titles, some of them longer than what the model reads, and constraints."""
        chance, ids = self.chance, [item.id for item in self.items.all]
        one_item = [title for title, of in self.items.of_title.items() if len({self.items.all[n].sid for n in of}) == 1]
        names = [*ids, *self.items.sids, *one_item]
        history = chance.choices(names, k=chance.choice([1, 1, 2, 5, 2 * MOST]))
        request = {"history": history, "K": chance.randint(1, self.num_beams)}
        request["exclude_seen"] = chance.choice([False, False, True, "earlier"])
        for name in ("allow", "deny"):
            if chance.random() < 0.3:
                request[name] = chance.choices(names, k=chance.choice([0, 1, 2, len(ids)]))
        return request

    def random_row(self) -> Interaction:
        """A row of a test file, with items in its history and as its target that the catalogue lacks."""
        chance, sids = self.chance, [*self.items.sids, *COLD]
        # After nothing that it knows, all SIDs are alike to SASRec, and any of them its best.
        first = chance.choice(self.items.sids if self.best < len(self.items.sids) else sids)
        history = [first, *chance.choices(sids, k=chance.choice([0, 1, 2, 5, 2 * MOST]))]
        chance.shuffle(history)
        return Interaction(history, [""] * len(history), chance.choice(sids), "")


class ByHand:
    """The scores of SIDs after a prompt, a forward pass for each of their tokens, and beam search with lists."""

    def __init__(self, model, prompt: list[int], tokens: dict[str, tuple[int, ...]], length_penalty: float = 0.0):
        self.tokens, self.length_penalty = tokens, length_penalty

        @cache
        @torch.no_grad()
        def logps(path: tuple[int, ...]) -> torch.Tensor:
            return model(input_ids=torch.tensor([[*prompt, *path]])).logits[0, -1].float().log_softmax(-1)

        self.logps = logps

    def sum(self, path: tuple[int, ...]) -> float:
        return sum(self.logps(path[:depth])[token].item() for depth, token in enumerate(path))

    def score(self, sid: str) -> float:
        return self.sum(self.tokens[sid]) / len(self.tokens[sid]) ** self.length_penalty

    def beams(self, sids: list[str], count: int) -> list[str]:
        """The SIDs of the `count` best beams."""
        of_path = {self.tokens[sid]: sid for sid in sids}
        running, ended, depth = [()], list[str](), 0
        while running:
            depth += 1
            paths = {path[:depth] for path in of_path if path[: depth - 1] in running}
            ended = sorted([*ended, *(of_path[path] for path in paths if path in of_path)], key=self.score)[-count:]
            running = sorted((path for path in paths if path not in of_path), key=self.sum)[-count:]
        return ended


def ranked_by_hand(
    setting: Setting, hand: ByHand, sids: list[str], allowed: list[str], weight: float, penalty: float
) -> dict[str, float]:
    """SID -> score of a ranking for a history of `sids`, best first."""
    found, added = hand.beams(allowed, setting.num_beams), dict.fromkeys(allowed, 0.0)
    if setting.weight is not None:
        logps = setting.sasrec.logps([sids])[0].tolist()
        added = {sid: logp for sid, logp in zip(setting.sasrec.sids, logps, strict=True) if sid in allowed}
        found += sorted(added, key=lambda sid: -added[sid])[: setting.best]
    scores = {sid: hand.score(sid) + weight * added[sid] - penalty * (sid in sids) for sid in set(found)}
    return dict(sorted(scores.items(), key=lambda pair: -pair[1]))


@pytest.mark.parametrize("seed", fuzz_seeds(24))
def test_recommendations_are_those_of_brute_force(seed, loaded, tmp_path, monkeypatch):
    setting = Setting(seed, loaded, tmp_path, monkeypatch)
    chance = setting.chance
    ranker, items = setting.ranker, setting.items
    reader = RequestReader(items, None, 1, setting.num_beams)
    requests = [reader.read(setting.random_request()) for _ in range(chance.randint(1, 4))]
    for request, found in zip(requests, ranker.answer(requests), strict=True):
        sids = [items.all[numbers[0]].sid for numbers in request.history]
        (prompt,) = ranker.encode([ranker._row_of(request)])
        assert len(prompt) + ranker.trie.depth <= ranker.encoder.cutoff_len
        may = [n for n in range(len(items)) if n not in request.without and all(n in only for only in request.only)]
        hand = ByHand(ranker.model, prompt, setting.tokens)
        allowed = list(dict.fromkeys(items.all[n].sid for n in may))
        scores = ranked_by_hand(setting, hand, sids, allowed, setting.weight or 0.0, setting.penalty)
        wanted = [n for sid in scores for n in items.of_sid[sid] if n in may][: request.K]
        assert [item["id"] for item in found] == [items.all[n].id for n in wanted]
        by_hand = [scores[items.all[n].sid] for n in wanted]
        assert [item["score"] for item in found] == pytest.approx(by_hand, abs=1e-3)


@pytest.mark.parametrize("seed", fuzz_seeds(24))
def test_evaluations_and_numbers_that_are_tried_are_those_of_brute_force(seed, loaded, tmp_path, monkeypatch):
    setting = Setting(seed, loaded, tmp_path, monkeypatch)
    chance = setting.chance
    ranker, catalogue = setting.ranker, setting.items.sids
    rows = [setting.random_row() for _ in range(chance.randint(1, 4))]
    exclude_seen, length_penalty = chance.choice([False, True, "earlier"]), chance.choice([0.0, 1.0])
    pairs = [*product([0.0, 0.7, 5.0] if setting.weight is not None else [0.0], [0.0, 0.75, 5.0])]
    gains, cutoff = dict.fromkeys(pairs, 0.0), watched_cutoff(min(setting.num_beams, len(catalogue)))
    prompts = ranker.encode(rows)
    rankings = ranker.rank(prompts, length_penalty, rows, exclude_seen)
    for row, prompt, found in zip(rows, prompts, rankings, strict=True):
        seen = left_out([[sid] for sid in row.sid_history], exclude_seen)
        allowed = [sid for sid in catalogue if sid not in seen]
        hand = ByHand(ranker.model, prompt, setting.tokens, length_penalty)
        of_row = setting, hand, row.sid_history, allowed
        ranked = [*ranked_by_hand(*of_row, setting.weight or 0.0, setting.penalty)][: setting.num_beams]
        fillers = [sid for sid in dict.fromkeys(row.sid_history) if sid in seen and sid in catalogue]
        assert found == (ranked + fillers)[: len(catalogue)][: setting.num_beams]
        for pair in pairs:
            ranked = [*ranked_by_hand(*of_row, *pair)][:cutoff]
            gains[pair] += 1 / math.log2(ranked.index(row.sid) + 2) if row.sid in ranked else 0.0
    tried = ranker.weigh(rows, pairs, length_penalty, exclude_seen)
    assert tried == pytest.approx({pair: gain / len(rows) for pair, gain in gains.items()})
