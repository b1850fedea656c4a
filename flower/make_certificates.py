"""Make certificates and keys to try TLS with: python -m flower.make_certificates FOLDER [NODE ...]

FOLDER gets ca.crt, server.pem and server.key for 127.0.0.1 and localhost, valid for 30 days, and for
every NODE a key pair NODE, NODE.pub. For trying only: the server's certificate is signed by its own key,
so ca.crt and server.pem are one certificate. It needs the commands openssl and ssh-keygen.

Between machines of their own, each with this program, requirements.txt and flower/requirements.txt,
the FLWR settings of flower/README.md in its environment and a clock in step (to seconds):

  server    has a certificate of its own name; flower-superlink runs there with --host 0.0.0.0, flwr
            on the machine that registers the keys and starts the run
  hospital  makes its key: ssh-keygen -t ecdsa -b 384 -N "" -f KEY, and sends KEY.pub, nothing else;
            once that is registered, its flower-supernode runs with --superlink SERVER:PORT,
            --root-certificates (of the authority that signed the server's certificate) and
            --auth-supernode-private-key KEY; it needs no port that is open to others
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CERTIFICATE = ("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -days 30 "
               "-subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1 "
               "-keyout server.key -out ca.crt")


def write(file, content):
    """Write a new file, readable by its owner alone; end the program where there is one or it cannot be."""
    try:
        with open(file, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
            stream.write(content)
    except OSError as problem:
        reason = "is there already" if os.path.lexists(file) else f"cannot be written ({problem.strerror})"
        sys.exit(f"error: {file}: {reason}, choose another folder")


def check_nodes(folder, nodes):
    """End the program unless each name is one of its own in the folder and none of its files is there."""
    names = ["ca.crt", "server.pem", "server.key"]
    for node in nodes:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,60}", node):
            sys.exit(f"error: {node!r}: is no name of a node; use letters, digits, dot, dash and underscore")
        names += [node, f"{node}.pub"]
    if len({name.casefold() for name in names}) < len(names):
        sys.exit(f"error: {', '.join(nodes)}: two of the files would have one name, choose other names")
    for name in names:
        if os.path.lexists(folder / name):
            sys.exit(f"error: {folder / name}: is there already, choose another folder")


def must_run(command, folder):
    """Run a command in a folder; end the program with what it says if it fails."""
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except OSError:
        sys.exit(f"error: {command[0]}: is not installed")
    except subprocess.CalledProcessError as failed:
        sys.exit(f"error: {command[0]}: {failed.stderr.strip()}")


def main():
    """Write the certificates and the keys of the nodes that are named."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    folder, nodes = Path(sys.argv[1]).expanduser(), sys.argv[2:]
    check_nodes(folder, nodes)
    with tempfile.TemporaryDirectory() as made:
        must_run(CERTIFICATE.split(), made)
        (Path(made) / "server.pem").write_bytes((Path(made) / "ca.crt").read_bytes())
        for node in nodes:
            must_run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", "", "-f", node], made)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in sorted(Path(made).iterdir()):
            write(folder / file.name, file.read_bytes())


if __name__ == "__main__":
    main()
