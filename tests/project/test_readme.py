"""The commands of README run as written, in both languages, after a quick start."""

import csv
import re
import shlex

import pytest
from helpers import ROOT, run_command, succeed

# What is tested elsewhere: test_scripts.py runs the scripts.
ELSEWHERE = ("bash scripts/quickstart.sh", "source .venv", "DATA=out/tools CATEGORY=Tools METHOD=lora")


def commands(document: str) -> list[str]:
    """The lines of the bash blocks, continuations joined, comments left out."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ")
    lines = (re.sub(r"(^|\s)# .*", "", line).strip() for line in blocks.splitlines())
    return [line for line in lines if line]


def test_both_languages_have_the_same_commands():
    assert commands("README.md") == commands("README.zh-CN.md")


@pytest.fixture
def after_a_quick_start(base, tmp_path, monkeypatch):
    """The folder that README's commands run in: the data of the demo, of every tenth customer, and a small base."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    with open("examples/demo/purchases.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    customer = header.index("customer")
    some = set(sorted({row[customer] for row in rows})[::10])
    with open("purchases.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *(row for row in rows if row[customer] in some)])
    succeed(
        "scripts/prepare_data.py",
        interactions="purchases.csv",
        items="examples/demo/items.csv",
        output_dir="out/quickstart/data",
        category="workshop",
        codes=16,
        min_interactions=1,
    )
    (tmp_path / "out" / "quickstart" / "base").mkdir()
    (tmp_path / "out" / "quickstart" / "base" / "final_checkpoint").symlink_to(base)
    return tmp_path


@pytest.mark.slow
def test_the_commands_run_as_written(after_a_quick_start, capsys):
    settings: dict[str, str] = {}
    ran = []
    for line in commands("README.md"):
        if line.startswith(ELSEWHERE):
            continue
        for name, value in settings.items():
            line = re.sub(rf"\${name}\b", value, line)
        if assigned := re.fullmatch(r'(\w+)="?([^"]*)"?', line):
            settings[assigned[1]] = assigned[2]
            continue
        python, script, *words = shlex.split(line)
        assert python == "python", line
        result = run_command(script, *words)
        assert result.returncode == 0, (line, result.stderr[-2000:])
        ran.append(script)
    assert ran == ["sft.py", "rl.py", "evaluate.py", "recommend.py", "merge_lora.py", "scripts/prepare_data.py"]
    assert (after_a_quick_start / "out" / "merged" / "config.json").is_file()
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(compile(lines, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.strip().splitlines()) == 5
