"""What is made once and kept where only the user can read it."""

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from ipaddress import ip_address
from pathlib import Path

from nightshift.errors import LocalServiceError


def made_once(path: Path, make: Callable[[], str]) -> str:
    """The text of a file that only the user can read; made if it is missing, its directory too.

    Of processes that come at the same moment, all get what the first has made. The file is whole or missing, even
    after a power cut.

    Raises:
        LocalServiceError: its directory is open to others, and is not ours to close.
    """
    close_to_others(path.parent)
    if not path.exists():
        draft = _draft(path, make())
        with suppress(FileExistsError):  # another process was first, and what it made counts
            path.hardlink_to(draft)
        draft.unlink()
    return path.read_text()


def written(path: Path, text: str) -> None:
    """Write a file that only the user can read. It is whole, or as it was before, even where there is no room.

    Raises:
        OSError: it could not be written.
    """
    _draft(path, text).replace(path)


def _draft(path: Path, text: str) -> Path:
    """A new file beside `path` with this text."""
    draft, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)  # with mode 0600
    try:
        with open(draft, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(draft)
    except OSError:
        Path(name).unlink()
        raise
    return Path(name)


def close_to_others(directory: Path) -> None:
    """Make a directory that only the user can enter. One that was copied with open modes is closed.

    Raises:
        LocalServiceError: it is open to others, and is not ours to close.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if directory.stat().st_mode & 0o077:
        try:
            directory.chmod(0o700)
        except PermissionError as error:
            raise LocalServiceError(
                f"{directory} can be entered by other users and belongs to one of them: "
                "set NIGHTSHIFT_HOME to a directory of your own"
            ) from error


def new_certificate() -> str:
    """A private key and a certificate for 127.0.0.1 that it has signed itself, as PEM. It never expires.

    Both ends of a connection can prove themselves with it, and trust nothing else.
    """
    # Imported here because it takes a while, and is needed once in a home's life.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "nightshift")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Whatever the clock of this machine says.
        .not_valid_before(datetime(1970, 1, 1))
        .not_valid_after(datetime(9999, 12, 31))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return (secret + certificate.public_bytes(serialization.Encoding.PEM)).decode()
