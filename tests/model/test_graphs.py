"""Passes that are recorded and started again, by tapes that keep the rules of CUDA graphs, against the same passes
computed as ever: values, gradients, whole runs; and that nothing in them waits for a GPU."""

import copy
import weakref
from contextlib import nullcontext

import pytest
import torch
from accelerate import PartialState
from architectures import build
from as_on_gpu import starts_kernels
from datasets import Dataset
from models import IDS, adapted, make_model
from plain import EOS, batch, moved, prompts, random_sids
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainingArguments

import lora_utils
from benchmarks.counting import Tape
from minionerec.checkpoint import Checkpoint
from minionerec.data.examples import Collator
from minionerec.decoding.beam_search import constrained_beam_search
from minionerec.decoding.trie import Trie
from minionerec.flags import AdapterFlags
from minionerec.model import device, fewer_kernels, graphs, groups, loading
from minionerec.model.graphs import READS
from minionerec.model.token_trees import Shape, TreeCollator, pad_to
from minionerec.training.logprobs import completion_logps
from minionerec.training.sft_trainer import SFTTrainer, plan_trees, tree_losses


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    monkeypatch.setattr(device, "starts_kernels", starts_kernels)
    monkeypatch.setitem(graphs.RECORDINGS, "cpu", Tape)


