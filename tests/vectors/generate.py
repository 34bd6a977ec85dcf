#!/usr/bin/env python3
"""Known answers for every layout of docs/formats.md and for the association with a meter, computed independently of the Rust code.

    python3 generate.py            writes vectors.json beside this file
    python3 generate.py --check    computes again and fails if vectors.json differs

Needs the packages `cryptography` and `dlms-cosem` and nothing else. Everything is computed from fixed inputs, so the output is always the same;
ECDSA signatures, which are random, are made by RFC 6979 (deterministic nonces).
"""

import base64
import hashlib
import hmac
import json
import pathlib
import sys

from cryptography.hazmat.primitives import cmac, hashes, keywrap, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.x963kdf import X963KDF
from dlms_cosem import cosem, enumerations
from dlms_cosem.protocol import acse, xdlms
from dlms_cosem.protocol.acse.user_information import UserInformation
from dlms_cosem.protocol.xdlms import conformance, invoke_id_and_priority
from dlms_cosem.protocol.xdlms.confirmed_service_error import ConfirmedServiceError
from dlms_cosem.security import SecurityControlField

FILE = pathlib.Path(__file__).with_name("vectors.json")

ISLAND = "north"
METER = bytes.fromhex("4B414D0000000001")
CLIENT = bytes.fromhex("4D4D4D0000000001")


def u32(number):
    return number.to_bytes(4, "big")


def u64(number):
    return number.to_bytes(8, "big")


def fixed(label, length=32):
    """Octets that look random and are the same every time."""
    return hashlib.shake_128(label.encode()).digest(length)


def hmac_sha256(key, message):
    return hmac.new(key, message, hashlib.sha256).digest()


def aes_cbc(key, data):
    encryptor = Cipher(algorithms.AES(key), modes.CBC(bytes(16))).encryptor()
    return encryptor.update(data) + encryptor.finalize()


def wrap(kek, key):
    """RFC 3394."""
    return keywrap.aes_key_wrap(kek, key)


# Protobuf, as much of it as the messages here need (https://protobuf.dev/programming-guides/encoding).


def varint(number):
    octets = b""
    while number > 0x7F:
        octets += bytes([number & 0x7F | 0x80])
        number >>= 7
    return octets + bytes([number])


def zigzag(number):
    return number * 2 if number >= 0 else -number * 2 - 1


def integer(tag, number):
    return varint(tag << 3) + varint(number) if number else b""


def octets(tag, value):
    return varint(tag << 3 | 2) + varint(len(value)) + value if value else b""


def text(tag, value):
    return octets(tag, value.encode())


def message(tag, value):
    return varint(tag << 3 | 2) + varint(len(value)) + value


def fixed64(tag, value):
    return varint(tag << 3 | 1) + value[::-1]


# Diversified keys


def sp800_108_cmac(root, type_octet, owner, setup, version, length):
    """NIST SP 800-108r1, counter mode, AES-CMAC."""
    context = owner + setup + u32(version) + bytes([length])
    output = b""
    counter = 1
    while len(output) < length:
        mac = cmac.CMAC(algorithms.AES(root))
        mac.update(u32(counter) + bytes([type_octet]) + b"\0" + context + u32(length * 8))
        output += mac.finalize()
        counter += 1
    return output[:length]


def aes_cbc_encrypt_data(root, type_octet, owner, setup, version, length):
    """CKM_AES_CBC_ENCRYPT_DATA with a zero IV."""
    data = owner + setup + bytes([type_octet]) + u32(version) + bytes([length])
    assert len(data) == 16
    if length == 32:
        data += b"meterkms-block-2"
    return aes_cbc(root, data)


