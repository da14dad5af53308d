"""Load generator, fault bench and kernel bench. Run by hand; nothing here is imported by a server."""
