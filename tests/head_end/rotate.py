#!/usr/bin/env python3
"""A head-end in miniature that replaces keys: leases the tasks of campaigns, and carries them out at its meters.

    rotate.py --profile .kms/profiles/head-end --meters meters.json

`meters.json` says where each meter is: {"4B414D0000000001": "127.0.0.1:4059/1"}, with address, port and logical device. The program works until Ctrl-C.

It uses the form WRAPPED_KEY: the request that delivers a new key is ciphered here, with session keys that the key management system grants, by the library
that the head-end has anyway (dlms-cosem). The new key comes wrapped under the meter's KEK, so this program never learns it. What shows which key the meter
holds is made and read in the HSM; here its octets are only carried. docs/rotation.md, "What a head-end implements", lists the rules that are kept below.
"""

import argparse
import json
import pathlib
import signal
import socket
import struct
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import grpc
from dlms_cosem import cosem, enumerations
from dlms_cosem.client import DlmsClient
from dlms_cosem.protocol import xdlms
from google.protobuf.message import Message

from head_end import Gmac, Profile, envelope_pb2, module, open_session

campaign_pb2, campaign_pb2_grpc = module("campaign_pb2"), module("campaign_pb2_grpc")
transfer_pb2, transfer_pb2_grpc = module("transfer_pb2"), module("transfer_pb2_grpc")

KEY_TRANSFER = 2  # method of class 64, security setup
AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class Line:
    """A TCP connection to one meter, with the wrapper of IEC 62056-47. It has what dlms-cosem asks of a transport."""

    def __init__(self, address, client_sap, timeout):
        place, logical_device = address.split("/")
        self.host, self.port = place.rsplit(":", 1)
        self.client_sap, self.logical_device, self.timeout = client_sap, int(logical_device), timeout
        self.socket = None

    def connect(self):
        self.disconnect()
        self.socket = socket.create_connection((self.host, int(self.port)), self.timeout)

    def disconnect(self):
        if self.socket:
            self.socket.close()
        self.socket = None

    def send_request(self, apdu):
        self.socket.sendall(struct.pack(">HHHH", 1, self.client_sap, self.logical_device, len(apdu)) + apdu)
        _, _, _, length = struct.unpack(">HHHH", self.receive(8))
        return self.receive(length)

    def receive(self, length):
        octets = b""
        while len(octets) < length:
            more = self.socket.recv(length - len(octets))
            if not more:
                raise ConnectionError("the meter closed the connection")
            octets += more
        return octets


