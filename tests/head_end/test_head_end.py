#!/usr/bin/env python3
"""Runs the example head-end against a real server and a simulated meter: the frames are made and checked by dlms-cosem.

Needs `cargo build --release --workspace` before. The last line is "N passed, N failed".
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import traceback

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PROGRAMS = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target")) / "release"
CLIENT_TITLE = "4D4D4D0000000001"


class Running:
    """A process that prints when it is ready, and ends with the test."""

    def __init__(self, arguments, ready, given=None):
        self.process = subprocess.Popen(
            [str(argument) for argument in arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if given is not None:
            self.process.stdin.write(given)
        self.process.stdin.close()
        self.printed = ""
        for line in self.process.stdout:
            self.printed += line
            found = re.search(ready, line)
            if found:
                self.ready = found
                return
        raise AssertionError(f"{arguments[0]} was not ready; it printed:\n{self.printed}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def simulated(device):
    """A device of the vendor's plaintext list as an ordinary meter of the simulator."""
    setup = device["security_setups"][0]
    return {
        "system_title": device["system_title"],
        "security_suite": device["security_suite"],
        "security_setups": [setup],
        "associations": [{"client_sap": 1, "mechanism": "high-gmac", "security_setup": setup["logical_name"]}],
        "objects": [{"class": "register", "logical_name": "1.0.1.8.0.255", "value": {"double-long-unsigned": 4711}, "scaler": 0, "unit": 30}],
        # A meter that takes no invocation counter twice, not even for its GMAC and the APDU around it.
        "behaviour": {"gmac_counter": "must-differ"},
    }


def head_end(state, meter, address):
    """Runs the example as a user would, and returns what it printed."""
    arguments = [sys.executable, REPOSITORY / "tests/head_end/head_end.py", "--profile", state / "profiles/head-end"]
    arguments += ["--meter", meter, "--client-title", CLIENT_TITLE, "--address", address]
    done = subprocess.run([str(argument) for argument in arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_reads_a_register_three_times():
    with tempfile.TemporaryDirectory(prefix="kms-head-end-") as folder:
        state = pathlib.Path(folder) / "kms"
        arguments = [PROGRAMS / "kms-server", "dev", "--state", state, "--listen", "127.0.0.1:0", "--meters", "20"]
        with Running(arguments, r"Serving on (\S+);"):
            device = json.loads((state / "vendor/devices.jsonl").read_text().splitlines()[11])
            simulation = {"listeners": [{"address": "127.0.0.1:0", "meter": simulated(device)}]}
            with Running([PROGRAMS / "meter-sim"], r"(127\.0\.0\.1:\d+)", json.dumps(simulation)) as meter:
                last = 0
                for _ in range(3):
                    printed = head_end(state, device["system_title"], meter.ready.group(1))
                    assert "1.0.1.8.0.255 = 4711" in printed, printed
                    first = int(re.search(r"counters (\d+) to", printed).group(1))
                    assert first > last, "a newer lease starts higher"
                    last = first
                    keys = [value for name, value in device["security_setups"][0].items() if name != "logical_name"]
                    assert not any(key.lower() in printed.lower() for key in keys), "a key was printed"


def main():
    tests = [test_reads_a_register_three_times]
    failed = 0
    for test in tests:
        try:
            test()
            print(f"{test.__name__}: ok")
        except Exception:
            failed += 1
            print(f"{test.__name__}: FAILED")
            traceback.print_exc()
    print(f"{len(tests) - failed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
