"""Who may call what: bearer tokens with roles and tenants, in a file that holds digests of them."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from router.errors import ForbiddenError, InvalidInputError, UnauthenticatedError
from router.roles import Role
from router.settings import DEFAULT_MAX_TENANTS
from router.tenants import check_tenant
from router.yaml_file import read_yaml

_HEADER = "authorization"
_SCHEME = "bearer "
_PREFIX = "promptyard-"  # so that scanners for leaked secrets can know one
_SECRET_BYTES = 32
_MOST_MIB = 1
_SECONDS_BETWEEN_LOOKS = 1.0
_DIGEST_CHARACTERS = 64
_HEX = frozenset("0123456789abcdef")

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Token:
    """Whom a token was given to, its SHA-256 (hex), what it may be used for, and on which catalog.

    The empty tenant is the home's own catalog.
    """

    name: str
    sha256: str
    roles: frozenset[Role]
    tenant: str = ""


class TokenFile:
    """The tokens of a file, read again when the file changes. Belongs to one event loop.

    A new version that cannot be used leaves the old tokens in place and is logged.
    """

    def __init__(self, path: Path, max_tenants: int = DEFAULT_MAX_TENANTS) -> None:
        """Raises InvalidInputError: the file cannot be used."""
        self._path = path
        self._max_tenants = max_tenants
        self._stamp = _stamp(path)
        self._tokens = read_tokens(path, max_tenants)
        self._looked = time.monotonic()

    def tenants(self) -> frozenset[str]:
        """The tenants that tokens name."""
        self._look()
        return tenants_of(self._tokens)

    def check(self, role: Role, metadata: Iterable[tuple[str, str | bytes]]) -> Token:
        """Let a call pass whose metadata bears a token with `role`; returns the token.

        Raises:
            UnauthenticatedError: there is no token, or none that is known.
            ForbiddenError: the token lacks the role.
        """
        self._look()
        token = self._tokens.get(_digest(_bearer_token(metadata)))
        if token is None:
            raise UnauthenticatedError(
                _HEADER, "an unknown token", "send one that the server's token file lists"
            )
        if role not in token.roles:
            raise ForbiddenError(
                _HEADER, f"the token of {token.name}", f"it needs the role {role.value!r}"
            )
        return token

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < _SECONDS_BETWEEN_LOOKS:
            return
        self._looked = now
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._tokens = read_tokens(self._path, self._max_tenants)
        except InvalidInputError as error:
            _log.error("the old tokens stay", problem=str(error))
        else:
            _log.info("tokens read again", tokens=len(self._tokens))


def new_token(
    name: str, roles: Iterable[Role], tenant: str | None = None
) -> tuple[str, dict[str, object]]:
    """A new secret token, and its entry for a file of tokens.

    Without a `tenant` it is for the home's own catalog.

    Raises:
        InvalidInputError: the entry could not be used.
    """
    secret = _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    entry: dict[str, object] = {
        "name": name,
        "sha256": _digest(secret),
        "roles": sorted({role.value for role in roles}),
    }
    if tenant is not None:
        entry["tenant"] = tenant
    _token("token", entry)
    return secret, entry


def tenants_of(tokens: Mapping[str, Token]) -> frozenset[str]:
    """The tenants of tokens; the home's own catalog is none."""
    return frozenset(token.tenant for token in tokens.values() if token.tenant)


def read_tokens(path: Path, max_tenants: int = DEFAULT_MAX_TENANTS) -> dict[str, Token]:
    """The tokens of a YAML file, by digest.

    Raises:
        InvalidInputError: it cannot be read, has an entry that cannot be used, or names more than
            `max_tenants` tenants.
    """
    document = read_yaml(path, _MOST_MIB)
    entries = document.get("tokens") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise InvalidInputError(
            f"{path}", "no list 'tokens'", "list the tokens under the key 'tokens'"
        )
    tokens: dict[str, Token] = {}
    names: set[str] = set()
    for number, entry in enumerate(entries, start=1):
        token = _token(f"{path}: token {number}", entry)
        if token.sha256 in tokens or token.name in names:
            raise InvalidInputError(
                f"{path}: token {number}", token.name, "list every name and every token once"
            )
        names.add(token.name)
        tokens[token.sha256] = token
    found = len(tenants_of(tokens))
    if found > max_tenants:
        raise InvalidInputError(
            f"{path}", f"{found} tenants", f"name at most {max_tenants}, or raise --max-tenants"
        )
    return tokens


def _token(where: str, entry: object) -> Token:
    if not isinstance(entry, dict) or set(entry) - {"tenant"} != {"name", "sha256", "roles"}:
        raise InvalidInputError(
            where, "other keys", "give 'name', 'sha256' and 'roles', and 'tenant' for a tenant's"
        )
    name, digest, roles = entry["name"], entry["sha256"], entry["roles"]
    if not isinstance(name, str) or not name:
        raise InvalidInputError(f"{where}, name", repr(name), "say whom the token is for")
    if not isinstance(digest, str) or len(digest) != _DIGEST_CHARACTERS or set(digest) - _HEX:
        # What stands here may be the token itself: it is not repeated.
        raise InvalidInputError(
            f"{where}, sha256", "no digest", "give 64 hexadecimal digits, see `promptyard token`"
        )
    known = {role.value: role for role in Role}
    if (
        not isinstance(roles, list)
        or not roles
        or not all(isinstance(role, str) and role in known for role in roles)
    ):
        raise InvalidInputError(
            f"{where}, roles", roles, f"give a list of some of {', '.join(known)}"
        )
    tenant = check_tenant(entry["tenant"], f"{where}, tenant") if "tenant" in entry else ""
    return Token(name, digest, frozenset(known[role] for role in roles), tenant)


def _bearer_token(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    values = [value for key, value in metadata if key == _HEADER]
    if len(values) != 1:
        found = "missing" if not values else f"{len(values)} of them"
        raise UnauthenticatedError(
            _HEADER, found, "send the metadata 'authorization: Bearer TOKEN'"
        )
    value = values[0] if isinstance(values[0], str) else values[0].decode(errors="replace")
    if not value.lower().startswith(_SCHEME):
        raise UnauthenticatedError(
            _HEADER, "another scheme", "send the metadata 'authorization: Bearer TOKEN'"
        )
    return value[len(_SCHEME) :].strip()


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes whenever a file is written or replaced; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_ino, found.st_size, found.st_mtime_ns)
