#!/usr/bin/env python3
"""A workforce system in miniature: makes a work order, sends it again, changes it, lists it, and cancels it.

    work_orders.py --profile .kms/profiles/workforce --meter 4B414D0000000001

Needs grpcio and grpcio-tools. docs/work-orders.md explains each step.
"""

import argparse
import importlib
import pathlib
import sys
import tempfile
import time
import tomllib
import uuid

import grpc
from grpc_tools import protoc

PROTO = pathlib.Path(__file__).resolve().parents[2] / "proto"
HOUR_MS = 3_600_000


def contract():
    """The modules of the contract's work orders, compiled here."""
    out = tempfile.mkdtemp(prefix="meterkms-proto-")
    files = ["meterkms/v1/work_order.proto"]
    if protoc.main(["protoc", f"-I{PROTO}", f"--python_out={out}", f"--grpc_python_out={out}", *files]) != 0:
        sys.exit("the proto files do not compile")
    sys.path.insert(0, out)
    return importlib.import_module("meterkms.v1.work_order_pb2"), importlib.import_module("meterkms.v1.work_order_pb2_grpc")


def connect(profile):
    """A channel that is authenticated both ways with the profile's certificate."""
    folder = pathlib.Path(profile)
    settings = tomllib.loads((folder / "profile.toml").read_text())
    credentials = grpc.ssl_channel_credentials(
        root_certificates=(folder / "ca.pem").read_bytes(),
        private_key=(folder / "key.pem").read_bytes(),
        certificate_chain=(folder / "certificate.pem").read_bytes(),
    )
    options = [("grpc.ssl_target_name_override", settings["server_name"])]
    return grpc.secure_channel(settings["server"], credentials, options)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--profile", required=True)
    parser.add_argument("--meter", required=True)
    parser.add_argument("--technician", default="Ida Technician")
    parser.add_argument("--page-size", type=int, default=100)
    arguments = parser.parse_args()
    messages, services = contract()
    service = services.WorkOrderServiceStub(connect(arguments.profile))

    now = int(time.time() * 1000)
    content = messages.WorkOrderContent(
        technician=arguments.technician,
        meters=[bytes.fromhex(arguments.meter)],
        tasks=["read", "firmware"],
        from_ms=now,
        until_ms=now + 8 * HOUR_MS,
        place="Harbour Street 7",
    )
    order = messages.NewWorkOrder(work_order_id=f"WO-{uuid.uuid4()}", content=content)
    # An order for a meter that does not exist. It is refused, and the other one is made.
    wrong = messages.NewWorkOrder(work_order_id=f"WO-{uuid.uuid4()}", content=content)
    wrong.content.meters[:] = [bytes.fromhex("4B414D00000000FF")]

    def create():
        # A request id of its own each time: an order that exists is left as it is.
        request = messages.CreateWorkOrdersRequest(request_id=uuid.uuid4().bytes, orders=[order, wrong])
        for result in service.CreateWorkOrders(request).results:
            outcome = messages.WorkOrderOutcome.Name(result.outcome).removeprefix("WORK_ORDER_OUTCOME_").lower()
            print(outcome, *[problem.reason for problem in result.problems], sep=": ")

    create()
    create()

    # A change names the revision that it was made for, and has all of the content.
    seen = service.ShowWorkOrder(messages.ShowWorkOrderRequest(work_order_id=order.work_order_id))
    longer = messages.ChangeWorkOrderRequest(
        request_id=uuid.uuid4().bytes, work_order_id=order.work_order_id, revision=seen.revision, content=seen.content
    )
    longer.content.until_ms += HOUR_MS
    changed = service.ChangeWorkOrder(longer)
    print(f"{changed.state}, revision {changed.revision}, until {changed.content.until_ms - now} ms from now")
    longer.request_id = uuid.uuid4().bytes
    try:
        service.ChangeWorkOrder(longer)
    except grpc.RpcError as error:
        print(error.code().name, error.details(), sep=": ")

    # A list comes in pages: the token of a page names the next one, and the last page has none.
    query = messages.ListWorkOrdersRequest(technician=arguments.technician, ends_after_ms=now, page_size=arguments.page_size)
    listed = []
    while True:
        page = service.ListWorkOrders(query)
        listed += [listed_order.work_order_id for listed_order in page.orders]
        if not page.next_page_token:
            break
        query.page_token = page.next_page_token
    print(f"listed: {order.work_order_id in listed}")

    cancelled = service.CancelWorkOrder(
        messages.CancelWorkOrderRequest(request_id=uuid.uuid4().bytes, work_order_id=order.work_order_id, reason="an example")
    )
    print(cancelled.state)


if __name__ == "__main__":
    main()
