"""Building of network, objective, optimizer and initial weights from the options."""
