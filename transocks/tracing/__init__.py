"""What the kernel does with a packet, by its own report, for one packet at a time.

samples.py   first packets of connections that rules select: sent or received, and what became of them
tracer.py    makes the kernel report some packets, and keeps ours on this host
reports.py    its reports, one message for each rule and chain                                  (pure)
trace.py     the trace of a packet, made of them: where it went, and what did that           (pure)
fate.py      what that means for the rules of transocks; for verify, what takes connections before they do
names.py     rules as their tools print them
packets.py   packets as bytes, and an interface that receives one
sockets.py   sockets as other users of this host would have them
links.py     interfaces, the networks on them, bridges, routes
"""
