"""Training: the three stages that turn a dense model into a routed one, and the calibration of its thresholds."""
