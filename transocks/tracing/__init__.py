"""What the kernel does with a packet, by its own report, for one packet at a time.

table.py     makes the kernel report some packets, and keeps ours on this host
events.py    its reports, one message for each rule and chain                                  (pure)
way.py       from these messages to where a packet went, and which rule did that
sockets.py   sockets as other users of this host would have them
frames.py    packets as bytes                                                                  (pure)
inject.py    makes an interface receive a packet that nobody sent
links.py     interfaces, the networks on them, bridges
samples.py   first packets of connections that rules select, sent or received
names.py     names of rules
fate.py      what happened to a packet, in one word
shadows.py   rules of others that take connections before ours: for verify
"""
