import ast
import inspect
import os
import re
import subprocess
import sys

import pytest
from fire import docstrings
from helpers import ROOT, run_command

import evaluate
import merge_lora
import rl
import sft
from minionerec import cli
from minionerec.cli import parse_flags, parse_value
from minionerec.errors import InputError
from scripts.train_sasrec import train_sasrec


def command(output_dir: str = "", use_lora: bool = False, lora_r: int = 16, lora_target_modules: str = "all"):
    pass


PARAMETERS = dict(inspect.signature(command).parameters)


def problems(*argv: str) -> str:
    with pytest.raises(InputError) as error:
        parse_flags(list(argv), PARAMETERS)
    return str(error.value)


def test_values_arrive_as_the_signature_says():
    argv = ["--output_dir", "2018", "--use_lora", "--lora-r=8", "--lora_target_modules", "q_proj,v_proj"]
    texts = parse_flags(argv, PARAMETERS)
    values = {name: parse_value(text, PARAMETERS[name].annotation) for name, text in texts.items()}
    assert values == {
        "output_dir": "2018",
        "use_lora": True,
        "lora_r": 8,
        "lora_target_modules": "q_proj,v_proj",
    }


def test_lower_case_false_is_false():
    assert parse_value("false", bool) is False


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        *[("yes", bool), ("1.5", int), ("1e3", int), ("1" + "0" * 30, int)],
        *[("abc", float), ("nan", float), ("inf", float)],
    ],
)
def test_a_value_of_another_type_is_refused(text, kind):
    with pytest.raises(ValueError):
        parse_value(text, kind)


def test_none_is_only_for_optional_flags():
    assert parse_value("None", str | None) is None
    assert parse_value("None", str) == "None"


def test_every_problem_is_reported_at_once():
    text = problems("--use_lroa", "True", "stray", "--lora", "--lora_r", "x", "--output_dir")
    assert "unknown flag --use_lroa; did you mean --use_lora?" in text
    assert "unknown flag --lora; did you mean --use_lora?" in text
    assert "'stray' is not a flag" in text
    assert "--lora_r 'x' is not valid; expected a whole number" in text
    assert "--output_dir needs a value" in text


def test_abbreviations_are_refused_and_the_last_value_counts():
    assert "'-u' is not a flag" in problems("-u", "True")
    assert parse_flags(["--lora_r", "1", "--lora_r=2"], PARAMETERS) == {"lora_r": "2"}


UPSTREAM = {
    rl.train: {
        "model_path": "", "seed": 42, "train_file": "", "eval_file": "", "info_file": "", "category": "",
        "wandb_project": "", "wandb_run_name": "", "output_dir": "", "train_batch_size": 32, "eval_batch_size": 32,
        "gradient_accumulation_steps": 1, "temperature": 1.0, "add_gt": False, "eval_step": 0.199,
        "num_generations": 16, "num_train_epochs": 1, "learning_rate": 1e-6, "beta": 0.04, "beam_search": False,
        "test_during_training": True, "dynamic_sampling": False, "mask_all_zero": False, "sync_ref_model": False,
        "test_beam": 20, "reward_type": "rule", "sample_train": False, "ada_path": "", "cf_path": "",
        "sid_index_path": "", "item_meta_path": "", "dapo": False, "gspo": False,
    },
    sft.train: {
        "base_model": "", "train_file": "", "eval_file": "", "output_dir": "", "sample": -1, "seed": 42,
        "batch_size": 128, "micro_batch_size": 4, "num_epochs": 10, "learning_rate": 3e-4, "cutoff_len": 512,
        "group_by_length": False, "freeze_LLM": False, "wandb_project": "", "wandb_run_name": "",
        "resume_from_checkpoint": None, "category": "", "train_from_scratch": False, "sid_index_path": "",
        "item_meta_path": "",
    },
    evaluate.evaluate: {
        "base_model": "", "train_file": "", "info_file": "", "category": "", "test_data_path": "",
        "result_json_data": "", "batch_size": 4, "K": 0, "seed": 42, "length_penalty": 0.0, "max_new_tokens": 256,
        "num_beams": 50,
    },
}  # fmt: skip


@pytest.mark.parametrize("function", UPSTREAM)
def test_upstream_flags_keep_names_and_defaults(function):
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in UPSTREAM[function]} == UPSTREAM[function]


@pytest.mark.parametrize("function", UPSTREAM)
def test_every_flag_is_documented_and_no_other(function):
    lines = inspect.getdoc(function).split("Args:\n", 1)[1].splitlines()
    documented = [line.strip().split(":")[0] for line in lines if line.startswith("    ") and line[4] != " "]
    assert documented == list(inspect.signature(function).parameters)


def test_values_from_python_have_the_types_of_their_flags(tmp_path):
    with pytest.raises(InputError) as refused:
        sft.train(use_lora="False", batch_size="abc", learning_rate=True, tasks=["sid_history_to_sid"], base_model=None)
    assert refused.value.problems == [
        "--use_lora 'False': must be bool, not str",
        "--batch_size 'abc': must be int, not str",
        "--learning_rate True: must be float, not bool",
        "--tasks ['sid_history_to_sid']: must be str, not list",
        "--base_model None: must be str, not NoneType",
    ]
    with pytest.raises(InputError) as refused:  # a path and a whole number are as good as text and a fraction
        sft.train(output_dir=tmp_path, learning_rate=1, prompt_file=None)
    assert not any("must be" in problem for problem in refused.value.problems)


@pytest.mark.parametrize("no", ["False", "false", "None", False])
def test_no_checkpoint_to_resume_from_can_be_said(no):
    with pytest.raises(InputError) as refused:
        sft.train(resume_from_checkpoint=no)
    assert not any("resume_from_checkpoint" in problem for problem in refused.value.problems)


