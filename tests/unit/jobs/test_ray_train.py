"""The network interface by which workers on several hosts find each other."""

from __future__ import annotations

import json
import subprocess

import pytest

from jobs.ray_train import interface_of


def _addresses() -> list[tuple[str, str]]:
    """Pairs of interface and address on this machine, as ``ip`` lists them."""
    try:
        listed = subprocess.run(["ip", "-j", "address"], capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("needs ip (Debian: iproute2)")
    return [
        (interface["ifname"], one["local"])
        for interface in json.loads(listed.stdout)
        for one in interface["addr_info"]
    ]


def test_every_address_has_its_interface() -> None:
    pairs = _addresses()
    assert pairs
    for interface, address in pairs:
        assert interface_of(address) == interface


def test_an_address_of_another_host_has_none() -> None:
    assert interface_of("203.0.113.7") is None
    assert interface_of("2001:db8::7") is None


@pytest.mark.parametrize("written", ["::1", "0:0:0:0:0:0:0:1"])
def test_an_address_is_known_however_it_is_written(written: str) -> None:
    if not any(address == "::1" for _, address in _addresses()):
        pytest.skip("this machine has no IPv6")
    assert interface_of(written) == "lo"