def rows_of(users: int, seed: int = 0) -> list[dict]:
    """Rows of users, each of which begins like the one before it."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(users):
        items = torch.randint(1, 89, (8, 2), generator=generator)
        for end in range(2, 4 + len(rows) % 3):
            ids = [1, 2, 90, *items[:end].flatten().tolist(), 91]
            rows.append({"input_ids": ids, "prompt_length": len(ids) - 2, "length": len(ids)})
    return rows


def recorded(model, said: list | None = None):
    """The model, whose passes are recorded, and its recordings."""
    graphs.record(model, True, (said if said is not None else []).append)
    return model, graphs.of(model)


def replays(of: graphs.Graphs) -> int:
    return sum(found is not None for found in of.passes.values())


def prepared(model, method: str, dropout: float = 0.0):
    fewer_kernels.use_fewer_kernels(model)
    if method == "full":
        return model
    flags = AdapterFlags(use_lora=True, lora_r=4, lora_dropout=dropout, use_dora=method == "dora")
    return moved(lora_utils.add_lora(model, lora_utils.lora_config(model, IDS, flags)), seed=4)


def train(model, losses_of, steps: int = 4, parts: int = 2):
    """Losses of every pass, and the weights afterwards: several passes a step, whose gradients add up."""
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, found = torch.optim.SGD(learnt, lr=0.01), []
    torch.manual_seed(3)
    for step in range(steps):
        for part in range(parts):
            losses = losses_of(model, step * parts + part)
            (losses.sum() / 8).backward()
            found.append(losses.detach())
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack([loss.sum() for loss in found]), [parameter.detach().clone() for parameter in learnt]


def assert_same_training(make, losses_of, replayed: int = 1) -> None:
    model, of = recorded(make())
    losses, weights = train(model, losses_of)
    expected, wanted = train(make(), losses_of)
    assert of.on and replays(of) >= replayed
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    for weight, other in zip(weights, wanted, strict=True):
        torch.testing.assert_close(weight, other, atol=1e-5, rtol=1e-4)


def of_trees(model, number: int) -> torch.Tensor:
    """The losses of a micro-batch, of one of two shapes."""
    rows = rows_of(3 if number % 3 else 2, seed=number)
    padded = pad_to(TreeCollator(0, 64)(rows), Shape(2, 48, 24) if number % 3 else Shape(1, 48, 16))
    names = tuple(padded)
    run = graphs.of(model)
    losses_of = lambda *tensors: (tree_losses(model, dict(zip(names, tensors, strict=True)))[0],)  # noqa: E731
    return (run(("trees",), losses_of, *padded.values()) if run else losses_of(*padded.values()))[0]


def of_completions(model, number: int) -> torch.Tensor:
    """How much less likely completions are than by the model without its adapter."""
    inputs = [tensor[: 3 if number % 3 == 0 else 6] for tensor in batch()]
    groups = [3] * (len(inputs[0]) // 3)
    reference = 0.0
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter(), torch.no_grad():
            reference = completion_logps(model, *inputs, shared=True, groups=groups)[0]
    return reference - completion_logps(model, *inputs, shared=True, groups=groups)[0]


@pytest.mark.parametrize(
    ("architecture", "tied", "method", "losses_of"),
    [
        *(("qwen2", tied, method, of_trees) for tied in (True, False) for method in ("full", "lora")),
        *(
            ("qwen2", tied, method, of_completions)
            for tied, method in ((True, "full"), (False, "lora"), (True, "dora"))
        ),
        *((name, True, "lora", of_trees) for name in ("llama", "gemma2", "gpt2")),
        *((name, True, "lora", of_completions) for name in ("qwen3", "phi3")),
    ],
)
def test_recorded_passes_train_as_others_do(architecture, tied, method, losses_of):
    def make():
        return prepared(make_model(architecture, scale=2.0, tie_word_embeddings=tied), method).train()

    assert_same_training(make, losses_of, replayed=2)


@pytest.mark.parametrize("name", ["gemma3_text", "llama4_text", "mixtral", "qwen3_moe"])
def test_what_cannot_be_recorded_trains_too(name):
    """Windows; experts, some of which the host counts."""
    said = []
    model, of = recorded(prepared(build(name), "lora").train(), said)
    losses, _ = train(model, of_trees)
    expected, _ = train(prepared(build(name), "lora").train(), of_trees)
    torch.testing.assert_close(losses, expected, atol=1e-3, rtol=1e-3)
    assert of.on == (not said) and len(said) <= 1
    if name == "gemma3_text":
        assert replays(of)


def test_a_recording_draws_new_masks_as_the_eager_pass_does():
    """And as a run does that is resumed: what is recorded later draws the same numbers."""

    def losses(skip: int) -> torch.Tensor:
        model, of = recorded(prepared(make_model(scale=2.0), "lora", dropout=0.3).train())
        torch.manual_seed(5)
        found = []
        for number in range(8):
            if number == skip:  # as in a new process
                of.passes.clear()
            found.append(of_trees(model, 1))
            found[-1].sum().backward()
        assert replays(of) == 1
        return torch.stack([of_pass.detach() for of_pass in found])

    found = losses(skip=-1)
    assert len({round(of_pass.sum().item(), 4) for of_pass in found}) == len(found)
    for skip in (3, 4):
        assert torch.equal(losses(skip), found)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_backward_pass_is_recorded_outside_of_autocast(method):
    """In it, what the edges of a tree want would be added up in 16 bits, and not cancel with a probability near 1."""
    model, of = recorded(prepared(make_model(scale=2.0), method).train())
    found = []
    for _ in range(3):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            losses = of_trees(model, 1)
        (losses / 7).sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert replays(of) == 1
    for eager, replayed in zip(found[0], found[2], strict=True):
        torch.testing.assert_close(replayed, eager, atol=1e-6, rtol=1e-5)


def test_a_seed_of_the_host_is_not_recorded(monkeypatch):
    monkeypatch.setattr(groups, "KEPT_IN_GRAPHS", 0)
    said = []
    model, of = recorded(prepared(make_model(scale=2.0), "lora", dropout=0.3).train(), said)
    losses = [of_trees(model, 1).sum().item() for _ in range(4)]
    assert len(set(losses)) == 4 and not of.on
    assert said == [
        "passes are not recorded as CUDA graphs, but computed kernel by kernel: RuntimeError: the mask of a dropout "
        "follows from a number of the host"
    ]


def test_masks_of_a_micro_batch_that_waits_for_the_host_can_be_recorded():
    """8 rows of 512 tokens at the shape of Qwen2.5-0.5B, whose widest input has 4,864 features."""
    assert groups.KEPT_IN_GRAPHS >= 8 * 512 * 4864


@pytest.mark.parametrize("method", ["qlora", "checkpointing"])
def test_four_bits_are_recorded_and_recomputed_activations_are_not(tmp_path, method):
    make_model(scale=2.0).save_pretrained(tmp_path)

    def make():
        flags = AdapterFlags(use_qlora=method == "qlora", use_lora=method != "qlora", lora_dropout=0.0)
        torch.manual_seed(1)
        model = loading.load_base(str(tmp_path), lora_utils.quantization_config(flags))
        model = lora_utils.add_lora(model, lora_utils.lora_config(model, IDS, flags))
        if method == "checkpointing":
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    said = []
    model, of = recorded(make(), said)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = train(model, of_trees)
        expected, _ = train(make(), of_trees)
    torch.testing.assert_close(losses, expected, atol=1e-2, rtol=1e-2)
    assert of.on == (method == "qlora") and len(said) == (method == "checkpointing")


def test_a_pass_whose_backward_is_yet_to_come_is_not_written_over():
    model, of = recorded(prepared(make_model(scale=2.0), "lora").train())
    for _ in range(3):
        of_completions(model, 1).sum().backward()
    model.zero_grad()
    twin = prepared(make_model(scale=2.0), "lora").train()
    for one in (model, twin):
        first = of_completions(one, 1)
        (first * of_completions(one, 1).detach() + of_completions(one, 2)).sum().backward()
    assert replays(of) == 2  # of the policy and the reference
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-4, rtol=1e-4)


def test_weights_that_moved_and_a_copy_of_the_model_are_recorded_anew():
    model, of = recorded(prepared(make_model(scale=2.0), "full"))
    twin = copy.deepcopy(model)
    assert graphs.of(twin) is not of and graphs.of(twin).base is twin
    with torch.no_grad():
        for _ in range(3):
            before = of_completions(model, 1)
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.1
            twin.get_parameter(next(n for n, p in model.named_parameters() if p is parameter)).mul_(1.1)
        found, expected = of_completions(model, 1), of_completions(twin, 1)
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("adapter", [True, False])
def test_recorded_searches_find_the_same(adapter):
    model = prepared(make_model(scale=2.0), "lora" if adapter else "full").eval()
    trie = Trie(random_sids(60, (1, 2, 3)), EOS)
    batches = [prompts(lengths) for lengths in ((5, 31, 42), (7, 40, 30), (48, 9), (46, 41, 2), (3, 4, 33, 42, 37))]
    chance = torch.Generator().manual_seed(0)
    allowed = [torch.rand(len(ids), len(trie), generator=chance) < 0.3 for ids, _ in batches]
    expected = [constrained_beam_search(model, *of, trie, 7) for of in batches]
    expected_of = [
        constrained_beam_search(model, *of, trie, 7, allowed=mask) for of, mask in zip(batches, allowed, strict=True)
    ]
    model, of = recorded(model)
    for _ in range(2):
        for inputs, mask, *wanted in zip(batches, allowed, expected, expected_of, strict=True):
            found = [constrained_beam_search(model, *inputs, trie, 7, allowed=of) for of in (None, mask)]
            for one, other in zip(found, wanted, strict=True):
                assert torch.equal(one[0], other[0])
                torch.testing.assert_close(one[1], other[1], atol=1e-5, rtol=1e-5)
    assert of.on and replays(of) == len(of.passes) == 6  # three shapes
    if adapter:  # it trains on, and its recordings follow
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(-1.5)
        found = constrained_beam_search(model, *batches[0], trie, 7)
        expected = constrained_beam_search(model, *batches[0], trie, 7, tree=True)
        assert torch.equal(found[0], expected[0]) and not torch.equal(found[0], wanted[0][0])


def test_padding_changes_no_value_and_no_gradient():
    for rows in (rows_of(3), rows_of(3)[:1], []):
        batch = TreeCollator(0, 0.5)(rows)
        (tensor_rows, nodes), labels = batch["input_ids"].shape, len(batch["labels"])
        padded = pad_to(batch, Shape(tensor_rows + 1, nodes + 5, labels + 3))
        assert padded["input_ids"].shape == (tensor_rows + 1, nodes + 5) and len(padded["labels"]) == labels + 3
        assert (padded["shift_labels"] != -100).sum() == labels
        model = adapted("qwen2", False, "lora")
        found = []
        for of in (batch, padded):
            losses, _ = tree_losses(model, of)
            losses.sum().backward()
            found.append((losses[:labels].detach(), [p.grad for p in model.parameters() if p.requires_grad]))
            assert not losses[labels:].any()
            model.zero_grad()
        torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
        for one, other in zip(found[0][1], found[1][1], strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def trainer(folder, on: bool, said: list, **more) -> SFTTrainer:
    rows, state = Dataset.from_list(rows_of(12)), PartialState(cpu=True)
    torch.manual_seed(0)
    model = prepared(make_model(scale=2.0), "lora")
    trees = plan_trees(model, rows, rows, 1, 16, 4, 2, 0, state)
    graphs.record(model, on, said.append)
    settings = {"learning_rate": 1e-2, "optim": "sgd", "logging_steps": 1, "save_steps": 2, "num_train_epochs": 2}
    return SFTTrainer(
        model=model,
        run={},
        data_collator=Collator(0),
        train_batches=trees,
        train_dataset=rows,
        eval_dataset=rows,
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=trees.accumulation,
            report_to="none",
            use_cpu=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            **{**settings, **more},
        ),
    )


def test_a_run_is_the_same_with_and_without_recordings_also_resumed(tmp_path, capsys):
    curves, said = {}, []
    for on in (True, False):
        run = trainer(tmp_path / str(on), on, said)
        shapes, losses = set(), run._losses

        def watched(model, inputs, shapes=shapes, losses=losses):
            shapes.add((*inputs["input_ids"].shape, len(inputs["labels"])))
            return losses(model, inputs)

        run._losses = watched
        run.train()
        curves[on] = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        if on:
            assert len(shapes) <= 4 and replays(graphs.of(run.model))
    assert curves[True] == pytest.approx(curves[False], rel=1e-4) and not said
    assert "micro-batches are padded to" in capsys.readouterr().out
    for on in (True, False):
        run = trainer(tmp_path / str(not on), on, said)
        run.train(Checkpoint(str(tmp_path / str(not on) / "checkpoint-4")))
        resumed = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        assert len(resumed) == len(curves[on]) > 4 and resumed == pytest.approx(curves[on], rel=1e-4)


def test_memory_that_runs_out_is_taken_from_recordings_first(tmp_path):
    curves = []
    for limited in (False, True):
        said = []
        run = trainer(tmp_path, True, said)
        of, back = graphs.of(run.model), run.accelerator.backward

        def too_large(loss, of=of, back=back, limited=limited):
            back(loss)
            if limited and replays(of):
                raise torch.OutOfMemoryError

        run.accelerator.backward = too_large
        run.train()
        curves.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        assert run.halving.parts == 1
    assert said == ["passes are not recorded as CUDA graphs, but computed kernel by kernel: memory ran out"]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


class OnlyOnTheDevice(TorchDispatchMode):
    """Raises where an operator would copy from the host, or wait for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        given = {of.device.type for of in tree_leaves((args, kwargs)) if isinstance(of, torch.Tensor)}
        made = {of.device.type for of in tree_leaves(result) if isinstance(of, torch.Tensor)}
        assert name not in READS and (len(given | made) < 2 or name in ("mul", "add", "div")), name
        return result


