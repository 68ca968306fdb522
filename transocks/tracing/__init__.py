"""Traces one packet at a time through the kernel, by the kernel's own reports.

samples.py   first packets of connections that rules select: sent or received, and their results
tracer.py    makes the kernel report some packets, and keeps ours on this host
reports.py   its reports, one message for each rule and chain                                  (pure)
trace.py     the trace of a packet, made of reports: where it went, and why                     (pure)
fate.py      the result for the rules of transocks; for verify, rules that take connections before ours
names.py     rules as their tools print them
packets.py   packets as bytes, and an interface that receives one
sockets.py   sockets as other users of this host would have them
links.py     interfaces, the networks on them, bridges, routes
"""
