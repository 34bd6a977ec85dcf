#!/usr/bin/env python3
"""Line lengths that no formatter keeps: comments and prose.

    tests/style.py            lists what is longer than 100 columns, and fails if something is
    tests/style.py --wrap     wraps the paragraphs of the documentation that are

Comments are those of Rust files. A line is let be that is a table, code, or one long word or link. rustfmt
keeps lines of code at 120, except for literals and the bodies of macros, which nobody checks.
"""

import re
import subprocess
import sys

WIDTH = 100


def main():
    wrap = "--wrap" in sys.argv[1:]
    listed = subprocess.run(["git", "ls-files"], check=True, capture_output=True, text=True).stdout.split("\n")
    wrong = []
    for path in filter(None, listed):
        if path.endswith(".md"):
            if wrap:
                wrap_file(path)
            wrong += [(path, *line) for line in long_prose(read(path))]
        elif path.endswith(".rs"):
            wrong += [(path, *line) for line in long_comments(read(path))]
    for path, number, width in wrong:
        print(f"{path}:{number}: {width} columns, and the most is {WIDTH}")
    if wrong:
        print("wrap comments by hand, and prose with `tests/style.py --wrap`")
    sys.exit(bool(wrong))


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read().split("\n")


def long_comments(lines):
    for number, line in enumerate(lines, 1):
        text = line.lstrip()
        if text.startswith("//") and len(line) > WIDTH and can_be_wrapped(text.lstrip("/! ")):
            yield number, len(line)


def long_prose(lines):
    for number, line, kind in kinds(lines):
        if kind == "prose" and len(line) > WIDTH and can_be_wrapped(line.strip()):
            yield number, len(line)


def can_be_wrapped(text):
    """Whether a part of it fits into a line: not a table, nor one long word or link."""
    return not text.startswith("|") and len(words(text)) > 1


def kinds(lines):
    """Each line with its number and what it is: code, a heading, a table, prose, or nothing."""
    fenced = False
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text.startswith("```"):
            fenced = not fenced
            yield number, line, "code"
        elif fenced or (line.startswith("    ") and not in_list(lines, number - 1)):
            yield number, line, "code"
        elif not text:
            yield number, line, "empty"
        elif text.startswith("#"):
            yield number, line, "heading"
        elif text.startswith("|"):
            yield number, line, "table"
        elif text.startswith("<"):
            yield number, line, "code"
        else:
            yield number, line, "prose"


def in_list(lines, index):
    """Whether an indented line goes on an item of a list: an item stands above it, with no empty line between."""
    for line in reversed(lines[:index]):
        if not line.strip():
            return False
        if ITEM.match(line):
            return True
        if not line.startswith(" "):
            return False
    return False


def wrap_file(path):
    lines = read(path)
    out, paragraph = [], []
    for _, line, kind in kinds(lines):
        if kind == "prose" and not (paragraph and ITEM.match(line)):
            paragraph.append(line)
            continue
        out += wrapped(paragraph)
        paragraph = [line] if kind == "prose" else []
        if kind != "prose":
            out.append(line)
    out += wrapped(paragraph)
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(out))


def wrapped(paragraph):
    """A paragraph or an item of a list; one that fits stays as it is."""
    if all(len(line) <= WIDTH for line in paragraph):
        return paragraph
    item = ITEM.match(paragraph[0])
    first = item.group(0) if item else re.match(r" *(> )?", paragraph[0]).group(0)
    rest = " " * len(first) if item else first
    text = " ".join(line.strip().removeprefix("> ") if not item else line.strip() for line in paragraph)
    text = text.removeprefix(first.strip()).strip() if item else text
    out, line = [], first
    for word in words(text):
        # A line must not begin with what begins a list or a heading.
        risky = re.match(r"([-+*>#]+|1[.)])$", word)
        if len(line) + len(word) > WIDTH and line.strip() != first.strip() and not risky:
            out.append(line.rstrip())
            line = rest
        line += word + " "
    return [*out, line.rstrip()]


def words(text):
    """Words, with code spans and links whole where they are short."""
    found, word = [], ""
    for part in text.split(" "):
        word = f"{word} {part}" if word else part
        open_link = word.count("[") > word.count("]")
        if (word.count("`") % 2 == 0 and not open_link) or len(word) > WIDTH // 2:
            found.append(word)
            word = ""
    return found + ([word] if word else [])


ITEM = re.compile(r" *([-*+]|\d+[.)]) +")

main()