def diversified():
    root = fixed("diversification root")
    owners = [("meter", 0, METER), ("group", 1, u64(7)), ("device-type", 2, u64(9))]
    vectors = []
    for derivation, derive in [("sp800-108-cmac", sp800_108_cmac), ("aes-cbc-encrypt-data", aes_cbc_encrypt_data)]:
        for kind, kind_number, owner in owners:
            for key_type, setup, version, length in [
                (2, b"\0\0", 1, 16),
                (4, b"\0\1", 2, 32),
                (63, b"\x01\xff", 0x01020304, 32),
            ]:
                type_octet = kind_number * 64 + key_type
                vectors.append(
                    {
                        "derivation": derivation,
                        "owner_kind": kind,
                        "owner_id": owner.hex(),
                        "setup": setup.hex(),
                        "key_type": key_type,
                        "version": version,
                        "octets": length,
                        "label": bytes([type_octet]).hex(),
                        "context": (owner + setup + u32(version) + bytes([length])).hex(),
                        "block": (owner + setup + bytes([type_octet]) + u32(version) + bytes([length])).hex(),
                        "key": derive(root, type_octet, owner, setup, version, length).hex(),
                    }
                )
    return {"root": root.hex(), "keys": vectors}


# Secrets that are no AES keys


def encode_secret(secret):
    encoded = bytes([len(secret)]) + secret
    encoded += bytes(-len(encoded) % 8)
    return encoded.ljust(16, b"\0")


def secrets():
    return [{"secret": secret.hex(), "encoded": encode_secret(secret).hex()} for secret in [b"1", b"12345678", b"0123456789abcde", b"0123456789abcdef", bytes([255]) * 255]]


# Keys from the seal root, sealed rows, fingerprints


def seal_root_keys():
    root = fixed("seal root")
    keys = {}
    for name in ["seal-key", "audit-chain-key", "fingerprint-key"]:
        text_message = f"meterkms/{name}".encode() + b"\x01" + ISLAND.encode()
        keys[name] = {"message": text_message.hex(), "key": hmac_sha256(root, text_message).hex()}
    return {"root": root.hex(), "island": ISLAND, "version": 1, "keys": keys}


def sealed_row(kind, row_id, generation, body):
    key = bytes.fromhex(seal_root_keys()["keys"]["seal-key"]["key"])
    row_input = b"meterkms/row\x01\x01" + bytes([kind, len(row_id)]) + row_id + u64(generation) + body
    return {
        "kind": kind,
        "id": row_id.hex(),
        "generation": generation,
        "body": body.hex(),
        "input": row_input.hex(),
        "seal": (b"\x01\x01" + hmac_sha256(key, row_input)[:16]).hex(),
        "digest": hashlib.sha256(row_input).digest()[:16].hex(),
    }


def meter_row():
    """The body of the meter that the Rust test builds: two imported keys, one of them granted, with a counter."""
    added = 1_795_165_200_000
    vendor_exposure = integer(3, 1)
    grant_exposure = integer(1, 2) + integer(2, zigzag(86_400_000)) + integer(3, 3)
    counter = fixed64(1, CLIENT) + integer(2, 65537) + octets(3, bytes([7]) * 16)
    gak = integer(2, 4) + integer(6, 6) + integer(7, 1) + octets(8, fixed("wrapped GAK", 24)) + octets(9, fixed("fingerprint GAK", 16))
    gak += integer(10, 1) + message(11, vendor_exposure)
    guek = integer(2, 2) + integer(3, 1) + integer(5, zigzag(5)) + integer(6, 1) + integer(7, 3) + integer(10, 1)
    guek += message(11, grant_exposure) + message(12, counter)
    body = integer(1, int.from_bytes(b"KAM", "big")) + text(2, "10000001") + text(3, "generic-suite0") + integer(5, 2)
    body += octets(6, varint(3) + varint(300)) + message(7, text(2, "hes-north")) + integer(8, 1) + text(9, "KAM-2026-0041")
    destroyed = integer(2, 2) + integer(4, 5) + integer(6, 5) + integer(7, 1)
    body += message(10, destroyed) + message(10, guek) + message(10, gak) + integer(15, added)
    return body


def rows():
    principal = f"urn:meterkms:{ISLAND}:head-end:hes-north".encode()
    return [
        sealed_row(1, METER, 1, meter_row()),
        sealed_row(2, u64(7), 2, b"group"),
        sealed_row(3, u64(9), 3, b"device type"),
        sealed_row(4, principal, 4, b""),
        sealed_row(5, fixed("fingerprint", 16), 2**40, fixed("body", 1000)),
        sealed_row(6, ISLAND.encode(), 6, b"island"),
        sealed_row(7, principal, 7, b"quota use"),
        sealed_row(8, fixed("campaign", 16), 8, b"campaign"),
    ]