class Rotation:
    """Works off tasks, several meters at once."""

    def __init__(self, profile, meters, client_title, parallel, lease_seconds, timeout):
        self.profile, self.meters, self.client_title = profile, meters, client_title
        self.parallel, self.lease_seconds, self.timeout = parallel, lease_seconds, timeout
        channel = profile.channel()
        self.tasks = campaign_pb2_grpc.TaskServiceStub(channel)
        self.transfers = transfer_pb2_grpc.TransferServiceStub(channel)
        # The leases that this program holds, by meter, and those of them that it has lost.
        self.held, self.lost, self.lock = {}, set(), threading.Lock()

    def work(self, stop):
        """Until `stop` is set; then what is under way comes to its end."""
        beat = time.monotonic()
        with ThreadPoolExecutor(self.parallel) as pool:
            while not stop.is_set() or self.held:
                if time.monotonic() - beat > self.lease_seconds / 3:
                    self.heartbeat()
                    beat = time.monotonic()
                for task in [] if stop.is_set() else self.lease():
                    with self.lock:
                        self.held[task.meter] = task
                        self.lost.discard(task.meter)
                    pool.submit(self.carry_out, task)
                time.sleep(0.1)

    def lease(self):
        """The tasks that are due. A meter that is still being worked on waits: its older lease is lost, and ends soon."""
        request = campaign_pb2.LeaseTasksRequest(most=self.parallel, lease_seconds=self.lease_seconds)
        tasks = [task for answer in call(lambda request, timeout: list(self.tasks.LeaseTasks(request, timeout=timeout)), request) for task in answer.tasks]
        busy = [task for task in tasks if task.meter in self.held]
        self.release(busy, "")
        return [task for task in tasks if task not in busy]

    def heartbeat(self):
        """Renews all leases. A lost one is somebody else's by now: the work on that meter stops."""
        with self.lock:
            leases = [lease_of(task) for task in self.held.values()]
        if leases:
            answer = call(self.tasks.HeartbeatTasks, campaign_pb2.HeartbeatTasksRequest(leases=leases, lease_seconds=self.lease_seconds))
            with self.lock:
                self.lost.update(lease.meter for lease in answer.lost)

    def release(self, tasks, reason):
        if tasks:
            call(self.tasks.ReleaseTasks, campaign_pb2.ReleaseTasksRequest(leases=[lease_of(task) for task in tasks], reason=reason))

    def carry_out(self, task):
        """One task from its order to its end. Whatever breaks here, the lease runs out and the task is offered again."""
        title = task.meter.hex().upper()
        try:
            if title not in self.meters:
                self.release([task], "unreachable")
                return
            # A session has the active keys only. A meter that went back to earlier ones is reached by requests that the HSM ciphers.
            form = transfer_pb2.TRANSFER_FORM_WRAPPED_KEY if task.attempts < 2 else transfer_pb2.TRANSFER_FORM_FRAMES
            order = transfer_pb2.TransferOrder(
                meter=task.meter, security_setup=task.security_setup, key_type=task.key_type, client_title=self.client_title,
                form=form, lifetime_seconds=self.lease_seconds, campaign_id=task.campaign_id, fence=task.fence,
            )
            # One request id, however often it must be asked: nothing is begun twice.
            begin = transfer_pb2.BeginTransfersRequest(request_id=uuid.uuid4().bytes, orders=[order])
            step = call(self.transfers.BeginTransfers, begin).steps[0]
            line = Line(self.meters[title], 1, self.timeout)
            while step.HasField("send") and task.meter not in self.lost:
                report = transfer_pb2.TransferReport(meter=step.meter, transfer_id=step.transfer_id, step=step.step)
                answer = self.deliver(task, step.send) if not step.send.apdu else self.relay(line, step.send)
                # What came, octet by octet; or that nothing came. An opinion is not asked for.
                if answer is None:
                    report.nothing = True
                else:
                    report.apdu = answer
                step = call(self.transfers.ContinueTransfers, transfer_pb2.ContinueTransfersRequest(reports=[report])).steps[0]
            line.disconnect()
            if step.HasField("refusal"):
                self.release([task], step.refusal.message[:100])
            print(f"{title} {task.key_type or 'probe'}: {step.end.outcome or step.refusal.message or 'lease lost'}", flush=True)
        except grpc.RpcError as error:
            print(f"{title}: {error.code().name}: {error.details()}", flush=True)
        finally:
            with self.lock:
                if self.held.get(task.meter) is task:
                    del self.held[task.meter]

    def relay(self, line, send):
        """Carries a request that the HSM made, and brings back what the meter answered."""
        try:
            if send.kind == transfer_pb2.TransferSend.KIND_ASSOCIATE:
                line.client_sap = send.client_sap or line.client_sap
                line.connect()
            return line.send_request(send.apdu)
        except OSError:
            return None

    def deliver(self, task, send):
        """Ciphers key_transfer under the session keys, in an association of its own: the answer as it came, still ciphered."""
        line = Line(self.meters[task.meter.hex().upper()], send.client_sap or 1, self.timeout)
        try:
            keys, manifest = open_session(self.profile, task.meter, self.client_title, envelope_pb2.PURPOSE_CONFIGURE)
            client = DlmsClient(
                transport=line,
                authentication=Gmac(challenge_length=32),
                encryption_key=keys["GUEK"],
                authentication_key=keys["GAK"],
                security_suite=0,
                client_system_title=self.client_title,
                client_initial_invocation_counter=manifest.meters[0].lease.first,
                meter_initial_invocation_counter=-1,
            )
            client.connect()
            client.associate()
            setup = cosem.Obis.from_bytes(task.security_setup)
            method = cosem.CosemMethod(enumerations.CosemInterface.SECURITY_SETUP, setup, KEY_TRANSFER)
            request = xdlms.ActionRequestNormal(cosem_method=method, data=send.key_transfer_argument)
            return line.send_request(client.dlms_connection.send(request))
        except grpc.RpcError:
            raise
        except Exception as error:  # the library raises many kinds: in each case nothing came that could be reported
            print(f"{task.meter.hex().upper()}: no answer to key_transfer: {error!r}", flush=True)
            return None
        finally:
            line.disconnect()


def lease_of(task):
    return campaign_pb2.TaskLease(campaign_id=task.campaign_id, meter=task.meter, fence=task.fence)


def call(method, request: Message):
    """Makes a call, again and again while the server is away. The request stays the same, so nothing is done twice."""
    for attempt in range(60):
        try:
            return method(request, timeout=10)
        except grpc.RpcError as error:
            if error.code() not in AWAY or attempt == 59:
                raise
            time.sleep(min(0.1 * 2**attempt, 5))


def main():
    parser = argparse.ArgumentParser(description="carries out the tasks of campaigns with wrapped keys from the key management system")
    parser.add_argument("--profile", required=True, help="directory of the head-end's identity")
    parser.add_argument("--meters", required=True, help="JSON file: system title to HOST:PORT/LOGICAL-DEVICE")
    parser.add_argument("--client-title", default="4D4D4D0000000001", help="client system title, 16 hex digits")
    parser.add_argument("--parallel", type=int, default=8, help="meters at once")
    parser.add_argument("--lease-seconds", type=int, default=120)
    parser.add_argument("--timeout", type=float, default=10, help="seconds to wait for a meter")
    arguments = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    meters = json.loads(pathlib.Path(arguments.meters).read_text())
    rotation = Rotation(
        Profile(arguments.profile), meters, bytes.fromhex(arguments.client_title), arguments.parallel, arguments.lease_seconds, arguments.timeout
    )
    print("working", flush=True)
    rotation.work(stop)


if __name__ == "__main__":
    main()
