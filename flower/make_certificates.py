"""Make certificates and keys to try TLS with: python -m flower.make_certificates FOLDER [NODE ...]

FOLDER gets ca.crt, server.pem and server.key for 127.0.0.1 and localhost, valid for 30 days, and for
every NODE a key pair NODE, NODE.pub. For trying only: the CA's own key is thrown away.

Between machines of their own, each with this program, requirements.txt and flower/requirements.txt,
the FLWR settings of flower/README.md in its environment and a clock in step (to seconds):

  server    has a certificate of its own name; flower-superlink runs there with --host 0.0.0.0, flwr
            on the machine that registers the keys and starts the run
  hospital  makes its key: ssh-keygen -t ecdsa -b 384 -N "" -f KEY, and sends KEY.pub, nothing else;
            once that is registered, its flower-supernode runs with --superlink SERVER:PORT,
            --root-certificates (of the authority that signed the server's certificate) and
            --auth-supernode-private-key KEY; it needs no port that is open to others
"""

import datetime
import ipaddress
import os
import re
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def certificate(name, key, issuer, issuer_key, extension):
    """Return a certificate of the key `key`, signed by issuer_key."""
    now = datetime.datetime.now(datetime.timezone.utc)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer or subject)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=30))
    return builder.add_extension(extension, critical=True).sign(issuer_key, hashes.SHA256())


def write(file, content):
    """Write a new file, readable by its owner alone; ends the program if there is anything of that name."""
    try:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as stream:
            stream.write(content)
    except FileExistsError:
        sys.exit(f"error: {file}: is there already, choose another folder")
    except OSError as problem:
        sys.exit(f"error: {file}: cannot be written ({problem.strerror}), choose another folder")


def check_nodes(folder, nodes):
    """End the program unless each name is one of its own in the folder and none of its files is there."""
    names = ["ca.crt", "server.pem", "server.key"]
    for node in nodes:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,60}", node):
            sys.exit(f"error: {node!r}: is no name of a node; use letters, digits, dot, dash and underscore")
        names += [node, f"{node}.pub"]
    if twice := {name for name in names if [n.casefold() for n in names].count(name.casefold()) > 1}:
        sys.exit(f"error: {min(twice)}: would be two files of one name, choose other names for the nodes")
    for name in names:
        if os.path.lexists(folder / name):
            sys.exit(f"error: {folder / name}: is there already, choose another folder")


def private(key, form):
    """Return a private key as PEM of a format."""
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def main():
    """Write the certificates and the keys of the nodes that are named."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    folder = Path(sys.argv[1]).expanduser()
    check_nodes(folder, sys.argv[2:])
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    pem, ca_key, server_key = serialization.Encoding.PEM, *(
        ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    ca = certificate("FedBCS test CA", ca_key, None, ca_key, x509.BasicConstraints(True, None))
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"),
                                         x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    server = certificate("localhost", server_key, ca.subject, ca_key, names)
    write(folder / "ca.crt", ca.public_bytes(pem))
    write(folder / "server.pem", server.public_bytes(pem))
    write(folder / "server.key", private(server_key, serialization.PrivateFormat.PKCS8))
    for node in sys.argv[2:]:
        key = ec.generate_private_key(ec.SECP384R1())
        write(folder / node, private(key, serialization.PrivateFormat.OpenSSH))
        write(folder / f"{node}.pub", key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH))


if __name__ == "__main__":
    main()