def fingerprint():
    kek = fixed("fingerprint KEK")
    key = fixed("a meter's key", 16)
    wrapped = wrap(kek, key)
    mac_key = bytes.fromhex(seal_root_keys()["keys"]["fingerprint-key"]["key"])
    return {"fingerprint_kek": kek.hex(), "key": key.hex(), "wrapped": wrapped.hex(), "fingerprint": hmac_sha256(mac_key, wrapped)[:16].hex()}


# Campaigns


def campaign():
    identity = fixed("campaign", 16)
    titles = [b"KAM" + number.to_bytes(5, "big") for number in range(1, 41)]
    chunks = [b"".join(titles[:25]), b"".join(titles[25:])]
    link, links = hashlib.sha256(b"meterkms/plan" + identity).digest(), []
    for chunk in chunks:
        link = hashlib.sha256(link + chunk).digest()
        links.append(link.hex())
    buckets = [int.from_bytes(hmac_sha256(identity, title)[:4], "big") >> 12 for title in titles]
    key = bytes.fromhex(seal_root_keys()["keys"]["seal-key"]["key"])
    former_mark = hmac_sha256(key, b"meterkms/task" + identity + titles[0] + u32(3))[:16]
    head_end = "urn:meterkms:north:head-end:hes-1"
    # Generation 5, wave 3, setup 1.2, a KEK (1) after version 4, leased (2), to be probed, 1 attempt, due, fence 7, leased, not ended.
    row = (5).to_bytes(8, "big") + u32(3) + bytes([1, 2]) + bytes([1]) + u32(4) + bytes([2, 1]) + u32(1)
    row += b"".join(number.to_bytes(8, "big") for number in [1795165200000, 7, 1795165100000, 0]) + head_end.encode()
    mark = hmac_sha256(key, b"meterkms/task-row" + identity + titles[0] + row)[:16]
    return {
        "campaign": identity.hex(),
        "chunks": [chunk.hex() for chunk in chunks],
        "links": links,
        "buckets": buckets,
        "task": {"meter": titles[0].hex(), "wave": 3, "head_end": head_end, "mark": mark.hex(), "former_mark": former_mark.hex()},
    }


# Envelopes


def private_key(label):
    return ec.derive_private_key(int.from_bytes(fixed(label), "big") % (2**255), ec.SECP256R1())


def point(key):
    return key.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)


def pkcs8(key):
    return key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def envelope(algorithm):
    ephemeral, grantee = private_key("ephemeral key"), private_key("grantee's transport key")
    certificate_digest = hashlib.sha256(b"the grantee's transport certificate").digest()
    not_after = 1_795_168_800_000
    shared_secret = ephemeral.exchange(ec.ECDH(), grantee.public_key())

    def agreed_key(use):
        info = b"meterkms/envelope\x01" + bytes([algorithm, use]) + point(ephemeral) + point(grantee) + certificate_digest
        info += bytes([len(ISLAND)]) + ISLAND.encode() + u64(not_after)
        shared = hashlib.sha256(info).digest()
        if algorithm == 1:
            key = X963KDF(algorithm=hashes.SHA256(), length=32, sharedinfo=shared).derive(shared_secret)
        else:
            key = aes_cbc(shared_secret, shared)
        return info, shared, key

    info, shared, transport_kek = agreed_key(1)
    seal_info, seal_shared, seal_key = agreed_key(2)
    guek, gak = fixed("GUEK", 16), fixed("GAK", 16)
    secret = encode_secret(b"12345678")
    header = integer(1, algorithm) + text(2, ISLAND) + octets(3, point(ephemeral)) + octets(4, certificate_digest) + integer(5, not_after)

    def granted_key(name, version, key):
        return message(4, text(1, name) + integer(2, version) + octets(3, wrap(transport_kek, key)))

    lease = octets(1, CLIENT) + integer(2, 1) + integer(3, 1001) + integer(4, 1000)
    keys = granted_key("GUEK", 1, guek) + granted_key("GAK", 1, gak) + granted_key("LLS-SECRET", 1, secret)
    meter = octets(1, METER) + octets(2, bytes.fromhex("00002B0000FF")) + keys + message(5, lease)
    manifest = text(1, f"urn:meterkms:{ISLAND}:head-end:hes-north") + octets(2, fixed("grant id", 16)) + octets(3, fixed("request id", 16))
    manifest += integer(5, 1) + integer(6, not_after - 3_600_000) + integer(7, not_after) + message(8, meter)
    seal = hmac_sha256(seal_key, u32(len(header)) + header + manifest)
    return {
        "algorithm": algorithm,
        "ephemeral_private_pkcs8": pkcs8(ephemeral).hex(),
        "ephemeral_public": point(ephemeral).hex(),
        "grantee_private_pkcs8": pkcs8(grantee).hex(),
        "grantee_public": point(grantee).hex(),
        "transport_certificate_sha256": certificate_digest.hex(),
        "island": ISLAND,
        "not_after_ms": not_after,
        "ecdh_z": shared_secret.hex(),
        "transport_info": info.hex(),
        "transport_shared": shared.hex(),
        "transport_kek": transport_kek.hex(),
        "seal_info": seal_info.hex(),
        "seal_shared": seal_shared.hex(),
        "seal_key": seal_key.hex(),
        "keys": [
            {"type": name, "key": key.hex(), "wrapped": wrap(transport_kek, key).hex()}
            for name, key in [("GUEK", guek), ("GAK", gak), ("LLS-SECRET", secret)]
        ],
        "header": header.hex(),
        "manifest": manifest.hex(),
        "seal": seal.hex(),
        "envelope": (octets(1, header) + octets(2, manifest) + octets(3, seal)).hex(),
    }


