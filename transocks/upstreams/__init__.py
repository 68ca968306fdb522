"""The upstream proxies: their groups, their health, and requests to them."""