def without_values(model: nn.Module, where: str) -> None:
    """Gives a model tensors without values, in place."""
    moved: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for named in (module._parameters, module._buffers):
            for name, tensor in named.items():
                if tensor is not None:
                    fake = torch.empty_like(tensor, device=where)
                    kept = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
                    named[name] = moved.setdefault(id(tensor), kept)


@pytest.mark.parametrize(
    ("name", "method", "where"),  # fake tensors, and such of a device that is not the host's
    [
        *(("qwen2", "full", "cpu"), ("llama", "lora", "cpu"), ("qwen3", "lora", "cpu"), ("gemma3_text", "lora", "cpu")),
        *(("qwen2", "lora", "meta"), ("gemma3_text", "full", "meta")),
    ],
)
def test_nothing_that_is_recorded_waits_for_the_host(name, method, where, monkeypatch):
    monkeypatch.setattr(device, "starts_kernels", lambda _: True)
    if where == "meta":  # which autocast does not know
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    model = prepared(build(name), method)
    trie, tree = Trie(random_sids(60, (1, 2, 3)), EOS), pad_to(TreeCollator(0, 64, 16)(rows_of(3)), Shape(2, 96, 40))
    asked, completions = prompts(), batch()
    constrained_beam_search(model, *asked, trie, 7)
    with FakeTensorMode(allow_non_fake_inputs=True) if where == "cpu" else nullcontext():
        without_values(model, where)
        for name, value in vars(trie).items():
            if isinstance(value, torch.Tensor):
                setattr(trie, name, torch.empty_like(value, device=where))
        inputs, rows, tree = (
            {name: torch.empty_like(tensor, device=where) for name, tensor in of}
            for of in (enumerate(asked), enumerate(completions), tree.items())
        )
        with OnlyOnTheDevice():
            constrained_beam_search(model, *inputs.values(), trie, 7, tree=True)
            tree_losses(model.train(), tree)[0].sum().backward()
            rows = [tensor[:6] for tensor in rows.values()]
            completion_logps(model, *rows, shared=True, width=7, groups=[3, 3])[0].sum().backward()


