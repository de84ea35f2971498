"""What is known of likelihood-ratio estimators: boundaries, bounds, and laws in closed form."""
