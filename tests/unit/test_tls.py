"""TLS and mutual TLS between a real server and the client; certificates that change meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from router.client import ClientTls, RouterClient, RouterError
from router.errors import InvalidInputError
from router.settings import TlsFiles
from router.tls import check_certificates
from tests.fakes import make_router, make_settings, running_server

HOST = "127.0.0.1"


def write(folder: Path, name: str, certificate: trustme.LeafCert) -> tuple[Path, Path]:
    """A chain and its key as PEM files."""
    chain, key = folder / f"{name}.pem", folder / f"{name}.key"
    chain.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    key.write_bytes(certificate.private_key_pem.bytes())
    return chain, key


def write_authority(folder: Path, name: str, authority: trustme.CA) -> Path:
    path = folder / f"{name}.pem"
    path.write_bytes(authority.cert_pem.bytes())
    return path


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def another() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca(tmp_path: Path, authority: trustme.CA) -> Path:
    return write_authority(tmp_path, "ca", authority)


@pytest.fixture
def files(tmp_path: Path, authority: trustme.CA) -> TlsFiles:
    return TlsFiles(*write(tmp_path, "server", authority.issue_cert(HOST)))


@pytest.fixture
def address(files: TlsFiles) -> Iterator[str]:
    with running_server(make_router(), make_settings(tls=files)) as address:
        yield address


def route(address: str, tls: ClientTls | None, timeout: float = 10) -> str:
    """The outcome of one call on a connection of its own."""
    with RouterClient(address, timeout=timeout, tls=tls) as client:
        return client.route("weather").outcome.value


def refused(address: str, tls: ClientTls | None) -> None:
    with pytest.raises(RouterError) as error:
        route(address, tls, timeout=1)  # the client would try again and again
    assert error.value.reason in ("UNAVAILABLE", "DEADLINE_EXCEEDED")


def test_a_client_that_trusts_the_authority_is_served(address: str, ca: Path) -> None:
    assert route(address, ClientTls(ca)) == "matched"


def test_a_client_without_tls_or_of_another_trust_is_not(
    address: str, tmp_path: Path, another: trustme.CA
) -> None:
    refused(address, None)
    refused(address, ClientTls())  # what the system trusts
    refused(address, ClientTls(write_authority(tmp_path, "another", another)))


def test_a_certificate_that_changes_is_shown_to_the_next_connection(
    address: str, ca: Path, files: TlsFiles, tmp_path: Path, another: trustme.CA
) -> None:
    new_ca = ClientTls(write_authority(tmp_path, "another", another))
    with RouterClient(address, timeout=5, tls=ClientTls(ca)) as connected:
        connected.route("weather")
        # The key comes first: for a moment the two files do not fit, and the old ones stay.
        certificate = another.issue_cert(HOST)
        files.key.write_bytes(certificate.private_key_pem.bytes())
        assert route(address, ClientTls(ca)) == "matched"
        files.certificate.write_bytes(certificate.cert_chain_pems[0].bytes())
        assert route(address, new_ca) == "matched"
        refused(address, ClientTls(ca))
        assert connected.route("weather").outcome.value == "matched"  # as it began


def test_certificates_that_vanish_leave_the_old_ones(
    address: str, ca: Path, files: TlsFiles
) -> None:
    files.certificate.unlink()
    assert route(address, ClientTls(ca)) == "matched"


def test_with_mutual_tls_a_client_must_show_a_certificate_of_the_authority(
    tmp_path: Path, files: TlsFiles, ca: Path, authority: trustme.CA, another: trustme.CA
) -> None:
    mutual = TlsFiles(files.certificate, files.key, ca)
    good = ClientTls(ca, *write(tmp_path, "good", authority.issue_cert("shop@example.com")))
    bad = ClientTls(ca, *write(tmp_path, "bad", another.issue_cert("shop@example.com")))
    with running_server(make_router(), make_settings(tls=mutual)) as address:
        assert route(address, good) == "matched"
        refused(address, ClientTls(ca))
        refused(address, bad)


def test_files_that_cannot_be_used_are_refused_by_name(
    tmp_path: Path, files: TlsFiles, ca: Path, authority: trustme.CA
) -> None:
    other_chain, _ = write(tmp_path, "other", authority.issue_cert(HOST))
    junk, none = tmp_path / "junk.pem", tmp_path / "none.pem"
    junk.write_bytes(b"\xff not a certificate")
    for bad, problem in (
        (TlsFiles(none, files.key), r"tls_certificate .*none\.pem: No such file"),
        (TlsFiles(files.certificate, none), r"tls_key .*none\.pem: No such file"),
        (TlsFiles(junk, files.key), r"tls_certificate .*junk\.pem: does not go with the key"),
        (TlsFiles(other_chain, files.key), "tls_certificate .*: does not go with the key"),
        (TlsFiles(files.certificate, files.key, none), r"tls_client_ca .*: No such file"),
        (TlsFiles(files.certificate, files.key, junk), "tls_client_ca .*: no certificate"),
    ):
        with pytest.raises(InvalidInputError, match=problem):
            check_certificates(bad)
    check_certificates(TlsFiles(files.certificate, files.key, ca))


def test_a_clients_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"tls .*none\.pem: No such file"):
        RouterClient("127.0.0.1:1", tls=ClientTls(tmp_path / "none.pem"))


# ---- whom the server listens to without TLS


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.9.9.9:0", "localhost:0", "[::1]:0"])
def test_this_machine_can_be_served_without_tls(listen: str) -> None:
    make_settings(listen=listen)


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:50051", "[::]:50051", "10.0.0.1:50051", "router.internal:50051"]
)
def test_others_can_be_served_with_tls_or_where_that_is_said_to_be_wanted(
    listen: str, files: TlsFiles
) -> None:
    with pytest.raises(InvalidInputError, match=r"listen: .*--tls-cert .*--insecure"):
        make_settings(listen=listen)
    make_settings(listen=listen, tls=files)
    make_settings(listen=listen, insecure=True)
