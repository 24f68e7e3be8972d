"""The theory: functions of (schedule, tensors, t), in NumPy and torch, without a model and without I/O."""
