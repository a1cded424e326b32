"""Access to the app, and what it lets people do."""

from __future__ import annotations

import socket

import pytest

from dora_diffusion.studio.app.launch import Launch, is_address, is_loopback
from tests.refusal import refused


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("192.168.1.4", False), ("localhost.example.org", False)],
)  # fmt: skip
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_shared_app_offers_listed_models_only() -> None:
    shared = Launch(share=True, auth="ann:longenough", models=("org/model",))
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
    with refused("host", "'300.1.1.1'"):
        Launch(host="300.1.1.1", auth="ann:longenough")


AUTH = "ann:longenough"


@pytest.mark.parametrize(
    ("launch", "host", "expected"),
    [
        (Launch(), "localhost", True), (Launch(), "127.0.0.1:7861", True),
        (Launch(), "[::1]:7860", True), (Launch(), "192.168.1.4", False),
        (Launch(), "evil.example", False), (Launch(), "", False),
        (Launch(), "a b", False),
        # A page cannot make a number mean another machine, so all of this machine's will do.
        (Launch(host="0.0.0.0", auth=AUTH), "192.168.1.4:7860", True),
        (Launch(host="::", auth=AUTH), "[fe80::1]:7860", True),
        (Launch(host="0.0.0.0", auth=AUTH), f"{socket.gethostname()}:7860", True),
        (Launch(host="0.0.0.0", auth=AUTH), f"{socket.gethostname()}.local:7860", True),
        (Launch(host="0.0.0.0", auth=AUTH), "evil.example", False),
        (Launch(host="box.example", auth=AUTH), "box.example:7860", True),
        (Launch(host="box.example", auth=AUTH), "evil.example", False),
        (Launch(allowed_hosts=("Studio.example",), auth=AUTH), "studio.example.", True),
        (Launch(allowed_hosts=("studio.example",), auth=AUTH), "a.studio.example", False),
    ],
)  # fmt: skip
def test_the_names_that_it_answers_to(launch: Launch, host: str, expected: bool) -> None:
    assert (launch.refusal({"host": [host]}) == "") is expected


@pytest.mark.parametrize(
    ("host", "origin", "expected"),
    [
        ("localhost:7860", "http://localhost:7860", True),
        ("localhost", "http://localhost", True), ("localhost", "http://localhost:80", True),
        ("localhost:7860", "http://localhost:8888", False),
        ("localhost:7860", "http://127.0.0.1:7860", False),
        ("studio.example", "https://studio.example", True),
        # What a proxy is called that says its own name to the app.
        ("127.0.0.1:7860", "https://studio.example", True),
        ("127.0.0.1:7860", "https://studio.example:8443", True),
        ("127.0.0.1:7860", "https://evil.example", False),
        ("127.0.0.1:7860", "null", False),
    ],
)  # fmt: skip
def test_the_pages_whose_requests_it_takes(host: str, origin: str, expected: bool) -> None:
    launch = Launch(allowed_hosts=("studio.example",), auth=AUTH)
    assert (launch.refusal({"host": [host], "origin": [origin]}) == "") is expected


def test_every_host_of_a_request_counts() -> None:
    assert Launch().refusal({"host": ["localhost", "evil.example"]})
    assert Launch().refusal({})


@pytest.mark.parametrize("name", ["https://studio.example", "studio.example:443", "*", ""])
def test_an_allowed_host_is_a_name(name: str) -> None:
    with refused("allowed_hosts"):
        Launch(allowed_hosts=(name,), auth=AUTH)


def test_who_is_behind_a_proxy_needs_a_password() -> None:
    with refused("auth", "--allowed_host studio.example lets others reach"):
        Launch(allowed_hosts=("studio.example",))
    assert Launch(allowed_hosts=("studio.example",), auth=AUTH).is_open
    assert not Launch(allowed_hosts=("localhost",)).is_open
