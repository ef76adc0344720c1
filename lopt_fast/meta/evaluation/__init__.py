"""What a learned optimizer is worth: training runs beside tuned baselines (docs/evaluation.md)."""
