"""What many tests share: the real encoder, a folder for other users, a process to fork."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import settings
from threadpoolctl import threadpool_limits

from router.backends.onnx_encoder import OnnxMiniLM
from tests.catalogs import new_workshop
from tests.forks import ForkServer
from trainer.workshop import Workshop

# The machine may be busy, and a slow example is no failure. The same examples every time, so that
# a commit passes or does not; the other profiles draw new ones.
settings.register_profile("promptyard", deadline=None, print_blob=True, derandomize=True)
settings.register_profile("random", deadline=None, print_blob=True)
settings.register_profile(
    "fuzz",
    deadline=None,
    print_blob=True,
    max_examples=int(os.environ.get("PROMPTYARD_FUZZ_EXAMPLES", "20000")),
)
settings.load_profile("promptyard")

# A name that is not on the hub must not cost a test a minute; libraries draw no bars.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Messages name temporary files, whose paths may be long: a line must hold them.
os.environ["COLUMNS"] = "200"


@pytest.fixture(scope="session", autouse=True)
def _one_thread_for_linear_algebra() -> Iterator[None]:
    """OpenBLAS's threads wait for each other spinning: on a busy machine that costs minutes."""
    with threadpool_limits(1, user_api="blas"):
        yield


@pytest.fixture(autouse=True)
def _log_as_if_nothing_were_configured() -> Iterator[None]:
    """The commands choose where the log goes and what is left out, for the whole process."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where a home may be made."""
    return tmp_path / "home"


@pytest.fixture
def workshop(home: Path) -> Iterator[Workshop]:
    """A workshop with the small encoder, in a new home."""
    with new_workshop(home) as workshop:
        yield workshop


@pytest.fixture(scope="session")
def encoder() -> OnnxMiniLM:
    """The embedded encoder as it is served: int8."""
    return OnnxMiniLM()


@pytest.fixture(scope="session")
def float_encoder() -> OnnxMiniLM:
    """The embedded encoder in float32."""
    return OnnxMiniLM("float32")


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    """Runs functions of `tests.victims` in processes of their own, as any user, to be killed."""
    with ForkServer() as server:
        yield server


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user of the machine can read (pytest's own is closed to others)."""
    folder = Path(tempfile.mkdtemp(prefix="promptyard-test-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