def test_a_pass_that_reads_on_the_host_is_not_begun_to_be_recorded(monkeypatch):
    """As with a rotary embedding that depends on the longest position: after a capture that fails, PyTorch's allocator
    fails, too."""

    class Begun(Tape):
        def record(self):
            raise AssertionError("a capture has begun")

    monkeypatch.setitem(graphs.RECORDINGS, "cpu", Begun)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    said = []
    model, of = recorded(prepared(make_model("llama", scale=2.0, rope_parameters=rope), "lora").train(), said)
    losses, _ = train(model, of_trees)
    assert losses.isfinite().all() and not of.on
    assert len(said) == 1 and "_local_scalar_dense: the host reads a value" in said[0]


def test_a_copy_between_host_and_device_is_found_before_a_recording_begins():
    """As Llama 4 makes one with LoRA: it asks where its embedding is, and PEFT copies row numbers there to answer."""
    there, here = torch.ones(2, device="meta"), torch.ones(2)
    with graphs.NoReads(there.device):
        there.double().add_(1).mul_(here.sum()).copy_(there)  # a number of the host is an argument of the kernel
        here.double().copy_(here)
        for copy_of in (lambda: here.to("meta"), lambda: there.copy_(here), there.cpu):
            with pytest.raises(RuntimeError, match="a copy between host and device"):
                copy_of()