# Audit records


def audit():
    key = bytes.fromhex(seal_root_keys()["keys"]["audit-chain-key"]["key"])
    chain, records = bytes(32), []
    for number in range(3):
        record = octets(1, fixed("writer", 16)) + integer(2, number) + integer(3, 1_795_165_200_000 + number)
        leaf = hashlib.sha256(b"\0" + record).digest()
        chain = hmac_sha256(key, chain + leaf)
        records.append({"record": record.hex(), "leaf": leaf.hex(), "chain": chain.hex()})
    return {"chain_key": key.hex(), "records": records}


# Shipments


def shipment():
    batch_key = fixed("batch key")
    signer = private_key("manufacturer's signing key")

    def line(value):
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"

    lines = line(
        {
            "format": "meterkms-shipment/1",
            "batch": "KAM-2026-0041",
            "manufacturer": "KAM",
            "device_profile": "generic-suite0",
            "created": "2026-11-20T09:00:00Z",
            "transport_key": fixed("transport key's SubjectPublicKeyInfo").hex(),
            "oaep_hash": "SHA-256",
            # RSA-OAEP is random, so these octets only stand for an encrypted batch key: no test decrypts them.
            "batch_key": base64.b64encode(fixed("encrypted batch key", 384)).decode(),
        }
    )
    devices = []
    for number in (1, 2):
        keys = {name: fixed(f"{name} of device {number}", 16) for name in ("KEK", "GUEK", "GBEK", "GAK")}
        device = {
            "title": f"4B414D000000000{number}",
            "serial": f"1000000{number}",
            "groups": ["north"],
            "keys": [{"setup": "0.0.43.0.0.255", "type": name, "wrapped": wrap(batch_key, key).hex()} for name, key in keys.items()],
        }
        if number == 2:
            device["counters"] = [{"setup": "0.0.43.0.0.255", "client_title": CLIENT.hex().upper(), "floor": 1200}]
        lines += line(device)
        devices.append({name: key.hex() for name, key in keys.items()})
    digest = hashlib.sha256(lines).hexdigest()
    file = lines + line({"trailer": {"devices": 2, "sha256": digest}})
    signature = signer.sign(file, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
    spki = signer.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return {
        "file": file.decode(),
        "sha256_before_trailer": digest,
        "batch_key": batch_key.hex(),
        "device_keys": devices,
        "signer_spki": spki.hex(),
        "signature": signature.hex(),
    }


# The association with a meter: what dlms-cosem makes, and reads back. Its lengths have one octet, so everything is below 128.


def ciphered_initiate(kind, label):
    """An initiate APDU whose ciphertext and authentication tag are only octets: the server's codec looks at neither."""
    control = SecurityControlField(security_suite=0, authenticated=True, encrypted=True)
    return kind(security_control=control, invocation_counter=0x01020304, ciphered_text=fixed(label, 14 + 12))


def association_request():
    challenge = fixed("client's challenge", 16)
    initiate = ciphered_initiate(xdlms.GlobalCipherInitiateRequest, "InitiateRequest")
    mechanism = enumerations.AuthenticationMechanism.HLS_GMAC
    request = acse.ApplicationAssociationRequest(
        user_information=UserInformation(initiate), system_title=CLIENT, authentication=mechanism, ciphered=True, authentication_value=challenge
    )
    made = request.to_bytes()
    assert len(made) < 128
    read = acse.ApplicationAssociationRequest.from_bytes(made)
    assert (read.system_title, read.authentication, read.ciphered) == (CLIENT, mechanism, True)
    assert bytes(read.authentication_value) == challenge and read.user_information.content == initiate
    return {"client_title": CLIENT.hex(), "challenge": challenge.hex(), "initiate_request": initiate.to_bytes().hex(), "octets": made.hex()}


def association_responses():
    user, provider = enumerations.AcseServiceUserDiagnostics, enumerations.AcseServiceProviderDiagnostics
    result = enumerations.AssociationResult
    challenge = fixed("meter's challenge", 20)
    ciphered = ciphered_initiate(xdlms.GlobalCipherInitiateResponse, "InitiateResponse")
    gmac = enumerations.AuthenticationMechanism.HLS_GMAC
    error = ConfirmedServiceError(error=enumerations.InitiateError.INCOMPATIBLE_CONFORMANCE)
    hls = {"ciphered": True, "authentication": gmac, "system_title": METER, "authentication_value": challenge}
    vectors = []
    for outcome, diagnostic, information, more in [
        (result.ACCEPTED, user.AUTHENTICATION_REQUIRED, ciphered, hls),
        (result.ACCEPTED, user.AUTHENTICATION_REQUIRED, ciphered, hls | {"public_cert": b"DER", "implementation_information": b"1"}),
        (result.ACCEPTED, user.NULL, initiate_response()[0], {}),
        (result.REJECTED_PERMANENT, user.AUTHENTICATION_FAILED, None, {"ciphered": True}),
        (result.REJECTED_PERMANENT, user.NO_REASON_GIVEN, error, {"ciphered": True, "system_title": METER}),
        (result.REJECTED_TRANSIENT, provider.NO_COMMON_ACSE_VERSION, None, {"ciphered": True}),
    ]:
        user_information = UserInformation(information) if information else None
        response = acse.ApplicationAssociationResponse(result=outcome, result_source_diagnostics=diagnostic, user_information=user_information, **more)
        assert len(response.to_bytes()) < 128
        vectors.append(
            {
                "result": int(outcome),
                "source": "user" if isinstance(diagnostic, user) else "provider",
                "diagnostic": int(diagnostic),
                "ciphered": response.ciphered,
                "mechanism": response.authentication.value if response.authentication else None,
                "server_title": response.system_title.hex() if response.system_title else None,
                "challenge": response.authentication_value.hex() if response.authentication_value else None,
                "information": information.to_bytes().hex() if information else None,
                "octets": response.to_bytes().hex(),
            }
        )
    return vectors


def initiate_response():
    agreed = conformance.Conformance(general_protection=True, get=True, set=True, action=True, selective_access=True, block_transfer_with_get_or_read=True)
    response = xdlms.InitiateResponse(negotiated_conformance=agreed, server_max_receive_pdu_size=1224)
    vector = {"conformance": agreed.to_bytes()[1:].hex(), "longest_apdu": 1224, "vaa_name": 7, "octets": response.to_bytes().hex()}
    return response, vector


def services():
    invoke = invoke_id_and_priority.InvokeIdAndPriority(invoke_id=1, confirmed=True, high_priority=True)
    answer = b"\x10" + u32(0x01020304) + fixed("GMAC", 12)
    octet_string = bytes([9, len(answer)]) + answer
    current_association = cosem.Obis(0, 0, 40, 0, 0, 255)
    reply = xdlms.ActionRequestNormal(
        cosem_method=cosem.CosemMethod(enumerations.CosemInterface.ASSOCIATION_LN, current_association, 1), data=octet_string, invoke_id_and_priority=invoke
    )
    energy = cosem.CosemAttribute(enumerations.CosemInterface.REGISTER, cosem.Obis(1, 0, 1, 8, 0, 255), 2)
    succeeded, failed = enumerations.ActionResultStatus.SUCCESS, enumerations.ActionResultStatus.OBJECT_CLASS_INCONSISTENT
    denied = enumerations.DataAccessResult.READ_WRITE_DENIED
    release = acse.ReleaseRequest(
        reason=enumerations.ReleaseRequestReason.NORMAL, user_information=UserInformation(ciphered_initiate(xdlms.GlobalCipherInitiateRequest, "release"))
    )
    return {
        "invoke_id_and_priority": invoke.to_bytes().hex(),
        "gmac": answer.hex(),
        "reply_to_hls_authentication": bytes(reply.to_bytes()).hex(),
        "get_request": bytes(xdlms.GetRequestNormal(cosem_attribute=energy, invoke_id_and_priority=invoke).to_bytes()).hex(),
        "get_response_error": bytes(xdlms.GetResponseNormalWithError(denied, invoke).to_bytes()).hex(),
        "action_response": bytes(xdlms.ActionResponseNormal(failed, invoke).to_bytes()).hex(),
        "action_response_with_data": bytes(xdlms.ActionResponseNormalWithData(succeeded, octet_string, invoke).to_bytes()).hex(),
        "action_response_with_error": bytes(xdlms.ActionResponseNormalWithError(failed, denied, invoke).to_bytes()).hex(),
        "release_initiate_request": release.user_information.content.to_bytes().hex(),
        "release_request": release.to_bytes().hex(),
        "release_request_plain": acse.ReleaseRequest(reason=enumerations.ReleaseRequestReason.NORMAL).to_bytes().hex(),
    }


def association():
    return {
        "request": association_request(),
        "responses": association_responses(),
        "initiate_response": initiate_response()[1],
        "services": services(),
    }


# Enrolment codes, and the file of a device


def crockford(octets):
    number = int.from_bytes(octets, "big")
    length = len(octets) * 8 // 5
    return "".join("0123456789ABCDEFGHJKMNPQRSTVWXYZ"[number >> 5 * (length - 1 - at) & 31] for at in range(length))


def enrolment_code():
    name, root = "h-17", fixed("root certificate", 300)
    public, secret = fixed("public part", 6), fixed("secret of the code", 15)
    content = public + secret + hashlib.sha256(root).digest()[:16]
    check = hashlib.sha256(b"meterkms/enrolment-code-check" + name.encode() + bytes(1) + content).digest()[:3]
    symbols = crockford(content + check)
    return {
        "name": name,
        "root": root.hex(),
        "public": public.hex(),
        "secret": secret.hex(),
        "text": name + "/" + "-".join(symbols[at : at + 4] for at in range(0, len(symbols), 4)),
        "digest": hashlib.sha256(b"meterkms/enrolment-code" + name.encode() + bytes(1) + public + secret).hexdigest(),
    }


def device():
    pin, content = "correct horse battery staple", b'{"handheld":"urn:meterkms:north:handheld:h-17"}'
    header = b"KMSFIELD\x01" + fixed("salt", 16) + fixed("nonce", 12)
    key = Argon2id(salt=fixed("salt", 16), length=32, iterations=3, lanes=4, memory_cost=65536).derive(pin.encode())
    return {
        "pin": pin,
        "content": content.hex(),
        "file": (header + AESGCM(key).encrypt(fixed("nonce", 12), content, header)).hex(),
    }


def main():
    vectors = {
        "diversified": diversified(),
        "secrets": secrets(),
        "seal_root": seal_root_keys(),
        "rows": rows(),
        "fingerprint": fingerprint(),
        "campaign": campaign(),
        "envelopes": [envelope(1), envelope(2)],
        "audit": audit(),
        "shipment": shipment(),
        "association": association(),
        "enrolment_code": enrolment_code(),
        "device": device(),
    }
    output = json.dumps(vectors, indent=1) + "\n"
    if sys.argv[1:] == ["--check"]:
        if not FILE.exists() or FILE.read_text() != output:
            sys.exit(f"{FILE.name} differs from what generate.py computes: run it, and look at the difference before you keep it")
        print(f"{FILE.name} is what generate.py computes")
    elif not sys.argv[1:]:
        FILE.write_text(output)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