def test_a_misspelt_keyword_and_a_positional_argument_are_named():
    with pytest.raises(
        TypeError, match=r"train\(\) got an unexpected keyword argument 'base_modle'; did you mean 'base_mo"
    ):
        sft.train(base_modle="x")
    with pytest.raises(TypeError, match=r"train\(\) takes keyword arguments, or RLFlags alone"):
        rl.train("x")


def test_help_into_a_pipe_that_is_closed_ends_quietly():
    """As `python sft.py --help | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run([sys.executable, "sft.py", "--help"], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT)
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")


@pytest.mark.parametrize("error", ["torch.OutOfMemoryError('CUDA out of memory')", "MemoryError()"])
def test_running_out_of_memory_ends_with_what_to_try(tmp_path, error):
    script = tmp_path / "hungry.py"
    signature = "rows: int = 1, batch_size: int = 4, use_qlora: bool = False"
    code = f"import torch\nfrom minionerec import cli\ndef eat({signature}):\n    raise {error}\ncli.run(eat)\n"
    script.write_text(code)
    result = run_command(str(script), rows=2)
    assert result.returncode == 1
    assert result.stderr.strip().endswith("in this order: a smaller --batch_size, --use_qlora True")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("command", "given", "advised"),
    [
        (sft.train, {}, "micro_batch_size gradient_checkpointing cutoff_len use_qlora"),
        (sft.train, {"use_qlora": "True", "batch_size": "8"}, "micro_batch_size gradient_checkpointing cutoff_len"),
        (
            *(sft.train, {"use_lora": "True", "load_in_8bit": "true"}),
            "micro_batch_size gradient_checkpointing cutoff_len use_qlora use_lora load_in_8bit",
        ),
        (sft.train, {"freeze_LLM": "True"}, "micro_batch_size gradient_checkpointing cutoff_len"),
        (rl.train, {}, "train_batch_size eval_batch_size num_generations gradient_checkpointing use_qlora"),
        (evaluate.evaluate, {}, "batch_size num_beams"),
        (train_sasrec, {}, "batch_size hidden_size"),
        (merge_lora.merge, {}, ""),
    ],
)
def test_the_advice_names_flags_that_the_command_has(command, given, advised):
    text = cli._what_saves_memory(dict(inspect.signature(command).parameters), given)
    assert re.findall(r"--(\w+)", text) == advised.split()
    assert advised or "CUDA_VISIBLE_DEVICES= before the command" in text


@pytest.mark.parametrize("script", ["sft.py", "rl.py", "evaluate.py", "recommend.py"])
def test_help_lists_the_flags_and_imports_nothing_heavy(script):
    argv = [sys.executable, "-X", "importtime", script, "--help"]
    result = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0
    imports = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    modules = {line.rsplit("|", 1)[1].strip() for line in imports}
    assert "minionerec.cli" in modules
    assert not {"torch", "transformers", "peft", "datasets", "numpy"} & modules
    shown = result.stdout + "".join(line for line in result.stderr.splitlines() if line not in imports)
    assert ("--model" if script == "recommend.py" else "--base_model") in shown and "category" in shown


def test_help_shows_every_word_about_a_flag():
    """Fire takes a line such as `other in it follows: a file` for another flag, and leaves it out."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, ast.FunctionDef)]
    texts += [command.__doc__ for command in (sft.train, rl.train, evaluate.evaluate, merge_lora.merge)]
    texts = [text for text in texts if "Args:" in text]
    assert len(texts) > 4
    for text in texts:
        written = text.partition("Args:")[2].split("\n\n")[0]
        shown = " ".join(f"{flag.name}: {flag.description}" for flag in docstrings.parse(text).args)
        assert not set(written.split()) - set(shown.split())


def test_few_compiled_products_are_kept(tmp_path):
    """bfloat16 products of 900 widths: kept, they hold 0.6 GB; those of the last 64 less than a tenth of that."""
    script = tmp_path / "widths.py"
    script.write_text(
        "from minionerec import cli\nfrom minionerec.process_memory import rss_gb\n"
        "def multiply(count: int = 900):\n"
        "    import torch\n"
        "    rows, weight = torch.randn(1000, 64).bfloat16(), torch.randn(64, 256).bfloat16()\n"
        "    torch.mm(rows, weight)\n"
        "    before = rss_gb()\n"
        "    for width in range(count):\n"
        "        torch.mm(rows[: width + 65], weight)\n"
        "    print(rss_gb() - before)\n"
        "cli.run(multiply)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in cli.KERNEL_CACHE_LIMITS}
    environment["PYTHONPATH"] = str(ROOT)
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 0.2


def test_no_command_imports_torch_before_its_environment_is_set():
    """In one process, which is told the name of each script with a command line."""
    scripts = [path for folder in (".", "scripts", "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))]
    commands = [str(path) for path in scripts if "cli.run(" in path.read_text()]
    assert len(commands) >= 14
    code = (
        "import runpy, sys\n"
        "for path in sys.argv[1:]:\n"
        "    runpy.run_path(path)\n"
        "    assert 'torch' not in sys.modules, path\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *commands], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("given", "read"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_the_threads_of_a_command_wait_asleep_unless_the_user_says_otherwise(tmp_path, given, read):
    """As the OpenMP runtime itself reports what it read when torch loaded it, in the command and in its children."""
    script = tmp_path / "threads.py"
    script.write_text(
        "import os\nfrom minionerec import cli\ndef threads(count: int = 1):\n    import torch\n"
        "    os.system('echo $OMP_WAIT_POLICY')\ncli.run(threads)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in cli.THREADS_SLEEP} | given
    environment |= {"PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "true"}
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert f"OMP_WAIT_POLICY = '{read}'" in result.stderr and result.stdout == f"{read}\n"
