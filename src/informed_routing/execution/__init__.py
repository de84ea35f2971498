"""How a routed unit is computed: back ends of torch, and the native engines."""
