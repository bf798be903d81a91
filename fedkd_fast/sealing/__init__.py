"""Frames that only their receiver can read, and only their sender can have written.

FedKD's clients encrypt what they upload and the server encrypts what it broadcasts (Algorithm 1).
Here each client shares two keys with the server, one a direction, that nobody else can compute::

    shared = X25519(own private key, public key of the peer)
    key    = HKDF-SHA256(shared, salt=run, info=label | server key | client key | names | run)
    sealed = header | AES-256-GCM(key, nonce, frame, associated data = header | run)

The server knows the clients' public keys beforehand, and the clients know the server's.
`docs/sealed-frames.md` specifies every byte, SECURITY.md says what this defends and what it does
not. Importing this room loads nothing: only its objects need `cryptography`, the extra `[crypto]`.
"""

from fedkd_fast.sealing._channel import MAX_FRAME_BYTES as MAX_FRAME_BYTES
from fedkd_fast.sealing._channel import SEAL_BYTES as SEAL_BYTES
from fedkd_fast.sealing._channel import Channel as Channel
from fedkd_fast.sealing._channel import Reason as Reason
from fedkd_fast.sealing._channel import SealError as SealError
from fedkd_fast.sealing._channel import Side as Side
from fedkd_fast.sealing._keys import PrivateKey as PrivateKey
from fedkd_fast.sealing._keys import PublicKey as PublicKey
from fedkd_fast.sealing._keys import read_enrolment as read_enrolment
from fedkd_fast.sealing._keys import require_cryptography as require_cryptography
