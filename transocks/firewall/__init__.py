"""The firewall rules of iptables/: rendered for a purpose, applied, and removed again.

Now for `transocks exec` only: one group's connections to one port. `holder.py` is the process that applies rules and
takes them away when whoever asked for them is gone.
"""

from transocks.firewall.apply import FirewallError, apply, remove
from transocks.firewall.render import RuleSet, Step, Tool, choose_tool, render

__all__ = ["FirewallError", "RuleSet", "Step", "Tool", "apply", "choose_tool", "remove", "render"]
