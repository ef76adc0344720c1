"""The element-wise MLP over the columns of every parameter."""
