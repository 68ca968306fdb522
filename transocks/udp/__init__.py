"""Transparent UDP: datagrams that TPROXY rules bring here go on through UDP associations with the upstream proxies."""
