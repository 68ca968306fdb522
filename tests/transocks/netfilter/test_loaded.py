"""Which tools are asked for the rules: each rule is read once, whatever is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from transocks import tools as tools_module
from transocks.netfilter.loaded import loaded

NFT = '{"nftables": [{"table": {"family": "ip", "name": "nat"}}, {"chain": {"family": "ip", "table": "nat", "name": "c"}}]}'
SAVED = "*nat\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n"


@pytest.mark.parametrize(
    ("tools", "read"),
    [
        (["iptables-save"], ["iptables"]),
        (["iptables-save", "iptables-legacy-save"], ["iptables"]),
        (["iptables-save", "iptables-nft-save"], ["iptables"]),
        (["iptables-save", "iptables-nft-save", "iptables-legacy-save"], ["iptables"] * 2),
        (["nft"], ["nft"]),
        (["nft", "iptables-save", "iptables-nft-save"], ["iptables"]),
        # Somebody has made a table "nat" by nft.
        (["nft", "iptables-save", "iptables-legacy-save"], ["nft", "iptables"]),
    ],
)
def test_each_rule_is_read_once(
    tools: list[str], read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tool in tools:
        (tmp_path / tool).touch(0o755)
    (tmp_path / "ip_tables_names").write_text("nat\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tools_module, "SBIN", ())
    ruleset = loaded(lambda *argv: NFT if argv[0] == "nft" else SAVED, tmp_path)
    assert [chain.tool for chain in ruleset.chains] == read
