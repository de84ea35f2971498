"""The native CPU engine: a routed decoder in one C++ call per forward, compiled for this machine on first use."""
