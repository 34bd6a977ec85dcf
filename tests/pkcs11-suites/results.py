"""Holds what a PKCS#11 test suite did against the list of what it may leave out, and prints the table of all suites.

    results.py deselected SKIPS MODULE                 prints pytest arguments for the tests that are not run
    results.py record RESULTS SUITE MODULE SKIPS KIND FILE SECONDS STATUS
                                                       judges one suite's run; KIND is pytest, cargo or tool
    results.py table RESULTS                           prints the table

A line of a skip list is `module | kind | test | reason`:
  module  `softhsm2`, `hsm-sim`, another module's file name without `.so`, or `*` for all
  kind    `deselected`  we do not run the test
          `skipped`     the suite leaves the test out by itself
          `fails`       the test is run and fails, for a reason that is no defect of the module
  test    the test's name as printed here; `*`, `?` and `[…]` match as in a shell
A test that skips or fails without an entry fails the run, and so does an entry that matches no test any more.
"""

import fnmatch
import json
import pathlib
import re
import sys
import textwrap
import xml.etree.ElementTree as ET


def main(arguments):
    command, rest = arguments[0], arguments[1:]
    if command == "deselected":
        return deselected(*rest)
    if command == "record":
        return record(*rest)
    if command == "table":
        return table(*rest)
    sys.exit(f"unknown command `{command}`")


def deselected(skips, module):
    for entry in read_skips(skips, module):
        if entry["kind"] == "deselected":
            test = entry["test"]
            print(f"--deselect={test}" if "::" in test else f"--ignore={test}")
    return 0


def record(results, suite, module, skips, kind, file, seconds, status):
    readers = {"pytest": read_pytest, "cargo": read_cargo, "tool": read_tool}
    outcomes = readers[kind](file)
    entries = read_skips(skips, module)
    problems = []
    counts = {"passed": 0, "skipped": 0, "failed": 0}
    left_out = {}

    for test, (outcome, detail) in outcomes.items():
        if outcome == "passed":
            counts["passed"] += 1
            continue
        wanted = "skipped" if outcome == "skipped" else "fails"
        entry = next((e for e in entries if e["kind"] == wanted and fnmatch.fnmatchcase(test, e["test"])), None)
        if entry is None:
            counts["failed"] += 1
            problems.append(f"{test}: {outcome} and not in {pathlib.Path(skips).name}: {detail}")
        else:
            entry["used"] = True
            counts["skipped"] += 1
            left_out[entry["reason"]] = left_out.get(entry["reason"], 0) + 1

    for entry in entries:
        if entry["kind"] == "deselected":
            left_out[f"not run: {entry['reason']}"] = left_out.get(f"not run: {entry['reason']}", 0) + 1
        elif not entry.get("used"):
            problems.append(f"{pathlib.Path(skips).name}: `{entry['test']}` ({entry['kind']}) matches no such test any more: remove it")
    if counts["passed"] == 0:
        problems.append("no test passed: the suite did not run")
    # A runner that ends badly is a failure too, unless all that it says is that tests failed.
    if int(status) not in (0, TESTS_FAILED.get(kind)):
        problems.append(f"the runner ended with status {status}{', by its time limit' if int(status) == 124 else ''}")
    elif int(status) != 0 and not problems and not any(e["kind"] == "fails" for e in entries):
        problems.append(f"the runner ended with status {status}, but no test failed")

    for problem in problems:
        print(f"pkcs11-suites: {suite} on {module}: {problem}", file=sys.stderr)
    row = {"suite": suite, "module": module, "seconds": int(seconds), "left_out": left_out, "ok": not problems, **counts}
    order = len(list(pathlib.Path(results).glob("*.json")))
    pathlib.Path(results, f"{order:02}-{suite}.json").write_text(json.dumps(row))
    return 0 if row["ok"] else 1


def table(results):
    rows = [json.loads(path.read_text()) for path in sorted(pathlib.Path(results).glob("*.json"))]
    print()
    print(f"{'suite':<14} {'module':<10} {'passed':>6} {'skipped':>7} {'failed':>6} {'seconds':>7}  skipped because")
    for row in rows:
        reasons = [line for reason, n in sorted(row["left_out"].items(), key=lambda item: -item[1])
                   for line in textwrap.wrap(f"{n} × {reason}", 90, subsequent_indent="    ")]
        first, more = (reasons[0], reasons[1:]) if reasons else ("", [])
        verdict = "" if row["ok"] else "  FAILED"
        print(f"{row['suite']:<14} {row['module']:<10} {row['passed']:>6} {row['skipped']:>7} {row['failed']:>6} {row['seconds']:>7}  {first}{verdict}")
        for reason in more:
            print(" " * 57 + reason)
    passed, failed, skipped = (sum(row[name] for row in rows) for name in ("passed", "failed", "skipped"))
    print(f"\n{passed} passed, {failed} failed, {skipped} skipped")
    return 0 if rows and all(row["ok"] for row in rows) else 1


