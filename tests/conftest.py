"""Prepare the process before Paddle is imported; paths of the data that tests share."""

from pathlib import Path

import pytest

from paddledsv4.host import prepare_host

prepare_host(bitwise=True)

import no_nan  # noqa: E402, F401  (for its effect: NaN passes in no comparison)

import tests.interpreted  # noqa: E402, F401  (before anything else imports triton)

ROOT = Path(__file__).resolve().parents[1]
LONG = {
    "test_ranks", "test_locate", "test_soak", "test_head_kernels", "test_align_launch", "test_bitwise", "test_loading",
    "test_failures", "test_finite_guard", "test_switches", "test_signals", "test_sft_launch", "test_packed_documents",
    "test_steps_keep_nothing", "test_first_steps", "test_bisect", "test_checkpoint_directory", "test_stopping",
    "test_guard", "test_train_launch", "test_planted_bugs",
}  # fmt: skip


def pytest_collection_modifyitems(items) -> None:
    """Files that take long come first, so that at the end no worker waits for another's."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="session")
def shared() -> Path:
    """../shared with the full recordings; tests that need it are skipped in a clone without it."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("needs ../shared, the full recordings")
    return path
