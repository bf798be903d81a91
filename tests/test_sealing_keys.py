"""Keys for sealed frames: files, texts, enrolment, and that nothing shows a private one."""

from __future__ import annotations

import base64
import copy
import json
import logging
import os
import pickle
import stat
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from cli_support import Refusal, refused

from fedkd_fast.__main__ import main
from fedkd_fast.sealing import PrivateKey, PublicKey, read_enrolment, require_cryptography

pytest.importorskip("cryptography", reason="sealed frames need the extra [crypto]")

from sealing_support import CLIENT, OTHER, SERVER, client_side, private_key

__all__ = ["refused"]
PRIME = 2**255 - 19
# u-coordinates of order 1, 2, 4 and 8 on the curve or its twist (Wycheproof, RFC 7748 section 7).
LOW_ORDER = [
    0,
    1,
    PRIME - 1,
    int("00b8495f16056286fdb1329ceb8d09da6ac49ff1fae35616aeb8413b7c7aebe0", 16),
    int("57119fd0dd4e22d8868e1c58c45c44045bef839c55b1d0b1248c50a3bc959c5f", 16),
]


# ---- public keys ---------------------------------------------------------------------------------


def test_a_public_key_is_one_line() -> None:
    key = PrivateKey.generate().public
    assert len(str(key)) == 44
    assert PublicKey.parse(f"  {key}\n") == key
    assert eval(repr(key), {"PublicKey": PublicKey}) == key
    assert key != PrivateKey.generate().public


@pytest.mark.parametrize("low", [n.to_bytes(32, "little") for n in LOW_ORDER])
def test_points_of_low_order_are_refused(low: bytes) -> None:
    with pytest.raises(ValueError, match="raw must not be a point of low order"):
        PublicKey(low)
    with pytest.raises(ValueError, match="peer is no public key: .* low order"):
        PublicKey.parse(base64.b64encode(low).decode(), "peer")


@pytest.mark.parametrize("number", [PRIME, PRIME + 1, 2 * PRIME, 2**255 + 9, 2**256 - 1])
def test_a_key_has_one_name(number: int) -> None:
    with pytest.raises(ValueError, match="raw must be a number below 2\\^255 - 19"):
        PublicKey((number % 2**256).to_bytes(32, "little"))


@pytest.mark.parametrize("raw", [b"", bytes(31), bytes(33), "x" * 32, bytearray(32), None])
def test_other_lengths_and_types_are_refused(raw: Any) -> None:
    with pytest.raises(ValueError, match="raw must be 32 bytes, got"):
        PublicKey(raw)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "secret",
        str(CLIENT.public)[:-1],
        str(CLIENT.public) + "=",
        str(CLIENT.public)[:20] + "\n" + str(CLIENT.public)[20:],
        str(CLIENT.public).replace("=", "é"),
        str(CLIENT.public)[:-2] + chr(ord(str(CLIENT.public)[-2]) + 1) + "=",  # bits of nothing
        base64.b64encode(bytes(33)).decode(),
        base64.urlsafe_b64encode(b"\xff" * 31 + b"\x0f").decode(),
    ],
)
def test_texts_that_are_no_key_are_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match="peer must be a public key, 32 bytes in base64") as error:
        PublicKey.parse(text, "peer")
    assert len(text) < 6 or text not in str(error.value)
    with pytest.raises(ValueError, match="text must be a public key in base64, got NoneType"):
        PublicKey.parse(None)  # type: ignore[arg-type]


# ---- private keys --------------------------------------------------------------------------------


def test_a_private_key_survives_its_file(tmp_path: Path) -> None:
    key, path = PrivateKey.generate(), tmp_path / "server.key"
    previous = os.umask(0)
    try:
        key.save(path)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_nlink == 1 and os.listdir(tmp_path) == ["server.key"]
    again = PrivateKey.load(path)
    assert again.public == key.public
    assert again.agree(CLIENT.public) == CLIENT.agree(key.public) == key.agree(CLIENT.public)


def test_a_private_key_is_replaced_only_on_demand(tmp_path: Path) -> None:
    first, second, path = PrivateKey.generate(), PrivateKey.generate(), tmp_path / "key"
    first.save(path)
    path.chmod(0o644)
    with pytest.raises(FileExistsError) as error:
        second.save(path)
    assert error.value.filename == str(path)
    assert PrivateKey.load(path).public == first.public
    second.save(path, overwrite=True)
    assert PrivateKey.load(path).public == second.public
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["key"]
    with pytest.raises(FileNotFoundError):
        first.save(tmp_path / "missing" / "key")


def test_files_that_hold_no_key(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    path = tmp_path / "key"
    SERVER.save(path)
    pem = path.read_bytes()
    loaded = serialization.load_pem_private_key(pem, None)
    layout = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked = loaded.private_bytes(*layout, serialization.BestAvailableEncryption(b"password"))
    signing = Ed25519PrivateKey.generate().private_bytes(*layout, serialization.NoEncryption())
    for content in (b"", b"\xff", pem[:-40], bytes(str(SERVER.public), "ascii"), locked, signing):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="key must hold a private key for X25519") as error:
            PrivateKey.load(path)
        shown = "".join(traceback.format_exception(error.value))
        assert not any(line.decode() in shown for line in content.split(b"\n")[1:2] if line)
    with pytest.raises(FileNotFoundError):
        PrivateKey.load(tmp_path / "missing")


