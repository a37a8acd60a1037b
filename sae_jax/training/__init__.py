"""Training: the optimiser, the knob's schedule, the step."""