def read_skips(path, module):
    entries = []
    for number, line in enumerate(pathlib.Path(path).read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = [field.strip() for field in line.split("|", 3)]
        if len(fields) != 4 or not all(fields) or fields[1] not in ("deselected", "skipped", "fails"):
            sys.exit(f"{path}:{number}: want `module | deselected, skipped or fails | test | reason`")
        if fields[0] in ("*", module):
            entries.append(dict(zip(("module", "kind", "test", "reason"), fields)))
    return entries


def read_pytest(path):
    """JUnit XML: {`module::Class::test`: (outcome, detail)}. A failure in set-up or tear-down is a failed test."""
    outcomes = {}
    if not pathlib.Path(path).is_file():
        return outcomes
    for case in ET.parse(path).getroot().iter("testcase"):
        name = "::".join(case.get("classname", "").split(".")[1:] + [case.get("name", "")])
        outcome, detail = "passed", ""
        for child in case:
            if child.tag in ("failure", "error"):
                outcome, detail = "failed", child.get("message", "").splitlines()[0] if child.get("message") else child.tag
            elif child.tag == "skipped" and outcome == "passed":
                outcome, detail = "skipped", child.get("message", "")
        if outcomes.get(name, ("passed",))[0] == "passed":
            outcomes[name] = (outcome, detail)
    return outcomes


def read_cargo(path):
    """`cargo test -- --show-output`: {`binary::test`: (outcome, detail)}."""
    outcomes, early, announced, binary, shown = {}, set(), {}, "", ""
    for line in pathlib.Path(path).read_text(errors="replace").splitlines():
        if match := re.match(r"\s+Running .*?([\w-]+)\.rs \(", line):
            binary, shown = match[1], ""
        elif match := re.match(r"running (\d+) tests?$", line):
            announced[binary] = int(match[1])
        elif match := re.match(r"test (\S+)(?: - should panic)? \.\.\. (ok|FAILED|ignored)(?:, (.*))?$", line):
            outcome = {"ok": "passed", "FAILED": "failed", "ignored": "skipped"}[match[2]]
            outcomes[f"{binary}::{match[1]}"] = (outcome, match[3] or match[2])
        elif match := re.match(r"---- (\S+) stdout ----", line):
            shown = f"{binary}::{match[1]}"
        elif line == "returned early":
            early.add(shown)
    for test in early:
        if outcomes.get(test, ("",))[0] == "passed":
            outcomes[test] = ("skipped", "the test returned early")
    # A binary that died gives no line for the test it died in, nor for those after it.
    for binary, number in announced.items():
        ended = sum(test.startswith(f"{binary}::") for test in outcomes)
        if ended != number:
            outcomes[f"the binary {binary}"] = ("failed", f"{ended} of {number} tests ended: it died")
    return outcomes


def read_tool(path):
    """Steps of pkcs11-tool: each is a test, and each line that tells of something left out is a skipped one."""
    outcomes, step, number, bad = {}, "", 0, ""
    for line in pathlib.Path(path).read_text(errors="replace").splitlines():
        if line.startswith("#step "):
            step, number, bad = line[6:], 0, ""
        elif line.startswith("#status "):
            failed = line[8:] != "0" or bad
            outcomes[step] = ("failed", bad or f"exit status {line[8:]}") if failed else ("passed", "")
        elif re.search(r"^warning: .*NOT_SUPPORTED|not implemented|not supported|unsupported|no private key found|skip|ignor", line, re.IGNORECASE):
            number += 1
            outcomes[f"{step}: {line.strip()}"] = ("skipped", line.strip())
        elif re.search(r"\berr(or)?s?:|\bERR\b|^[1-9]\d* errors|FAIL", line) or re.search(r"rv\s*[=:]\s*CKR_(?!OK)", line):
            # ALREADY_INITIALIZED is what a second thread must get.
            if "CKR_CRYPTOKI_ALREADY_INITIALIZED" not in line or step == "test-fork":
                bad = bad or line.strip()
    return outcomes


# The exit status by which each runner says that tests failed, and nothing worse.
TESTS_FAILED = {"pytest": 1, "cargo": 101}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
