"""The firewall rules of iptables/: rendered for a purpose, applied, compared with what is live, and removed again.

`transocks exec` has the connections of one cgroup (`cgroups.py`) and group redirected to one port for a time:
`holder.py` is the process that applies these rules and takes them away when whoever asked for them is gone. `transocks
rules` has what [rules] of the configuration says:

    config.py    [rules], typed
    wanted.py    the same with everything looked up
    render.py    from the files in iptables/ to what the tools take                 (pure)
    cgroups.py   a cgroup for one command
    saved.py     what iptables-save prints, and the changes between two of it       (pure)
    live.py      what is loaded on this host, and what the tools make of a text
    loops.py     whether the proxies' own connections would come back
    known.py     makes connections of before known to connection tracking
    cut.py       resets the clients of rules that are to go
    lock.py      one change at a time
    change.py    applies, confirms, prolongs and removes
    watch.py     hears when tables are deleted
    guard.py     tables that nobody else can flush
    verify.py    compares what is loaded with what should be                        (pure)
    foreign.py   which rules of others take connections before ours                 (pure)
"""
