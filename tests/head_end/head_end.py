#!/usr/bin/env python3
"""A head-end in miniature: asks the key management system for a session with one meter, opens the envelope, and reads a register.

    head_end.py --profile .kms/profiles/head-end --meter 4B414D0000000001 --address 127.0.0.1:4059

Needs grpcio, grpcio-tools, cryptography and dlms-cosem (tests/requirements.txt). The keys live in this process for one session
and are never printed. docs/integration.md explains each step.
"""

import argparse
import hashlib
import hmac
import importlib
import logging
import pathlib
import struct
import sys
import tempfile
import time
import tomllib
import uuid

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, keywrap, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.x963kdf import X963KDF
from dlms_cosem import cosem, enumerations, utils
from dlms_cosem.client import DlmsClient
from dlms_cosem.io import BlockingTcpIO, TcpTransport
from dlms_cosem.security import HighLevelSecurityGmacAuthentication
from grpc_tools import protoc

# dlms-cosem tells every APDU, the plain ones too, unless it is asked not to.
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))

PROTO = pathlib.Path(__file__).resolve().parents[2] / "proto"


def compile_contract():
    """Compiles the contract, so that its modules can be imported."""
    out = tempfile.mkdtemp(prefix="meterkms-proto-")
    files = [str(file.relative_to(PROTO)) for file in sorted(PROTO.glob("meterkms/v1/*.proto"))]
    if protoc.main(["protoc", f"-I{PROTO}", f"--python_out={out}", f"--grpc_python_out={out}", *files]) != 0:
        sys.exit("the proto files do not compile")
    sys.path.insert(0, out)


def module(name):
    """A module of the contract, such as `grant_pb2`."""
    return importlib.import_module(f"meterkms.v1.{name}")


compile_contract()
envelope_pb2, grant_pb2, grant_pb2_grpc = module("envelope_pb2"), module("grant_pb2"), module("grant_pb2_grpc")


class Profile:
    """An identity on disk, as `kms` and the server's `dev` command write it."""

    def __init__(self, directory):
        self.directory = pathlib.Path(directory)
        self.settings = tomllib.loads((self.directory / "profile.toml").read_text())

    def octets(self, name):
        return (self.directory / name).read_bytes()

    def channel(self):
        credentials = grpc.ssl_channel_credentials(self.octets("ca.pem"), self.octets("key.pem"), self.octets("certificate.pem"))
        server = self.settings["server"].removeprefix("https://")
        options = [("grpc.ssl_target_name_override", self.settings["server_name"])] if "server_name" in self.settings else []
        return grpc.secure_channel(server, credentials, options)

    def transport(self):
        """The transport key and the DER of its certificate."""
        key = serialization.load_pem_private_key(self.octets("transport-key.pem"), None)
        certificate = x509.load_pem_x509_certificate(self.octets("transport-certificate.pem"))
        return key, certificate.public_bytes(serialization.Encoding.DER)


def open_envelope(envelope, transport_key, certificate):
    """Checks the seal, then unwraps: {(key type, version): key}, and the manifest. See docs/formats.md, Envelopes."""
    header = envelope_pb2.EnvelopeHeader.FromString(envelope.header)
    if header.algorithm != envelope_pb2.ENVELOPE_ALGORITHM_ECDH_P256_X963_SHA256:
        raise ValueError("this envelope's algorithm is not for production")
    digest = hashlib.sha256(certificate).digest()
    if header.transport_certificate_sha256 != digest:
        raise ValueError("this envelope is for another transport key")
    point = transport_key.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    z = transport_key.exchange(ec.ECDH(), ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), header.ephemeral_public))

    def agreed(use):
        island = header.island.encode()
        info = b"meterkms/envelope" + bytes([1, header.algorithm, use]) + header.ephemeral_public + point + digest
        info += bytes([len(island)]) + island + struct.pack(">q", header.not_after_ms)
        return X963KDF(hashes.SHA256(), 32, hashlib.sha256(info).digest()).derive(z)

    sealed = struct.pack(">I", len(envelope.header)) + envelope.header + envelope.manifest
    if not hmac.compare_digest(hmac.digest(agreed(2), sealed, "sha256"), envelope.seal):
        raise ValueError("the envelope's seal does not fit: it was changed on the way")
    manifest = envelope_pb2.Manifest.FromString(envelope.manifest)
    if manifest.not_after_ms < time.time() * 1000:
        raise ValueError("the grant has expired")
    kek = agreed(1)
    keys = {key.key_type: keywrap.aes_key_unwrap(kek, key.wrapped) for key in manifest.meters[0].keys}
    return keys, manifest


def open_session(profile, meter, client_title, purpose=envelope_pb2.PURPOSE_READ):
    """Keys and counter lease for one meter."""
    grants = grant_pb2_grpc.GrantServiceStub(profile.channel())
    terms = grant_pb2.SessionTerms(purpose=purpose, client_title=client_title, counters=100)
    answer = grants.OpenSession(grant_pb2.OpenSessionRequest(request_id=uuid.uuid4().bytes, meter=meter, terms=terms), timeout=10)
    return open_envelope(answer.envelopes[0], *profile.transport())


class Gmac(HighLevelSecurityGmacAuthentication):
    """HLS mechanism 5 whose GMAC has an invocation counter of its own, as every nonce must."""

    def hls_generate_reply_data(self, connection):
        data = super().hls_generate_reply_data(connection)
        connection.client_invocation_counter += 1
        return data


def read_register(address, logical_device, keys, lease, obis):
    """Associates with the meter under the granted keys and reads attribute 2 of a register."""
    host, port = address.rsplit(":", 1)
    io = BlockingTcpIO(host=host, port=int(port), timeout=10)
    transport = TcpTransport(client_logical_address=1, server_logical_address=logical_device, io=io)
    client = DlmsClient(
        transport=transport,
        authentication=Gmac(challenge_length=32),
        encryption_key=keys["GUEK"],
        authentication_key=keys["GAK"],
        security_suite=0,
        client_system_title=lease.client_title,
        client_initial_invocation_counter=lease.first,
        meter_initial_invocation_counter=-1,
    )
    with client.session() as session:
        attribute = cosem.CosemAttribute(interface=enumerations.CosemInterface.REGISTER, instance=cosem.Obis.from_string(obis), attribute=2)
        return utils.parse_as_dlms_data(session.get(attribute))


def main():
    parser = argparse.ArgumentParser(description="reads one register of one meter with keys from the key management system")
    parser.add_argument("--profile", required=True, help="directory of the head-end's identity")
    parser.add_argument("--meter", required=True, help="system title, 16 hex digits")
    parser.add_argument("--client-title", default="4D4D4D0000000001", help="client system title, 16 hex digits")
    parser.add_argument("--address", required=True, help="HOST:PORT of the meter")
    parser.add_argument("--logical-device", type=int, default=1)
    parser.add_argument("--obis", default="1.0.1.8.0.255")
    arguments = parser.parse_args()
    keys, manifest = open_session(Profile(arguments.profile), bytes.fromhex(arguments.meter), bytes.fromhex(arguments.client_title))
    granted = manifest.meters[0]
    print(f"granted until {time.strftime('%H:%M:%S', time.localtime(manifest.not_after_ms / 1000))}: {', '.join(sorted(keys))}")
    print(f"counters {granted.lease.first} to {granted.lease.first + granted.lease.count - 1}")
    value = read_register(arguments.address, arguments.logical_device, keys, granted.lease, arguments.obis)
    print(f"{arguments.obis} = {value}")


if __name__ == "__main__":
    main()