def test_a_recording_with_other_gradients_is_not_used(monkeypatch):
    """As it would be if a backward pass kept a value of the host."""
    compute, said = graphs._Pass._compute_gradients, []

    def spoiled(self, outputs):
        if self.forward.calls:  # while the backward pass is recorded
            outputs = tuple(out * 2 if out.requires_grad else out for out in outputs)
        compute(self, outputs)

    monkeypatch.setattr(graphs._Pass, "_compute_gradients", spoiled)
    model = torch.nn.Linear(3, 1)
    model.device = torch.device("cpu")
    of = graphs.Graphs(model, said.append)
    for _ in range(3):
        (loss,) = of(("pass",), lambda x: (model(x),), torch.ones(2, 3))
        loss.sum().backward()
    assert said and "other gradients" in said[0]


def test_no_graph_of_autograd_is_alive_while_a_pass_is_recorded(monkeypatch):
    """A GPU refuses a recorded backward pass that meets nodes which were made outside of it."""
    made, recordings = [], []

    class Strict(Tape):
        def record(self):
            if len(made) == 2:
                recordings.append([one() for one in made])
            return super().record()

    monkeypatch.setitem(graphs.RECORDINGS, "cpu", Strict)
    model = torch.nn.Linear(3, 1)
    model.device = torch.device("cpu")
    of = graphs.Graphs(model, print)

    def compute(x):
        out = model(x)
        made.append(weakref.ref(out))
        return (out,)

    for _ in range(3):
        of(("pass",), compute, torch.ones(2, 3))[0].sum().backward()
    assert replays(of) == 1 and recordings == [[None, None]]  # the first pass, and the eager twin of the recording


def test_recomputed_activations_draw_the_masks_that_they_had(monkeypatch):
    """Where masks of a pass that may be recorded are kept, and others are made again, from the first pass on."""
    monkeypatch.setattr(groups, "KEPT_MASK", 0)
    said = []
    model, of = recorded(prepared(make_model(scale=2.0), "lora", dropout=0.5).train(), said)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    losses, _ = train(model, of_trees)
    assert (
        losses.isfinite().all()
        and not of.on
        and said
        == ["passes are not recorded as CUDA graphs, but computed kernel by kernel: activations are recomputed"]
    )


def test_layers_that_read_on_the_host_are_not_recorded(tmp_path):
    make_model(scale=2.0).save_pretrained(tmp_path)
    flags = AdapterFlags(use_lora=True, load_in_8bit=True)
    model = loading.load_base(str(tmp_path), lora_utils.quantization_config(flags))
    graphs.record(model, True)
    assert graphs.of(model) is None
