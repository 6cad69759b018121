"""Markdown pages of the repository: their code blocks, links and figures."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "tests" / "fixtures" / "README.md",
]
RUN = ("sh", "bash", "python")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (long|not run: .+?|file: .+?) -->\n\Z")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Args:
        line: of the page, where the code begins.
        language: what stands behind the fence.
        mark: "long" (run with --whole only), "not run: why", "file: path" (it shows a file that is
            tested elsewhere), or "" for what is always run.
    """

    page: Path
    line: int
    language: str
    code: str
    mark: str

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


def name(page: Path) -> str:
    """A page's path in the repository."""
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        mark = MARK.search(text[: match.start()])
        line = text.count("\n", 0, match.start(2)) + 1
        found.append(Block(page, line, match[1], match[2], mark[1] if mark else ""))
    return found


def prose(page: Path) -> str:
    """A page's text without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def inline(page: Path) -> list[str]:
    """What stands between backticks in the prose."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def links(page: Path) -> list[str]:
    """Targets of a page's links and pictures."""
    return LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """Names that a link may have behind its #, as GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", head.lower()) for head in heads]
    return {head.strip().replace(" ", "-") for head in plain}
