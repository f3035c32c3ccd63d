"""Prepare the process before Paddle is imported; paths of the data that tests share."""

from pathlib import Path

import pytest

from paddledsv4.host import prepare_host

prepare_host(bitwise=True)

import no_nan  # noqa: E402, F401  (for its effect: NaN passes in no comparison)

import tests.interpreted  # noqa: E402, F401  (before anything else imports triton)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """../shared with the full recordings; tests that need it are skipped in a clone without it."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("needs ../shared, the full recordings")
    return path
