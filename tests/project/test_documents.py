"""The documents: every link leads somewhere, and a measured figure stands in a table or sentence of RESULTS."""

import re
from pathlib import Path

import pytest
from helpers import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
FIGURES_FROM_RESULTS = ["README.md", "README.zh-CN.md", "docs/guide.zh-CN.md", "docs/memory.md", "docs/faq.md"]
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)


def anchors(document: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, spaces as hyphens, no punctuation."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(document):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", document.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def figures(text: str) -> set[str]:
    """Numbers with a decimal point or a thousands separator, outside code, links and outputs; .142 is 0.142."""
    text = re.sub(r"\]\([^)]*\)", "]", CODE.sub("", text))
    found = re.findall(r"(?<![\w.])\d*(?:,\d{3})*\.?\d+(?![\w.]*\d)", text)
    return {f"0{number}" if number.startswith(".") else number for number in found if re.search(r"[.,]", number)}


@pytest.mark.parametrize("name", FIGURES_FROM_RESULTS)
def test_measured_figures_stand_in_the_results(name):
    """A figure that changes in one place must not stay behind in another. Versions are no results."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = re.sub(r"(Python|torch|Qwen|Apache|bitsandbytes|用|换成了测试所用的)[ -]?\d[\d.]*", "", text)
    text = re.sub(r"^\| [^|]*", "", text, flags=re.MULTILINE)  # the first cell of a table row says what it is about
    results = figures((ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8"))
    known = results | {f"{float(n.replace(',', '')):g}" for n in results}
    lacking = {n for n in figures(text) if n not in known and f"{float(n.replace(',', '')):g}" not in known}
    assert not lacking, sorted(lacking)
