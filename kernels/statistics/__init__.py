"""Means and variances of tensors, gradients and running averages."""
