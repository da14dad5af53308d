"""The expert server: holds the weights of its experts only, computes routed rows, loads and drops while it serves."""
