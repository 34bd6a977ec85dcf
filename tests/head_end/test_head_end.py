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
import threading
import time
import traceback
import uuid

from head_end import Profile, open_session, read_register

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PROGRAMS = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target")) / "release"
CLIENT_TITLE = "4D4D4D0000000001"
# Challenges of the simulated meters come from it.
SEED = int(os.environ.get("METER_SIM_SEED", "1"))
METERS = 184
# Meters of which two each have the same keys, as some vendors deliver them.
EQUAL_KEYS = 16


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
                # What it goes on printing is read, so that it never waits for a reader.
                self.reader = threading.Thread(target=self.read, daemon=True)
                self.reader.start()
                return
        raise AssertionError(f"{arguments[0]} was not ready; it printed:\n{self.printed}")

    def read(self):
        for line in self.process.stdout:
            self.printed += line

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
            self.reader.join(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


# The first octets of requests: a challenge that begins so is not answered in the HSM, and another association follows.
REQUESTS = ["01", "05", "06", "10", "16", "C0", "C1", "C3", "D9", "E0"]


def simulated(device, faults=(), behaviour=None, challenges=()):
    """A device of the vendor's plaintext list as an ordinary meter of the simulator. Its first challenges begin with the given octets, in hex."""
    setup = device["security_setups"][0]
    return {
        "faults": list(faults),
        "challenges": {"seed": SEED, "chosen": list(challenges)},
        "system_title": device["system_title"],
        "security_suite": device["security_suite"],
        "security_setups": [setup],
        "associations": [{"client_sap": 1, "mechanism": "high-gmac", "security_setup": setup["logical_name"]}],
        "objects": [{"class": "register", "logical_name": "1.0.1.8.0.255", "value": {"double-long-unsigned": 4711}, "scaler": 0, "unit": 30}],
        # A meter that takes no invocation counter twice, not even for its GMAC and the APDU around it.
        "behaviour": {"gmac_counter": "must-differ", **(behaviour or {})},
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
        arguments = [PROGRAMS / "kms-dev", "--state", state, "--listen", "127.0.0.1:0", "--meters", "20"]
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


def test_orders_work():
    """The workforce system of docs/work-orders.md, as its reader would run it."""
    with tempfile.TemporaryDirectory(prefix="kms-work-orders-") as folder:
        state = pathlib.Path(folder) / "kms"
        arguments = [PROGRAMS / "kms-dev", "--state", state, "--listen", "127.0.0.1:0", "--meters", "2"]
        with Running(arguments, r"Serving on (\S+);"):
            program = [sys.executable, REPOSITORY / "docs/examples/work_orders.py", "--profile", state / "profiles/workforce"]
            program += ["--meter", "4B414D0000000001"]
            # The second time its order is on the second page of the list.
            for more in [], ["--page-size", "1"]:
                command = [str(argument) for argument in program + more]
                done = subprocess.run(command, capture_output=True, text=True, timeout=120)
                assert done.returncode == 0, done.stdout + done.stderr
                assert "listed: True" in done.stdout, done.stdout
            refused = "refused: it is unknown, or this work is not permitted with it"
            first, second, third, fourth, *rest = done.stdout.splitlines()
            assert (first, second, third, fourth) == ("created", refused, "unchanged", refused), done.stdout
            assert rest[0] == "open, revision 2, until 32400000 ms from now" and rest[1].startswith("ABORTED: "), done.stdout
            assert rest[2:] == ["listed: True", "cancelled"], done.stdout


# What happens to the meters, one after another, at one of the first deliveries of a key.
FAULTS = [
    None,
    "lose-request",
    "lose-answer",
    {"delay-request": 2600},
    {"delay-answer": 2600},
    {"hold-request": 2},
    {"hold-request-and-answer": 1},
    "duplicate-request",
    "duplicate-answer",
    "repeat-previous-answer",
    {"corrupt-answer": 0},
    {"wrong-answer": "C701C10000"},
    {"applied-but-error": 9},
    {"refused-without-applying": 250},
    "success-without-applying",
    "power-cycle-before",
    "power-cycle-before-answer",
    "power-cycle-after",
    "close-connection",
]


def faulty(number, device):
    """A meter that goes wrong in its own way, and then once more at an association."""
    fault = FAULTS[number % len(FAULTS)]
    faults = [{"at": {"key-transfer": 1 + number % 4}, "fault": fault}] if fault else []
    faults.append({"at": {"association-request": 1 + number % 5}, "fault": "lose-answer" if number % 2 else "power-cycle-after"})
    if number % 8 == 0:
        faults.append({"at": {"exchange": 5 + number % 11}, "fault": {"wrong-answer": "D80106FFFFFFFF"}})
    behaviour = {
        "counter_on_new_key": ["keep-counting", {"restart-at": 0}, {"restart-at": 250}][number % 3],
        "reverts_on_power_cycle": ["global-unicast-encryption"] if number % 7 == 0 else [],
    }
    # "41" is an ordinary challenge.
    challenges = [REQUESTS[number % len(REQUESTS)], "41", REQUESTS[number // 7 % len(REQUESTS)]] if number % 3 == 0 else []
    return simulated(device, faults, behaviour, challenges)


def test_takes_meters_over():
    """Every key that the vendor knows is replaced, and each GUEK once more under the new KEK, by a head-end that ciphers key_transfer itself."""
    with tempfile.TemporaryDirectory(prefix="kms-head-end-") as folder:
        folder = pathlib.Path(folder)
        state, memory_file, meters_file = folder / "kms", folder / "memory.json", folder / "meters.json"
        arguments = [PROGRAMS / "kms-dev", "--state", state, "--listen", "127.0.0.1:0", "--meters", METERS]
        with Running(arguments, r"Serving on (\S+);"):
            equal = folder / "equal.jsonl"
            sample = ["--devices", EQUAL_KEYS, "--first", METERS + 1, "--equal-keys", 2, "--vendor-key", state / "vendor/signing.key", "--out", equal]
            kms(state, "officer-1", "shipment", "make-sample", *sample)
            assign = ["--manufacturer", "urn:meterkms:dev:manufacturer:kam", "--head-end", "urn:meterkms:dev:head-end:head-end"]
            kms(state, "officer-1", "shipment", "import", equal, *assign, code=5)  # all imported, equal keys told
            lists = [state / "vendor/devices.jsonl", folder / "equal.jsonl.devices.jsonl"]
            devices = [json.loads(line) for path in lists for line in path.read_text().splitlines()]
            meters = {number: faulty(number, device) for number, device in enumerate(devices, 1)}
            simulation = {"listeners": [{"address": "127.0.0.1:0", "meters": meters}], "memory_file": str(memory_file)}
            with Running([PROGRAMS / "meter-sim"], r"(127\.0\.0\.1:\d+)", json.dumps(simulation)) as simulator:
                addresses = {meter["system_title"]: f"{simulator.ready.group(1)}/{number}" for number, meter in meters.items()}
                meters_file.write_text(json.dumps(addresses))
                program = [sys.executable, REPOSITORY / "tests/head_end/rotate.py", "--profile", state / "profiles/head-end", "--meters", meters_file]
                program += ["--timeout", "2", "--lease-seconds", "10", "--parallel", "32"]
                rotation = Running(program, "working")
                try:
                    with rotation:
                        take_over = ["--take-over", "--imported", "--manufacturer", "KAM"]
                        # Meters that were left behind are taken over by another campaign.
                        while left := run_campaign(state, "take over", *take_over, "--canary", "4", "--wave", "100%"):
                            print(f"{left} meters are not taken over yet")
                        # What is still in doubt is probed before it is rotated; then no meter may be left.
                        left = run_campaign(state, "new GUEK", "--rotate", "GUEK", "--whole-island", "--canary", "0", "--wave", "100%")
                        assert left == 0, f"{left} meters failed or are in doubt"
                except AssertionError:
                    print(rotation.printed)
                    raise
                profile, granted = Profile(state / "profiles/head-end"), {}
                for title, address in addresses.items():
                    keys, manifest = open_session(profile, bytes.fromhex(title), bytes.fromhex(CLIENT_TITLE))
                    place, logical_device = address.split("/")
                    assert read_register(place, int(logical_device), keys, manifest.meters[0].lease, "1.0.1.8.0.255") == 4711, title
                    granted[title] = {name.lower(): key.hex().upper() for name, key in keys.items()}
            memory = json.loads(memory_file.read_text())
            assert memory["repeated_nonces"] == 0
            assert len(memory["meters"]) == METERS + EQUAL_KEYS
            shipped = {device["system_title"]: device["security_setups"][0] for device in devices}
            liars = {meter["system_title"] for meter in meters.values() if any(fault["fault"] == "success-without-applying" for fault in meter["faults"])}
            for meter in memory["meters"]:
                title = meter["system_title"]
                assert granted[title] == {"guek": meter["guek"], "gak": meter["gak"]}, f"{title} holds other keys than the server grants"
                for name in ("kek", "guek", "gak", "gbek"):
                    # No exchange shows a GBEK: a meter that says that it took one, and did not, is found by the first broadcast.
                    if name != "gbek" or title not in liars:
                        assert meter[name] != shipped[title][name].upper(), f"{title} still has the {name} of its vendor"


def kms(state, identity, *arguments, code=0):
    """The command-line client, and what it answers."""
    program = [PROGRAMS / "kms", "--state", state, "--profile", identity, *arguments, "--output", "json"]
    done = subprocess.run([str(argument) for argument in program], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout) if done.stdout.strip() else None


def run_campaign(state, name, *arguments):
    """Two officers lead a campaign until it has ended: how many of its tasks failed or are in doubt."""
    terms = ["--attempts", "6", "--back-off", "1", "--success-threshold", "1", "--failure-limit", "1000", "--commit"]
    campaign = kms(state, "officer-1", "campaign", "create", name, *arguments, *terms)["campaign"]
    number = str(uuid.UUID(campaign["campaign_id"]))
    kms(state, "officer-2", "campaign", "approve", number, "--content", campaign["content_sha256"], "--yes")
    kms(state, "officer-1", "campaign", "start", number, "--yes")
    # Far more than it takes on a busy machine: it is there so that a campaign that never ends is told.
    deadline = time.monotonic() + 900
    while kms(state, "auditor", "campaign", "show", number)["state"] == "running":
        assert time.monotonic() < deadline, f"`{name}` does not end"
        time.sleep(0.3)
    report = kms(state, "auditor", "campaign", "report", number)["progress"]
    assert report["campaign"]["state"] == "finished", report["campaign"]["reason"]
    return sum(wave["failed"] + wave["in_doubt"] for wave in report["waves"])


def main():
    print(f"METER_SIM_SEED={SEED}", flush=True)
    tests = [test_reads_a_register_three_times, test_orders_work, test_takes_meters_over]
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
