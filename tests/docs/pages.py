"""The documentation as the tests read it: pages, their text without code, their code blocks, their anchors."""

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
_FENCE = re.compile(r"^(?P<fence>```+)(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL)


def tracked_files() -> list[Path]:
    """Return every file that belongs to the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [path for line in listed.stdout.splitlines() if (path := ROOT / line).is_file()]


PAGES = sorted(path for path in tracked_files() if path.suffix == ".md")
DOCS = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced piece of code, with the page and line where it begins."""

    page: Path
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(language: str) -> list[Block]:
    """Return all code blocks in a language."""
    return [block for page in PAGES for block in _blocks(page) if block.language == language]


def _blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page=page, line=line, language=match["language"], code=match["code"])


def prose(page: Path) -> str:
    """Return a page's text without its code blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def inline_code() -> set[str]:
    """Return everything that stands in single backticks outside of code blocks."""
    return {code for page in PAGES for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page))}


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, in the way that code forges make them."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", prose(page), re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        found.add(f"{words}-{seen[words]}" if seen[words] else words)
        seen[words] += 1
    return found
