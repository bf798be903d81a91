"""The subcommand on keys: keygen."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedkd_fast.cli.common import Parser, add_command, check_target, say, write_bytes


def add_commands(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "keygen",
        _keygen,
        "make a pair of keys for sealed frames",
        "server.key\nclient3.key",
        "Make a pair of keys for sealed frames: write the private one to FILE, which only its "
        "owner may read, and the public one to FILE.pub, and print the public one. The server's "
        "public key goes to all clients, each client's public key to the server, by a way that "
        "can be trusted.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="private key to write (PEM)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace FILE and FILE.pub: old keys are lost"
    )


def _keygen(args: argparse.Namespace) -> int:
    private, public = (
        check_target(path, args.overwrite)
        for path in (args.file, args.file.with_name(f"{args.file.name}.pub"))
    )
    from fedkd_fast.sealing import PrivateKey

    key = PrivateKey.generate()
    key.save(private, overwrite=args.overwrite)
    write_bytes(public, f"{key.public}\n".encode())
    say(str(key.public))
    return 0
