"""What the kernel does with a packet: asked of the kernel, for one packet at a time.

table.py     makes the kernel tell of some packets, and keeps those of ours on this host
events.py    what it tells, one message for each rule and chain                                (pure)
way.py       from these messages to where a packet got, and which rule did that
sockets.py   sockets as others on this host would have them
frames.py    packets as bytes                                                                  (pure)
inject.py    a packet that an interface receives, although nobody has sent it
links.py     interfaces, the networks on them, bridges
samples.py   first packets of what rules are for, sent or received, and their ways
names.py     what rules are called
fate.py      what became of a packet, in one word
shadows.py   what takes connections before our rules do: for verify
"""
