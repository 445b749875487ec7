"""What the pages for people say: their commands, the files and settings they name, their links and headings."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "shards/README.md", "launch_configs/README.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))

COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(lgp|accelerate|torchrun|sbatch|pip|scripts/\w+)(?= |$)")
"""The beginning of a line, or of text between backticks, that is a command."""

MENTION = re.compile(r"(lgp|accelerate|torchrun|sbatch)( [a-z-]+){0,2}")
"""Between backticks: the name of a command, without what it needs."""

SAID_BEHIND = re.compile(r"\s{2,}|\s#\s|\s>\s")
"""What divides a command in a block from words that explain it, or from the file that takes what it prints."""

PLACEHOLDERS = {
    "STAGE": "finetune",
    "RECIPE": "tiny",
    "QUESTION": "rows",
    "ARM": "recipe",
    "LAYOUT": "imagefolder",
    "RUN RUN": "runs/tiny runs/other",
    "RUN": "runs/tiny",
    "PATH": "runs/tiny/checkpoints/finetune/step-00000500",
    "KEY": "r0.0-5",
    "FILES_OF_BENCH_ENGINE": "engines.json",
    "FOLDER": "folder",
    "FOLDERS_OF_PHOTOGRAPHS": "photographs,others",
    "IMAGES": "some.jpg",
    "FILE.py": "some.py",
    "SHARDS": "shards/sample",
    "ROOT": "shards/sample",
    "ADDRESS": "https://host/shards",
    "launch_configs/FILE": "launch_configs/cpu_2.yaml",
    "FILE": "some.file",
    "NAME": "name",
    "N": "1",
    "S": "1",
    "%a": "1",
    "$NODE_RANK": "0",
    "$HEAD_NODE": "10.0.0.5",
    "--dotted.overrides": "--finetune.policy shared",
}
"""What stands for something -> an example of it."""


@dataclass(frozen=True)
class Command:
    """A command as a page has it, with examples in place of what stands for something."""

    page: str
    text: str
    words: tuple[str, ...]
    """Without variables in front."""
    named: bool = False
    """It is only named, without what it needs."""


def blocks(text: str) -> tuple[list[str], str]:
    """Lines of fenced and indented blocks, where one that ends with a backslash has its next; and the text without."""
    code, prose = list[str](), list[str]()
    fenced = indented = False
    for line in text.split("\n"):
        if line.startswith("```"):
            fenced = not fenced
            continue
        indented = line.startswith("    ") and (indented or not prose or not prose[-1].strip())
        if not (fenced or indented):
            prose.append(line)
        elif code and code[-1].endswith("\\"):
            code[-1] = f"{code[-1][:-1].rstrip()} {line.strip()}"
        else:
            code.append(line.strip())
    return code, "\n".join(prose)


def spans(prose: str) -> list[str]:
    """Texts between backticks."""
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", prose)]


def commands(page: str, text: str) -> list[Command]:
    """Every command of a page, each once; in blocks without the words that explain it."""
    code, prose = blocks(text)
    lines = [SAID_BEHIND.split(line)[0] for line in code]
    mentions = [Command(page, text, tuple(text.split()), True) for text in spans(prose) if MENTION.fullmatch(text)]
    lines += [text for text in spans(prose) if not MENTION.fullmatch(text)]
    found = [command for line in lines if COMMAND.match(line) for command in expanded(page, line)]
    return list(dict.fromkeys(command for command in found + mentions if len(command.words) > 1 or "/" in command.text))


def expanded(page: str, line: str) -> Iterator[Command]:
    """A command for each of the alternatives `a | b`, or `a|b`, with examples for placeholders.

    `RUN RUN ...` stands for any number, `--option ...` for a value; with more options after the dots it is only named.
    """
    text = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line)
    if several := re.search(r"[\w-]+(?: \| [\w-]+)+", text):
        for name in several[0].split(" | "):
            yield Command(page, line, tuple(shlex.split(text[: several.start()] + name)), named=True)
        return
    if " ... --" in text:
        yield Command(page, line, tuple(re.split(r" [A-Z]", text)[0].split()), named=True)
        return
    text = re.sub(r"(--[\w.-]+) \.\.\.$", r"\1 NAME", text)
    text = text.replace("[--", "--").replace("] ", " ").replace(" ...", "").removesuffix("]")
    for old, new in PLACEHOLDERS.items():
        text = re.sub(rf"(?<![\w$/]){re.escape(old)}(?!\w)|(?<=/){re.escape(old)}(?!\w)", new, text)
    if several := re.search(r"\S+(?:\|\S+)+", text):
        for choice in several[0].split("|"):
            yield Command(page, line, tuple(shlex.split(text.replace(several[0], choice))))
        return
    yield Command(page, line, tuple(shlex.split(text)))


def files_named(text: str) -> set[str]:
    """Files of this repository that a page names between backticks or in a command, by their path from its root.

    What follows a command tells what it writes, which need not be there.
    """
    code, prose = blocks(text)
    words = {word for line in code for word in SAID_BEHIND.split(line)[0].split()}
    words |= {word for span in spans(prose) for word in span.split()}
    words = {word.strip("`'\"(),;:").split("::")[0] for word in words}
    tops = ("lgp_dist/", "tests/", "scripts/", "launch_configs/", "benchmarks/", "docs/")
    return {word for word in words if word.startswith(tops) and not re.search(r"[A-Z*{=]|seed\d", word)}


def settings_named(text: str) -> set[str]:
    """Dotted settings of a recipe that a page names as options, with underscores."""
    code, prose = blocks(text)
    found = re.findall(r"--([a-z_]+(?:\.[a-zN0-9_-]+)+)", "\n".join([*code, *spans(prose)]))
    return {name.replace("-", "_").replace(".N.", ".0.") for name in found if name != "dotted.overrides"}


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings that a code host and the site's builder both make."""
    _, prose = blocks(text)
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose, re.MULTILINE):
        bare = re.sub(r"[^\w\s-]", "", heading.lower()).strip()
        if re.sub(r"\s", "-", bare) == re.sub(r"[\s-]+", "-", bare):
            found.add(re.sub(r"\s", "-", bare))
    return found


def links(text: str) -> list[str]:
    """Targets of a page's links and images that lead into this repository."""
    _, prose = blocks(text)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def broken(page: str, text: str) -> list[str]:
    """A sentence for each link of a page whose file or heading is not there."""
    wrong = []
    for target in links(text):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if path and not file.exists():
            wrong.append(f"{page}: {target}: no such file")
        elif anchor and anchor not in slugs(text if not path else file.read_text()):
            wrong.append(f"{page}: {target}: no such heading")
    return wrong