def test_nothing_shows_a_private_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    key, raw = private_key(32), bytes(range(32, 64))
    sealing = client_side()
    shared = key.agree(SERVER.public)
    shown = [repr(key), str(key), repr(sealing), str(sealing), repr(vars(key)), repr(vars(sealing))]
    for wrong in (lambda: sealing.open(b"x" * 99, 1), lambda: PublicKey(raw + b"!")):
        with pytest.raises(ValueError) as error:
            wrong()
        shown.append("".join(traceback.format_exception(error.value)))
    with pytest.raises(ValueError) as refused:
        # A private key in the place of a public one is a likely mistake.
        PublicKey.parse(base64.b64encode(raw).decode() + " ?")
    shown += ["".join(traceback.format_exception(refused.value)), caplog.text, *capsys.readouterr()]
    text = "\n".join(shown)
    assert str(key.public) in text and not caplog.records
    for secret in (raw, shared):
        for form in (secret.hex(), base64.b64encode(secret).decode()[:-1], repr(secret)[2:-1]):
            assert form not in text


@pytest.mark.parametrize("make", [PrivateKey.generate, client_side])
def test_secrets_are_neither_pickled_nor_copied(make: Any) -> None:
    for call in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="holds secret keys: it cannot be pickled or copied"):
            call(make())


# ---- enrolment -----------------------------------------------------------------------------------


def test_enrolment(tmp_path: Path) -> None:
    path = tmp_path / "clients.json"
    path.write_text(json.dumps({"0": str(CLIENT.public), "12": str(OTHER.public)}))
    assert read_enrolment(path) == {0: CLIENT.public, 12: OTHER.public}


ONE, TWO = str(CLIENT.public), str(OTHER.public)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "clients.json: not JSON"),
        ("[]", "clients.json must hold a JSON object of clients and their public keys"),
        ("{}", "clients.json must hold a JSON object of clients"),
        (json.dumps({"0": ONE, "1": TWO, "2": ONE}), "json: clients 0 and 2 have the same key"),
        (f'{{"0": "{ONE}", "0": "{TWO}"}}', "clients.json: a client stands there twice"),
        (json.dumps({"-1": ONE}), "clients are numbers from 0 to 4294967295, got '-1'"),
        (json.dumps({"01": ONE}), "clients are numbers .* got '01'"),
        (json.dumps({" 1": ONE}), "clients are numbers .* got ' 1'"),
        (json.dumps({"1\n": ONE}), "clients are numbers"),
        (json.dumps({"١": ONE}), "clients are numbers"),
        (json.dumps({"1.0": ONE}), "clients are numbers .* got '1.0'"),
        (json.dumps({"4294967296": ONE}), "clients are numbers .* got '4294967296'"),
        (json.dumps({"1" * 5000: ONE}), "clients are numbers"),
        (json.dumps({"3": 5}), "key of client 3 must be a public key in base64, got int"),
        (json.dumps({"3": ONE[:-4]}), "key of client 3 must be a public key, 32 bytes in base64"),
        (json.dumps({"3": "A" * 43 + "="}), "key of client 3 is no public key: .* low order"),
    ],
)
def test_enrolment_that_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "clients.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_enrolment(path)
    assert str(path) in str(error.value)


# ---- command line --------------------------------------------------------------------------------


def test_keygen(tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refusal) -> None:
    path = tmp_path / "client.key"
    assert main(["keygen", str(path)]) == 0
    printed = capsys.readouterr().out
    public = PublicKey.load(tmp_path / "client.key.pub")
    assert printed == f"{public}\n" and PrivateKey.load(path).public == public
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert f"{path} exists: give --overwrite" in refused("keygen", path)
    path.unlink()
    assert f"{path}.pub exists: give --overwrite" in refused("keygen", path)
    assert main(["keygen", str(path), "--overwrite"]) == 0
    capsys.readouterr()
    assert PublicKey.load(tmp_path / "client.key.pub") == PrivateKey.load(path).public != public
    assert "missing is not a folder" in refused("keygen", tmp_path / "missing" / "key")


def without_cryptography(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)


def test_without_cryptography_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refusal
) -> None:
    without_cryptography(monkeypatch)
    calls = (
        require_cryptography,
        PrivateKey.generate,
        lambda: PrivateKey.load(tmp_path / "key"),
        lambda: PublicKey.parse(ONE),
    )
    for call in calls:
        with pytest.raises(ImportError, match=r'pip install "fedkd-fast\[crypto\]"'):
            call()
    assert 'pip install "fedkd-fast[crypto]"' in refused("keygen", tmp_path / "key")


def test_import_loads_nothing() -> None:
    program = (
        "import sys, fedkd_fast, fedkd_fast.__main__; fedkd_fast.sealing.SEAL_BYTES; "
        "print(sorted({'torch', 'numpy', 'cryptography'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
