"""The firewall rules of iptables/: rendered for a purpose, applied, compared with what is live, and removed again.

    config.py       [rules], typed
    redirection.py  the same with everything looked up
    render.py       text for the tools, from the files in iptables/                        (pure)
    loaded.py       what the tools print of rules: one model, compared and replaced        (pure)
    live.py         what is loaded on this host, and who listens
    routing.py      the routing that TPROXY needs
    loops.py        whether the proxies' own connections would come back
    conntrack.py    enters existing connections in connection tracking
    change.py       applies, confirms, prolongs and removes
    guard.py        tables that nobody else can flush, and news of tables that are deleted
    verify.py       compares this host with what should be
    lint.py         parts of [rules] that could not be applied here

Programs are run by transocks/tools.py, which also makes one change wait for another.
"""
