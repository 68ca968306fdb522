#!/bin/sh
# transocks-rules.sh redirect | stop | early | remove: loads and removes the redirect rules, for transocks-rules.service
# and transocks-rules-early.service. Install it in /usr/local/lib/transocks/.
#
# RULES   the rule file: iptables/host.nft or gateway.nft, with your changes
# POLICY  while transocks does not accept, connections that the rules select
#         open    go out directly, as if there were no rules
#         closed  are refused at once, with a TCP reset
#
# Each change is one nft transaction that replaces the table: there is no moment without rules, no rule is loaded twice,
# and existing connections are not affected.
set -eu

# When the last rule that needs connection tracking and NAT is removed, the kernel stops both in this network namespace,
# and redirected connections hang, just when transocks lets them finish. So one rule stays, without effect.
redirect() {
    nft 'table inet transocks_nat { chain stays { type nat hook output priority -90; }; }
        flush chain inet transocks_nat stays
        add rule inet transocks_nat stays ct state new accept'
    nft -f "$RULES"
}

# The lines of the file before the table's block, "table T" and "delete table T", are a transaction that removes the
# table, if it exists.
remove() {
    sed '/{$/,$d' "$RULES" | nft -f -
}

remove_all() {
    remove
    nft 'table inet transocks_nat; delete table inet transocks_nat'
}

# The same table with the same exemptions, but TCP is reset instead of redirected. That is a filter, which sees every
# packet of a connection, so it must match first segments only, even if the rule file does not.
refuse() {
    refusing=$(sed -e 's/type nat hook output priority [^;]*/type filter hook output priority -10/' \
        -e 's/type nat hook prerouting priority [^;]*/type filter hook forward priority -10/' \
        -e 's/meta l4proto tcp redirect to .*/tcp flags \& (syn|ack|rst|fin) == syn reject with tcp reset/' "$RULES")
    case $refusing in
    *"syn reject with tcp reset"*) printf '%s\n' "$refusing" | nft -f - ;;
    *) echo "RULES: $RULES: found no 'meta l4proto tcp redirect to' to refuse instead" >&2; return 1 ;;
    esac
}

[ -r "$RULES" ] || { echo "RULES: $RULES can't be read" >&2; exit 1; }
case $POLICY in
open | closed) ;;
*) echo "POLICY: $POLICY: expected open or closed" >&2; exit 1 ;;
esac

# Not at the same time as another change, by this script or by `transocks rules`. Without the file there was no other.
lock=/run/transocks-rules.lock
if [ -r "$lock" ]; then
    exec 9<"$lock"
    flock -w 30 9 || { echo "$lock: another change of the rules has been at work for 30 s" >&2; exit 1; }
fi

case $1-$POLICY in
redirect-*) redirect ;;
stop-open) remove ;;
stop-closed | early-closed) refuse ;;
early-open) ;;
remove-*) remove_all ;;
*) echo "usage: transocks-rules.sh redirect | stop | early | remove" >&2; exit 2 ;;
esac
