"""The firewall rules that are loaded on a host, read into one model, whoever has loaded them and by which tool.

    loaded.py     asks the tools
    nft_json.py   nft's JSON, also where nft spoils it                                                   (pure)
    nft.py        reads what nft says
    iptables.py   reads what iptables-save says
    ruleset.py    the model: chains of rules, of conditions that hold, do not hold, or can't be told     (pure)
    walk.py       what one packet meets in it, and what a hooked chain may do to any                     (pure)

The doctor walks packets through it; `transocks rules verify` asks it who takes connections before our rules do.
"""
