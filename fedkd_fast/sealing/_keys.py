"""Pairs of keys, their files, and which clients a server knows."""

from __future__ import annotations

import base64
import binascii
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

from fedkd_fast._extras import needed
from fedkd_fast._files import parse_json, read_text, replacing

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

KEY_BYTES = 32
# Of clients, rounds and counters: four bytes each in a header.
MOST = 2**32 - 1
_PRIME = 2**255 - 19


def require_cryptography() -> None:
    """Check that frames can be sealed.

    Raises:
        ImportError: cryptography is not installed; the message says how to get it.
    """
    needed("cryptography", "sealing frames", "cryptography", "crypto")


@dataclass(frozen=True)
class PublicKey:
    """Half of a pair of keys, for everybody to know; `str` gives its one line of base64.

    Args:
        raw: 32 bytes, the u-coordinate of X25519 (RFC 7748).

    Raises:
        ValueError: of another length; not below 2^255 - 19, so that one key would have two names;
            or of low order, so that what it agrees on is no secret.
        ImportError: cryptography is not installed.
    """

    raw: bytes

    def __post_init__(self) -> None:
        require_cryptography()
        from cryptography.hazmat.primitives.asymmetric import x25519

        if not isinstance(self.raw, bytes) or len(self.raw) != KEY_BYTES:
            raise ValueError(f"raw must be {KEY_BYTES} bytes, got {described(self.raw)}")
        if int.from_bytes(self.raw, "little") >= _PRIME:
            raise ValueError("raw must be a number below 2^255 - 19, got a larger one")
        try:
            # Private keys are multiples of 8, so that any of them turns low order into zeros.
            key = x25519.X25519PublicKey.from_public_bytes(self.raw)
            x25519.X25519PrivateKey.generate().exchange(key)
        except ValueError:
            raise ValueError("raw must not be a point of low order, got one") from None

    @classmethod
    def parse(cls, text: str, name: str = "text") -> PublicKey:
        """Read a key from the line of base64 that `str` gives; space around it does not matter.

        Args:
            text: 44 characters.
            name: what to call them in errors, which never repeat them: they may be a private key.

        Raises:
            ValueError: they are no public key.
            ImportError: cryptography is not installed.
        """
        if not isinstance(text, str):
            raise ValueError(f"{name} must be a public key in base64, got {described(text)}")
        line = text.strip()
        try:
            raw = base64.b64decode(line, validate=True)
            canonical = base64.b64encode(raw).decode() == line
        except (binascii.Error, ValueError):
            canonical = False
        if not canonical or len(raw) != KEY_BYTES:
            raise ValueError(
                f"{name} must be a public key, {KEY_BYTES} bytes in base64 on one line, "
                f"got {len(text)} other characters"
            )
        try:
            return cls(raw)
        except ValueError as error:
            raise ValueError(f"{name} is no public key: {error}") from None

    @classmethod
    def load(cls, path: Path) -> PublicKey:
        """Read the file of one public key.

        Raises:
            ValueError: it holds something else; names the file.
            OSError: it cannot be read.
            ImportError: cryptography is not installed.
        """
        return cls.parse(read_text(path), str(path))

    def __str__(self) -> str:
        """Return 44 characters of base64."""
        return base64.b64encode(self.raw).decode()

    def __repr__(self) -> str:
        return f"PublicKey.parse({str(self)!r})"


class Secret:
    """What holds keys can be neither pickled nor copied: the copies would be where nobody looks."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(f"{type(self).__name__} holds secret keys: it cannot be pickled or copied")


class PrivateKey(Secret):
    """A pair of keys, of a server or of a client; `generate` or `load` it.

    Attributes:
        public: the half for everybody.
    """

    def __init__(self, key: X25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(key.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> PrivateKey:
        """Return a new pair, from the randomness of the operating system.

        Raises:
            ImportError: cryptography is not installed.
        """
        require_cryptography()
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        return cls(X25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> PrivateKey:
        """Read what `save` wrote: PKCS 8 in PEM.

        Raises:
            ValueError: the file holds something else; names it and tells nothing of its content.
            OSError: it cannot be read.
            ImportError: cryptography is not installed.
        """
        require_cryptography()
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            key = load_pem_private_key(path.read_bytes(), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, X25519PrivateKey):
            raise ValueError(f"{path} must hold a private key for X25519 in PEM, without password")
        return cls(key)

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the key, whole or not at all, to a file that only its owner may read (mode 0600).

        Args:
            path: the file; its folder must exist.
            overwrite: replace a file that is there already.

        Raises:
            FileExistsError: there is one.
            OSError: it cannot be written.
        """
        from cryptography.hazmat.primitives import serialization

        text = self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        with replacing(path) as part:
            # Private from the start: between writing and a chmod somebody could open it.
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(text)
            if not overwrite:
                # Fails where the name is taken, at one stroke, which a look beforehand cannot.
                os.link(part, path)

    def agree(self, peer: PublicKey) -> bytes:
        """Return the 32 secret bytes that the owners of both keys can compute, and nobody else."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

        return self._key.exchange(X25519PublicKey.from_public_bytes(peer.raw))

    def __repr__(self) -> str:
        return f"<PrivateKey of {self.public}>"


def read_enrolment(path: Path) -> dict[int, PublicKey]:
    """Read which clients a server knows: a JSON object, number of a client to its public key.

    Raises:
        ValueError: it is something else, a number stands twice, or two clients have the same key;
            names the file and the clients.
        OSError: it cannot be read.
        ImportError: cryptography is not installed.
    """
    content = parse_json(read_text(path), str(path), pairs=_once)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} must hold a JSON object of clients and their public keys")
    known: dict[int, PublicKey] = {}
    owners: dict[PublicKey, int] = {}
    for name, text in content.items():
        if not re.fullmatch("0|[1-9][0-9]{0,9}", name) or int(name) > MOST:
            raise ValueError(f"{path}: clients are numbers from 0 to {MOST}, got {name!r}")
        client, key = int(name), PublicKey.parse(text, f"{path}: key of client {name}")
        if key in owners:
            raise ValueError(f"{path}: clients {owners[key]} and {client} have the same key")
        known[client], owners[key] = key, client
    return known


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a name that stands twice, of which JSON would keep the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a client stands there twice")
    return found


def described(value: object) -> str:
    """Say what a value is like without showing it: it may be a secret in the wrong place."""
    size = f" of {len(value)}" if isinstance(value, (bytes, str)) else ""
    return type(value).__name__ + size
