"""Recommends with vLLM's beam search, held to the SIDs of the catalogue. Same items and scores as recommend.py.

It takes a whole checkpoint, such as one of merge_lora.py, and histories without constraints of their own. It runs in an
environment that has vLLM 0.32 and what this project needs:

    python examples/vllm_recommend.py --model out/merged --info_file info.txt --histories test.csv --output items.jsonl
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # the newer one has another kind of processors
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine runs in this process

from vllm import LLM, TokensPrompt
from vllm.config import VllmConfig
from vllm.sampling_params import BeamSearchParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from minionerec import cli
from minionerec.checkpoint import is_adapter, read_model
from minionerec.data.files import Interaction, read_info_items
from minionerec.data.items import Items
from minionerec.data.sid_tokens import PAD
from minionerec.errors import InputError, Problems
from minionerec.flags import Flags, PromptFlags, above_zero, command, flag
from minionerec.output import whole_file
from minionerec.ranking import Ranker
from minionerec.serving.requests import Request, RequestReader

Tokens = tuple[int, ...]


class SIDTokens:
    """Which tokens may follow a beam: those that continue a SID.

    vLLM's beam search sends every beam as a prompt of its own. What a beam has written is the longest end of that
    prompt that begins a SID, as long as no prompt ends like that before a beam has written anything.
    """

    def __init__(self, sids: list[Tokens]):
        self.following: dict[Tokens, list[int]] = {}
        for sid in sids:
            for i, token in enumerate(sid):
                after = self.following.setdefault(sid[:i], [])
                if token not in after[-1:]:  # SIDs are sorted
                    after.append(token)
        self.longest = max(map(len, self.following))

    def written(self, prompt: list[int]) -> Tokens:
        """The longest end of a prompt that begins a SID."""
        ends = (tuple(prompt[len(prompt) - n :]) for n in range(min(self.longest, len(prompt)), 0, -1))
        return next((end for end in ends if end in self.following), ())


class OnlySIDs(LogitsProcessor):
    """Turns logits into log-probabilities over the whole vocabulary, and those of tokens that continue no SID into
    -inf."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        with open(vllm_config.additional_config["sids"], encoding="utf-8") as file:
            self.tokens = SIDTokens([tuple(sid) for sid in json.load(file)])
        self.allowed: dict[int, list[int]] = {}  # for each row of the batch

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        def allowed(_params: object, prompt: list[int], _output: list[int]) -> list[int]:
            return self.tokens.following[self.tokens.written(prompt)]

        process_dict_updates(self.allowed, batch_update, allowed)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        logps = logits.log_softmax(dim=-1)
        logits.fill_(-torch.inf)
        for row, tokens in self.allowed.items():
            logits[row, tokens] = logps[row, tokens]
        return logits


def beam_search(model: str, ranker: Ranker, prompts: list[list[int]]) -> tuple[list[list[tuple[str, float]]], float]:
    """For each prompt the SIDs of its beams with their scores, best first; and the seconds of all, without loading."""
    sids = [tuple(token for token in row if token != PAD) for row in ranker.trie.sequences.tolist()]
    tokens = SIDTokens(sids)
    if any(tokens.written(prompt) for prompt in prompts):
        raise InputError(f"--model {model}: its prompts end like the beginning of a SID; use recommend.py")
    sid_of = {sid: ranker.sids[index] for sid, index in zip(sids, ranker.trie.source.tolist(), strict=True)}
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(sids, file)
        file.flush()
        llm = LLM(
            model,
            dtype="float32",
            max_model_len=ranker.encoder.cutoff_len,
            logits_processors=[OnlySIDs],
            additional_config={"sids": file.name},
            logprobs_mode="processed_logits",  # what OnlySIDs returns is what beams are scored by
            max_logprobs=2 * ranker.length,
            block_size=32,  # beams share the blocks of their prompt; the CPU's default is 128 tokens
            enforce_eager=True,
        )
        params = BeamSearchParams(ranker.length, max_tokens=ranker.trie.depth, length_penalty=0.0)
        started = time.perf_counter()
        inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        outputs = llm.beam_search(inputs, params, concurrency_limit=ranker.batch_size)
        seconds = time.perf_counter() - started
    found = []
    for prompt, output in zip(prompts, outputs, strict=True):
        beams = [(tuple(beam.tokens[len(prompt) :]), beam.cum_logprob) for beam in output.sequences]
        found.append([(sid_of[sid], score) for sid, score in beams if score > -torch.inf])
    return found, seconds


def read_requests(items: Items, histories: str, K: int, num_beams: int) -> list[Request]:
    """The requests of a file. Raises InputError also for one with constraints, which this search does not have."""
    requests = list(RequestReader(items, None, K, num_beams).read_file(histories))
    if any(request.without or request.only for request in requests):
        raise InputError(f"--histories {histories}: has requests with constraints; use recommend.py")
    return requests


@dataclass(frozen=True, kw_only=True)
class SearchFlags(Flags):
    """The checkpoint, its catalogue, and what is asked."""

    model: str = flag("", "a whole checkpoint.")
    info_file: str = flag("", "its catalogue.")
    histories: str = flag("", "file of histories, as in recommend.py.")
    output: str = flag("", "file for the recommendations, as JSON lines.")
    K: int = flag(10, "items to recommend.", above_zero)
    num_beams: int = flag(50, "SIDs that are ranked.", above_zero)
    batch_size: int = flag(8, "histories that are searched together.", above_zero)

    def check(self, problems: Problems) -> None:
        super().check(problems)
        if self.num_beams < self.K:
            problems.add(f"--K {self.K}: must be at most --num_beams {self.num_beams}")
        self.check_output(problems, "output", "the recommendations")


@command(SearchFlags)
def recommend(flags: SearchFlags) -> None:
    """Writes a line for each history, as recommend.py does."""
    problems = flags.problems()
    model, info_file, output = flags.model, flags.info_file, flags.output
    checkpoint, _, prompts = read_model(problems, "model", model, "", PromptFlags())
    if is_adapter(model):
        problems.add(f"--model {model}: is an adapter; merge it with merge_lora.py")
    listed = problems.attempt(read_info_items, info_file)
    items = listed and problems.attempt(Items, listed, info_file)
    requests = items and problems.attempt(read_requests, items, flags.histories, flags.K, flags.num_beams)
    problems.check()

    where = f"{info_file} belongs to a different catalogue"
    sizes = {"num_beams": flags.num_beams, "batch_size": flags.batch_size}
    ranker = Ranker(checkpoint, prompts, items.sids, f"--model {model}", where, items=items, **sizes)
    rows = []
    for request in requests:
        bought = [items.all[numbers[0]] for numbers in request.history[-checkpoint.cutoff_len :]]
        rows.append(Interaction([item.sid for item in bought], [item.title for item in bought], "", ""))
    rankings, seconds = beam_search(model, ranker, ranker.encode(rows))
    os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
    with whole_file(output) as partial, open(partial, "w", encoding="utf-8") as file:
        for request, ranking in zip(requests, rankings, strict=True):
            found = [
                {"id": items.all[n].id, "title": items.all[n].title, "sid": sid, "score": round(score, 6)}
                for sid, score in ranking
                for n in items.of_sid[sid]
            ]
            line = {"history": request.given, "items": found[: request.K]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(f"{len(rows)} rows in {output}, {len(rows) / seconds:.2f} rows/s")


if __name__ == "__main__":
    cli.run(recommend)
