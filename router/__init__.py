"""The router process: attention, gate, KV cache, batching, sampling, and the dispatch of routed tokens."""
