"""The method: routers, decision rules, forecasters, the routed unit, and every number of sparsity and cost."""
