"""What a tenant is: a name, and a catalog of its own in a folder of the home.

HOME/catalog.sqlite3, artifacts, heads              the home's own catalog, of the empty tenant
HOME/tenants/NAME/catalog.sqlite3, artifacts, ...   the catalog of a tenant
"""

from __future__ import annotations

import re
from pathlib import Path

from router.errors import InvalidInputError

TENANTS_FOLDER = "tenants"
MAX_TENANT_NAME_CHARACTERS = 40
# In lower case alone: some file systems find a folder by its name in any case.
_NAME = re.compile(rf"[a-z0-9][a-z0-9-]{{0,{MAX_TENANT_NAME_CHARACTERS - 1}}}")


def check_tenant(name: object, field: str = "tenant") -> str:
    """`name`, which may name a tenant and so a folder.

    Raises:
        InvalidInputError: it may not.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidInputError(
            field,
            repr(name),
            f"give a name of lower-case letters, digits and -, at most"
            f" {MAX_TENANT_NAME_CHARACTERS} characters",
        )
    return name


def tenant_home(home: Path, tenant: str) -> Path:
    """The folder of a tenant's catalog; that of the home's own one for the empty name.

    Raises:
        InvalidInputError: it is no name of a tenant.
    """
    return home / TENANTS_FOLDER / check_tenant(tenant) if tenant else home
