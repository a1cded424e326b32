"""Who may reach the app, and what it lets them do."""

from __future__ import annotations

import pytest

from dora_diffusion.app.launch import Launch, is_address, is_loopback
from dora_diffusion.config import ConfigError


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("192.168.1.4", False), ("localhost.example.org", False)],
)  # fmt: skip
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_shared_app_offers_listed_models_only() -> None:
    shared = Launch(share=True, auth=("ann", "longenough"), models=("org/model",))
    assert shared.allows_model("org/model")
    assert shared.allows_model("embedded:tiny-sd")
    assert not shared.allows_model("/home/ann/private-model")
    assert Launch().allows_model("/home/ann/private-model")


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::", True), ("fe80::1%eth0", True), ("localhost", True),
     ("studio-2.example.org", True), ("300.1.1.1", False), ("1.2.3", False), ("1:2", False),
     ("http://localhost", False), ("two words", False), ("", False)],
)  # fmt: skip
def test_what_can_be_listened_on(host: str, expected: bool) -> None:
    assert is_address(host) is expected


def test_a_host_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"host is '300\.1\.1\.1'; it must be an address"):
        Launch(host="300.1.1.1", auth=("ann", "longenough"))
