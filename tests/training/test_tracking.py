"""W&B without a key or a network, and the user's own mode."""

from __future__ import annotations

import logging
import os
import types

import pytest

from cfe_lightning.training import (
    tracking,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*in eval mode at the start.*", "ignore:.*LeafSpec.*")


@pytest.mark.parametrize("mode", [None, "online"])
@pytest.mark.parametrize(
    ("has_key", "reachable", "reason"),
    [(False, True, "no API key is configured"), (True, False, "cannot be reached"), (True, True, None)],
)
def test_wandb_without_key_or_network_is_offline_and_says_so_once(
    has_key: bool,
    reachable: bool,
    reason: str | None,
    mode: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE")
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_SILENT", "false")
    monkeypatch.delenv("WANDB_SILENT")
    settings = types.SimpleNamespace(base_url="https://wandb.invalid")
    monkeypatch.setattr(wandb, "setup", lambda: types.SimpleNamespace(settings=settings))
    monkeypatch.setattr(wandb, "teardown", lambda: None)
    monkeypatch.setattr(wandb, "login", lambda **_: has_key)
    monkeypatch.setattr(tracking, "_reachable", lambda host: reachable)
    with caplog.at_level(logging.WARNING, logger="cfe_lightning"):
        assert tracking.wandb_must_be_offline() == (reason is not None)
    assert len(caplog.messages) == (reason is not None)
    # W&B itself would say the same again.
    assert ("WANDB_SILENT" in os.environ) == (reason is not None)
    assert reason is None or reason in caplog.messages[0]


@pytest.mark.parametrize("mode", ["offline", "disabled", "shared"])
def test_the_users_wandb_mode_is_respected(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    assert not tracking.wandb_must_be_offline()


def test_a_host_that_does_not_exist_is_not_reachable() -> None:
    assert not tracking._reachable("http://127.0.0.1:9")
