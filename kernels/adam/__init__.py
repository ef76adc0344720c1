"""Adam's update and its relatives."""
