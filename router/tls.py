"""TLS for the server: certificates from files, read again when they change."""

from __future__ import annotations

import os
import ssl
import threading
from pathlib import Path

import grpc
import structlog

from router.errors import InvalidInputError
from router.settings import TlsFiles

_log = structlog.get_logger(__name__)


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials that follow their files: a new connection gets the newest good certificate.

    With `client_ca` every client must show a certificate of that authority.

    Raises:
        InvalidInputError: a file cannot be used.
    """
    certificates = _Certificates(files)
    return grpc.dynamic_ssl_server_credentials(
        certificates.read(),
        certificates.fetch,  # type: ignore[arg-type]  # the stub forgets that None is allowed
        require_client_authentication=files.client_ca is not None,
    )


def check_certificates(files: TlsFiles) -> None:
    """Raises InvalidInputError: a file is missing, is no PEM, or the key is of another one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for field, path in (("tls_key", files.key), ("tls_certificate", files.certificate)):
        _read(field, path)
    try:
        # A key with a passphrase would be asked for at the terminal.
        context.load_cert_chain(files.certificate, files.key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise InvalidInputError(
            f"tls_certificate {files.certificate}",
            f"does not go with the key {files.key}",
            "give a certificate chain and its key without a passphrase, both as PEM",
        ) from error
    if files.client_ca is not None:
        content = _read("tls_client_ca", files.client_ca)
        try:
            context.load_verify_locations(cadata=content.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise InvalidInputError(
                f"tls_client_ca {files.client_ca}",
                "no certificate",
                "give the authority's certificate as PEM",
            ) from error


class _Certificates:
    """What `grpc` asks for certificates, in threads of its own, at every handshake."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._stamps = _stamps(files)

    def read(self) -> grpc.ServerCertificateConfiguration:
        check_certificates(self._files)
        files = self._files
        chain = (_read("tls_key", files.key), _read("tls_certificate", files.certificate))
        authority = None
        if files.client_ca is not None:
            authority = _read("tls_client_ca", files.client_ca)
        return grpc.ssl_server_certificate_configuration([chain], root_certificates=authority)

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """New certificates, or None to go on with the old ones."""
        with self._lock:
            stamps = _stamps(self._files)
            if stamps == self._stamps:
                return None
            self._stamps = stamps
            try:
                fresh = self.read()
            except InvalidInputError as error:
                # Key and certificate are two files: between the two writes they do not fit.
                _log.error("the old certificate stays", problem=str(error))
                return None
            _log.info("certificate read again", certificate=str(self._files.certificate))
            return fresh


def _read(field: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInputError(
            f"{field} {path}", error.strerror or error, "give a PEM file that can be read"
        ) from error


def _stamps(files: TlsFiles) -> list[tuple[int, int, int] | None]:
    stamps: list[tuple[int, int, int] | None] = []
    for path in (files.certificate, files.key, files.client_ca):
        try:
            found = None if path is None else os.stat(path)
        except OSError:
            found = None
        stamps.append(found and (found.st_ino, found.st_size, found.st_mtime_ns))
    return stamps
