"""The firewall rules of iptables/: rendered for a purpose, applied, compared with what is live, and removed again.

`transocks exec` redirects the connections of one cgroup (`cgroups.py`) and group to one port for a time; `holder.py` is
the process that applies these rules, and removes them when its parent is gone. `transocks rules` applies those of
[rules] in the configuration:

    config.py    [rules], typed
    redirection.py  the same with everything looked up
    render.py    from the files in iptables/ to what the tools take                 (pure)
    live.py      what is loaded on this host, and how the tools write a text
    saved.py     output of iptables-save, and the changes between two of it         (pure)
    nft_json.py  JSON of nft                                                        (pure)
    loops.py     whether the proxies' own connections would come back
    known.py     enters existing connections in connection tracking
    cut.py       resets redirected connections before rules are removed
    lock.py      one change at a time
    change.py    applies, confirms, prolongs and removes
    watch.py     notices when tables are deleted
    guard.py     tables that nobody else can flush
    verify.py    compares what is loaded with what should be                        (pure)
    examine.py   the same on this host, with its listeners and routing
    routing.py   the kernel's route for one packet
    lint.py      parts of [rules] that could not be applied here
"""
