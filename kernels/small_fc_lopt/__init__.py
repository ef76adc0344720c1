"""The fused update of `small_fc_lopt`."""
