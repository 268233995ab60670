"""What attention computes: functions of tensors, no modules, no models. `longlens.attention` is the entry point."""
