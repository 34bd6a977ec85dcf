#!/usr/bin/env python3
"""Makes the worked vector of docs/integration.md: docs/examples/{vector.properties,transport-key.pem,transport-certificate.pem}.

Independent of the Rust code: Python's `cryptography` and a protobuf encoding of its own. Run it from the repository's root. All
inputs are fixed, so that it writes the same files each time; kms-client/tests/client/vector.rs opens them.
"""
import datetime
import hashlib
import hmac
import pathlib
import struct

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.x963kdf import X963KDF
from cryptography.hazmat.primitives.keywrap import aes_key_wrap

EXAMPLES = pathlib.Path("docs/examples")
ISLAND = "north"
PRINCIPAL = "urn:meterkms:north:head-end:hes-1"
ISSUED, GRANT_ENDS, AGREEMENT_ENDS = 1795248000000, 1795248900000, 1795251600000
GUEK = bytes.fromhex("000102030405060708090A0B0C0D0E0F")
GAK = bytes.fromhex("D0D1D2D3D4D5D6D7D8D9DADBDCDDDEDF")
LLS = b"12345678"


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value):
    octets = bytearray()
    while value > 0x7F:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(octets + bytes([value]))


def point(key):
    return key.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)


def key_of(label):
    return ec.derive_private_key(int.from_bytes(hashlib.sha256(label).digest(), "big"), ec.SECP256R1())


def certify(key):
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "hes-1")])
    day = datetime.datetime(2026, 11, 21, tzinfo=datetime.timezone.utc)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, day, day + datetime.timedelta(days=3650))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(PRINCIPAL)]), False)
    usage = x509.KeyUsage(False, False, False, False, True, False, False, False, False)
    return builder.add_extension(usage, True).sign(key, hashes.SHA256(), ecdsa_deterministic=True)


def make(algorithm, grantee, certificate, ephemeral):
    digest = hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).digest()
    header = field(1, algorithm) + field(2, ISLAND.encode()) + field(3, point(ephemeral)) + field(4, digest) + field(5, AGREEMENT_ENDS)
    z = ephemeral.exchange(ec.ECDH(), grantee.public_key())

    def derive(use):
        island = ISLAND.encode()
        info = b"meterkms/envelope" + bytes([1, algorithm, use]) + point(ephemeral) + point(grantee) + digest
        info += bytes([len(island)]) + island + struct.pack(">q", AGREEMENT_ENDS)
        shared = hashlib.sha256(info).digest()
        if algorithm == 1:
            return X963KDF(hashes.SHA256(), 32, shared).derive(z)
        encryptor = Cipher(algorithms.AES(z), modes.CBC(bytes(16))).encryptor()
        return encryptor.update(shared) + encryptor.finalize()

    kek, seal_key = derive(1), derive(2)
    lls = bytes([len(LLS)]) + LLS + bytes(16 - 1 - len(LLS))
    wrapped = {name: aes_key_wrap(kek, key) for name, key in [("GUEK", GUEK), ("GAK", GAK), ("LLS-SECRET", lls)]}
    keys = b"".join(field(4, field(1, name.encode()) + field(2, 3) + field(3, octets)) for name, octets in wrapped.items())
    lease = field(1, bytes.fromhex("4D4D4D0000000001")) + field(2, 3) + field(3, 1001) + field(4, 1000)
    meter = field(1, bytes.fromhex("4B414D0000000001")) + field(2, bytes([0, 0, 43, 0, 0, 255])) + keys + field(5, lease)
    manifest = field(1, PRINCIPAL.encode()) + field(2, bytes.fromhex("0199AA00000070008000000000000001"))
    manifest += field(3, bytes.fromhex("0199AA00000070008000000000000002")) + field(5, 1) + field(6, ISSUED) + field(7, GRANT_ENDS) + field(8, meter)
    seal = hmac.new(seal_key, struct.pack(">I", len(header)) + header + manifest, hashlib.sha256).digest()
    return {
        "algorithm": algorithm, "island": ISLAND, "ephemeral_public": point(ephemeral), "transport_certificate_sha256": digest, "not_after_ms": AGREEMENT_ENDS,
        "header": header, "manifest": manifest, "seal": seal, "envelope": field(1, header) + field(2, manifest) + field(3, seal),
        "guek_wrapped": wrapped["GUEK"], "gak_wrapped": wrapped["GAK"], "lls_secret_wrapped": wrapped["LLS-SECRET"],
        "z": z, "transport_kek": kek, "seal_key": seal_key, "guek": GUEK, "gak": GAK, "lls_secret": LLS,
    }


def write(name, comment, values):
    lines = [f"# {line}" for line in comment] + [f"{key}={value.hex().upper() if isinstance(value, bytes) else value}" for key, value in values.items()]
    (EXAMPLES / name).write_text("\n".join(lines) + "\n")


def main():
    grantee, ephemeral = key_of(b"transport key of the worked example"), key_of(b"ephemeral key of the worked example")
    certificate = certify(grantee)
    (EXAMPLES / "transport-key.pem").write_bytes(
        grantee.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    (EXAMPLES / "transport-certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    comment = ["The worked vector of docs/integration.md, made by kms-client/tests/make_vector.py. Octets are hex.",
               "Down to `envelope`: what the server sends. Then: one wrapped key each out of the manifest.",
               "Then: what comes out on the way, and the keys. Public knowledge: never use any of them."]
    write("vector.properties", comment, make(1, grantee, certificate, ephemeral))
    comment = ["The same as vector.properties with algorithm 2, ecdh-p256-cbc-expand, which is not for production."]
    write("vector-cbc-expand.properties", comment, make(2, grantee, certificate, ephemeral))


main()
