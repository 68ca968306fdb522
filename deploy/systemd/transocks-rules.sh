#!/bin/sh
# transocks-rules.sh redirect | stop | early | remove: what transocks-rules.service and transocks-rules-early.service
# run. Goes to /usr/local/lib/transocks/.
#
# RULES   the rule file: iptables/host.nft or gateway.nft, edited at will
# POLICY  what becomes of the connections that the rules select, while transocks is not there to take them:
#         open    they go out directly, as if there were no rules
#         closed  they are refused at once, with a TCP reset
#
# Each change is one nft transaction, in which the table takes the place of what it was before: no moment without, no
# rule twice, and connections that are there stay as they are.
set -eu

# With the last rule that needs them, the kernel ends connection tracking and translation in a network namespace, and
# connections that were redirected hang: just when transocks wants to let them come to their end. So one stays, of no
# effect.
redirect() {
    nft 'table inet transocks_nat { chain stays { type nat hook output priority -90; }; }
        flush chain inet transocks_nat stays
        add rule inet transocks_nat stays ct state new accept'
    nft -f "$RULES"
}

# What stands in the file before the table's block, "table T" and "delete table T", is a transaction of its own that
# removes the table and does not mind when there is none.
remove() {
    sed '/{$/,$d' "$RULES" | nft -f -
}

remove_all() {
    remove
    nft 'table inet transocks_nat; delete table inet transocks_nat'
}

# The same table with the same exemptions, where TCP is reset instead of redirected. A reset is a filter, which sees every
# packet of a connection and so has to ask for the first one, also where a file of old does not.
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

# One change at a time, and not in the middle of one by `transocks rules`. Without the file nobody has made any.
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
