"""The methods that informed routing is compared with. Nothing outside imports this package on the way to inference."""
