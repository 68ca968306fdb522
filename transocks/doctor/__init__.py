"""What is wrong on this host, between the firewall and the upstream."""
